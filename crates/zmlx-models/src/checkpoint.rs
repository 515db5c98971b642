//! The tensors of a checkpoint, read from its safetensors headers alone.
//!
//! A safetensors file is an 8-byte little-endian length, a JSON header of that length that gives each
//! tensor's dtype, shape and byte range, and the bytes (<https://github.com/huggingface/safetensors>). The
//! header comes from strangers: every claim it makes is checked here, against the others and against the
//! file's size, before anything is loaded.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value as Json;
use thiserror::Error;

use crate::files;

/// Longest header, and longest index, that is read: the limit of the reference reader.
const LONGEST_HEADER: u64 = 100_000_000;
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

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

/// Reads and checks one file's header.
fn read_header(path: &Path) -> Result<Vec<(String, TensorInfo)>, CheckpointError> {
    let fail = |problem| CheckpointError::Header { path: path.to_owned(), problem: Box::new(problem) };
    let read = |source| CheckpointError::Read { path: path.to_owned(), source };
    // Looked at before it is opened: opening a pipe may never return.
    let metadata = std::fs::metadata(path).map_err(read)?;
    if !metadata.is_file() {
        return Err(read(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let mut file = File::open(path).map_err(read)?;
    let length = metadata.len();
    if length < 8 {
        return Err(fail(HeaderProblem::TooShort { length }));
    }
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).map_err(read)?;
    let (header, available) = (u64::from_le_bytes(prefix), length - 8);
    if header > available {
        return Err(fail(HeaderProblem::LongerThanFile { header, available }));
    }
    if header > LONGEST_HEADER {
        return Err(fail(HeaderProblem::TooLarge { header }));
    }
    let mut bytes = Vec::new();
    file.take(header).read_to_end(&mut bytes).map_err(read)?;
    let mut tensors = parse_header(&bytes, available - header, path).map_err(fail)?;
    // Offsets in the header count from its end.
    tensors.iter_mut().for_each(|(_, tensor)| tensor.offset += 8 + header);
    Ok(tensors)
}

fn parse_header(
    bytes: &[u8],
    available: u64,
    path: &Path,
) -> Result<Vec<(String, TensorInfo)>, HeaderProblem> {
    let text = std::str::from_utf8(bytes).map_err(|_| HeaderProblem::NotUtf8)?;
    let Entries(entries) =
        serde_json::from_str(text).map_err(|error| HeaderProblem::NotJson { message: error.to_string() })?;
    let mut ranges = BTreeMap::new();
    let mut tensors = Vec::with_capacity(entries.len());
    for (tensor, entry) in entries {
        if tensor == "__metadata__" {
            continue;
        }
        let (info, begin, end) = check_entry(&tensor, &entry, path)?;
        if end > available {
            return Err(HeaderProblem::Truncated { tensor, end, available });
        }
        // Sorted by position; the name tells tensors without data apart.
        if ranges.insert((begin, end, tensor.clone()), ()).is_some() {
            return Err(HeaderProblem::Twice { tensor });
        }
        tensors.push((tensor, info));
    }
    let mut seen: std::collections::BTreeSet<&str> = std::collections::BTreeSet::new();
    if let Some((tensor, _)) = tensors.iter().find(|(tensor, _)| !seen.insert(tensor)) {
        return Err(HeaderProblem::Twice { tensor: tensor.clone() });
    }
    let (mut position, mut previous) = (0, "");
    for (begin, end, tensor) in ranges.keys() {
        if *begin < position {
            return Err(HeaderProblem::Overlap { first: previous.to_owned(), second: tensor.clone() });
        }
        if *begin > position {
            return Err(HeaderProblem::Hole { tensor: tensor.clone(), bytes: begin - position });
        }
        (position, previous) = (*end, tensor);
    }
    match available - position {
        0 => Ok(tensors),
        bytes => Err(HeaderProblem::Trailing { bytes }),
    }
}

/// One tensor's entry, and where its bytes begin and end.
fn check_entry(tensor: &str, entry: &Json, path: &Path) -> Result<(TensorInfo, u64, u64), HeaderProblem> {
    let bad =
        |message: &str| HeaderProblem::BadEntry { tensor: tensor.to_owned(), message: message.to_owned() };
    let dtype = entry.get("dtype").and_then(Json::as_str).ok_or_else(|| bad("it has no dtype"))?.to_owned();
    let whole_numbers =
        |key: &str| -> Option<Vec<u64>> { entry.get(key)?.as_array()?.iter().map(Json::as_u64).collect() };
    let shape =
        whole_numbers("shape").ok_or_else(|| bad("its shape is not a list of whole numbers from 0"))?;
    let shape: Option<Vec<usize>> = shape.into_iter().map(|size| usize::try_from(size).ok()).collect();
    let shape = shape.ok_or_else(|| bad("its shape does not fit this machine"))?;
    let offsets = whole_numbers("data_offsets").unwrap_or_default();
    let &[begin, end] = offsets.as_slice() else {
        return Err(bad("its data_offsets are not two whole numbers from 0"));
    };
    let found = end.checked_sub(begin);
    let found = found.ok_or_else(|| HeaderProblem::Backwards { tensor: tensor.to_owned(), begin, end })?;
    let unknown = || HeaderProblem::UnknownDtype { tensor: tensor.to_owned(), dtype: dtype.clone() };
    let bits = bits_of(&dtype).ok_or_else(unknown)?;
    let overflow =
        || HeaderProblem::Overflow { tensor: tensor.to_owned(), shape: shape.clone(), dtype: dtype.clone() };
    let bits =
        shape.iter().try_fold(bits, |bits, &size| bits.checked_mul(size as u64)).ok_or_else(overflow)?;
    if bits % 8 != 0 || bits / 8 != found {
        let expected = if bits % 8 == 0 { format!("{} bytes", bits / 8) } else { format!("{bits} bits") };
        return Err(HeaderProblem::SizeMismatch { tensor: tensor.to_owned(), shape, dtype, expected, found });
    }
    Ok((TensorInfo { file: path.to_owned(), dtype, shape, bytes: found, offset: begin }, begin, end))
}

/// Bits of one element of a safetensors dtype.
fn bits_of(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// A JSON object as the list of its entries, so that a name given twice is seen.
struct Entries(Vec<(String, Json)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Entries;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-lfm2-moe");

    type Files = Vec<(&'static str, Vec<u8>)>;

    /// A file with the given header and so many bytes of data.
    fn safetensors(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(dir.path().join(name), bytes).unwrap();
        }
        dir
    }

    fn one(name: &str) -> Vec<u8> {
        safetensors(&format!(r#"{{"{name}": {{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}}}"#), 8)
    }

    #[test]
    fn embedded_model() {
        let checkpoint = Checkpoint::open(Path::new(MODEL)).unwrap();
        assert_eq!(checkpoint.files, [Path::new(MODEL).join(SINGLE)]);
        let embedding = &checkpoint.tensors["model.embed_tokens.weight"];
        assert_eq!(
            (embedding.dtype.as_str(), embedding.shape.as_slice(), embedding.bytes),
            ("U32", &[4096, 32][..], 524_288)
        );
        let file = std::fs::metadata(&checkpoint.files[0]).unwrap().len();
        assert!(checkpoint.total_bytes() < file && file - checkpoint.total_bytes() < 100_000);
    }

    #[test]
    fn good_headers() {
        let cases = [
            ("empty", "{}", 0),
            ("padded", "{}      ", 0),
            ("metadata", r#"{"__metadata__": {"format": "mlx"}}"#, 0),
            ("scalar", r#"{"a": {"dtype": "BF16", "shape": [], "data_offsets": [0, 2]}}"#, 2),
            ("four bits", r#"{"a": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}}"#, 3),
            (
                "no elements, out of order",
                r#"{"b": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]}, "z": {"dtype": "F32", "shape": [0, 5], "data_offsets": [3, 3]},
                    "a": {"dtype": "F32", "shape": [7, 0], "data_offsets": [0, 0]}}"#,
                3,
            ),
        ];
        for (name, header, data) in cases {
            let dir = folder(&[(SINGLE, safetensors(header, data))]);
            let checkpoint = Checkpoint::open(dir.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(checkpoint.total_bytes(), data as u64, "{name}");
        }
    }

    fn entry(dtype: &str, shape: &str, offsets: &str) -> String {
        format!(r#"{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}"#)
    }

    #[test]
    fn hostile_headers() {
        let a = |dtype: &str, shape: &str, offsets: &str| {
            safetensors(&format!(r#"{{"a": {}}}"#, entry(dtype, shape, offsets)), 8)
        };
        let ab = |first: &str, second: &str, data: usize| {
            let header =
                format!(r#"{{"a": {}, "b": {}}}"#, entry("U8", "[4]", first), entry("U8", "[4]", second));
            safetensors(&header, data)
        };
        let mut not_utf8 = safetensors("{\"..\": 1}", 0);
        not_utf8[10] = 0xff;
        let nested = "[".repeat(100_000);
        let cases: Vec<(&str, Vec<u8>, &str)> = vec![
            ("empty file", vec![], "has 0 bytes"),
            ("seven bytes", vec![1; 7], "has 7 bytes"),
            (
                "header longer than file",
                [&100u64.to_le_bytes()[..], b"{}"].concat(),
                "claims 100 bytes, and only 2 follow",
            ),
            ("largest length", vec![0xff; 64], "claims 18446744073709551615 bytes"),
            ("not utf-8", not_utf8, "not UTF-8"),
            ("not json", safetensors("{\"a\"", 0), "not a JSON object"),
            ("no header", safetensors("", 0), "not a JSON object"),
            ("a list", safetensors("[]", 0), "not a JSON object"),
            ("trailing text", safetensors("{} {}", 0), "not a JSON object"),
            ("deeply nested", safetensors(&format!(r#"{{"a": {nested}"#), 0), "not a JSON object"),
            ("entry is text", safetensors(r#"{"a": "b"}"#, 0), "tensor a: it has no dtype"),
            (
                "no shape",
                safetensors(r#"{"a": {"dtype": "F32", "data_offsets": [0, 0]}}"#, 0),
                "tensor a: its shape",
            ),
            ("negative shape", a("F32", "[-2]", "[0, 8]"), "tensor a: its shape"),
            ("fractional shape", a("F32", "[2.0]", "[0, 8]"), "tensor a: its shape"),
            ("negative offsets", a("F32", "[2]", "[-8, 0]"), "tensor a: its data_offsets are not"),
            (
                "huge offsets",
                a("F32", "[2]", "[0, 99999999999999999999]"),
                "tensor a: its data_offsets are not",
            ),
            ("one offset", a("F32", "[2]", "[8]"), "tensor a: its data_offsets are not"),
            ("three offsets", a("F32", "[2]", "[0, 8, 8]"), "tensor a: its data_offsets are not"),
            ("backwards", a("F32", "[2]", "[8, 0]"), "run backwards, from 8 to 0"),
            ("unknown dtype", a("F33", "[2]", "[0, 8]"), "unknown dtype F33"),
            ("overflow", a("F32", "[4294967296, 4294967296]", "[0, 8]"), "more bytes than can be counted"),
            (
                "overflow by bits",
                a("F32", "[1152921504606846976]", "[0, 8]"),
                "more bytes than can be counted",
            ),
            (
                "wrong size",
                a("F32", "[3]", "[0, 8]"),
                "shape [3] of F32 takes 12 bytes, its data_offsets give 8 bytes",
            ),
            ("half a byte", a("F4", "[3]", "[0, 1]"), "takes 12 bits"),
            ("out of range", a("U8", "[16]", "[0, 16]"), "ends at 16, and the file holds 8 bytes"),
            (
                "far out of range",
                a("U8", "[0]", "[18446744073709551615, 18446744073709551615]"),
                "the file holds 8 bytes",
            ),
            (
                "truncated",
                ab("[0, 4]", "[4, 8]", 7),
                "tensor b: its data ends at 8, and the file holds 7 bytes",
            ),
            ("overlap", ab("[0, 4]", "[2, 6]", 6), "tensors a and b share bytes"),
            ("same bytes", ab("[0, 4]", "[0, 4]", 4), "tensors a and b share bytes"),
            ("hole", ab("[0, 4]", "[6, 10]", 10), "the 2 bytes before tensor b"),
            ("hole at the front", ab("[5, 9]", "[1, 5]", 9), "the 1 bytes before tensor b"),
            ("bytes left over", ab("[0, 4]", "[4, 8]", 11), "its last 3 bytes"),
            (
                "listed twice",
                safetensors(
                    &format!(
                        r#"{{"a": {0}, "a": {1}}}"#,
                        entry("U8", "[4]", "[0, 4]"),
                        entry("U8", "[4]", "[4, 8]")
                    ),
                    8,
                ),
                "tensor a is listed twice",
            ),
        ];
        for (name, bytes, expected) in cases {
            let dir = folder(&[(SINGLE, bytes)]);
            let error = Checkpoint::open(dir.path()).expect_err(name);
            assert!(matches!(error, CheckpointError::Header { .. }), "{name}: {error:?}");
            let text = error.to_string();
            assert!(
                text.contains(expected) && text.contains(SINGLE) && text.contains("fetch the file again"),
                "{name}: {text}"
            );
        }
    }

    #[test]
    fn header_over_the_limit_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SINGLE);
        std::fs::write(&path, 100_000_001u64.to_le_bytes()).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(200_000_000).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("claims 100000001 bytes, more than the 100000000 allowed"), "{error}");
    }

    #[test]
    fn every_cut_of_the_embedded_model_is_refused() {
        let whole = std::fs::read(Path::new(MODEL).join(SINGLE)).unwrap();
        let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        for length in [0, 7, 8, 9, header - 1, header, header + 1, whole.len() / 2, whole.len() - 1] {
            let dir = folder(&[(SINGLE, whole[..length].to_vec())]);
            let error = Checkpoint::open(dir.path()).unwrap_err();
            assert!(matches!(error, CheckpointError::Header { .. }), "{length}: {error}");
        }
    }

    #[test]
    fn layouts() {
        let index = |map: &str| format!(r#"{{"metadata": {{}}, "weight_map": {map}}}"#).into_bytes();
        let (x, y) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
        let both = index(&format!(r#"{{"a": "{x}", "b": "{y}"}}"#));
        let files = |dir: &tempfile::TempDir| {
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            let names: Vec<_> =
                checkpoint.tensors.iter().map(|(name, info)| (name.clone(), info.file.clone())).collect();
            names
                .into_iter()
                .map(|(name, file)| format!("{name} {}", file.strip_prefix(dir.path()).unwrap().display()))
                .collect::<Vec<_>>()
        };
        let expected = [format!("a {x}"), format!("b {y}")];
        assert_eq!(files(&folder(&[(x, one("a")), (y, one("b")), (INDEX, both.clone())])), expected);
        assert_eq!(
            files(&folder(&[(x, one("a")), (y, one("b")), ("adapter.safetensors", vec![])])),
            expected
        );
        assert_eq!(files(&folder(&[(SINGLE, one("c")), (x, one("a"))])), ["c model.safetensors"]);

        let errors: Vec<(&str, Files, &str)> = vec![
            ("empty folder", vec![], "has no model*.safetensors; give the folder"),
            ("another format", vec![("pytorch_model.bin", vec![])], "convert them to safetensors"),
            ("same tensor twice", vec![(x, one("a")), (y, one("a"))], "tensor a is in both"),
            (
                "missing shard",
                vec![(x, one("a")), (INDEX, both.clone())],
                "the file model-00002-of-00002.safetensors it names is missing",
            ),
            (
                "missing tensor",
                vec![(x, one("a")), (y, one("c")), (INDEX, both)],
                "tensor b is said to be in model-00002-of-00002",
            ),
            ("index not json", vec![(INDEX, b"{".to_vec())], "it is not JSON"),
            ("index not utf-8", vec![(INDEX, b"\xff".to_vec())], "it is not JSON"),
            ("no weight map", vec![(INDEX, b"{}".to_vec())], "no \"weight_map\""),
            ("empty weight map", vec![(INDEX, index("{}"))], "no \"weight_map\""),
            ("not a name", vec![(INDEX, index(r#"{"a": 3}"#))], "no \"weight_map\""),
            ("traversal", vec![(INDEX, index(r#"{"a": "../x.safetensors"}"#))], "not a plain file name"),
            ("hidden traversal", vec![(INDEX, index(r#"{"a": "x/../../y"}"#))], "not a plain file name"),
            ("absolute", vec![(INDEX, index(r#"{"a": "/etc/passwd"}"#))], "not a plain file name"),
            ("backslash", vec![(INDEX, index(r#"{"a": "..\\x"}"#))], "not a plain file name"),
            ("empty name", vec![(INDEX, index(r#"{"a": ""}"#))], "not a plain file name"),
        ];
        for (name, files, expected) in errors {
            let error = Checkpoint::open(folder(&files).path()).expect_err(name).to_string();
            assert!(error.contains(expected), "{name}: {error}");
        }
        let error = Checkpoint::open(Path::new("/no/such/folder")).unwrap_err();
        assert!(
            matches!(error, CheckpointError::MissingFolder { .. })
                && error.to_string().contains("/no/such/folder"),
            "{error}"
        );
    }

    #[test]
    fn a_folder_in_place_of_the_weights() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(SINGLE)).unwrap();
        assert!(matches!(Checkpoint::open(dir.path()).unwrap_err(), CheckpointError::Read { .. }));
    }
}
