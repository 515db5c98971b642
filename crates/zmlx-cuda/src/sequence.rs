//! A sequence that is decoded on the GPU, or a batch of equally long ones: its caches, and the captured graph of a step, a
//! token of each.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::decoder::Decoder;
use crate::error::{CudaError, Result};
use crate::kernels::{Arg, MOMENTS};
use crate::memory::{DeviceBuffer, External, Ring, Rows, copy_rows};
use crate::module::Function;
use crate::plan::{CONTROL_BYTES, CacheType, Control, MOST_SEQUENCES, Plan, RING, SlotAddress, Step};
use crate::slots::DeviceSlot;
use crate::stream::{Event, Graph, Stream};

/// Positions by which caches grow at least.
const STEP: usize = 1024;

/// Steps that may be submitted and not yet read.
const AHEAD: usize = 2;

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// Keys.
    Keys,
    /// Values.
    Values,
}

/// Keys or values in the memory of the GPU: `heads` times `pitch` bytes, a position each `row` bytes, from position 0 on; the
/// heads of a sequence follow those of the one before it.
#[derive(Debug, Clone, Copy)]
pub struct CachePart {
    /// Where they begin.
    pub address: u64,
    /// Key/value heads of all sequences.
    pub heads: usize,
    /// Bytes from one head to the next.
    pub pitch: usize,
    /// Bytes of a position.
    pub row: usize,
}

/// A sequence, or several of the same length that go on together. Everything it is asked to do goes onto its stream, in
/// order.
#[derive(Debug)]
pub struct Sequence {
    decoder: Arc<Decoder>,
    stream: Arc<Stream>,
    /// How many sequences.
    sequences: usize,
    slots: Vec<DeviceSlot>,
    /// Positions that caches have room for.
    capacity: usize,
    /// Activations, in the order in which translation asks for them.
    room: Vec<DeviceBuffer>,
    /// Tokens, position, count.
    control: DeviceBuffer,
    ring: Ring,
    plan: Plan,
    functions: Vec<Arc<Function>>,
    graph: Option<Graph>,
    /// Whether the plan is one of the memory that there is.
    planned: bool,
    /// Where the next tokens stand.
    position: usize,
    /// How many steps the GPU was asked for.
    submitted: usize,
    /// A mark after each that has not been read.
    pending: VecDeque<Event>,
    /// Marks to use again.
    marks: Vec<Event>,
}

impl Sequence {
    /// So many empty sequences with room for `positions` positions.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for none or more than [`MOST_SEQUENCES`], [`CudaError::OutOfMemory`]; those of translation,
    /// which [`Decoder::takes`] foresees, and of compiling.
    pub fn new(decoder: &Arc<Decoder>, sequences: usize, positions: usize) -> Result<Self> {
        if !(1..=MOST_SEQUENCES).contains(&sequences) {
            let message = format!("{sequences} sequences together; 1 to {MOST_SEQUENCES} can be");
            return Err(CudaError::Argument(message));
        }
        let device = decoder.device();
        let capacity = positions.max(1).next_multiple_of(STEP);
        let slots = decoder.parts.slots.iter().map(|s| DeviceSlot::new(decoder, s, [sequences, capacity]));
        let slots = slots.collect::<Result<Vec<_>>>()?;
        let control = DeviceBuffer::new(device, CONTROL_BYTES, "tokens and position")?;
        let ring = Ring::new(device, Control::ring_words(sequences))?;
        let mut room = Vec::new();
        let sizes = [sequences, capacity];
        let plan = plan(decoder, &slots, (&control, &ring), sizes, &mut room)?;
        let functions = decoder.functions(&plan.steps)?;
        let stream = Stream::new(device)?;
        Ok(Self {
            decoder: Arc::clone(decoder),
            stream,
            sequences,
            slots,
            capacity,
            room,
            control,
            ring,
            plan,
            functions,
            graph: None,
            planned: true,
            position: 0,
            submitted: 0,
            pending: VecDeque::new(),
            marks: Vec::new(),
        })
    }

