//! GGUF files: one file with hyperparameters, tokenizer and weights, as llama.cpp uses them.
//!
//! The format is described at <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Weights of the types Q4_0,
//! Q4_1 and Q8_0 become MLX's affine layout with groups of 32 without any loss: every type stores `w = scale * code +
//! bias` with whole-number codes, only the bias is implied in some. Names and hyperparameters are brought to those of the
//! model folders that the families know, so that a family never learns where its weights came from.
//!
//! A file comes from strangers: its header is checked against itself and against the file's size before a weight is read.

mod convert;
mod header;
mod names;
mod vocabulary;

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use thiserror::Error;
use zmlx_mlx::Array;

pub use header::HeaderProblem;

use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::tensors::{Tensor, Tensors};
use crate::tokenizer::Tokenizer;
use convert::Affine;
use header::{GgufTensor, Header, Kind};
use names::Placed;

/// Why a GGUF file cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The file could not be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is damaged or was made to deceive.
    #[error("{}: {problem}; fetch the file again or convert the model anew", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: HeaderProblem,
    },
    /// A tensor is stored in a type that has no counterpart here.
    #[error(
        "{}: tensor {tensor} has the type {kind}; F32, F16, BF16, Q4_0, Q4_1 and Q8_0 can be read: requantise the model \
         to one of them",
        path.display()
    )]
    UnsupportedType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type as llama.cpp names it.
        kind: String,
    },
    /// The file is of an architecture that no family here runs.
    #[error("{}: architecture {found:?} is not supported; known: {known}", path.display())]
    UnknownArchitecture {
        /// The file.
        path: PathBuf,
        /// What the file says.
        found: String,
        /// What is known.
        known: String,
    },
    /// A key of the metadata is missing, or has a value that makes no sense or is not supported.
    #[error("{}: {key}: {message}", path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong.
        message: String,
    },
    /// A scale that is no finite number, or whose bias would not be one.
    #[error("{}: tensor {tensor} has a scale that is not a finite number or too large: the file is damaged", path.display())]
    Scale {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
}

/// The tokenizer of a GGUF file, of whatever architecture; `None` if it has none.
///
/// # Errors
/// [`LoadError::Gguf`] if the file or its kind of tokenizer cannot be read, [`LoadError::Tokenizer`] if it contradicts
/// itself.
pub fn read_tokenizer(path: &Path) -> Result<Option<Tokenizer>, LoadError> {
    vocabulary::tokenizer(path, &Header::read(path)?)
}

/// A GGUF file whose header was read and checked, as a model of a family here.
#[derive(Debug)]
pub(crate) struct GgufModel {
    path: PathBuf,
    header: Header,
    placed: Vec<Placed>,
    config: ModelConfig,
}

impl GgufModel {
    /// Reads the header, and finds the family's names and hyperparameters.
    pub(crate) fn open(path: &Path) -> Result<Self, GgufError> {
        let header = Header::read(path)?;
        let (config, placed) = names::understand(path, &header)?;
        Ok(Self { path: path.to_owned(), header, placed, config: ModelConfig::from_json(config) })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What `config.json` would say.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of all tensors in the file.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.header.tensors.iter().map(|t| t.bytes).sum()
    }

    /// The tensors as they will be once they are converted, under the family's names.
    pub(crate) fn tensors(&self) -> Tensors {
        let one = |(name, part): (String, Part)| {
            let tensor = &self.header.tensors[self.placed[part.placed].tensor];
            let shape = part.shape(&self.placed[part.placed], tensor);
            let dtype = part.dtype(tensor).to_owned();
            (name.clone(), Tensor::stored(&name, shape, dtype))
        };
        Tensors::from_list(self.parts().into_iter().map(one))
    }

    /// Bytes of each converted tensor.
    pub(crate) fn bytes(&self) -> HashMap<String, u64> {
        let one = |(name, part): (String, Part)| {
            let tensor = &self.header.tensors[self.placed[part.placed].tensor];
            let shape = part.shape(&self.placed[part.placed], tensor);
            let size = if matches!(part.dtype(tensor), "F32" | "U32") { 4 } else { 2 };
            (name, shape.iter().map(|&d| d as u64).product::<u64>() * size)
        };
        self.parts().into_iter().map(one).collect()
    }

