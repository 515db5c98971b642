//! A model's decode step on the GPU: its program, weights and kernels, for one sequence or several together.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use zmlx_engine::program::{Buffer, Program, Slot};

use crate::device::Device;
use crate::error::{CudaError, Result};
use crate::kernels::Source;
use crate::memory::{DeviceBuffer, External};
use crate::module::{self, Functions};
use crate::plan::{
    CacheType, Control, Imagined, MOST_SEQUENCES, Memory, Plan, Request, SlotAddress, Step, WeightAddress,
};
use crate::sequence::Sequence;
use crate::translate::translate;

/// What a decoder is made of.
#[derive(Debug)]
pub struct Parts {
    /// The stages of one token, over outlines of weights.
    pub program: Program,
    /// Empty forms of its slots.
    pub slots: Vec<Slot>,
    /// The buffer of logits.
    pub logits: Buffer,
    /// How many logits a token has.
    pub vocabulary: usize,
    /// The parts of each weight (codes, scales, biases, or the elements alone), by the number its outlines have.
    pub weights: HashMap<usize, Vec<External>>,
    /// How keys and values are held that the slots' forms have in float32.
    pub cache: CacheType,
    /// Whether a launch may begin before the one before it has ended.
    pub overlap: bool,
}

/// A model that decodes on a GPU. Sequences share its weights, constants and kernels.
#[derive(Debug)]
pub struct Decoder {
    pub(crate) device: Arc<Device>,
    pub(crate) parts: Parts,
    /// Constants in the order in which translation asks for them, by the number of sequences, which decides on that.
    constants: Mutex<HashMap<usize, Vec<DeviceBuffer>>>,
    /// Whether so many sequences, and one more, are decoded together; known once it was asked.
    together: [OnceLock<bool>; MOST_SEQUENCES],
    functions: Mutex<Functions>,
    launches: AtomicUsize,
}

impl Decoder {
    /// Checks that every stage has a translation and that its kernels compile, so that what cannot run is known now.
    ///
    /// # Errors
    /// [`CudaError::Untranslated`], [`CudaError::Kernel`], and those of compiling.
    pub fn new(device: &Arc<Device>, parts: Parts) -> Result<Arc<Self>> {
        let decoder = Self {
            device: Arc::clone(device),
            parts,
            constants: Mutex::default(),
            together: Default::default(),
            functions: Mutex::default(),
            launches: AtomicUsize::new(0),
        };
        let decoder = Arc::new(decoder);
        // A first sequence, small and dropped again: it brings constants and kernels to the GPU.
        let first = Sequence::new(&decoder, 1, 1)?;
        decoder.launches.store(first.launches(), Ordering::Relaxed);
        Ok(decoder)
    }

    /// The GPU.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// The program.
    pub fn program(&self) -> &Program {
        &self.parts.program
    }

    /// Launches of a token of one sequence.
    pub fn launches(&self) -> usize {
        self.launches.load(Ordering::Relaxed)
    }

    /// How many logits a token has.
    pub fn vocabulary(&self) -> usize {
        self.parts.vocabulary
    }

    /// Whether so many sequences can be decoded together: [`MOST_SEQUENCES`] at most, if every kernel takes as many.
    pub fn takes(&self, sequences: usize) -> bool {
        let known = sequences.checked_sub(1).and_then(|at| self.together.get(at));
        known.is_some_and(|known| *known.get_or_init(|| self.outline(sequences).is_ok()))
    }

    /// A plan for memory that is nowhere.
    fn outline(&self, sequences: usize) -> Result<Plan> {
        let (memory, capacity) = (&mut Imagined::default(), 1);
        let slot = |form| SlotAddress::in_room(memory, form, self.parts.cache, [sequences, capacity]);
        let slots = self.parts.slots.iter().map(slot).collect::<Result<Vec<_>>>()?;
        let control = Control::in_room(memory, sequences)?;
        let plan = translate(&self.request([sequences, capacity], &slots, control), memory)?;
        let most = self.device.info().shared_memory;
        match plan.steps.iter().find(|step| i64::from(step.launch.shared) > i64::from(most)) {
            Some(step) => {
                let reason = format!("{} bytes of shared memory, a block has {most}", step.launch.shared);
                Err(CudaError::Untranslated { stage: step.name, reason })
            }
            None => Ok(plan),
        }
    }

