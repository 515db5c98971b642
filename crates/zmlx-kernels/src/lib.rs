//! Kernels from the kernel language on MLX arrays.
//!
//! One expression gives a [`Kernel`] that runs on the CPU, on Metal and on CUDA, takes any dtype, and has derivatives.
//!
//! ```
//! use zmlx_kernels::{Array, Kernel};
//!
//! # fn main() -> zmlx_kernels::Result<()> {
//! let mish = Kernel::new("x * tanh(log(1 + exp(x)))")?;
//! let y = mish.call1(&[&Array::from_slice(&[0.0f32, 1.0], &[2])?])?;
//! assert_eq!(y.to_vec::<f32>()?, [0.0, 0.86509836]);
//! # Ok(()) }
//! ```

mod authoring;
mod cache;
pub mod catalogue;
mod cpu;
mod dtype;
mod error;
mod explain;
mod kernel;
mod launch;
pub mod raw;
mod stats;
pub mod tuning;

pub use authoring::{Builder, elementwise, map_reduce, reduce, scan};
pub use error::{Error, Result};
pub use explain::Cost;
pub use kernel::{Call, Kernel, Scalar};
pub use raw::{RawKernel, raw_kernel};
pub use stats::Stats;
pub use zmlx_lang as lang;
pub use zmlx_mlx::Array;
