//! The tensors of a checkpoint, read from its safetensors headers alone.
//!
//! A safetensors file is an 8-byte little-endian length, a JSON header of that length that gives each
//! tensor's dtype, shape and byte range, and the bytes (<https://github.com/huggingface/safetensors>). The
//! header comes from strangers: every claim it makes is checked here, against the others and against the
//! file's size, before anything is loaded.

mod error;
mod header;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde_json::Value as Json;

use crate::files;
use header::LONGEST_HEADER;
pub(crate) use header::read_header;

pub use error::{CheckpointError, HeaderProblem, IndexProblem};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Where a tensor is and what it looks like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The safetensors file that holds it.
    pub file: PathBuf,
    /// dtype as the header writes it: `F32`, `BF16`, `U32`, ...
    pub dtype: String,
    /// Sizes of its axes, outermost first.
    pub shape: Vec<usize>,
    /// Bytes of its data.
    pub bytes: u64,
    /// Where its data begins in the file.
    pub offset: u64,
}

/// All tensors of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The tensors by name.
    pub tensors: BTreeMap<String, TensorInfo>,
    /// The safetensors files, in order of their names.
    pub files: Vec<PathBuf>,
}

impl Checkpoint {
    /// Reads and checks the headers of a model folder: `model.safetensors`, else the shards that
    /// `model.safetensors.index.json` names, else every `model*.safetensors`. No tensor's data is read.
    ///
    /// # Errors
    /// [`CheckpointError`], naming the file and what is wrong with it.
    pub fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
        let layout = Layout::find(dir)?;
        let files = layout.files(dir);
        let mut tensors: BTreeMap<String, TensorInfo> = BTreeMap::new();
        for file in &files {
            for (tensor, info) in read_header(file)? {
                let listed =
                    layout.weight_map.as_ref().and_then(|map| map.get(&tensor)).map(|shard| dir.join(shard));
                if listed.as_ref().is_some_and(|listed| listed != file) {
                    continue;
                }
                if let Some(other) = tensors.get(&tensor) {
                    return Err(CheckpointError::TwoFiles {
                        tensor,
                        first: other.file.clone(),
                        second: file.clone(),
                    });
                }
                tensors.insert(tensor, info);
            }
        }
        for (tensor, shard) in layout.weight_map.iter().flatten() {
            if !tensors.contains_key(tensor) {
                let problem = IndexProblem::MissingTensor { tensor: tensor.clone(), shard: shard.clone() };
                return Err(CheckpointError::Index { path: dir.join(INDEX), problem });
            }
        }
        Ok(Checkpoint { tensors, files })
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.bytes).sum()
    }
}

/// The safetensors files of a model folder; each of them exists, none has been opened.
///
/// # Errors
/// As [`Checkpoint::open`], for what can be seen without the headers.
pub fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    Ok(Layout::find(dir)?.files(dir))
}

/// Which files hold a checkpoint.
struct Layout {
    names: Vec<String>,
    /// Tensor name to file name, of a checkpoint with an index.
    weight_map: Option<BTreeMap<String, String>>,
}

impl Layout {
    fn find(dir: &Path) -> Result<Layout, CheckpointError> {
        if !dir.is_dir() {
            return Err(CheckpointError::MissingFolder { path: dir.to_owned() });
        }
        if dir.join(SINGLE).exists() {
            return Ok(Layout { names: vec![SINGLE.to_owned()], weight_map: None });
        }
        let index = dir.join(INDEX);
        if index.exists() {
            let fail = |problem| CheckpointError::Index { path: index.clone(), problem };
            let weight_map = read_index(&index)?;
            let mut names: Vec<String> = weight_map.values().cloned().collect();
            names.sort();
            names.dedup();
            if let Some(shard) = names.iter().find(|name| !dir.join(name).exists()) {
                return Err(fail(IndexProblem::MissingShard { shard: shard.clone() }));
            }
            return Ok(Layout { names, weight_map: Some(weight_map) });
        }
        let read = |source| CheckpointError::Read { path: dir.to_owned(), source };
        let mut names = Vec::new();
        let mut other_format = false;
        for entry in std::fs::read_dir(dir).map_err(read)? {
            let Ok(name) = entry.map_err(read)?.file_name().into_string() else { continue };
            other_format |= name.ends_with(".bin") || name.ends_with(".gguf") || name.ends_with(".npz");
            if name.starts_with("model") && name.ends_with(".safetensors") {
                names.push(name);
            }
        }
        names.sort();
        if names.is_empty() {
            let hint = if other_format {
                "its weights are in another format, convert them to safetensors"
            } else {
                "give the folder that holds config.json and the weights"
            };
            return Err(CheckpointError::NoWeights { path: dir.to_owned(), hint });
        }
        Ok(Layout { names, weight_map: None })
    }

    fn files(&self, dir: &Path) -> Vec<PathBuf> {
        self.names.iter().map(|name| dir.join(name)).collect()
    }
}

/// The `weight_map` of an index, every path in it checked.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let fail = |problem| CheckpointError::Index { path: path.to_owned(), problem };
    let read = |source| CheckpointError::Read { path: path.to_owned(), source };
    let length = std::fs::metadata(path).map_err(read)?.len();
    if length > LONGEST_HEADER {
        return Err(fail(IndexProblem::TooLarge { length }));
    }
    let Some(bytes) = files::read_if_there(path).map_err(read)? else {
        return Err(read(std::io::ErrorKind::NotFound.into()));
    };
    let json: Json = serde_json::from_slice(&bytes)
        .map_err(|error| fail(IndexProblem::NotJson { message: error.to_string() }))?;
    let map = json.get("weight_map").and_then(Json::as_object).filter(|map| !map.is_empty());
    let mut weight_map = BTreeMap::new();
    for (tensor, shard) in map.ok_or_else(|| fail(IndexProblem::NoWeightMap))? {
        let shard = shard.as_str().ok_or_else(|| fail(IndexProblem::NoWeightMap))?;
        let plain = Path::new(shard).components().all(|part| matches!(part, Component::Normal(_)));
        if shard.is_empty() || !plain || shard.contains(['\\', '\0']) {
            return Err(fail(IndexProblem::UnsafePath { tensor: tensor.clone(), shard: shard.to_owned() }));
        }
        weight_map.insert(tensor.clone(), shard.to_owned());
    }
    Ok(weight_map)
}
