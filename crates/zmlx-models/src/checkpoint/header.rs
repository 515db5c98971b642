//! The header of one safetensors file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value as Json;

use super::{CheckpointError, HeaderProblem, TensorInfo};

/// Longest header, and longest index, that is read: the limit of the reference reader.
pub(super) const LONGEST_HEADER: u64 = 100_000_000;

/// Reads and checks one file's header.
pub(crate) fn read_header(path: &Path) -> Result<Vec<(String, TensorInfo)>, CheckpointError> {
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
