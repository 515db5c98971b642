//! Gives the embedded bridge to the system's loader, which opens files only.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::platform::Platform;

/// A path that the loader can open, and what keeps it there.
pub(crate) struct BridgeFile {
    path: PathBuf,
    keep: Keep,
}

enum Keep {
    /// Has the path `/proc/self/fd/N`. The loader remembers paths, so the number must never be used again.
    #[cfg(target_os = "linux")]
    Anonymous(std::fs::File),
    Temporary,
}

impl BridgeFile {
    /// Linux: an anonymous file in memory. Elsewhere a file in the temporary folder.
    pub(crate) fn new(bytes: &[u8]) -> Result<Self> {
        #[cfg(target_os = "linux")]
        return Self::anonymous(bytes);
        #[cfg(not(target_os = "linux"))]
        return Self::temporary(bytes, &std::env::temp_dir());
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// To be called once the library is loaded, or cannot be.
    pub(crate) fn loaded(self) {
        match self.keep {
            #[cfg(target_os = "linux")]
            Keep::Anonymous(file) => std::mem::forget(file),
            // The loader has mapped it; if it can't be removed it is the system's to clear.
            Keep::Temporary => drop(std::fs::remove_file(&self.path)),
        }
    }

    #[cfg(target_os = "linux")]
    fn anonymous(bytes: &[u8]) -> Result<Self> {
        use std::os::fd::{AsRawFd, FromRawFd};
        let fail = |e: std::io::Error| Error::LibraryLoad {
            path: PathBuf::from("zmlx_bridge"),
            message: e.to_string(),
        };
        // SAFETY: a plain system call with a NUL-terminated name.
        let fd = unsafe { libc::memfd_create(c"zmlx_bridge".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(fail(std::io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made and is owned by nobody else.
        let mut file = unsafe { std::fs::File::from_raw_fd(fd) };
        file.write_all(bytes).map_err(fail)?;
        Ok(Self {
            path: PathBuf::from(format!("/proc/self/fd/{fd}", fd = file.as_raw_fd())),
            keep: Keep::Anonymous(file),
        })
    }

    /// A file of this process in `folder`.
    #[cfg_attr(target_os = "linux", allow(dead_code))] // there for its test
    fn temporary(bytes: &[u8], folder: &Path) -> Result<Self> {
        let path = folder.join(format!("{}-{}", std::process::id(), Platform::HERE.bridge_file()));
        let fail = |e: std::io::Error| Error::LibraryLoad { path: path.clone(), message: e.to_string() };
        // What an ended process of this number left. `create_new` refuses what somebody else puts there meanwhile.
        let _ = std::fs::remove_file(&path);
        let mut file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(fail)?;
        file.write_all(bytes).map_err(fail)?;
        Ok(Self { path, keep: Keep::Temporary })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_file_lasts_until_loaded() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        // One that an ended process left is in nobody's way.
        for bytes in [b"first".as_slice(), b"second"] {
            let file = BridgeFile::temporary(bytes, folder.path()).expect("a file");
            assert_eq!(std::fs::read(file.path()).expect("its content"), bytes);
        }
        let file = BridgeFile::temporary(b"third", folder.path()).expect("a file");
        let path = file.path().to_path_buf();
        file.loaded();
        assert!(!path.exists());
        let missing = folder.path().join("missing");
        let error = BridgeFile::temporary(b"x", &missing).err().expect("no such folder").to_string();
        assert!(error.contains("missing"), "{error}");
    }
}
