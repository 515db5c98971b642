//! Models as data.
//!
//! A [`Graph`] is a list of nodes in execution order, each with a semantic [`Op`](op::Op), the values it reads, and the
//! readable path of the module it belongs to. Weights are referred to by their name in the checkpoint, and what lasts
//! from one step to the next (key/value caches, convolution states) lives in numbered [state] slots. Family
//! builders write graphs with a [`Builder`]; an [`Executor`] binds weights and runs them.

#![forbid(unsafe_code)]

pub mod bandwidth;
pub mod bisect;
pub mod builder;
pub mod cost;
pub mod cuda;
mod error;
mod exec;
mod fidelity;
pub mod fused;
mod graph;
mod held;
pub mod infer;
pub mod native;
pub mod op;
pub mod ops;
pub mod pattern;
pub mod patterns;
pub mod print;
pub mod profile;
mod quantize_caches;
pub mod quantized_cache;
pub mod saved;
pub mod shape;
pub mod state;
pub mod weights;

pub use builder::Builder;
pub use cost::{Cost, CostContext, NodeCost, Work};
pub use error::{GraphError, Result};
pub use exec::Executor;
pub use fidelity::Fidelity;
pub use graph::{Graph, Node, Value};
pub use held::Held;
pub use infer::{InferContext, ShapeError, Types};
pub use print::Detail;
pub use profile::{Profile, ProfileReport};
pub use quantize_caches::{KvQuantizationError, quantize_caches};
pub use quantized_cache::KvQuantization;
pub use saved::{Keep, SavedError, SavedSlot, SavedState};
pub use shape::{Dim, DtypeSpec, Shape, Sizes, Type};
pub use state::State;
pub use zmlx_engine::program::Wanted;