    /// The same once more, with caches of its own.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn duplicate(&self) -> Result<Self> {
        self.stream.synchronize()?;
        let mut other = Self::new(&self.decoder, self.sequences, self.capacity)?;
        for (from, to) in self.slots.iter().zip(&other.slots) {
            to.copy_from(&other.stream, from, [self.capacity, other.capacity])?;
        }
        other.stream.synchronize()?;
        other.position = self.position;
        Ok(other)
    }

    /// The model it is of.
    pub fn decoder(&self) -> &Arc<Decoder> {
        &self.decoder
    }

    /// How many sequences go on together.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// Where the next tokens stand.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Launches of a step.
    pub fn launches(&self) -> usize {
        self.plan.steps.len()
    }

    /// What a step takes.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Makes room for `positions` positions. Caches that move are copied, and the graph is captured anew.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn reserve(&mut self, positions: usize) -> Result<()> {
        if positions <= self.capacity {
            return Ok(());
        }
        // Doubling keeps the copying linear in the length.
        let capacity = positions.max(2 * self.capacity).next_multiple_of(STEP);
        self.stream.synchronize()?;
        let mut grown = Vec::new();
        for (slot, template) in self.slots.iter().zip(&self.decoder.parts.slots) {
            let larger = DeviceSlot::new(&self.decoder, template, [self.sequences, capacity])?;
            larger.copy_from(&self.stream, slot, [self.capacity, capacity])?;
            grown.push(larger);
        }
        self.stream.synchronize()?;
        (self.slots, self.capacity) = (grown, capacity);
        self.replan()
    }

    /// Plans a step anew. Until that succeeds nothing can be submitted: what was planned names memory that is gone.
    fn replan(&mut self) -> Result<()> {
        (self.planned, self.graph) = (false, None);
        let control = (&self.control, &self.ring);
        let sizes = [self.sequences, self.capacity];
        self.plan = plan(&self.decoder, &self.slots, control, sizes, &mut self.room)?;
        self.functions = self.decoder.functions(&self.plan.steps)?;
        self.planned = true;
        Ok(())
    }

    /// Makes ready for one more position.
    fn ready(&mut self) -> Result<()> {
        self.reserve(self.position + 1)?;
        if self.planned { Ok(()) } else { self.replan() }
    }

    /// Says what comes next: a token of each sequence, at `position`. What was submitted and not read is forgotten.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for another number of tokens; [`CudaError::Driver`].
    pub fn set(&mut self, tokens: &[u32], position: usize) -> Result<()> {
        if tokens.len() != self.sequences {
            let message =
                format!("{} tokens for {} sequences; give one of each", tokens.len(), self.sequences);
            return Err(CudaError::Argument(message));
        }
        self.marks.extend(self.pending.drain(..));
        self.submitted = 0;
        self.position = position;
        let place = u32::try_from(position);
        let place = place.map_err(|_| CudaError::Argument(format!("position {position}: beyond 32 bits")))?;
        self.control.write(&self.stream, &Control::words(tokens, place))
    }

    /// Has the GPU go on by a token of each sequence: those that [`Self::set`] gave, or those it has chosen last. Returns at
    /// once.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] where caches must grow; [`CudaError::Argument`] if too many are not read yet.
    pub fn submit(&mut self) -> Result<()> {
        if self.pending.len() >= AHEAD {
            return Err(CudaError::Argument(format!("{AHEAD} steps are submitted and not read")));
        }
        self.ready()?;
        if self.graph.is_none() {
            self.graph = Some(self.capture(&self.plan.steps, &self.functions)?);
        }
        if let Some(graph) = &mut self.graph {
            // SAFETY: all memory that it names is the sequence's, the decoder's, or kept by the decoder.
            unsafe { graph.replay() }?;
        }
        let mark = match self.marks.pop() {
            Some(mark) => mark,
            None => Event::new(self.decoder.device(), false)?,
        };
        mark.record(&self.stream)?;
        self.pending.push_back(mark);
        self.position += 1;
        self.submitted += 1;
        Ok(())
    }

    /// The tokens, one of each sequence, chosen in the earliest step that is submitted and not read; waits for it.
    ///
    /// # Errors
    /// [`CudaError::Argument`] if there is none; [`CudaError::Driver`] if its work failed.
    pub fn read(&mut self) -> Result<Vec<u32>> {
        let number = self.submitted - self.pending.len();
        let mark = self.pending.pop_front();
        let mark = mark.ok_or_else(|| CudaError::Argument("no step is submitted".to_owned()))?;
        mark.wait()?;
        self.marks.push(mark);
        let first = number % RING * self.sequences;
        Ok((first..first + self.sequences).map(|at| self.ring.word(at)).collect())
    }

    /// Waits for all that is submitted, and gives the address of the last step's logits `[sequences, vocabulary]`, float32.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn logits(&mut self) -> Result<u64> {
        self.stream.synchronize()?;
        Ok(self.plan.logits)
    }

    /// The last step's logits `[sequences, vocabulary]`, on the host.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn read_logits(&mut self) -> Result<Vec<f32>> {
        let count = self.sequences * self.decoder.vocabulary();
        let logits = self.room.iter().find(|b| b.address() == self.plan.logits);
        let logits = logits.ok_or_else(|| CudaError::Argument("the logits have no buffer".to_owned()))?;
        let mut bytes = vec![0; count * size_of::<f32>()];
        logits.read(&self.stream, &mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    /// Seconds of each launch of one step, which is submitted launch by launch, a mark after each. The step counts as
    /// submitted and read.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub fn submit_timed(&mut self) -> Result<Vec<f64>> {
        self.ready()?;
        let device = self.decoder.device();
        let count = self.plan.steps.len();
        let marks = (0..=count).map(|_| Event::new(device, true)).collect::<Result<Vec<_>>>()?;
        marks[0].record(&self.stream)?;
        for ((step, function), mark) in self.plan.steps.iter().zip(&self.functions).zip(&marks[1..]) {
            // SAFETY: as in `submit`.
            unsafe { self.stream.launch(function, &step.launch, false) }?;
            mark.record(&self.stream)?;
        }
        self.stream.synchronize()?;
        self.position += 1;
        self.submitted += 1;
        marks.windows(2).map(|pair| pair[1].seconds_since(&pair[0])).collect()
    }

    /// The moments of each launch of one step, which runs as [`Self::submit`] runs it but for the noting: nanoseconds since
    /// the first, the earliest and the latest of all blocks. The step counts as submitted and read.
    ///
    /// # Errors
    /// As [`Self::submit`].
    pub fn submit_noted(&mut self) -> Result<Vec<[[u64; 2]; MOMENTS]>> {
        self.ready()?;
        let mut steps = self.plan.steps.clone();
        let mut words = 0;
        let mut parts = Vec::new();
        for step in &steps {
            let count = MOMENTS * step.launch.blocks();
            parts.push(words..words + count);
            words += count;
        }
        let notes = DeviceBuffer::new(self.decoder.device(), words * size_of::<u64>(), "a timeline")?;
        for (step, part) in steps.iter_mut().zip(&parts) {
            step.source = step.source.with_timeline();
            step.launch.args.push(Arg::Ptr(notes.address() + (part.start * size_of::<u64>()) as u64));
        }
        let functions = self.decoder.functions(&steps)?;
        let mut graph = self.capture(&steps, &functions)?;
        // SAFETY: as in `submit`; the notes outlive the work, which is waited for.
        unsafe { graph.replay() }?;
        let mut bytes = vec![0; words * size_of::<u64>()];
        notes.read(&self.stream, &mut bytes)?;
        self.position += 1;
        self.submitted += 1;
        let noted: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        let first = noted.iter().copied().filter(|&t| t > 0).min().unwrap_or(0);
        let of_launch = |part: &std::ops::Range<usize>| {
            std::array::from_fn(|moment| {
                let all = noted[part.clone()].iter().skip(moment).step_by(MOMENTS);
                let since = all.filter(|&&t| t > 0).map(|t| t - first);
                let (least, most) = (since.clone().min(), since.max());
                [least.unwrap_or(0), most.unwrap_or(0)]
            })
        };
        Ok(parts.iter().map(of_launch).collect())
    }

    /// Registers a thread and bytes that did not fit into them, of each launch's kernel.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn registers(&self) -> Result<Vec<(i32, i32)>> {
        self.functions.iter().map(|f| f.registers()).collect()
    }

    fn capture(&self, steps: &[Step], functions: &[Arc<Function>]) -> Result<Graph> {
        let overlap = self.decoder.parts.overlap;
        self.stream.capture(|| {
            for (index, (step, function)) in steps.iter().zip(functions).enumerate() {
                // The first waits for the replay before it, which it does not know.
                // SAFETY: as in `submit`; nothing runs now.
                unsafe { self.stream.launch(function, &step.launch, overlap && index > 0) }?;
            }
            Ok(())
        })
    }

    /// Where the keys or values of a slot are, with the stream's work done.
    ///
    /// # Errors
    /// [`CudaError::Argument`] if the slot holds none.
    pub fn cache_part(&self, slot: usize, half: Half) -> Result<CachePart> {
        self.stream.synchronize()?;
        match self.slots.get(slot) {
            Some(DeviceSlot::Kv { keys, values, heads, widths, kind }) => {
                let (buffer, width) =
                    if half == Half::Keys { (keys, widths[0]) } else { (values, widths[1]) };
                let row = width * kind.bytes();
                Ok(CachePart { address: buffer.address(), heads: *heads, pitch: self.capacity * row, row })
            }
            _ => Err(CudaError::Argument(format!("slot {slot} holds no keys and values"))),
        }
    }

    /// How keys and values of a slot are held; nothing if it holds none.
    pub fn cache_type(&self, slot: usize) -> Option<CacheType> {
        match self.slots.get(slot) {
            Some(DeviceSlot::Kv { kind, .. }) => Some(*kind),
            _ => None,
        }
    }

    /// Takes keys or values of the positions from `first` on from `source`: `[sequences, heads, capacity, width]` as the slot
    /// holds them, of which `count` positions count.
    ///
    /// # Errors
    /// [`CudaError::Argument`] if the source is too small or there is no room.
    pub fn load_cache(
        &mut self,
        slot: usize,
        half: Half,
        source: &External,
        first: usize,
        count: usize,
    ) -> Result<()> {
        self.reserve(first + count)?;
        let part = self.cache_part(slot, half)?;
        let pitch = source.len() / part.heads.max(1);
        if pitch < count * part.row {
            let message = format!("{} bytes for {count} positions of slot {slot}", source.len());
            return Err(CudaError::Argument(message));
        }
        let from = Rows { address: source.address(), pitch };
        let to = Rows { address: part.address + (first * part.row) as u64, pitch: part.pitch };
        // SAFETY: the source is kept by the caller until the copy is done, which is waited for; the other is the slot's own.
        unsafe { copy_rows(&self.stream, from, to, count * part.row, part.heads) }?;
        self.stream.synchronize()
    }

    /// Writes keys or values of the positions `first..first + count` to `target`, `[sequences, heads, count, width]`.
    ///
    /// # Errors
    /// [`CudaError::Argument`] if the target has another size.
    pub fn store_cache(
        &self,
        slot: usize,
        half: Half,
        target: &External,
        first: usize,
        count: usize,
    ) -> Result<()> {
        let part = self.cache_part(slot, half)?;
        let width = count * part.row;
        if target.len() != width * part.heads || first + count > self.capacity {
            let message = format!("{} bytes for {count} positions of slot {slot}", target.len());
            return Err(CudaError::Argument(message));
        }
        let from = Rows { address: part.address + (first * part.row) as u64, pitch: part.pitch };
        let to = Rows { address: target.address(), pitch: width };
        // SAFETY: as above, the other way round.
        unsafe { copy_rows(&self.stream, from, to, width, part.heads) }?;
        self.stream.synchronize()
    }

    /// Takes the rows of a slot from `source`, those of all sequences, float32.
    ///
    /// # Errors
    /// [`CudaError::Argument`] if the slot has no rows or the source another size.
    pub fn load_rows(&mut self, slot: usize, source: &External) -> Result<()> {
        let rows = self.rows(slot, source.len())?;
        self.copy_whole(source.address(), rows, source.len())
    }

    /// Writes the rows of a slot to `target`, those of all sequences, float32.
    ///
    /// # Errors
    /// As [`Self::load_rows`].
    pub fn store_rows(&self, slot: usize, target: &External) -> Result<()> {
        let rows = self.rows(slot, target.len())?;
        self.copy_whole(rows, target.address(), target.len())
    }

    /// Writes the last step's logits `[sequences, vocabulary]` to `target`, float32.
    ///
    /// # Errors
    /// [`CudaError::Argument`] if it has another size.
    pub fn store_logits(&self, target: &External) -> Result<()> {
        let bytes = self.sequences * self.decoder.vocabulary() * size_of::<f32>();
        if target.len() != bytes {
            return Err(CudaError::Argument(format!("{} bytes for {bytes} of logits", target.len())));
        }
        self.copy_whole(self.plan.logits, target.address(), bytes)
    }

    fn copy_whole(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        let rows = |address| Rows { address, pitch: bytes };
        // SAFETY: one side is the sequence's, the other the caller's until the copy is done, which is waited for.
        unsafe { copy_rows(&self.stream, rows(from), rows(to), bytes, 1) }?;
        self.stream.synchronize()
    }

    fn rows(&self, slot: usize, bytes: usize) -> Result<u64> {
        match self.slots.get(slot) {
            Some(DeviceSlot::Rows { values, keep, channels }) if keep * channels * 4 == bytes => {
                Ok(values.address())
            }
            Some(DeviceSlot::Rows { keep, channels, .. }) => {
                let message = format!("{bytes} bytes for {keep} rows of {channels} floats in slot {slot}");
                Err(CudaError::Argument(message))
            }
            _ => Err(CudaError::Argument(format!("slot {slot} holds no rows"))),
        }
    }
}

/// Plans a step over these slots.
fn plan(
    decoder: &Arc<Decoder>,
    slots: &[DeviceSlot],
    (control, ring): (&DeviceBuffer, &Ring),
    sizes @ [sequences, _]: [usize; 2],
    room: &mut Vec<DeviceBuffer>,
) -> Result<Plan> {
    let control = Control::at(control.address(), ring.address(), sequences);
    let addresses: Vec<SlotAddress> = slots.iter().map(|s| s.address(sizes)).collect();
    decoder.plan(&decoder.request(sizes, &addresses, control), room)
}
