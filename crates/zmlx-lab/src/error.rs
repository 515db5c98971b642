use std::io;
use std::path::PathBuf;

use crate::roofline::AboveRoofline;

/// Why something could not be measured or compared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// A model could not be loaded.
    #[error(transparent)]
    Load(#[from] zmlx_models::LoadError),
    /// Text could not be generated.
    #[error(transparent)]
    Generate(#[from] zmlx_models::GenerateError),
    /// A model could not be run.
    #[error(transparent)]
    Graph(#[from] zmlx_graph::GraphError),
    /// A model could not be patched.
    #[error("{0}")]
    Patch(String),
    /// MLX failed.
    #[error(transparent)]
    Mlx(#[from] zmlx_mlx::Error),
    /// A prompt could not be tokenised.
    #[error(transparent)]
    Tokenizer(#[from] zmlx_models::tokenizer::TokenizerError),
    /// An option out of range.
    #[error("{name} = {value}: must be {allowed}")]
    Option {
        /// The option.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// The prompts of a file make no sense.
    #[error("{}: {message}", path.display())]
    Prompts {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        message: String,
    },
    /// A prompt and the tokens to generate do not fit into the model's context.
    #[error(
        "prompt {name}: {prompt} tokens and {max_tokens} to generate do not fit into the context of {context}: shorten the prompt, or ask for fewer tokens"
    )]
    TooLong {
        /// The prompt's name.
        name: String,
        /// Its tokens.
        prompt: usize,
        /// Tokens to generate.
        max_tokens: usize,
        /// The model's positions.
        context: usize,
    },
    /// The patched model's output is no number where stock's is one.
    #[error(
        "prompt {prompt}: the patched model's output is not a number at position {position}, and stock's is one: --exclude patterns to find the one that does it"
    )]
    PatchedNotANumber {
        /// The prompt's name.
        prompt: String,
        /// Position of the token.
        position: usize,
    },
    /// A speed that cannot be.
    #[error(transparent)]
    AboveRoofline(#[from] AboveRoofline),
    /// Nothing is remembered of which patterns pay for a model.
    #[error(
        "it was not measured which patterns pay for {} with these threads, on this machine and in this version: run zmlx lab smart-patch first",
        path.display()
    )]
    NotMeasured {
        /// The model.
        path: PathBuf,
    },
    /// No pattern's effect could be measured on a sample.
    #[error("the sample was decoded in no time at all: give more tokens to generate")]
    NoSpeed,
    /// What was measured could not be kept or found.
    #[error(transparent)]
    Store(#[from] zmlx_tune::StoreError),
    /// There is no folder to keep it in.
    #[error(transparent)]
    NoCache(#[from] zmlx_mlx::locate::LocateError),
    /// A capsule is wrong.
    #[error(transparent)]
    Capsule(#[from] CapsuleError),
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// Why a file is no capsule that can be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CapsuleError {
    /// It could not be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It is larger than any capsule.
    #[error("{}: {bytes} bytes are more than the {limit} that a capsule may have: it is another kind of file", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// It is not JSON, or cut off.
    #[error("{}: is not whole JSON ({message}): it is cut off or another kind of file; measure again", path.display())]
    NotJson {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        message: String,
    },
    /// It is JSON of another kind.
    #[error("{}: has no \"schema\", so it is not a capsule: give a file that --capsule wrote", path.display())]
    NotACapsule {
        /// The file.
        path: PathBuf,
    },
    /// It is of another version.
    #[error("{}: its schema is {found:?}, and this program reads {known:?}: measure again, or use the zmlx that wrote it", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: String,
        /// The schema that is read.
        known: &'static str,
    },
    /// A field is missing or of another type.
    #[error("{}: is not as the schema says ({message}): it was damaged or changed by hand; measure again", path.display())]
    Schema {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        message: String,
    },
    /// Its fields contradict each other.
    #[error("{}: {message}: it was damaged or changed by hand; measure again", path.display())]
    Inconsistent {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}
