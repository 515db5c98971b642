use std::path::PathBuf;

use zmlx_graph::weights::Quantization;

use crate::checkpoint::CheckpointError;
use crate::gguf::GgufError;
use crate::stop::StopError;
use crate::tokenizer::TokenizerError;

/// Why a model could not be loaded or looked into.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// It could not be patched.
    #[error("{0}")]
    Patch(String),
    /// The folder's weights cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The GGUF file cannot be used.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// What a GGUF file says in its own way makes no model.
    #[error("{}: {source}", path.display())]
    InGguf {
        /// The file.
        path: PathBuf,
        /// What is wrong, in the names of a model folder.
        source: Box<LoadError>,
    },
    /// A configuration file is missing or cannot be read.
    #[error("{}: {message}", path.display())]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// `config.json` names no family.
    #[error("{} has no model_type: it is not the config.json of a language model", path.display())]
    NoModelType {
        /// The file.
        path: PathBuf,
    },
    /// `config.json` names a family that is not known.
    #[error("model_type {found:?} is not supported; known families: {known}")]
    UnknownFamily {
        /// What the file says.
        found: String,
        /// What is known.
        known: String,
    },
    /// A key of `config.json` is missing.
    #[error("config.json: {key} is missing")]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A value of `config.json` makes no sense.
    #[error("config.json: {key}: {message}")]
    Config {
        /// The key.
        key: String,
        /// What is wrong.
        message: String,
    },
    /// A quantisation that is not supported.
    #[error("quantization of {path}: {message}")]
    Quantization {
        /// Path of the module, or the section of `config.json`.
        path: String,
        /// What is wrong.
        message: String,
    },
    /// A quantisation that MLX does not have.
    #[error(
        "there is no {} quantization with {} bits in groups of {}: affine has 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or \
         128, mxfp4 has 4 in groups of 32, mxfp8 8 in groups of 32, nvfp4 4 in groups of 16",
        asked.mode, asked.bits, asked.group_size
    )]
    NoSuchQuantization {
        /// What was asked for.
        asked: Quantization,
    },
    /// A model was to be quantised, and has no matrix left that could be.
    #[error(
        "nothing to quantize: every matrix is quantised already (zmlx convert --dequantize undoes it), or has columns that \
         groups of {group_size} do not divide"
    )]
    NothingToQuantize {
        /// The groups asked for.
        group_size: i32,
    },
    /// A model was to be dequantised, and is not quantised.
    #[error("nothing to dequantize: no matrix of this model is quantised")]
    NothingToDequantize,
    /// A tensor has another shape than the configuration asks for.
    #[error(
        "tensor {name}: expected shape {expected:?}, found {found:?}: config.json and the weights do not belong together"
    )]
    Shape {
        /// The tensor.
        name: String,
        /// The shape that follows from `config.json`.
        expected: Vec<i32>,
        /// The shape in the file.
        found: Vec<i32>,
    },
    /// A tensor has a dtype that does not serve.
    #[error("tensor {name}: expected {expected}, found dtype {found}")]
    Dtype {
        /// The tensor.
        name: String,
        /// What is needed.
        expected: &'static str,
        /// The dtype in the file.
        found: String,
    },
    /// Tensors that the model needs are not there.
    #[error("{count} missing tensor(s): {names}: the checkpoint is incomplete or of another model")]
    MissingTensors {
        /// How many.
        count: usize,
        /// The first of them.
        names: String,
    },
    /// Tensors that the model has no place for.
    #[error("{count} extra tensor(s): {names}: the checkpoint is of another model than config.json says")]
    ExtraTensors {
        /// How many.
        count: usize,
        /// The first of them.
        names: String,
    },
    /// What was asked for does not run on this device.
    #[error("{0}")]
    Unsupported(String),
    /// The tokenizer's files are wrong.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The embedded model could not be unpacked.
    #[error("the embedded model cannot be unpacked to {}: {message}; set ZMLX_CACHE_DIR to a folder that can be written", path.display())]
    Unpack {
        /// The folder.
        path: PathBuf,
        /// What went wrong.
        message: String,
    },
    /// Keys and values cannot be held in few bits.
    #[error(transparent)]
    KvQuantization(#[from] zmlx_graph::KvQuantizationError),
    /// The graph could not be made.
    #[error(transparent)]
    Graph(#[from] zmlx_graph::GraphError),
    /// MLX failed.
    #[error(transparent)]
    Mlx(#[from] zmlx_mlx::Error),
}

/// Why text could not be generated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// There is nothing to continue.
    #[error("the prompt is empty: give at least one token")]
    EmptyPrompt,
    /// A prompt id that the model does not have.
    #[error("token id {id} is outside the vocabulary (0 to {last})")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// The largest id.
        last: usize,
    },
    /// The prompt does not fit.
    #[error("the prompt has {length} tokens, but the model's context is {context}: shorten it")]
    PromptTooLong {
        /// Tokens of the prompt.
        length: usize,
        /// Positions of the model.
        context: usize,
    },
    /// An option out of range.
    #[error("{name} = {value}: must be {allowed}")]
    Option {
        /// The option.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// Stop strings need text, and there is no tokenizer to make it.
    #[error("stop strings need a tokenizer, and the model's folder has none")]
    StopWithoutTokenizer,
    /// The logits hold NaN: the weights or the dtype are wrong.
    #[error(
        "the model's output is not a number at position {position}: the weights are damaged, or the dtype overflows (try --dtype f32)"
    )]
    NotANumber {
        /// Position of the token.
        position: usize,
    },
    /// The tokenizer failed.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A stop string is wrong.
    #[error(transparent)]
    Stop(#[from] StopError),
    /// A node of the model failed.
    #[error(transparent)]
    Graph(#[from] zmlx_graph::GraphError),
    /// The session's state could not go back to where the prompt parts from what was seen.
    #[error(transparent)]
    Saved(#[from] zmlx_graph::SavedError),
    /// MLX failed.
    #[error(transparent)]
    Mlx(#[from] zmlx_mlx::Error),
}
