use std::path::Path;

use serde::Serialize;
use zmlx_graph::pattern::{Backend, PatternReport, Rewritten, rewrite};
use zmlx_graph::weights::Weight;
use zmlx_graph::{Cost, CostContext, Graph, GraphError, cuda};
use zmlx_mlx::Dtype;

use crate::checkpoint::CheckpointError;
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::families::{self, Built};
use crate::info::{ModelInfo, describe};
use crate::patch::{PatchError, PatchOptions, PatchReport};
use crate::quantize::dtype_of;
use crate::source::Source;

/// A model's graph and the sizes of its weights, without the weights.
#[derive(Debug, Clone)]
pub struct Blueprint {
    /// What the model is.
    pub info: ModelInfo,
    /// Its stock graph.
    pub graph: Graph,
    /// Bytes of each weight of the graph as it is stored (those of a GGUF file, as they are converted).
    pub weight_bytes: Vec<u64>,
    /// Where the sizes come from.
    pub sizes: SizesFrom,
}

/// Where the sizes of a blueprint's weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SizesFrom {
    /// The headers of the weight files.
    Headers,
    /// `config.json` alone: the folder has no weights. Unquantised weights count as bfloat16.
    Config,
}

/// A blueprint patched for the CPU: what [`crate::Model::patch`] would run there in float32, without the weights.
#[derive(Debug, Clone)]
pub struct PatchedBlueprint {
    /// Its graph. Nodes that no pattern took run on MLX.
    pub graph: Graph,
    /// What became of each pattern.
    pub report: PatchReport,
    /// Bytes of each weight as it is held: by the engine as it is stored (vectors in float32), for MLX in float32.
    pub weight_bytes: Vec<u64>,
}

impl PatchedBlueprint {
    /// What a token costs after `position` others.
    ///
    /// # Errors
    /// As [`Graph::cost`].
    pub fn decode_cost(&self, position: u32) -> Result<Cost, GraphError> {
        self.graph.cost(&CostContext::decode(position, Dtype::Float32, self.weight_bytes.clone()))
    }
}

/// A blueprint patched for an NVIDIA GPU, with activations of two bytes: what a decode step would be there.
#[derive(Debug, Clone)]
pub struct CudaBlueprint {
    /// What became of each pattern.
    pub patterns: Vec<PatternReport>,
    /// The launches that a token takes past MLX, in order of their first; or why MLX runs the stock graph.
    pub launches: Result<Vec<CudaLaunches>, String>,
}

/// Launches that do the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CudaLaunches {
    /// What they do.
    pub name: &'static str,
    /// How many there are.
    pub launches: u64,
    /// Bytes that they read, as far as they do not depend on the position.
    pub bytes: u64,
}

impl CudaBlueprint {
    /// Launches a token; `None` if MLX runs them.
    pub fn count(&self) -> Option<u64> {
        self.launches.as_ref().ok().map(|all| all.iter().map(|l| l.launches).sum())
    }
}

