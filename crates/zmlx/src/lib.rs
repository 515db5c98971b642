//! ZMLX in Rust: one crate to add, with the parts under their names.
//!
//! * [`mlx`]: stock MLX: arrays, ops, gradients, streams, custom kernels.
//! * [`kernels`]: kernels of one's own in one line, on every backend, with gradients; [`kernel`] and [`elementwise!`].
//! * [`graph`]: models as data, patterns that rewrite them, and their executor.
//! * [`engine`]: the CPU's kernels for fused ops, and the team of threads that runs them.
//! * [`models`]: families, checkpoints, tokenizers, generation; [`patch()`] and [`unpatch`].
//! * [`lab`]: is a patched model still the same, and how fast is it?

#![forbid(unsafe_code)]

pub use zmlx_engine as engine;
pub use zmlx_graph as graph;
pub use zmlx_graph::Fidelity;
pub use zmlx_kernels as kernels;
pub use zmlx_lab as lab;
pub use zmlx_macros::{elementwise, kernel};
pub use zmlx_mlx as mlx;
pub use zmlx_models as models;
pub use zmlx_models::{LoadError, Model, PatchError, PatchOptions, PatchReport, Preset};

/// Replaces what patterns match in the model's graph by fused ops; see [`Model::patch`].
///
/// # Errors
/// [`PatchError`]; the model stays as it was.
pub fn patch(model: &mut Model, options: &PatchOptions) -> Result<PatchReport, PatchError> {
    model.patch(options)
}

/// Goes back to the stock graph; see [`Model::unpatch`].
///
/// # Errors
/// [`LoadError`], if the weights cannot be read again; the model stays as it was.
pub fn unpatch(model: &mut Model) -> Result<(), LoadError> {
    model.unpatch()
}

/// What most programs need.
pub mod prelude {
    pub use zmlx_kernels::Kernel;
    pub use zmlx_mlx::{Array, Device, Dtype, Stream, async_eval, eval, fast, ops, random, transforms};
    pub use zmlx_models::{
        ChatMessage, Completion, Event, Flow, GenerateOptions, LoadOptions, Model, PatchOptions, PatchReport,
        Preset, SamplerOptions, Session,
    };
}