    /// The tokenizer, if the file has one.
    pub(crate) fn tokenizer(&self) -> Result<Option<Tokenizer>, LoadError> {
        vocabulary::tokenizer(&self.path, &self.header)
    }

    /// Opens the file to read weights.
    pub(crate) fn reader(&self) -> Result<Reader<'_>, GgufError> {
        let read = |source| GgufError::Read { path: self.path.clone(), source };
        let file = File::open(&self.path).map_err(read)?;
        Ok(Reader {
            model: self,
            file,
            parts: self.parts().into_iter().collect(),
            affine: Affine::default(),
            ready: HashMap::new(),
        })
    }

    /// Every converted tensor's name, and what it is made of.
    fn parts(&self) -> Vec<(String, Part)> {
        let mut parts = Vec::new();
        for (index, placed) in self.placed.iter().enumerate() {
            let quantized = self.header.tensors[placed.tensor].kind.bits().is_some();
            let mut add = |name: String, what| parts.push((name, Part { placed: index, what }));
            match placed.name.strip_suffix(".weight") {
                Some(module) if quantized => {
                    add(placed.name.clone(), What::Packed);
                    add(format!("{module}.scales"), What::Scales);
                    add(format!("{module}.biases"), What::Biases);
                }
                _ => add(placed.name.clone(), What::Floats),
            }
        }
        parts
    }
}

/// One of the tensors that a tensor of the file becomes.
#[derive(Debug, Clone, Copy)]
struct Part {
    /// Number in [`GgufModel::placed`].
    placed: usize,
    what: What,
}

#[derive(Debug, Clone, Copy)]
enum What {
    Floats,
    Packed,
    Scales,
    Biases,
}

impl Part {
    fn shape(self, placed: &Placed, tensor: &GgufTensor) -> Vec<i32> {
        let mut shape = placed.shape.clone().unwrap_or_else(|| tensor.shape.clone());
        if let Some(last) = shape.last_mut() {
            *last = match (self.what, tensor.kind.bits()) {
                // 64-bit in between: columns x bits can pass 2^31.
                (What::Packed, Some(bits)) => (i64::from(*last) * i64::from(bits) / 32) as i32,
                (What::Scales | What::Biases, _) => *last / header::GROUP as i32,
                _ => *last,
            };
        }
        shape
    }

    fn dtype(self, tensor: &GgufTensor) -> &'static str {
        match (self.what, tensor.kind) {
            (What::Packed, _) => "U32",
            (What::Scales | What::Biases, _) | (What::Floats, Kind::F16) => "F16",
            (What::Floats, Kind::BF16) => "BF16",
            (What::Floats, _) => "F32",
        }
    }
}

/// Reads weights from an open file.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    model: &'a GgufModel,
    file: File,
    parts: HashMap<String, Part>,
    /// The last converted tensor.
    affine: Affine,
    /// Scales and biases that came with packed words and were not asked for yet.
    ready: HashMap<String, Array>,
}

impl Reader<'_> {
    /// A converted tensor, `None` when the file has none of this name. Each can be taken once.
    pub(crate) fn take(&mut self, name: &str) -> Result<Option<Array>, LoadError> {
        if let Some(array) = self.ready.remove(name) {
            return Ok(Some(array));
        }
        let Some(part) = self.parts.get(name) else { return Ok(None) };
        let placed = &self.model.placed[part.placed];
        let tensor = &self.model.header.tensors[placed.tensor];
        let path = &self.model.path;
        let shape = |what| Part { what, ..*part }.shape(placed, tensor);
        let Some(bits) = tensor.kind.bits() else {
            let floats = convert::floats(path, &self.file, tensor, placed.heads)?;
            return Ok(Some(floats.into_array(&shape(What::Floats))?));
        };
        let affine = &mut self.affine;
        convert::affine(path, &self.file, tensor, bits, placed.heads, affine)?;
        let packed = Array::from_slice(&affine.packed, &shape(What::Packed))?;
        let scales = Array::from_slice(&affine.scales, &shape(What::Scales))?;
        let biases = Array::from_slice(&affine.biases, &shape(What::Biases))?;
        let module = placed.name.strip_suffix(".weight").unwrap_or(&placed.name);
        self.ready.insert(format!("{module}.weight"), packed);
        self.ready.insert(format!("{module}.scales"), scales);
        self.ready.insert(format!("{module}.biases"), biases);
        Ok(self.ready.remove(name))
    }
}
