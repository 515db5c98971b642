//! Runs GPU kernel text on the CPU, for tests on machines without a GPU.
//!
//! Kernels are bodies as MLX's `metal_kernel` and `cuda_kernel` take them; [`Module::build`] writes the signature as
//! MLX does, compiles with the system's C++ compiler (`CXX`, else `c++`) and loads the result. [`Module::run`] runs
//! the threads of a group as fibers, in an order drawn from [`Launch::seed`], and fails with a typed [`Error`] on
//! accesses outside a buffer, reads of memory never written, races, barriers that not all threads reach, misaligned
//! vector accesses and outputs left unwritten.
//!
//! The text is compiled unchanged, plain pointers and casts included: the checks hang on the compiler's
//! thread-sanitizer instrumentation, whose run-time library `simt/runtime.cpp` replaces. Only declarations of shared
//! memory are rewritten, so that each array lies between guards of its own. Pointers without an address space are
//! refused in Metal text, mixed-up address spaces are not found; CUDA text can also be given to NVRTC ([`nvrtc`]).
//!
//! ```
//! use zmlx_emulator::{Buffer, Dialect, Dtype, KernelText, Launch, Module};
//!
//! let kernel = KernelText::new("twice", "uint i = thread_position_in_grid.x;\ny[i] = 2.0f * x[i];")
//!     .input("x", Dtype::F32, 1)
//!     .output("y", Dtype::F32);
//! let module = Module::build(Dialect::Metal, &[kernel])?;
//! let x = Buffer::from_f32(Dtype::F32, &[1.0, 2.0, 3.0], &[3]);
//! let y = module.run(0, &Launch::new(&[x], &[vec![3]], [3, 1, 1], [32, 1, 1]))?;
//! assert_eq!(y[0].to_f32(), [2.0, 4.0, 6.0]);
//! # Ok::<(), zmlx_emulator::Error>(())
//! ```

mod address_space;
mod buffer;
mod compile;
mod error;
mod kernel;
mod module;
pub mod nvrtc;
mod rewrite;
mod source;

pub use buffer::{Buffer, Dtype};
pub use error::{Access, Error, Place};
pub use kernel::{Dialect, KernelText, Output, Param, TemplateArg};
pub use module::{Launch, Module};
