//! The model that comes with the program.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::LoadError;

/// Its files, as they are in the repository.
macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny-lfm2-moe/", $name)))),*]
    };
}

const FILES: &[(&str, &[u8])] = files!(
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
);

/// The folder of the embedded model: the repository's own if the program still runs beside it, else a copy unpacked to
/// the cache folder (`ZMLX_CACHE_DIR`, or the user's cache).
pub fn embedded_model_dir() -> Result<PathBuf, LoadError> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny-lfm2-moe");
    if is_complete(&source) {
        return Ok(source.canonicalize().unwrap_or(source));
    }
    let cache = zmlx_mlx::locate::cache_dir().map_err(zmlx_mlx::Error::from)?;
    unpack(&cache.join("models"))
}

fn is_complete(dir: &Path) -> bool {
    FILES
        .iter()
        .all(|(name, bytes)| fs::metadata(dir.join(name)).is_ok_and(|m| m.len() == bytes.len() as u64))
}

/// Writes the files to a temporary folder and renames it, so that nobody ever sees half a model.
fn unpack(parent: &Path) -> Result<PathBuf, LoadError> {
    let target = parent.join(concat!("tiny-lfm2-moe-", env!("CARGO_PKG_VERSION")));
    if is_complete(&target) {
        return Ok(target);
    }
    let fail = |e: std::io::Error| LoadError::Unpack { path: parent.to_path_buf(), message: e.to_string() };
    let staging = parent.join(format!(".unpack-{}", std::process::id()));
    fs::create_dir_all(&staging).map_err(fail)?;
    let written = FILES.iter().try_for_each(|(name, bytes)| fs::write(staging.join(name), bytes));
    let placed = written.and_then(|()| {
        // A damaged copy from before is in the way.
        if target.exists() && !is_complete(&target) {
            fs::remove_dir_all(&target)?;
        }
        match fs::rename(&staging, &target) {
            // Another process was quicker.
            Err(_) if is_complete(&target) => Ok(()),
            other => other,
        }
    });
    // Gone already after a rename; otherwise of no use.
    let _ = fs::remove_dir_all(&staging);
    placed.map_err(fail)?;
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpacks_whole_and_repairs_a_damaged_copy() {
        let folder = tempfile::tempdir().unwrap();
        let dir = unpack(folder.path()).unwrap();
        assert!(is_complete(&dir));
        fs::write(dir.join("config.json"), "{").unwrap();
        assert!(is_complete(&unpack(folder.path()).unwrap()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no staging folder is left");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = unpack(&file).unwrap_err().to_string();
        assert!(error.contains("file") && error.contains("ZMLX_CACHE_DIR"), "{error}");
    }
}
