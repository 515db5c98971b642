//! Decode on NVIDIA GPUs: the stages of a program of the CPU's engine as launches of hand-written CUDA kernels, captured
//! into one graph that a step replays: a token of one sequence, or of each of a few. Knows nothing of MLX, models or files; weights are addresses.
//!
//! * [`kernels`]: the kernels' texts and what it takes to launch them. Needs no GPU.
//! * [`translate`] makes of a program a [`plan`]: the launches of a step. Needs no GPU.
//! * [`device`], [`memory`], [`module`], [`nvrtc`], [`stream`]: the driver and the compiler, looked up at run time; without
//!   them each call is a [`CudaError`] that says what is missing.
//! * [`chain`] measures launches.
//! * [`decoder`] and [`sequence`]: a model on a GPU, and what is decoded with it.

pub mod chain;
pub mod decoder;
pub mod device;
pub mod error;
pub mod kernels;
pub mod memory;
pub mod module;
pub mod nvrtc;
pub mod plan;
pub mod sequence;
mod slots;
pub mod stream;
pub mod translate;

pub use device::{Device, DeviceInfo};
pub use error::{CudaError, Result};
