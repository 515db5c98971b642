use std::path::PathBuf;

use crate::Dtype;
use crate::locate::LocateError;

/// Result of a call into MLX.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong between Rust and MLX.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No libmlx could be loaded.
    #[error("{0}")]
    Locate(#[from] LocateError),
    /// None of the places holds a libmlx.
    #[error(
        "no libmlx {version} was found (looked at {searched}): set ZMLX_MLX_DIR to the `mlx` folder of an unpacked wheel, or run `zmlx doctor --fetch`"
    )]
    LibraryNotFound {
        /// The version that is needed.
        version: &'static str,
        /// The places looked at.
        searched: String,
    },
    /// The operating system's loader refused a library.
    #[error("{} could not be loaded: {message}", path.display())]
    LibraryLoad {
        /// The library.
        path: PathBuf,
        /// The loader's words.
        message: String,
    },
    /// MLX refused or failed an op while the graph was built.
    #[error("{op}({operands}): {message}")]
    Op {
        /// Name of the op.
        op: &'static str,
        /// Shapes and dtypes of its arrays.
        operands: String,
        /// MLX's words.
        message: String,
    },
    /// MLX failed in something that is not one op, such as an evaluation.
    #[error("{what}: {message}")]
    Mlx {
        /// What was being done.
        what: &'static str,
        /// MLX's words.
        message: String,
    },
    /// An argument that does not make sense, found before MLX was called.
    #[error("{0}")]
    Argument(String),
    /// An array was read as another type than it has.
    #[error("the array holds {found}, not {expected}: convert it with astype first")]
    Dtype {
        /// The type asked for.
        expected: Dtype,
        /// The array's dtype.
        found: Dtype,
    },
    /// The loaded library has no such backend.
    #[error("{what} needs {needs}, which this libmlx or machine does not have")]
    Unavailable {
        /// What was asked for.
        what: &'static str,
        /// The backend it needs.
        needs: &'static str,
    },
    /// A closure or CPU primitive panicked; the text is the panic's message.
    #[error("panic in a callback: {0}")]
    Panic(String),
    /// MLX was called from inside a CPU primitive.
    #[error("MLX cannot be called inside a CPU primitive: it runs on a worker thread that MLX waits for")]
    InsideCallback,
    /// A CPU primitive was differentiated and has no gradient.
    #[error("CPU primitive {0} has no gradient: implement its vjp, or wrap it in custom_vjp")]
    NoGradient(String),
    /// A file could not be read or written.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        message: String,
    },
    /// An error that a callback of the user's raises itself.
    #[error("{0}")]
    Custom(String),
}

impl Error {
    /// An error with the text of any other one, for closures that MLX calls.
    pub fn custom(error: impl std::fmt::Display) -> Self {
        Self::Custom(error.to_string())
    }
}