    /// What is asked of translation.
    pub(crate) fn request<'a>(
        &'a self,
        [sequences, capacity]: [usize; 2],
        slots: &'a [SlotAddress],
        control: Control,
    ) -> Request<'a> {
        let info = self.device.info();
        Request {
            program: &self.parts.program,
            sequences,
            slots,
            control,
            logits: self.parts.logits,
            vocabulary: self.parts.vocabulary,
            capacity,
            multiprocessors: info.multiprocessors,
            shared_memory: info.shared_memory as usize,
        }
    }

    /// A plan for the memory that `room` hands out, and its kernels.
    pub(crate) fn plan(&self, request: &Request<'_>, room: &mut Vec<DeviceBuffer>) -> Result<Plan> {
        let mut constants = self.constants.lock().unwrap_or_else(PoisonError::into_inner);
        let constants = constants.entry(request.sequences).or_default();
        let mut memory = Arena { decoder: self, room, rooms: 0, constants, given: 0 };
        translate(request, &mut memory)
    }

    /// The kernels of a plan, compiled and loaded if they are not yet.
    pub(crate) fn functions(&self, steps: &[Step]) -> Result<Vec<Arc<module::Function>>> {
        let mut known = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let missing: Vec<_> = steps.iter().map(|s| &s.source).filter(|s| !known.contains_key(*s)).collect();
        if !missing.is_empty() {
            known.extend(module::load(&self.device, &missing)?);
        }
        let mut shared: HashMap<&Source, u32> = HashMap::new();
        for step in steps {
            let most = shared.entry(&step.source).or_default();
            *most = step.launch.shared.max(*most);
        }
        for (source, bytes) in shared {
            if bytes > 48 << 10 {
                known[source].allow_shared(bytes)?;
            }
        }
        Ok(steps.iter().map(|s| Arc::clone(&known[&s.source])).collect())
    }
}

/// Memory of the GPU in the order in which it is asked for.
struct Arena<'a> {
    decoder: &'a Decoder,
    room: &'a mut Vec<DeviceBuffer>,
    rooms: usize,
    constants: &'a mut Vec<DeviceBuffer>,
    given: usize,
}

/// Number `at` of `buffers`; made anew where it is missing or too small.
fn buffer_at(
    buffers: &mut Vec<DeviceBuffer>,
    at: usize,
    bytes: usize,
    make: impl FnOnce() -> Result<DeviceBuffer>,
) -> Result<u64> {
    if buffers.get(at).is_none_or(|b| b.len() < bytes) {
        let made = make()?;
        match buffers.get_mut(at) {
            Some(old) => *old = made,
            None => buffers.push(made),
        }
    }
    Ok(buffers[at].address())
}

impl Memory for Arena<'_> {
    fn table(&mut self, floats: &[f32]) -> Result<u64> {
        let address = self.room(size_of_val(floats))?;
        let bytes: Vec<u8> = floats.iter().flat_map(|f| f.to_le_bytes()).collect();
        self.room[self.rooms - 1].fill(&bytes)?;
        Ok(address)
    }

    fn room(&mut self, bytes: usize) -> Result<u64> {
        self.rooms += 1;
        let device = &self.decoder.device;
        buffer_at(self.room, self.rooms - 1, bytes, || DeviceBuffer::new(device, bytes, "activations"))
    }

    fn constant(&mut self, floats: &[f32]) -> Result<u64> {
        self.given += 1;
        let device = &self.decoder.device;
        buffer_at(self.constants, self.given - 1, size_of_val(floats), || {
            let bytes: Vec<u8> = floats.iter().flat_map(|f| f.to_le_bytes()).collect();
            DeviceBuffer::of(device, &bytes, "constants")
        })
    }

    fn weight(&self, number: usize) -> Result<WeightAddress> {
        let parts = self.decoder.parts.weights.get(&number);
        let parts = parts.ok_or_else(|| CudaError::Argument(format!("weight {number} is not on the GPU")))?;
        let at = |i: usize| parts.get(i).map_or(0, External::address);
        Ok(WeightAddress { codes: at(0), scales: at(1), biases: at(2) })
    }
}
