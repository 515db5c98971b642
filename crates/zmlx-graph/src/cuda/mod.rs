//! Decode on an NVIDIA GPU, past MLX: the fused nodes of a graph as one captured graph of kernels.
//!
//! Calls of several tokens (prefill) run on MLX, and so do batches of more than [`MOST_SEQUENCES`] sequences or of more than
//! some kernel takes. At the first call of one token of each sequence the state moves to the GPU's own caches, where it
//! stays while such calls go on; a later call of several tokens brings it back first. Both ways are copies within the GPU's
//! memory, a few milliseconds for a long context.

mod decode;
mod grouped;
mod timeline;
mod transfer;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use zmlx_cuda::decoder::{Decoder, Parts};
use zmlx_cuda::kernels::MOMENTS;
use zmlx_cuda::memory::External;
use zmlx_cuda::nvrtc::Nvrtc;
use zmlx_cuda::plan::{CacheType, Control, Imagined, Memory, Plan, Request, SlotAddress};
use zmlx_cuda::translate::translate;
use zmlx_cuda::{Device, kernels};
use zmlx_engine::program::{Buffer, Program, Slot};
use zmlx_mlx::{Array, Dtype, ops};

use crate::exec::{Executor, last_reads};
use crate::graph::{Graph, Value};
use crate::native::{Form, Lowering, Place, WeightSource};
use crate::shape::Sizes;
use crate::state::SlotId;
use crate::weights::{BoundWeight, WeightId};

pub use grouped::grouped_linear;
pub(crate) use grouped::{combine_rows, sort_rows};
pub use timeline::{DecodeTime, LaunchParts, LaunchRow, Timeline};
pub(crate) use transfer::DeviceState;
pub use zmlx_cuda::kernels::Tile;
pub use zmlx_cuda::plan::MOST_SEQUENCES;
pub use zmlx_cuda::{CudaError, DeviceInfo};

/// Why a graph does not decode past MLX; the text says what to do where something can be done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// The GPU, its compiler or a stage.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// A fused op whose body cannot be written down.
    #[error(transparent)]
    Lowering(#[from] crate::native::LoweringError),
    /// An array that is not to be had.
    #[error("{path}: {source}")]
    Weight {
        /// The weight.
        path: String,
        /// What MLX said.
        source: zmlx_mlx::Error,
    },
    /// The graph is not all fused.
    #[error("{0}")]
    Graph(String),
}

/// The fused nodes of a graph on a GPU.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) decoder: Arc<Decoder>,
    /// Which slots of the graph are which of the decoder.
    pub(crate) slots: HashMap<SlotId, usize>,
    /// Shapes of MLX's arrays in slots of one array, for one sequence.
    pub(crate) shapes: HashMap<SlotId, Vec<i32>>,
    /// The dtype of MLX's activations.
    pub(crate) activation: Dtype,
    /// Launches of a token of one sequence.
    pub(crate) launches: usize,
}

/// A program of one token.
pub(crate) struct Lowered {
    pub(crate) program: Program,
    pub(crate) templates: Vec<Slot>,
    pub(crate) slots: HashMap<SlotId, usize>,
    pub(crate) logits: Buffer,
    pub(crate) vocabulary: usize,
    /// The weights whose matrices it names.
    pub(crate) matrices: Vec<WeightId>,
}

/// The whole graph as a program over outlines of its weights. `last_reads`: for each node, the values that nobody reads
/// after it.
pub(crate) fn lower<'a>(
    graph: &'a Graph,
    weights: WeightSource<'a>,
    last_reads: &[Vec<Value>],
) -> Result<Lowered, Refusal> {
    let loose: Vec<_> = graph.nodes.iter().filter(|n| n.op.fused().is_none()).collect();
    if let Some(first) = loose.first() {
        let (count, all) = (loose.len(), graph.nodes.len());
        let (path, op) = (&first.path, first.op.name());
        let message = format!("{count} of {all} ops are in no pattern, the first {op} at {path}");
        return Err(Refusal::Graph(message));
    }
    let mut lowering = Lowering::new(graph, None, weights);
    for (index, (node, dead)) in graph.nodes.iter().zip(last_reads).enumerate() {
        lowering.node(index, node, dead)?;
    }
    let (logits, vocabulary) = match lowering.places.get(&graph.output) {
        Some(Place::Buffer(buffer, Form::Flat { width })) => (*buffer, *width),
        _ => return Err(Refusal::Graph("its output is not one row of logits a token".to_owned())),
    };
    let Lowering { program, templates, slots, matrices, .. } = lowering;
    Ok(Lowered { program, templates, slots, logits, vocabulary, matrices: matrices.into_keys().collect() })
}

