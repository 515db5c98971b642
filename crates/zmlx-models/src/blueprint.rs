use std::path::Path;

use zmlx_graph::{Cost, CostContext, Graph, GraphError};
use zmlx_mlx::Dtype;

use crate::checkpoint::CheckpointError;
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::families::{self, Built};
use crate::info::{ModelInfo, describe};
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

/// Bytes of each weight of the graph in the files (those of a GGUF file, as they are converted).
pub(crate) fn stored_bytes(built: &Built, source: &Source) -> Vec<u64> {
    let bytes = source.bytes();
    let of_tensor = |name: &str| -> u64 {
        let sources = built.tensors.get(name).map_or(&[][..], |t| &t.sources);
        sources.iter().filter_map(|s| bytes.get(s)).sum()
    };
    let weights = built.graph.weights.iter();
    weights.map(|w| w.tensors().iter().map(|t| of_tensor(&t.name)).sum()).collect()
}
