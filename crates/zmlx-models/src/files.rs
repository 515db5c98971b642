//! Reading the small files of a model folder, which come from strangers, and calling parsers that may panic on them.

use std::any::Any;
use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Longest configuration, tokenizer or template file that is read, in bytes.
const LONGEST: u64 = 256 << 20;

/// The bytes of a regular file of sensible size; `None` when it is not there. Pipes and devices are refused before they
/// are opened, since opening one may never return.
pub(crate) fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    if metadata.len() > LONGEST {
        let message =
            format!("{} bytes are more than the {LONGEST} that such a file may have", metadata.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    std::fs::read(path).map(Some)
}

thread_local! {
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic on this thread is caught and becomes an error: a program's panic hook need not print it.
pub fn panic_is_caught() -> bool {
    CAUGHT.with(Cell::get)
}

/// Runs code of a dependency that panics on some malformed files; gives the panic's message as an error.
pub(crate) fn catch_panic<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    let before = CAUGHT.with(|c| c.replace(true));
    let result = catch_unwind(AssertUnwindSafe(f));
    CAUGHT.with(|c| c.set(before));
    result.map_err(|payload| message(payload.as_ref()))
}

fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without a message").split_whitespace().collect::<Vec<_>>().join(" ")
}
