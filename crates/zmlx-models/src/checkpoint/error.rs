//! What can be wrong with a checkpoint.

use std::path::PathBuf;

use thiserror::Error;

use super::header::LONGEST_HEADER;

/// Why a folder's weights cannot be read.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The folder is not there.
    #[error("{} is not a folder; give the folder that holds config.json and model.safetensors", path.display())]
    MissingFolder {
        /// What was given.
        path: PathBuf,
    },
    /// The folder holds no weights.
    #[error("{} has no model*.safetensors; {hint}", path.display())]
    NoWeights {
        /// The folder.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
    },
    /// A file could not be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A safetensors file is damaged or was made to deceive.
    #[error("{}: {problem}; fetch the file again or convert the model anew", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: Box<HeaderProblem>,
    },
    /// The index of a sharded checkpoint is wrong.
    #[error("{}: {problem}; fetch the model again", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        problem: IndexProblem,
    },
    /// Two files hold a tensor of the same name.
    #[error("tensor {tensor} is in both {} and {}; keep only one model in the folder", first.display(), second.display())]
    TwoFiles {
        /// The tensor.
        tensor: String,
        /// One file.
        first: PathBuf,
        /// The other file.
        second: PathBuf,
    },
}

/// What is wrong with a safetensors header.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[allow(missing_docs)] // the messages say what the fields are
pub enum HeaderProblem {
    #[error("the file has {length} bytes, and a safetensors file has at least 8")]
    TooShort { length: u64 },
    #[error(
        "its header claims {header} bytes, and only {available} follow: the file is cut off or is not safetensors"
    )]
    LongerThanFile { header: u64, available: u64 },
    #[error("its header claims {header} bytes, more than the {LONGEST_HEADER} allowed")]
    TooLarge { header: u64 },
    #[error("its header is not UTF-8")]
    NotUtf8,
    #[error("its header is not a JSON object of tensors: {message}")]
    NotJson { message: String },
    #[error("tensor {tensor} is listed twice")]
    Twice { tensor: String },
    #[error("tensor {tensor}: {message}")]
    BadEntry { tensor: String, message: String },
    #[error("tensor {tensor} has the unknown dtype {dtype}")]
    UnknownDtype { tensor: String, dtype: String },
    #[error("tensor {tensor}: shape {shape:?} of {dtype} has more bytes than can be counted")]
    Overflow { tensor: String, shape: Vec<usize>, dtype: String },
    #[error(
        "tensor {tensor}: shape {shape:?} of {dtype} takes {expected}, its data_offsets give {found} bytes"
    )]
    SizeMismatch { tensor: String, shape: Vec<usize>, dtype: String, expected: String, found: u64 },
    #[error("tensor {tensor}: its data_offsets run backwards, from {begin} to {end}")]
    Backwards { tensor: String, begin: u64, end: u64 },
    #[error(
        "tensor {tensor}: its data ends at {end}, and the file holds {available} bytes of data: it is cut off"
    )]
    Truncated { tensor: String, end: u64, available: u64 },
    #[error("tensors {first} and {second} share bytes")]
    Overlap { first: String, second: String },
    #[error("the {bytes} bytes before tensor {tensor} belong to no tensor")]
    Hole { tensor: String, bytes: u64 },
    #[error("its last {bytes} bytes belong to no tensor")]
    Trailing { bytes: u64 },
}

/// What is wrong with a sharded checkpoint's index.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[allow(missing_docs)] // the messages say what the fields are
pub enum IndexProblem {
    #[error("it has {length} bytes, more than the {LONGEST_HEADER} allowed")]
    TooLarge { length: u64 },
    #[error("it is not JSON: {message}")]
    NotJson { message: String },
    #[error("it has no \"weight_map\" from tensor names to file names")]
    NoWeightMap,
    #[error("tensor {tensor} is said to be in {shard:?}, which is not a plain file name inside the folder")]
    UnsafePath { tensor: String, shard: String },
    #[error("the file {shard} it names is missing")]
    MissingShard { shard: String },
    #[error("tensor {tensor} is said to be in {shard}, and is not there")]
    MissingTensor { tensor: String, shard: String },
}