impl Gpu {
    /// Brings a graph to the GPU that MLX uses; `weights` stay where they are.
    pub(crate) fn new(
        graph: &Graph,
        weights: &[Option<BoundWeight>],
        last_reads: &[Vec<Value>],
        activation: Dtype,
    ) -> Result<Self, Refusal> {
        let cache = cache_type(activation);
        let folder = zmlx_mlx::locate::cache_dir().ok();
        let device = Device::open(0, folder.as_deref())?;
        let lowered = lower(graph, WeightSource::Bound(weights), last_reads)?;
        let mut addressed = HashMap::new();
        for id in &lowered.matrices {
            let Some(bound) = &weights[id.0] else { continue };
            let path = &graph.weights[id.0].path;
            let arrays = bound.arrays().into_iter().map(|a| external(&device, path, a));
            addressed.insert(id.0, arrays.collect::<Result<Vec<_>, _>>()?);
        }
        let parts = Parts {
            program: lowered.program,
            slots: lowered.templates,
            logits: lowered.logits,
            vocabulary: lowered.vocabulary,
            weights: addressed,
            cache,
            overlap: overlap(),
        };
        let decoder = Decoder::new(&device, parts)?;
        let launches = decoder.launches();
        Ok(Self { decoder, slots: lowered.slots, shapes: shapes(graph)?, activation, launches })
    }
}

/// The GPU that decode steps past MLX would run on.
///
/// # Errors
/// What is missing: a driver, a GPU, or one that is new enough.
pub fn device() -> Result<DeviceInfo, CudaError> {
    Ok(Device::open(0, None)?.info().clone())
}

/// The compiler of kernels: its version and where it is.
///
/// # Errors
/// [`CudaError::NoNvrtc`], which says where it was looked for; [`CudaError::Nvrtc`].
pub fn compiler() -> Result<((i32, i32), PathBuf), CudaError> {
    let nvrtc = Nvrtc::find(zmlx_mlx::locate::cache_dir().ok().as_deref())?;
    Ok((nvrtc.version(), nvrtc.path().to_path_buf()))
}

/// What a plan is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Sequences that are decoded together.
    pub sequences: usize,
    /// Positions that caches have room for.
    pub capacity: usize,
    /// Bytes of shared memory that a block may have.
    pub shared_memory: usize,
}

impl Extent {
    /// One sequence on a GPU like an H100.
    pub fn new(capacity: usize) -> Self {
        Self { sequences: 1, capacity, shared_memory: kernels::SHARED_MOST }
    }
}

/// The launches that a token of a rewritten graph takes on a GPU like an H100, without one: weights are nowhere, floats
/// among them `activation`, and caches have room for `capacity` positions.
///
/// # Errors
/// Why the graph does not decode past MLX.
pub fn outline(graph: &Graph, activation: Dtype, capacity: usize) -> Result<Plan, String> {
    outline_within(graph, activation, Extent::new(capacity))
}

/// The same of several sequences together, or on a GPU whose blocks have other shared memory.
///
/// # Errors
/// As [`outline`].
pub fn outline_within(graph: &Graph, activation: Dtype, extent: Extent) -> Result<Plan, String> {
    let refused = |refusal: Refusal| refusal.to_string();
    let lowered = lower(graph, WeightSource::Declared(activation), &last_reads(graph)).map_err(refused)?;
    planned(&lowered, activation, extent, &mut Imagined::default())
}

/// The same of an executor on MLX with its weights, where `memory` says that they and all else are.
///
/// # Errors
/// As [`outline`].
pub fn plan(executor: &Executor, extent: Extent, memory: &mut dyn Memory) -> Result<Plan, String> {
    let graph = executor.graph();
    let lowered = lower(graph, WeightSource::Bound(executor.weights()), &last_reads(graph));
    let lowered = lowered.map_err(|refusal| refusal.to_string())?;
    planned(&lowered, executor.activation(), extent, memory)
}

