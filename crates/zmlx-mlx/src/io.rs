//! Arrays in files: safetensors and GGUF.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::ptr;

use crate::api::{api, check, text};
use crate::array::{Array, List};
use crate::error::{Error, Result};
use crate::stream::{Device, Stream};

fn file_error(path: &Path, message: impl std::fmt::Display) -> Error {
    Error::File { path: path.to_path_buf(), message: message.to_string() }
}

/// A path as MLX takes it: UTF-8 and a regular file.
fn checked_path(path: &Path) -> Result<&str> {
    let meta = fs::metadata(path).map_err(|e| file_error(path, e))?;
    if !meta.is_file() {
        return Err(file_error(path, "not a regular file"));
    }
    path.to_str().ok_or_else(|| file_error(path, "the path is not UTF-8"))
}

/// Checks the length of the header, which MLX trusts, against the file.
fn check_safetensors_header(path: &Path) -> Result<()> {
    let mut file = File::open(path).map_err(|e| file_error(path, e))?;
    let size = file.metadata().map_err(|e| file_error(path, e))?.len();
    let mut length = [0u8; 8];
    file.read_exact(&mut length).map_err(|_| file_error(path, "shorter than a safetensors header"))?;
    let length = u64::from_le_bytes(length);
    if length.checked_add(8).is_none_or(|end| end > size) {
        return Err(file_error(path, format!("its header claims {length} bytes, the file has {size}")));
    }
    Ok(())
}

/// The names that the bridge returned beside a list, with NUL after each.
fn named(arrays: Vec<Array>, names: &str) -> BTreeMap<String, Array> {
    names.split_terminator('\0').map(str::to_owned).zip(arrays).collect()
}

/// The tensors of a `.safetensors` file, read lazily on the CPU stream.
pub fn load_safetensors(path: impl AsRef<Path>) -> Result<BTreeMap<String, Array>> {
    let path = path.as_ref();
    let name = checked_path(path)?;
    check_safetensors_header(path)?;
    let api = api()?;
    let stream = Stream::default_of(Device::Cpu)?.index();
    let (mut list, mut names, mut names_n) = (ptr::null_mut(), ptr::null(), 0);
    // SAFETY: valid pointers; on success the bridge wrote an owned list and text that lives until the next call.
    let (status, names) = unsafe {
        let status =
            (api.load_safetensors)(name.as_ptr(), name.len(), stream, &mut list, &mut names, &mut names_n);
        (status, text(names, names_n))
    };
    check(api, status, "load_safetensors").map_err(|e| file_error(path, e))?;
    // SAFETY: as above.
    Ok(named(unsafe { List::from_raw(list) }.into_arrays()?, &names))
}

/// Writes tensors and metadata as safetensors: to a temporary name beside `path`, renamed when complete.
pub fn save_safetensors(
    path: impl AsRef<Path>,
    arrays: &BTreeMap<String, Array>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    let has_nul = |s: &String| s.contains('\0');
    if arrays.keys().any(has_nul) || metadata.iter().any(|(k, v)| has_nul(k) || has_nul(v)) {
        return Err(file_error(path, "a name or metadata text contains a NUL character"));
    }
    let temporary = temporary_beside(path)?;
    let name = temporary.to_str().ok_or_else(|| file_error(path, "the path is not UTF-8"))?;
    let api = api()?;
    let handles: Vec<&Array> = arrays.values().collect();
    crate::eval(&handles)?;
    let names: String = arrays.keys().flat_map(|k| [k.as_str(), "\0"]).collect();
    let pairs: String = metadata.iter().flat_map(|(k, v)| [k.as_str(), "\0", v.as_str(), "\0"]).collect();
    // SAFETY: valid pointers for the call.
    let status = unsafe {
        (api.save_safetensors)(
            name.as_ptr(),
            name.len(),
            names.as_ptr(),
            names.len(),
            handles.as_ptr(),
            handles.len(),
            pairs.as_ptr(),
            pairs.len(),
        )
    };
    let saved = check(api, status, "save_safetensors").map_err(|e| file_error(path, e));
    let renamed = saved.and_then(|()| fs::rename(&temporary, path).map_err(|e| file_error(path, e)));
    if renamed.is_err() {
        // The half-written file is of no use; the error already says what happened.
        let _ = fs::remove_file(&temporary);
    }
    renamed
}

fn temporary_beside(path: &Path) -> Result<PathBuf> {
    let stem = path.file_name().ok_or_else(|| file_error(path, "names no file"))?;
    let mut name = std::ffi::OsString::from(".");
    name.push(stem);
    // MLX adds the extension to names that lack it.
    name.push(format!(".{}.tmp.safetensors", std::process::id()));
    Ok(path.with_file_name(name))
}

/// A loaded GGUF file.
#[derive(Debug)]
pub struct Gguf {
    /// The tensors; quantised ones come as MLX's packed weight, `.scales` and `.biases`.
    pub arrays: BTreeMap<String, Array>,
    /// The metadata as text; arrays of more than 64 values are left out.
    pub metadata: BTreeMap<String, String>,
}

/// The tensors and metadata of a `.gguf` file.
pub fn load_gguf(path: impl AsRef<Path>) -> Result<Gguf> {
    let path = path.as_ref();
    let name = checked_path(path)?;
    let mut magic = [0u8; 4];
    let read = File::open(path).and_then(|mut f| f.read_exact(&mut magic));
    if read.is_err() || &magic != b"GGUF" {
        return Err(file_error(path, "not a GGUF file"));
    }
    let api = api()?;
    let stream = Stream::default_of(Device::Cpu)?.index();
    let (mut list, mut names, mut names_n, mut keys, mut keys_n) =
        (ptr::null_mut(), ptr::null(), 0, ptr::null(), 0);
    // SAFETY: valid pointers; on success the bridge wrote an owned list and texts that live until the next call.
    let (status, names, keys) = unsafe {
        let status = (api.load_gguf)(
            name.as_ptr(),
            name.len(),
            stream,
            &mut list,
            &mut names,
            &mut names_n,
            &mut keys,
            &mut keys_n,
        );
        (status, text(names, names_n), text(keys, keys_n))
    };
    check(api, status, "load_gguf").map_err(|e| file_error(path, e))?;
    // SAFETY: as above.
    let arrays = named(unsafe { List::from_raw(list) }.into_arrays()?, &names);
    let mut metadata = BTreeMap::new();
    let mut parts = keys.split_terminator('\0');
    while let (Some(key), Some(value)) = (parts.next(), parts.next()) {
        metadata.insert(key.to_owned(), value.to_owned());
    }
    Ok(Gguf { arrays, metadata })
}
