//! ZMLX in Rust: one crate to add, with the parts under their names.
//!
//! * [`mlx`]: stock MLX: arrays, ops, gradients, streams, custom kernels.
//! * [`kernels`]: kernels of one's own in one line, on every backend, with gradients; [`kernel`] and [`elementwise!`].
//! * [`graph`]: models as data, and their executor.
//! * [`models`]: families, checkpoints, tokenizers, generation.

#![forbid(unsafe_code)]

pub use zmlx_graph as graph;
pub use zmlx_kernels as kernels;
pub use zmlx_macros::{elementwise, kernel};
pub use zmlx_mlx as mlx;
pub use zmlx_models as models;

/// What most programs need.
pub mod prelude {
    pub use zmlx_kernels::Kernel;
    pub use zmlx_mlx::{Array, Device, Dtype, Stream, async_eval, eval, fast, ops, random, transforms};
    pub use zmlx_models::{
        ChatMessage, Completion, Event, Flow, GenerateOptions, LoadOptions, Model, SamplerOptions, Session,
    };
}
