//! Where a model comes from: a folder or a GGUF file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use zmlx_mlx::{Array, io};

use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::families::{self, Built};
use crate::gguf::{self, GgufModel};
use crate::tensors::Tensors;
use crate::tokenizer::Tokenizer;

/// An opened model, of which no weight was read yet.
pub(crate) enum Source {
    /// A folder with `config.json` and safetensors.
    Folder { dir: PathBuf, config: ModelConfig, checkpoint: Checkpoint },
    /// A GGUF file.
    Gguf(Box<GgufModel>),
}

impl Source {
    /// Opens a folder, or a GGUF file if `path` is a file.
    pub(crate) fn open(path: &Path) -> Result<Self, LoadError> {
        if path.is_file() {
            return Ok(Self::Gguf(Box::new(GgufModel::open(path)?)));
        }
        let config = ModelConfig::read(path)?;
        let checkpoint = Checkpoint::open(path)?;
        Ok(Self::Folder { dir: path.to_owned(), config, checkpoint })
    }

    /// The configuration.
    pub(crate) fn config(&self) -> &ModelConfig {
        match self {
            Self::Folder { config, .. } => config,
            Self::Gguf(model) => model.config(),
        }
    }

    /// The tensors, as the weights will be read.
    fn tensors(&self) -> Result<Tensors, LoadError> {
        match self {
            Self::Folder { checkpoint, .. } => Tensors::new(checkpoint),
            Self::Gguf(model) => Ok(model.tensors()),
        }
    }

    /// The graph that the configuration asks for, checked against the tensors.
    pub(crate) fn build(&self) -> Result<Built, LoadError> {
        families::build(self.config(), self.tensors()?).map_err(|error| match self {
            Self::Folder { .. } => error,
            Self::Gguf(model) => LoadError::InGguf { path: model.path().to_owned(), source: Box::new(error) },
        })
    }

    /// Bytes of all tensors as they are in the files.
    pub(crate) fn file_bytes(&self) -> u64 {
        match self {
            Self::Folder { checkpoint, .. } => checkpoint.total_bytes(),
            Self::Gguf(model) => model.file_bytes(),
        }
    }

    /// Bytes of each source of the graph's tensors.
    pub(crate) fn bytes(&self) -> HashMap<String, u64> {
        match self {
            Self::Folder { checkpoint, .. } => {
                checkpoint.tensors.iter().map(|(name, t)| (name.clone(), t.bytes)).collect()
            }
            Self::Gguf(model) => model.bytes(),
        }
    }

    /// The tokenizer, if there is one.
    pub(crate) fn tokenizer(&self) -> Result<Option<Tokenizer>, LoadError> {
        match self {
            Self::Folder { dir, .. } => Ok(Tokenizer::load(dir)?),
            Self::Gguf(model) => model.tokenizer(),
        }
    }

    /// Opens the weights.
    pub(crate) fn reader(&self) -> Result<Reader<'_>, LoadError> {
        match self {
            Self::Folder { checkpoint, .. } => {
                let mut arrays = HashMap::new();
                for file in &checkpoint.files {
                    arrays.extend(io::load_safetensors(file)?);
                }
                Ok(Reader::Folder(arrays))
            }
            Self::Gguf(model) => Ok(Reader::Gguf(model.reader()?)),
        }
    }
}

/// Gives out weights.
pub(crate) enum Reader<'a> {
    /// Lazy arrays, read when they are evaluated.
    Folder(HashMap<String, Array>),
    /// Converted when asked for.
    Gguf(gguf::Reader<'a>),
}

impl Reader<'_> {
    /// The array of a source of the graph's tensors; each can be taken once.
    pub(crate) fn take(&mut self, name: &str) -> Result<Option<Array>, LoadError> {
        match self {
            Self::Folder(arrays) => Ok(arrays.remove(name)),
            Self::Gguf(reader) => reader.take(name),
        }
    }
}
