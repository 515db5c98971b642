//! Where a model comes from: a folder or a GGUF file.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use zmlx_engine::memory::copying_threads;
use zmlx_mlx::{Array, Dtype, io};

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::families::{self, Built};
use crate::gguf::{self, GgufModel};
use crate::quantize::Recode;
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
        self.build_as(&Recode::Keep)
    }

    /// The same with matrices in another form.
    pub(crate) fn build_as(&self, recode: &Recode) -> Result<Built, LoadError> {
        families::build(self.config(), self.tensors()?, recode).map_err(|error| match self {
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

    /// The files that hold the weights.
    pub(crate) fn files(&self) -> Vec<&Path> {
        match self {
            Self::Folder { checkpoint, .. } => checkpoint.files.iter().map(PathBuf::as_path).collect(),
            Self::Gguf(model) => vec![model.path()],
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
                Ok(Reader::Folder { arrays, given: HashMap::new(), checkpoint, open: None })
            }
            Self::Gguf(model) => Ok(Reader::Gguf(model.reader()?)),
        }
    }
}

/// Gives out weights.
pub(crate) enum Reader<'a> {
    /// Lazy arrays, read when they are evaluated, and for bytes the file that was read last.
    Folder {
        arrays: HashMap<String, Array>,
        /// How often an array that several tensors are parts of was given out.
        given: HashMap<String, usize>,
        checkpoint: &'a Checkpoint,
        open: Option<(PathBuf, File)>,
    },
    /// Converted when asked for.
    Gguf(gguf::Reader<'a>),
}

impl Reader<'_> {
    /// The array of a source of the graph's tensors; each can be taken as often as it has `readers`, and is dropped then.
    pub(crate) fn take(&mut self, name: &str, readers: usize) -> Result<Option<Array>, LoadError> {
        match self {
            Self::Folder { arrays, given, .. } if readers > 1 => {
                let count = given.entry(name.to_owned()).or_default();
                *count += 1;
                Ok(if *count < readers { arrays.get(name).cloned() } else { arrays.remove(name) })
            }
            Self::Folder { arrays, .. } => Ok(arrays.remove(name)),
            Self::Gguf(reader) => reader.take(name),
        }
    }

    /// Writes the bytes of a source into `buffer` as the file has them, and says their dtype; `None` if that takes more than
    /// reading a part of a file: then [`Self::take`] gives it.
    pub(crate) fn bytes(&mut self, name: &str, buffer: &mut Vec<u8>) -> Result<Option<Dtype>, LoadError> {
        let Self::Folder { checkpoint, open, .. } = self else { return Ok(None) };
        let Some(tensor) = checkpoint.tensors.get(name) else { return Ok(None) };
        let Some(dtype) = dtype_named(&tensor.dtype) else { return Ok(None) };
        let fail =
            |source| LoadError::Checkpoint(CheckpointError::Read { path: tensor.file.clone(), source });
        if open.as_ref().is_none_or(|(path, _)| *path != tensor.file) {
            *open = Some((tensor.file.clone(), File::open(&tensor.file).map_err(fail)?));
        }
        let Some((_, file)) = open else { return Ok(None) };
        buffer.resize(tensor.bytes as usize, 0);
        read_in_parts(file, tensor.offset, buffer).map_err(fail)?;
        Ok(Some(dtype))
    }
}

/// Reads a part of a file on several threads.
fn read_in_parts(file: &File, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
    let part = buffer.len().div_ceil(copying_threads(buffer.len())).max(1);
    std::thread::scope(|scope| {
        let parts: Vec<_> = buffer
            .chunks_mut(part)
            .enumerate()
            .map(|(i, chunk)| scope.spawn(move || file.read_exact_at(chunk, offset + (i * part) as u64)))
            .collect();
        let ended = |p: std::thread::ScopedJoinHandle<'_, std::io::Result<()>>| {
            p.join().unwrap_or_else(|_| Err(std::io::Error::other("a reading thread panicked")))
        };
        parts.into_iter().try_for_each(ended)
    })
}

/// The dtype of that name in safetensors headers, of those that weights come in.
fn dtype_named(name: &str) -> Option<Dtype> {
    Some(match name {
        "F32" => Dtype::Float32,
        "F16" => Dtype::Float16,
        "BF16" => Dtype::Bfloat16,
        "U32" => Dtype::Uint32,
        "U8" => Dtype::Uint8,
        _ => return None,
    })
}
