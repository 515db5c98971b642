//! A program: stages over numbered buffers, for any number of tokens at a time.

use std::any::Any;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::cells::Cells;
use crate::matrix::{Activations, Layout, Raw, Scratch};
use crate::store::Store;
use crate::team::{Job, Team};

/// Number of a buffer of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Buffer(pub usize);

/// From this many rows on, activations are packed once for all threads and not by each.
pub const SHARE_FROM: usize = 3;

/// One step of a program. A fused op is one or a few. Who writes programs for another device looks at its type.
pub trait Stage: Any + Send + Sync + std::fmt::Debug {
    /// What it does, in the field's terms.
    fn name(&self) -> &'static str;

    /// Gets ready for calls of up to so many positions; called before a run.
    fn prepare(&self, _positions: usize) {}

    /// Floats that it or the stage before it needs in the scratch that stages share: what is there is void once the stage
    /// after it is complete.
    fn scratch(&self, _call: &Call<'_>) -> usize {
        0
    }

    /// Whether it has anything to do for a single token, the first of a sequence.
    fn in_decode(&self) -> bool {
        true
    }

    /// How many chunks it is cut into. Must follow from the frame's sizes alone.
    fn chunks(&self, frame: &Frame<'_>) -> usize;

    /// Works on one chunk. `first`: this thread has worked on no chunk of this stage yet.
    ///
    /// A chunk reads what earlier stages wrote and writes what no other chunk touches.
    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, first: bool);

    /// Layout and width of the activations that it packs for all threads, and how many rows a token has, if it packs.
    fn packs(&self) -> Option<(Layout, usize, usize)> {
        None
    }
}

/// What a run is about.
pub struct Frame<'a> {
    /// Token ids, `[batch, length]`.
    pub tokens: &'a [u32],
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub length: usize,
    /// Positions that came before.
    pub position: usize,
    /// Of how many rows at the end of each sequence the output is wanted.
    pub outputs: usize,
    pub(crate) buffers: &'a [Cells],
    pub(crate) slots: &'a [Slot],
    /// Activations that one stage packs and the next reads.
    pub(crate) shared: Raw,
    /// Floats that one stage leaves for the next.
    pub(crate) scratch: &'a Cells,
}

impl Frame<'_> {
    /// Tokens of all sequences.
    pub fn rows(&self) -> usize {
        self.batch * self.length
    }

    pub(crate) fn buffer(&self, buffer: Buffer) -> &Cells {
        &self.buffers[buffer.0]
    }

    /// Whether activations are packed once for all threads.
    pub(crate) fn shares(&self, rows: usize) -> bool {
        rows >= SHARE_FROM
    }
}

/// What a thread has for itself.
#[derive(Debug, Default)]
pub struct Local {
    pub(crate) activations: Activations,
    pub(crate) scratch: Scratch,
    pub(crate) a: Vec<f32>,
    pub(crate) b: Vec<f32>,
    pub(crate) c: Vec<f32>,
    pub(crate) list: Vec<u32>,
}

/// What lasts from one run to the next.
#[derive(Debug, Clone)]
pub enum Slot {
    /// Keys and values of each sequence: `[batch, heads, capacity, head_dim]`.
    Kv {
        /// Keys.
        keys: Store,
        /// Values.
        values: Store,
        /// Key/value heads.
        heads: usize,
        /// Width of a key.
        key_width: usize,
        /// Width of a value.
        value_width: usize,
        /// Positions there is room for.
        capacity: usize,
        /// How many positions a token sees, its own included, if not all: what lies further back may be dropped.
        window: Option<usize>,
        /// Positions at the start that are no longer there: the first element is that of this position.
        dropped: usize,
    },
    /// The last inputs of a convolution: `[batch, keep, channels]`.
    Rows {
        /// The inputs.
        values: Cells,
        /// Positions kept.
        keep: usize,
        /// Channels.
        channels: usize,
    },
}

/// Positions by which key/value slots grow.
const KV_STEP: usize = 256;

impl Slot {
    /// An empty key/value slot of float32.
    pub fn kv(heads: usize, key_width: usize, value_width: usize) -> Self {
        let (keys, values) = (Cells::default().into(), Cells::default().into());
        Self::Kv { keys, values, heads, key_width, value_width, capacity: 0, window: None, dropped: 0 }
    }

