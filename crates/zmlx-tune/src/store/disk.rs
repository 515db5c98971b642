//! Names, locking, reading and atomic writing of a store's files.

use super::StoreError;
use super::format::FORMAT_VERSION;
use crate::Key;
use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Longest file that is read or written; 2048 decisions of twenty measured candidates are a third of it.
pub(super) const MAX_BYTES: u64 = 16 << 20;
/// Damaged files kept beside a good one.
const MAX_DAMAGED: u32 = 100;

/// Tells whether a file has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stamp {
    modified: Option<SystemTime>,
    len: u64,
    /// Each write makes a new file, so this differs even within one tick of the file system's clock.
    inode: u64,
}

impl Stamp {
    fn of(data: &Metadata) -> Self {
        #[cfg(unix)]
        let inode = std::os::unix::fs::MetadataExt::ino(data);
        #[cfg(not(unix))]
        let inode = 0;
        Self { modified: data.modified().ok(), len: data.len(), inode }
    }
}

/// Makes an [`StoreError::Io`].
fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |error| StoreError::Io { action, path: path.into(), error }
}

/// `None` in place of "there is no such file".
fn if_found<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// `DEVICE--LIBRARY-HASH.vN.json`: readable, safe on every file system, and by the hash distinct for names
/// that differ only in what the readable part leaves out.
pub(super) fn file_name(key: &Key) -> String {
    let readable = |text: &str| {
        let plain =
            |c: char| if c.is_ascii_alphanumeric() || c == '.' { c.to_ascii_lowercase() } else { '-' };
        text.chars().take(40).map(plain).collect::<String>()
    };
    let bytes = [key.device.as_bytes(), &[0xff], key.library.as_bytes()].concat();
    let hash = fnv1a(&bytes);
    format!("{}--{}-{hash:016x}.v{FORMAT_VERSION}.json", readable(&key.device), readable(&key.library))
}

/// FNV-1a, 64 bits (Fowler, Noll, Vo): fixed for all time, which the standard library's hasher is not.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// `path` with `suffix` added to its last part.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The file's stamp, or `None` without a file.
pub(super) fn stamp(path: &Path) -> Result<Option<Stamp>, StoreError> {
    Ok(if_found(fs::metadata(path)).map_err(failed("look at", path))?.map(|data| Stamp::of(&data)))
}

/// The file's bytes with the stamp of exactly these bytes, or `None` without a file. Of a file that is too
/// long it reads one byte more than allowed.
pub(super) fn read(path: &Path) -> Result<Option<(Vec<u8>, Stamp)>, StoreError> {
    let Some(file) = if_found(File::open(path)).map_err(failed("open", path))? else { return Ok(None) };
    let stamp = Stamp::of(&file.metadata().map_err(failed("look at", path))?);
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed("read", path))?;
    Ok(Some((bytes, stamp)))
}

/// Makes the directory and takes the lock for writing `path`. The lock is on a file of its own, for `path`
/// itself is replaced by each write. It ends with the returned file, or with the process.
pub(super) fn lock(directory: &Path, path: &Path, timeout: Duration) -> Result<File, StoreError> {
    fs::create_dir_all(directory).map_err(failed("make the directory", directory))?;
    let path = beside(path, ".lock");
    let open = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = open.map_err(failed("open", &path))?;
    let start = Instant::now();
    // Polling, because a blocking lock has no time limit and a stopped process may hold it for ever.
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(failed("lock", &path)(error)),
            Err(TryLockError::WouldBlock) if start.elapsed() >= timeout => {
                return Err(StoreError::Locked { path, waited: timeout });
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// Replaces `path` by a file with these bytes, whole or not at all. The caller holds the lock, so the
/// temporary file's fixed name is nobody else's, and one left by a killed process goes away here.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let temporary = beside(path, ".tmp");
    if_found(fs::remove_file(&temporary)).map_err(failed("remove", &temporary))?;
    let fill = || {
        let mut file = File::create_new(&temporary)?;
        file.write_all(bytes)?;
        // Before the rename: after a power cut the new name must not point to missing contents.
        file.sync_all()
    };
    let result = fill().map_err(failed("write", &temporary));
    let result = result.and_then(|()| fs::rename(&temporary, path).map_err(failed("replace", path)));
    if result.is_err() {
        // Best effort: the error that matters is the one above, and the next write removes it too.
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// Renames a damaged file to the first free `NAME.corrupt-N`. The caller holds the lock.
pub(super) fn move_aside(path: &Path) -> Result<PathBuf, StoreError> {
    for n in 1..=MAX_DAMAGED {
        let target = beside(path, &format!(".corrupt-{n}"));
        if if_found(fs::symlink_metadata(&target)).map_err(failed("look at", &target))?.is_none() {
            fs::rename(path, &target).map_err(failed("move aside", path))?;
            return Ok(target);
        }
    }
    Err(StoreError::TooManyDamaged { path: path.into(), count: MAX_DAMAGED })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_and_distinct() {
        let name = |device: &str, library: &str| file_name(&Key::new(device, library, "k", "h", "s"));
        let h100 = name("NVIDIA H100 80GB", "mlx 0.32.4 cuda");
        assert!(h100.starts_with("nvidia-h100-80gb--mlx-0.32.4-cuda-"), "{h100}");
        assert!(h100.ends_with(".v1.json"), "{h100}");
        let hostile = name("../../etc/passwd\0\n", "C:\\x");
        assert!(hostile.chars().all(|c| c.is_ascii_alphanumeric() || ".-".contains(c)), "{hostile}");
        assert!(!hostile.contains('/'));
        // Alike in the readable part only.
        assert_ne!(name("a b", "c"), name("a-b", "c"));
        assert_ne!(name("ab", "c"), name("a", "bc"));
        assert_ne!(name(&"x".repeat(50), "c"), name(&"x".repeat(51), "c"));
        assert!(name(&"é".repeat(500), &"漢".repeat(300)).len() < 120);
    }

    #[test]
    fn fnv1a_matches_its_published_vectors() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
