//! What can go wrong on the way to the GPU and on it.

use std::path::PathBuf;

use cudarc::driver::DriverError;

use crate::kernels::KernelError;

/// Why something cannot run on CUDA.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// No driver library.
    #[error("no NVIDIA driver is installed (libcuda is not found): install one, or run without CUDA")]
    NoDriver,
    /// The driver is there and has no GPU.
    #[error("the NVIDIA driver finds no GPU ({0}): check `nvidia-smi` and CUDA_VISIBLE_DEVICES")]
    NoDevice(String),
    /// The driver lacks what is called.
    #[error("the NVIDIA driver supports CUDA {}.{}: 12.0 or newer is needed, update it", .0 / 1000, .0 % 1000 / 10)]
    OldDriver(i32),
    /// The GPU is older than the kernels.
    #[error("{name} has compute capability {major}.{minor}: {needed} or newer is needed")]
    OldDevice {
        /// The GPU.
        name: String,
        /// Its compute capability.
        major: i32,
        /// Its compute capability.
        minor: i32,
        /// The oldest that will do.
        needed: &'static str,
    },
    /// No run-time compiler.
    #[error(
        "NVRTC, which compiles the kernels, is not found (looked for {searched}): install the wheel nvidia-cuda-nvrtc and set {variable} at the folder that it is in",
        variable = crate::nvrtc::VARIABLE
    )]
    NoNvrtc {
        /// Where it was looked for.
        searched: String,
    },
    /// The compiler does not work.
    #[error("NVRTC in {}: {message}", path.display())]
    Nvrtc {
        /// The library.
        path: PathBuf,
        /// What it said.
        message: String,
    },
    /// A kernel does not compile: a fault of this program.
    #[error("kernel {kernel} does not compile for {arch}:\n{log}")]
    Compile {
        /// Its name.
        kernel: String,
        /// For what.
        arch: String,
        /// What the compiler said.
        log: String,
    },
    /// No memory on the GPU.
    #[error(
        "the GPU has no {bytes} bytes left for {what}: free memory, or use a smaller model or a shorter context"
    )]
    OutOfMemory {
        /// What was asked for.
        bytes: usize,
        /// What it was for.
        what: &'static str,
    },
    /// An address is not where the caller says.
    #[error("{what} is not {bytes} bytes of GPU memory at {address:#x}: {message}")]
    Address {
        /// What should be there.
        what: String,
        /// Its address.
        address: u64,
        /// How many bytes are needed.
        bytes: usize,
        /// What is wrong.
        message: String,
    },
    /// A kernel was asked for what it does not do.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A stage has no translation.
    #[error("{stage}: {reason}")]
    Untranslated {
        /// The stage.
        stage: &'static str,
        /// Why.
        reason: String,
    },
    /// The caller asked for what is not there.
    #[error("{0}")]
    Argument(String),
    /// The driver refused.
    #[error("{call}: {message}")]
    Driver {
        /// What was called.
        call: &'static str,
        /// What the driver said.
        message: String,
    },
}

/// The result of calls here.
pub type Result<T> = std::result::Result<T, CudaError>;

/// What the driver said of a call.
pub(crate) fn driver<T>(call: &'static str, result: std::result::Result<T, DriverError>) -> Result<T> {
    result.map_err(|error| CudaError::Driver { call, message: message(error) })
}

/// The driver's words for an error.
pub(crate) fn message(error: DriverError) -> String {
    let text = error.error_string().map(|t| t.to_string_lossy().into_owned());
    text.unwrap_or_else(|_| format!("{:?}", error.0))
}
