use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use thiserror::Error;

use super::GgufError;

/// Elements that share a scale in every type that can be read.
pub(super) const GROUP: usize = 32;
/// Longest header that is read, in bytes: vocabularies of 250,000 tokens take some 15 MB.
const LONGEST_HEADER: u64 = 100_000_000;
/// Longest key or tensor name.
const LONGEST_NAME: u64 = 4096;
const MOST_AXES: u32 = 4;

/// What is wrong with a GGUF header.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[allow(missing_docs)] // the messages say what the fields are
pub enum HeaderProblem {
    #[error("it does not begin with \"GGUF\", so it is no GGUF file")]
    NotGguf,
    #[error("GGUF version {version}: only 2 and 3 can be read{hint}")]
    Version { version: u32, hint: &'static str },
    #[error("it ends in the middle of its header, at {what}")]
    CutOff { what: String },
    #[error("its header has more than the {LONGEST_HEADER} bytes allowed, at {what}")]
    TooLong { what: String },
    #[error("{what} claims {length} bytes, and only {left} follow")]
    LongerThanFile { what: String, length: u64, left: u64 },
    #[error("{what} is not UTF-8")]
    NotUtf8 { what: String },
    #[error("{what} has the unknown value type {found}")]
    ValueType { what: String, found: u32 },
    #[error("key {key} is there twice")]
    KeyTwice { key: String },
    #[error("general.alignment = {found}: must be a power of two from 8 to 65536")]
    Alignment { found: String },
    #[error("tensor {tensor} is there twice")]
    TensorTwice { tensor: String },
    #[error("tensor {tensor} has {axes} axes, and may have 1 to {MOST_AXES}")]
    Axes { tensor: String, axes: u32 },
    #[error(
        "tensor {tensor}: shape {shape:?} cannot be: every axis has 1 to 2^31 - 1 elements, all together below 2^48"
    )]
    Shape { tensor: String, shape: Vec<u64> },
    #[error("tensor {tensor}: rows of {columns} do not split into blocks of {GROUP}")]
    Blocks { tensor: String, columns: u64 },
    #[error("tensor {tensor}: its offset {offset} is not a multiple of {alignment}")]
    Misaligned { tensor: String, offset: u64, alignment: u64 },
    #[error(
        "tensor {tensor}: its data ends {end} bytes behind the header, and {available} follow: the file is cut off"
    )]
    Truncated { tensor: String, end: u64, available: u64 },
    #[error("tensors {first} and {second} share bytes")]
    Overlap { first: String, second: String },
    #[error("it is one part of several: join them with llama-gguf-split --merge")]
    Split,
}

/// A value of the metadata. Integers of all widths are one kind, as are floats.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    Integers(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
    Texts(Vec<String>),
}

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types)] // llama.cpp's names
pub(super) enum Kind {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q8_0,
}

impl Kind {
    /// Bits of a code; `None` for floats.
    pub(super) fn bits(self) -> Option<i32> {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => None,
            Self::Q4_0 | Self::Q4_1 => Some(4),
            Self::Q8_0 => Some(8),
        }
    }

    /// Elements of a block, and its bytes.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q4_0 => (GROUP, 2 + GROUP / 2),
            Self::Q4_1 => (GROUP, 4 + GROUP / 2),
            Self::Q8_0 => (GROUP, 2 + GROUP),
        }
    }

    fn from_id(id: u32) -> Result<Self, String> {
        Ok(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            8 => Self::Q8_0,
            30 => Self::BF16,
            _ => {
                let name = OTHER_KINDS.iter().find(|(other, _)| *other == id);
                return Err(name.map_or_else(|| format!("number {id}"), |(_, name)| (*name).to_owned()));
            }
        })
    }
}

/// Types that are known by name only.
const OTHER_KINDS: [(u32, &str); 28] = [
    (6, "Q5_0"),
    (7, "Q5_1"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

/// A tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GgufTensor {
    pub(super) name: String,
    /// Sizes of its axes, outermost first.
    pub(super) shape: Vec<i32>,
    pub(super) kind: Kind,
    /// Where its data begins in the file.
    pub(super) offset: u64,
    /// Bytes of its data.
    pub(super) bytes: u64,
}

/// Metadata and tensors of a file.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: Vec<GgufTensor>,
}