fn planned(
    lowered: &Lowered,
    activation: Dtype,
    extent: Extent,
    memory: &mut dyn Memory,
) -> Result<Plan, String> {
    let Extent { sequences, capacity, shared_memory } = extent;
    let kind = cache_type(activation);
    let slot = |form| SlotAddress::in_room(memory, form, kind, [sequences, capacity]);
    let slots = lowered.templates.iter().map(slot);
    let slots = slots.collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
    let request = Request {
        program: &lowered.program,
        sequences,
        slots: &slots,
        control: Control::in_room(memory, sequences).map_err(|e| e.to_string())?,
        logits: lowered.logits,
        vocabulary: lowered.vocabulary,
        capacity,
        multiprocessors: kernels::MULTIPROCESSORS,
        shared_memory,
    };
    translate(&request, memory).map_err(|e| e.to_string())
}

/// What a run of decode steps came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decoded {
    /// Tokens of each sequence that the state has seen more, the one it went on from included: as many as were told, or one
    /// more when the caller ended it early.
    pub fed: usize,
    /// Whether the last logits are numbers; NaN in a cache stays.
    pub finite: bool,
}

/// One launch of a decode step, timed.
#[derive(Debug, Clone, PartialEq)]
pub struct LaunchTime {
    /// What it does.
    pub name: &'static str,
    /// The node of the graph that it belongs to.
    pub node: usize,
    /// Seconds by the GPU's clock, the gap before the next launch included.
    pub seconds: f64,
    /// Bytes that it reads, as far as they do not depend on the position.
    pub bytes: u64,
    /// Registers a thread.
    pub registers: i32,
    /// Bytes a thread that did not fit into them.
    pub spilled: i32,
}

/// One launch of a decode step that ran as all do, one beginning before the one before it has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchMoments {
    /// What it does.
    pub name: &'static str,
    /// The node of the graph that it belongs to.
    pub node: usize,
    /// Bytes that it reads, as far as they do not depend on the position.
    pub bytes: u64,
    /// Blocks.
    pub blocks: usize,
    /// Nanoseconds since the step's first, of the earliest and the latest block: begun, launches before complete, activations
    /// placed, sums done, ended. 0 where a kernel has no such moment.
    pub moments: [[u64; 2]; MOMENTS],
}

/// How keys and values are held beside activations of that dtype: in the same.
fn cache_type(activation: Dtype) -> CacheType {
    match activation {
        Dtype::Bfloat16 => CacheType::Bf16,
        Dtype::Float16 => CacheType::F16,
        _ => CacheType::F32,
    }
}

/// With `0` launches wait until the one before them has ended: to compare.
const OVERLAP_VARIABLE: &str = "ZMLX_CUDA_OVERLAP";

fn overlap() -> bool {
    std::env::var(OVERLAP_VARIABLE).map_or(true, |value| value != "0")
}

/// An array where it is, or a copy of it in one piece if it is a view that skips.
fn external(device: &Device, path: &str, array: &Array) -> Result<External, Refusal> {
    let fail = |source| Refusal::Weight { path: path.to_owned(), source };
    let (array, address) = match array.device_address() {
        Ok(address) => (array.clone(), address),
        Err(zmlx_mlx::Error::Argument(_)) => {
            let dense = ops::contiguous(array).map_err(fail)?;
            let address = dense.device_address().map_err(fail)?;
            (dense, address)
        }
        Err(error) => return Err(fail(error)),
    };
    Ok(External::new(device, path, address, array.nbytes(), Arc::new(array))?)
}

/// What slots of one array hold for one sequence.
fn shapes(graph: &Graph) -> Result<HashMap<SlotId, Vec<i32>>, Refusal> {
    let types = graph.infer().map_err(|e| Refusal::Graph(e.to_string()))?;
    let one = Sizes::decode(0);
    let shape = |id: SlotId| match types.slot(id) {
        [held] => Some((id, held.shape.0.iter().map(|d| d.at(one) as i32).collect())),
        _ => None,
    };
    Ok((0..graph.slots.len()).filter_map(|index| shape(SlotId(index))).collect())
}
