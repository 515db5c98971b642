//! A model's name by its content, without reading all of it.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::LabError;

/// Files up to this size are hashed whole.
const WHOLE_BYTES: u64 = 1 << 20;

/// Bytes from the beginning of a larger file: of a safetensors file, its header (all of it up to this size).
const HEAD_BYTES: u64 = 4 << 20;

/// Blocks that are sampled from a larger file, evenly spaced, the last one at its end.
const BLOCKS: u64 = 64;

/// Bytes of a block.
const BLOCK_BYTES: u64 = 64 << 10;

/// `zmlx-sample-v1:` and 64 hexadecimal digits: SHA-256 over the files of a model folder that decide what it computes
/// (`config.json`, `*.safetensors`, `*.gguf`), in the order of their names. For each: its name, its size, and its bytes up
/// to 1 MiB; of larger ones the first 4 MiB and 64 blocks of 64 KiB at even distances. A path to a single file gives the
/// same over that file, whatever its name is.
///
/// It takes milliseconds for any size, and tells apart other models, other quantisations and almost all damage; a change of
/// bytes between the samples goes unseen, so it is no proof against forgery.
pub fn model_hash(path: &Path) -> Result<String, LabError> {
    let fail = |path: &Path, source: io::Error| LabError::Read { path: path.to_owned(), source };
    let files = match path.is_file() {
        true => vec![(String::new(), path.to_owned())],
        false => weight_files(path).map_err(|e| fail(path, e))?,
    };
    let mut hash = Sha256::new();
    for (name, path) in &files {
        hash_file(&mut hash, name, path).map_err(|e| fail(path, e))?;
    }
    let digits: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("zmlx-sample-v1:{digits}"))
}

/// Names and paths, sorted.
fn weight_files(dir: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == "config.json" || name.ends_with(".safetensors") || name.ends_with(".gguf") {
            files.push((name, entry.path()));
        }
    }
    files.sort();
    Ok(files)
}

fn hash_file(hash: &mut Sha256, name: &str, path: &Path) -> io::Result<()> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    hash.update((name.len() as u64).to_le_bytes());
    hash.update(name.as_bytes());
    hash.update(size.to_le_bytes());
    if size <= WHOLE_BYTES {
        return piece(hash, &mut file, size);
    }
    piece(hash, &mut file, HEAD_BYTES.min(size))?;
    let room = size.saturating_sub(BLOCK_BYTES);
    for block in 1..=BLOCKS {
        // 128 bits in between: sizes times 64 may pass 64.
        let at = (u128::from(room) * u128::from(block) / u128::from(BLOCKS)) as u64;
        file.seek(SeekFrom::Start(at))?;
        piece(hash, &mut file, BLOCK_BYTES.min(size))?;
    }
    Ok(())
}

fn piece(hash: &mut Sha256, file: &mut File, bytes: u64) -> io::Result<()> {
    let mut buffer = Vec::new();
    file.take(bytes).read_to_end(&mut buffer)?;
    hash.update(&buffer);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        folder
    }

    #[test]
    fn content_decides_and_other_files_do_not() {
        let weights = vec![7u8; 9 << 20];
        let config = b"{}".to_vec();
        let base = folder(&[("config.json", config.clone()), ("model.safetensors", weights.clone())]);
        let hash = model_hash(base.path()).unwrap();
        assert!(hash.starts_with("zmlx-sample-v1:") && hash.len() == 15 + 64, "{hash}");
        let beside = folder(&[
            ("README.md", b"x".to_vec()),
            ("model.safetensors", weights.clone()),
            ("config.json", config.clone()),
        ]);
        assert_eq!(model_hash(beside.path()).unwrap(), hash);

        let changed = |at: usize| {
            let mut bytes = weights.clone();
            bytes[at] ^= 1;
            bytes
        };
        // In the header, at the very end, and inside a sampled block.
        for weights in [
            changed(0),
            changed((9 << 20) - 1),
            changed(((9 << 20) - 65536) / 64 * 50 + 9),
            vec![7u8; 9 << 20 | 1],
        ] {
            let other = folder(&[("config.json", config.clone()), ("model.safetensors", weights)]);
            assert_ne!(model_hash(other.path()).unwrap(), hash);
        }
        let other = folder(&[("config.json", b"{ }".to_vec()), ("model.safetensors", weights.clone())]);
        assert_ne!(model_hash(other.path()).unwrap(), hash);
    }

    #[test]
    fn a_single_file_has_no_name() {
        let one = folder(&[("a.gguf", vec![1; 100]), ("b.gguf", vec![1; 100]), ("c.gguf", vec![2; 100])]);
        let hash = |name: &str| model_hash(&one.path().join(name)).unwrap();
        assert_eq!(hash("a.gguf"), hash("b.gguf"));
        assert_ne!(hash("a.gguf"), hash("c.gguf"));
    }

    #[test]
    fn a_missing_folder_is_named() {
        let error = model_hash(Path::new("/nowhere/model")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/model"), "{error}");
    }
}
