//! Stock [MLX](https://github.com/ml-explore/mlx) from Rust.
//!
//! MLX is used as released: the `libmlx` of its official wheels, for plain CPUs, NVIDIA CUDA and Apple Metal. The
//! build finds or fetches one for its headers; the program loads one when first needed (see [`runtime`]), so the same
//! binary runs with any of them and needs no link flags.
//!
//! ```
//! use zmlx_mlx::{Array, ops, transforms};
//!
//! # fn main() -> zmlx_mlx::Result<()> {
//! let x = Array::from_slice(&[1.0f32, 2.0, 3.0], &[3])?;
//! let y = x.square()?.sum_all()?;                       // lazy: nothing has been computed yet
//! assert_eq!(y.item::<f32>()?, 14.0);                    // computed here
//!
//! let gradient = transforms::grad(|v| v[0].square()?.sum_all(), &[0]);
//! assert_eq!(gradient(&[&x])?[0].to_vec::<f32>()?, [2.0, 4.0, 6.0]);
//! # Ok(()) }
//! ```
//!
//! # Threads
//! Arrays are [`Send`] and [`Sync`]. MLX itself changes descriptors of arrays while it evaluates and keeps its streams
//! per thread, so two things make that right: every call into MLX holds one process-wide lock (not while a plain
//! evaluation waits for its result), and the streams made here are those that MLX lets any thread use. A graph built on
//! one thread can thus be extended, evaluated or dropped on another. Work on different streams overlaps; building graphs
//! does not.
//!
//! A CPU primitive ([`cpu`]) runs on a worker thread of MLX. There arrays can be cloned, dropped and asked for their
//! shapes; every op is an error ([`Error::InsideCallback`]) rather than a deadlock.
//!
//! # Errors
//! Exceptions of C++ become [`Error`] values with the op and the shapes. An error or a
//! panic in a closure given to a transform comes back from the transform as it was ([`Error::Panic`] for a panic); one in
//! a CPU primitive comes back from the evaluation that needed it, as text ([`Error::Mlx`]), and the arrays of that
//! evaluation stay errors.
//!
//! Two things MLX leaves to the caller, since it sees the values only while it computes: indices given to `take`,
//! `gather`, `scatter` and their kin must be within their axis, and on the CPU the smallest integer must not be divided
//! by -1. Outside that, memory of others is read or the process ends.

mod api;
mod array;
pub mod bench;
mod bridge_file;
mod callback;
pub mod cpu;
mod dtype;
mod element;
mod error;
pub mod io;
pub mod kernel;
pub mod locate;
pub mod mac;
pub mod memory;
mod ops_generated;
pub mod platform;
pub mod runtime;
pub mod stream;
pub mod transforms;

pub use array::Array;
pub use dtype::Dtype;
pub use element::{Complex64, Element, Plain};
pub use error::{Error, Result};
pub use ops_generated::{fast, ops, random};
pub use stream::{Device, Stream};
pub use transforms::{async_eval, eval};