impl Header {
    /// Reads and checks a file's header.
    pub(super) fn read(path: &Path) -> Result<Self, GgufError> {
        let read = |source| GgufError::Read { path: path.to_owned(), source };
        // Looked at before it is opened: opening a pipe may never return.
        let metadata = std::fs::metadata(path).map_err(read)?;
        if !metadata.is_file() {
            return Err(read(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
        }
        let file = File::open(path).map_err(read)?;
        Self::parse(BufReader::new(file), metadata.len()).map_err(|fault| match fault {
            Fault::Read(source) => read(source),
            Fault::Problem(problem) => GgufError::Header { path: path.to_owned(), problem },
            Fault::Kind { tensor, kind } => {
                GgufError::UnsupportedType { path: path.to_owned(), tensor, kind }
            }
        })
    }

    fn parse(input: impl Read, length: u64) -> Result<Self, Fault> {
        let mut bytes = Bytes { input, left: length, position: 0 };
        if bytes.take::<4>("the first bytes").map_err(|fault| fault.unless_cut(HeaderProblem::NotGguf))?
            != *b"GGUF"
        {
            return Err(HeaderProblem::NotGguf.into());
        }
        let version = bytes.u32("the version")?;
        if !(2..=3).contains(&version) {
            let big_endian = (2..=3).contains(&version.swap_bytes());
            let hint = if big_endian { "; this file is big-endian" } else { "" };
            return Err(HeaderProblem::Version { version, hint }.into());
        }
        let (tensor_count, key_count) =
            (bytes.u64("the number of tensors")?, bytes.u64("the number of keys")?);
        let mut metadata = BTreeMap::new();
        // Counts are not believed: a list ends with the file at the latest, and nothing is reserved for it.
        for _ in 0..key_count {
            let key = bytes.text("a key", LONGEST_NAME)?;
            let value = bytes.value(&key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(HeaderProblem::KeyTwice { key }.into());
            }
        }
        if matches!(metadata.get("split.count"), Some(Value::Integer(n)) if *n > 1) {
            return Err(HeaderProblem::Split.into());
        }
        let alignment = alignment(&metadata)?;
        let mut tensors = Vec::new();
        for _ in 0..tensor_count {
            tensors.push(bytes.tensor(alignment)?);
        }
        let data = bytes.position.next_multiple_of(alignment);
        place(&mut tensors, data, length)?;
        Ok(Self { metadata, tensors })
    }
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, HeaderProblem> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(Value::Integer(n)) if (8..=65536).contains(n) && n.count_ones() == 1 => Ok(*n as u64),
        Some(Value::Integer(n)) => Err(HeaderProblem::Alignment { found: n.to_string() }),
        Some(_) => Err(HeaderProblem::Alignment { found: "no whole number".to_owned() }),
    }
}

/// Turns offsets from the data's begin into offsets in the file, and checks that no two tensors share bytes.
fn place(tensors: &mut [GgufTensor], data: u64, length: u64) -> Result<(), HeaderProblem> {
    let available = length.saturating_sub(data);
    let mut ranges: Vec<(u64, u64, &str)> = Vec::new();
    let mut names = std::collections::HashSet::new();
    for t in tensors.iter() {
        if !names.insert(t.name.as_str()) {
            return Err(HeaderProblem::TensorTwice { tensor: t.name.clone() });
        }
        let end = t.offset.saturating_add(t.bytes);
        if end > available {
            return Err(HeaderProblem::Truncated { tensor: t.name.clone(), end, available });
        }
        ranges.push((t.offset, end, &t.name));
    }
    ranges.sort();
    if let Some(pair) = ranges.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        let (first, second) = (pair[0].2.to_owned(), pair[1].2.to_owned());
        return Err(HeaderProblem::Overlap { first, second });
    }
    tensors.iter_mut().for_each(|t| t.offset += data);
    Ok(())
}

/// Why a header could not be read, without the file's name.
enum Fault {
    Read(io::Error),
    Problem(HeaderProblem),
    Kind { tensor: String, kind: String },
}

impl Fault {
    /// Another problem if the file was cut off.
    fn unless_cut(self, problem: HeaderProblem) -> Self {
        match self {
            Self::Problem(HeaderProblem::CutOff { .. }) => Self::Problem(problem),
            other => other,
        }
    }
}

impl From<HeaderProblem> for Fault {
    fn from(problem: HeaderProblem) -> Self {
        Self::Problem(problem)
    }
}

/// Bytes of a header, counted.
struct Bytes<R> {
    input: R,
    /// Bytes of the file that are left.
    left: u64,
    position: u64,
}

impl<R: Read> Bytes<R> {
    /// Counts `n` bytes that are about to be read.
    fn count(&mut self, n: u64, what: &str) -> Result<(), Fault> {
        if n > self.left {
            return Err(HeaderProblem::CutOff { what: what.to_owned() }.into());
        }
        self.left -= n;
        self.position += n;
        if self.position > LONGEST_HEADER {
            return Err(HeaderProblem::TooLong { what: what.to_owned() }.into());
        }
        Ok(())
    }