    /// The same for attention of which a token sees `window` positions, its own included. Positions stay in their order;
    /// when the end of the room is reached, those that are still seen move to its start, so that it stays at twice the
    /// window or one call, whichever is more.
    pub fn windowed(mut self, seen: Option<usize>) -> Self {
        if let Self::Kv { window, .. } = &mut self {
            *window = seen;
        }
        self
    }

    /// The same slot, empty and with keys and values in half precision.
    pub fn half(self) -> Self {
        match self {
            Self::Kv { heads, key_width, value_width, window, .. } => {
                let (keys, values) = (Store::half(), Store::half());
                Self::Kv { keys, values, heads, key_width, value_width, capacity: 0, window, dropped: 0 }
            }
            rows @ Self::Rows { .. } => rows,
        }
    }

    /// Rows of zeros.
    pub fn rows(keep: usize, channels: usize) -> Self {
        Self::Rows { values: Cells::default(), keep, channels }
    }

    /// Makes room for `positions` positions, of which the first `used` are kept; with a window, those of them that the first
    /// of the others sees.
    pub fn reserve(&mut self, batch: usize, used: usize, positions: usize) {
        match self {
            Self::Kv { keys, values, heads, key_width, value_width, capacity, window, dropped } => {
                let first = window.map_or(0, |w| (used + 1).saturating_sub(w));
                let needed = positions - first;
                let most = window.map(|w| (2 * w).max(needed).next_multiple_of(KV_STEP));
                let too_large = most.is_some_and(|most| *capacity >= 2 * most);
                if *capacity >= positions - *dropped && !too_large {
                    return;
                }
                // Doubling keeps the copying linear in the length, and so does room for another window.
                let room = match most {
                    Some(most) if *capacity < needed || too_large => most,
                    Some(_) => *capacity,
                    None => needed.max(*capacity * 2).next_multiple_of(KV_STEP),
                };
                let (from, to) = (first - *dropped, used - *dropped);
                for (store, width) in [(keys, *key_width), (values, *value_width)] {
                    let kept = from * width..to * width;
                    *store = store.regrown(batch * *heads, *capacity * width, kept, room * width);
                }
                (*capacity, *dropped) = (room, first);
            }
            Self::Rows { values, keep, channels } => values.grow(batch * *keep * *channels),
        }
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Kv { keys, values, .. } => keys.bytes() + values.bytes(),
            Self::Rows { values, .. } => 4 * values.len(),
        }
    }
}

/// Stages in order, and the widths of their buffers.
#[derive(Debug, Default)]
pub struct Program {
    stages: Vec<Box<dyn Stage>>,
    /// For each stage, the node of the caller's graph it belongs to.
    owners: Vec<usize>,
    /// Floats a row.
    widths: Vec<usize>,
}

impl Program {
    /// An empty program.
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer of `width` floats a row.
    pub fn buffer(&mut self, width: usize) -> Buffer {
        self.widths.push(width);
        Buffer(self.widths.len() - 1)
    }

    /// Makes a buffer at least that wide.
    pub fn widen(&mut self, buffer: Buffer, width: usize) {
        self.widths[buffer.0] = self.widths[buffer.0].max(width);
    }

    /// Adds a stage, which belongs to `owner`.
    pub fn push(&mut self, owner: usize, stage: impl Stage + 'static) {
        self.stages.push(Box::new(stage));
        self.owners.push(owner);
    }

    /// The stages.
    pub fn stages(&self) -> &[Box<dyn Stage>] {
        &self.stages
    }

    /// How many stages a single token takes.
    pub fn decode_stages(&self) -> usize {
        self.stages.iter().filter(|s| s.in_decode()).count()
    }

    /// Floats a row of each buffer.
    pub fn widths(&self) -> &[usize] {
        &self.widths
    }

    /// For each stage, the number that was given with it.
    pub fn owners(&self) -> &[usize] {
        &self.owners
    }
}

/// What a run is about, as the caller gives it.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// Token ids, `[batch, length]`.
    pub tokens: &'a [u32],
    /// Sequences.
    pub batch: usize,
    /// Positions that came before.
    pub position: usize,
    /// Of which positions the output is wanted.
    pub wanted: Wanted,
}

/// Of which positions of a call the output (of a model, the logits) is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// All.
    All,
    /// The last of each sequence.
    Last,
    /// None: only the state is to move on.
    None,
}

impl Wanted {
    /// How many rows at the end of each sequence that is, of `length`.
    pub fn rows(self, length: usize) -> usize {
        match self {
            Self::All => length,
            Self::Last => length.min(1),
            Self::None => 0,
        }
    }
}

