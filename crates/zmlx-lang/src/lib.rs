//! The kernel language: expressions to typed IR, derivatives, and source text for GPUs.
//!
//! A [`Kernel`] is data: named inputs, a [`Graph`] of expressions that share their common parts, outputs. One form
//! holds every kind: without reductions a kernel is elementwise; with reductions and scans over the row (the last
//! axis) it is a row kernel of as many passes as its reductions depend on each other; with loads and scatters at
//! computed places it is a gather or a scatter. [`Program`] is a kernel with all types decided, which backends read.

#![forbid(unsafe_code)]

pub mod derive;
mod dtype;
pub mod emit;
mod error;
pub mod eval;
pub mod graph;
pub mod kernel;
mod op;
pub mod program;
pub mod shape;
pub mod simplify;
pub mod text;

pub use dtype::{Dtype, Ty};
pub use error::{LangError, Result};
pub use graph::{Bounds, Const, Graph, Id, Node};
pub use kernel::{InputDecl, Kernel, OutputDecl, Role, Scatter};
pub use op::{Op, ReduceOp, ScanOp, Signature};
pub use program::Program;
