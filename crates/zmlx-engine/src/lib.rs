//! The CPU kernels of the decode path, in plain Rust: products of quantised matrices, attention, routing, convolution, and
//! a team of threads that runs them without waiting for stolen cores. Knows nothing of MLX, models or files.
//!
//! A [`Program`](program::Program) is a list of [stages] over numbered buffers; a [`Runner`](program::Runner) goes through
//! it with its [`Team`](team::Team) for any number of tokens.

pub mod cells;
pub mod kept;
pub mod matrix;
pub mod memory;
pub mod program;
pub mod stages;
pub mod store;
pub mod team;
mod vector;
