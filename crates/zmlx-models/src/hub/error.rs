//! Why a model could not be found or fetched.

use std::path::PathBuf;

use thiserror::Error;

/// Why a model folder could not be found or fetched.
#[derive(Debug, Error)]
pub enum HubError {
    /// What was given is a file.
    #[error("{} is a file; give the folder that holds config.json and the weights, or a .gguf file", path.display())]
    IsFile {
        /// The file.
        path: PathBuf,
    },
    /// What was given is neither a folder nor a hub id.
    #[error("{spec:?} is neither an existing folder nor a hub id such as org/name or org/name@revision")]
    NeitherFolderNorId {
        /// What was given.
        spec: String,
    },
    /// The model is not (wholly) in the cache and could not be fetched.
    #[error("model {model} is {state} the cache at {} and {reason}; no folder has that name either", cache.display())]
    NotCached {
        /// The model, with its revision if one was given.
        model: String,
        /// "not in" or "only partly in".
        state: &'static str,
        /// The cache folder.
        cache: PathBuf,
        /// Why it was not fetched.
        reason: String,
    },
    /// The hub has no such model, or does not show it.
    #[error("no folder {model} is here, and the hub answers {status}: {}", advice(*.status))]
    Refused {
        /// The model, with its revision if one was given.
        model: String,
        /// HTTP status.
        status: u16,
    },
    /// The cache folder cannot be written.
    #[error("cannot write model {model} to the cache at {}: {source}; set HF_HOME to a folder that can be written", cache.display())]
    CacheNotWritable {
        /// The model, with its revision if one was given.
        model: String,
        /// The cache folder.
        cache: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file could not be fetched.
    #[error("could not fetch {file} of model {model}: {reason}; run again to go on where it stopped")]
    Download {
        /// The model, with its revision if one was given.
        model: String,
        /// The file.
        file: String,
        /// The cause.
        reason: String,
    },
    /// The hub's model has no files that could be run.
    #[error("model {model} has no {missing} on the hub; choose one in the safetensors format")]
    Unusable {
        /// The model, with its revision if one was given.
        model: String,
        /// What is missing.
        missing: &'static str,
    },
}

fn advice(status: u16) -> &'static str {
    match status {
        404 => "it has no such model or revision",
        _ => "it has no such model or does not let you read it (gated or private models need HF_TOKEN)",
    }
}