    fn take<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Fault> {
        self.count(N as u64, what)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(Fault::Read)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, Fault> {
        Ok(u32::from_le_bytes(self.take(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, Fault> {
        Ok(u64::from_le_bytes(self.take(what)?))
    }

    fn text(&mut self, what: &str, longest: u64) -> Result<String, Fault> {
        let length = self.u64(what)?;
        if length > self.left {
            let (what, left) = (what.to_owned(), self.left);
            return Err(HeaderProblem::LongerThanFile { what, length, left }.into());
        }
        if length > longest {
            return Err(HeaderProblem::TooLong { what: what.to_owned() }.into());
        }
        self.count(length, what)?;
        let mut bytes = Vec::new();
        let read = self.input.by_ref().take(length).read_to_end(&mut bytes).map_err(Fault::Read)?;
        if (read as u64) < length {
            return Err(Fault::Read(io::ErrorKind::UnexpectedEof.into()));
        }
        String::from_utf8(bytes).map_err(|_| HeaderProblem::NotUtf8 { what: what.to_owned() }.into())
    }

    fn value(&mut self, key: &str) -> Result<Value, Fault> {
        let kind = self.u32(key)?;
        Ok(match kind {
            8 => Value::Text(self.text(key, LONGEST_HEADER)?),
            9 => self.array(key)?,
            7 => Value::Bool(self.bool(key)?),
            6 | 12 => Value::Float(self.float(kind, key)?),
            _ => Value::Integer(self.integer(kind, key)?),
        })
    }

    fn array(&mut self, key: &str) -> Result<Value, Fault> {
        let (kind, length) = (self.u32(key)?, self.u64(key)?);
        // The smallest elements have one byte, so a count beyond what is left is a lie.
        if length > self.left {
            let (what, left) = (key.to_owned(), self.left);
            return Err(HeaderProblem::LongerThanFile { what, length, left }.into());
        }
        let unsupported = || HeaderProblem::ValueType { what: key.to_owned(), found: kind };
        Ok(match kind {
            8 => Value::Texts(self.list(length, |b| b.text(key, LONGEST_HEADER))?),
            7 => Value::Bools(self.list(length, |b| b.bool(key))?),
            6 | 12 => Value::Floats(self.list(length, |b| b.float(kind, key))?),
            9 => return Err(unsupported().into()),
            _ => Value::Integers(self.list(length, |b| {
                let n = b.integer(kind, key)?;
                i64::try_from(n).map_err(|_| unsupported().into())
            })?),
        })
    }

    fn list<T>(
        &mut self,
        length: u64,
        mut one: impl FnMut(&mut Self) -> Result<T, Fault>,
    ) -> Result<Vec<T>, Fault> {
        let mut items = Vec::new();
        for _ in 0..length {
            items.push(one(self)?);
        }
        Ok(items)
    }

    fn bool(&mut self, what: &str) -> Result<bool, Fault> {
        Ok(self.take::<1>(what)? != [0])
    }

    fn float(&mut self, kind: u32, what: &str) -> Result<f64, Fault> {
        Ok(match kind {
            6 => f32::from_le_bytes(self.take(what)?).into(),
            _ => f64::from_le_bytes(self.take(what)?),
        })
    }

    fn integer(&mut self, kind: u32, what: &str) -> Result<i128, Fault> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.take(what)?).into(),
            1 => i8::from_le_bytes(self.take(what)?).into(),
            2 => u16::from_le_bytes(self.take(what)?).into(),
            3 => i16::from_le_bytes(self.take(what)?).into(),
            4 => u32::from_le_bytes(self.take(what)?).into(),
            5 => i32::from_le_bytes(self.take(what)?).into(),
            10 => u64::from_le_bytes(self.take(what)?).into(),
            11 => i64::from_le_bytes(self.take(what)?).into(),
            _ => return Err(HeaderProblem::ValueType { what: what.to_owned(), found: kind }.into()),
        })
    }

    /// One entry of the table of tensors; its offset is still from the data's begin.
    fn tensor(&mut self, alignment: u64) -> Result<GgufTensor, Fault> {
        let name = self.text("a tensor's name", LONGEST_NAME)?;
        let axes = self.u32(&name)?;
        if !(1..=MOST_AXES).contains(&axes) {
            return Err(HeaderProblem::Axes { tensor: name, axes }.into());
        }
        let mut shape = Vec::new();
        for _ in 0..axes {
            shape.push(self.u64(&name)?);
        }
        // Innermost first in the file.
        shape.reverse();
        let kind = self.u32(&name)?;
        let offset = self.u64(&name)?;
        let kind = Kind::from_id(kind).map_err(|kind| Fault::Kind { tensor: name.clone(), kind })?;
        let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|n| *n < 1 << 48);
        let dims: Option<Vec<i32>> =
            shape.iter().map(|&d| i32::try_from(d).ok().filter(|d| *d > 0)).collect();
        let (Some(elements), Some(dims)) = (elements, dims) else {
            return Err(HeaderProblem::Shape { tensor: name, shape }.into());
        };
        let (block, bytes) = kind.block();
        let columns = shape.last().copied().unwrap_or(0);
        if columns % block as u64 != 0 {
            return Err(HeaderProblem::Blocks { tensor: name, columns }.into());
        }
        if offset % alignment != 0 {
            return Err(HeaderProblem::Misaligned { tensor: name, offset, alignment }.into());
        }
        Ok(GgufTensor { name, shape: dims, kind, offset, bytes: elements / block as u64 * bytes as u64 })
    }
}
