use zmlx_lang::LangError;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a kernel could not be made or launched.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The text or the IR is wrong, types do not fit, or shapes do not.
    #[error("{0}")]
    Lang(#[from] LangError),
    /// MLX refused or failed.
    #[error("{0}")]
    Mlx(#[from] zmlx_mlx::Error),
    /// Another number of arrays than the kernel takes.
    #[error("kernel {kernel} takes {expected}; {found} arrays were given")]
    Arity {
        /// The kernel's name.
        kernel: String,
        /// Its inputs, by name.
        expected: String,
        /// How many arrays were given.
        found: usize,
    },
    /// An argument by name that the kernel does not have, or has twice.
    #[error("kernel {kernel}: {what}")]
    Argument {
        /// The kernel's name.
        kernel: String,
        /// What is wrong, and what there is.
        what: String,
    },
    /// An array of a dtype that kernels do not compute with.
    #[error(
        "kernel {kernel}: input {input} is {found}; kernels take bool, integers, float16, bfloat16 and float32"
    )]
    Dtype {
        /// The kernel's name.
        kernel: String,
        /// The input's name.
        input: String,
        /// Its dtype.
        found: zmlx_mlx::Dtype,
    },
    /// A launch that a device can't do.
    #[error("kernel {kernel}: {what}: requested {requested}, allowed {allowed}")]
    Launch {
        /// The kernel's name.
        kernel: String,
        /// Which limit.
        what: &'static str,
        /// What was asked for.
        requested: String,
        /// The limit.
        allowed: String,
    },
    /// A kernel without a body for the backend.
    #[error("kernel {kernel} has no {backend} body: give it one, or run it on another device")]
    NoBody {
        /// The kernel's name.
        kernel: String,
        /// The backend.
        backend: &'static str,
    },
    /// Tuning or its store failed.
    #[error("tuning {kernel}: {what}")]
    Tune {
        /// The kernel's name.
        kernel: String,
        /// What went wrong.
        what: String,
    },
}

impl From<Error> for zmlx_mlx::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Mlx(e) => e,
            other => Self::custom(other),
        }
    }
}