/// Runs programs: the team, buffers, and each thread's room.
pub struct Runner {
    team: Team,
    locals: Vec<Mutex<Local>>,
    buffers: Vec<Cells>,
    shared: Activations,
    scratch: Cells,
    /// Nanoseconds of each stage, if they are measured.
    times: Option<Vec<AtomicU64>>,
}

impl std::fmt::Debug for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Runner({} threads)", self.team.threads())
    }
}

impl Runner {
    /// A runner of `threads` threads for programs of at most `stages` stages.
    pub fn new(threads: usize, stages: usize) -> Self {
        let team = Team::new(threads, stages);
        let locals = (0..team.threads()).map(|_| Mutex::default()).collect();
        Self {
            team,
            locals,
            buffers: Vec::new(),
            shared: Activations::default(),
            scratch: Cells::default(),
            times: None,
        }
    }

    /// How many threads it has.
    pub fn threads(&self) -> usize {
        self.team.threads()
    }

    /// Measures stages from now on, or stops measuring.
    pub fn measure(&mut self, on: bool, stages: usize) {
        self.times = on.then(|| (0..stages).map(|_| AtomicU64::new(0)).collect());
    }

    /// Nanoseconds that all threads together spent in each stage since measuring began or since the last call of this;
    /// nothing if it was not asked for.
    pub fn take_times(&mut self) -> Vec<u64> {
        self.times.iter().flatten().map(|t| t.swap(0, Ordering::Relaxed)).collect()
    }

    /// Goes through the program. `slots` are those its stages name; room is made for the call's positions.
    ///
    /// # Panics
    /// If the call has no tokens, or its tokens are not a multiple of its batch.
    pub fn run(&mut self, program: &Program, slots: &mut [Slot], call: &Call<'_>) {
        assert!(call.batch > 0 && !call.tokens.is_empty() && call.tokens.len().is_multiple_of(call.batch));
        let rows = call.tokens.len();
        let length = rows / call.batch;
        for slot in slots.iter_mut() {
            slot.reserve(call.batch, call.position, call.position + length);
        }
        self.buffers.resize_with(program.widths.len().max(self.buffers.len()), Cells::default);
        for (buffer, width) in self.buffers.iter_mut().zip(&program.widths) {
            buffer.grow(rows * width);
        }
        for stage in &program.stages {
            stage.prepare(call.position + length);
            if let Some((layout, columns, per_row)) = stage.packs() {
                self.shared.reserve(layout, rows * per_row, columns);
            }
            self.scratch.grow(stage.scratch(call));
        }
        let frame = Frame {
            tokens: call.tokens,
            batch: call.batch,
            length,
            position: call.position,
            outputs: call.wanted.rows(length),
            buffers: &self.buffers,
            slots,
            shared: self.shared.raw(),
            scratch: &self.scratch,
        };
        let run = Run { program, frame: &frame, locals: &self.locals, times: self.times.as_deref() };
        self.team.run(&run);
    }

    /// Fills a buffer before a run over `rows` tokens.
    ///
    /// # Panics
    /// If there are fewer floats than the rows have.
    pub fn fill(&mut self, program: &Program, buffer: Buffer, rows: usize, floats: &[f32]) {
        self.buffers.resize_with(program.widths.len().max(self.buffers.len()), Cells::default);
        let len = rows * program.widths[buffer.0];
        let cells = &mut self.buffers[buffer.0];
        cells.grow(len);
        cells.as_mut_slice()[..len].copy_from_slice(&floats[..len]);
    }

    /// A buffer after a run.
    pub fn buffer(&mut self, buffer: Buffer) -> &[f32] {
        self.buffers[buffer.0].as_mut_slice()
    }
}

struct Run<'a> {
    program: &'a Program,
    frame: &'a Frame<'a>,
    locals: &'a [Mutex<Local>],
    times: Option<&'a [AtomicU64]>,
}

impl Job for Run<'_> {
    fn stages(&self) -> usize {
        self.program.stages.len()
    }

    fn chunks(&self, stage: usize) -> usize {
        self.program.stages[stage].chunks(self.frame)
    }

    fn work(&self, thread: usize, stage: usize, chunk: usize, first: bool) {
        // Each thread has its own, so this never waits.
        let mut local = self.locals[thread].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let start = self.times.map(|_| Instant::now());
        self.program.stages[stage].work(self.frame, &mut local, chunk, first);
        if let (Some(times), Some(start)) = (self.times, start) {
            times[stage].fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        }
    }
}