impl Blueprint {
    /// Reads the headers of a model folder or a GGUF file; no weights are loaded. A folder that has a `config.json` and no
    /// weight files will do too: then all matrices are taken to be stored as its `quantization` says.
    ///
    /// # Errors
    /// [`LoadError`], as [`crate::inspect`].
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        let source = match Source::open(path) {
            Ok(source) => source,
            Err(LoadError::Checkpoint(CheckpointError::NoWeights { .. })) => {
                return Self::from_config(&ModelConfig::read(path)?);
            }
            Err(error) => return Err(error),
        };
        let built = source.build()?;
        let weight_bytes = stored_bytes(&built, &source);
        let info = describe(&built, &weight_bytes, source.file_bytes());
        Ok(Self { info, graph: built.graph, weight_bytes, sizes: SizesFrom::Headers })
    }

    /// The model that a configuration alone describes.
    ///
    /// # Errors
    /// [`LoadError`] for a configuration that no family can build.
    pub fn from_config(config: &ModelConfig) -> Result<Self, LoadError> {
        let built = families::build_from_config(config)?;
        let weight_bytes = built.graph.weight_bytes(Dtype::Bfloat16);
        let info = describe(&built, &weight_bytes, weight_bytes.iter().sum());
        Ok(Self { info, graph: built.graph, weight_bytes, sizes: SizesFrom::Config })
    }

    /// Its graph with what these options replace by fused ops, as the CPU runs it.
    ///
    /// # Errors
    /// [`PatchError`], as [`crate::Model::patch`].
    pub fn patched(&self, options: &PatchOptions) -> Result<PatchedBlueprint, PatchError> {
        let choice = options.choose(Backend::Cpu)?;
        let threads = options.thread_count()?;
        let Rewritten { graph, patterns } = rewrite(&self.graph, &choice)?;
        // Rewriting may put nodes in another order that can be run; what it left alone stays as it is.
        let graph = if patterns.iter().any(|p| p.matched > 0) { graph } else { self.graph.clone() };
        let native = graph.nodes.iter().all(|n| n.op.fused().is_some());
        let weight_bytes = graph.engine_weight_bytes(&self.weight_bytes);
        let threads = if graph.nodes.iter().any(|n| n.op.fused().is_some()) { threads } else { 0 };
        let report = PatchReport { patterns, launches_per_token: 0, native, threads, cuda: None };
        let mut patched = PatchedBlueprint { graph, report, weight_bytes };
        patched.report.launches_per_token = patched.decode_cost(0)?.total.launches;
        Ok(patched)
    }

    /// What a token after `position` others is on an NVIDIA GPU, counted without one. It moves the bytes of
    /// [`Self::decode_cost`], whichever way it runs.
    ///
    /// # Errors
    /// [`PatchError`], as [`crate::Model::patch`].
    pub fn on_cuda(&self, options: &PatchOptions, position: u32) -> Result<CudaBlueprint, PatchError> {
        let Rewritten { graph, patterns } = rewrite(&self.graph, &options.choose(Backend::Cuda)?)?;
        let capacity = position as usize + 1;
        let launches = cuda::outline(&graph, Dtype::Bfloat16, capacity).map(|plan| {
            let mut all: Vec<CudaLaunches> = Vec::new();
            for step in &plan.steps {
                let bytes = step.launch.bytes;
                match all.iter_mut().find(|l| l.name == step.name) {
                    Some(known) => (known.launches, known.bytes) = (known.launches + 1, known.bytes + bytes),
                    None => all.push(CudaLaunches { name: step.name, launches: 1, bytes }),
                }
            }
            all
        });
        Ok(CudaBlueprint { patterns, launches })
    }

    /// What a token costs after `position` others, with weights as they are stored and activations of two bytes, as the
    /// checkpoint's own dtype has them.
    ///
    /// # Errors
    /// As [`Graph::cost`].
    pub fn decode_cost(&self, position: u32) -> Result<Cost, GraphError> {
        self.graph.cost(&CostContext::decode(position, Dtype::Bfloat16, self.weight_bytes.clone()))
    }

    /// The same where the model runs in float32, as stock MLX does here on a CPU: scales and unquantised weights are held
    /// in float32 too, whatever they are stored in.
    ///
    /// # Errors
    /// As [`Graph::cost`].
    pub fn decode_cost_f32(&self, position: u32) -> Result<Cost, GraphError> {
        let weight_bytes = self.graph.weight_bytes(Dtype::Float32);
        self.graph.cost(&CostContext::decode(position, Dtype::Float32, weight_bytes))
    }
}

/// Bytes of each weight of the graph: in the files (those of a GGUF file, as they are converted), or in the form that it
/// was brought to.
pub(crate) fn stored_bytes(built: &Built, source: &Source) -> Vec<u64> {
    let bytes = source.bytes();
    let of_tensor = |name: &str| -> u64 {
        let Some(tensor) = built.tensors.get(name) else { return 0 };
        let all: u64 = tensor.sources.iter().filter_map(|s| bytes.get(s)).sum();
        all / tensor.part.map_or(1, |part| part.of as u64)
    };
    let of_weight = |w: &Weight| -> u64 {
        let tensors = w.tensors();
        match built.recoded.stored.contains_key(&w.path) {
            true => tensors.iter().map(|t| t.bytes(dtype_of(built, w, t, built.recoded.float))).sum(),
            false => tensors.iter().map(|t| of_tensor(&t.name)).sum(),
        }
    };
    built.graph.weights.iter().map(of_weight).collect()
}
