//! The ops, one file a family. A new one is a struct with the [`Op`](crate::op::Op) trait in the file of its family.

mod attention;
mod conv;
mod deltanet;
mod elementwise;
mod geglu;
mod groups;
mod indexer;
mod linear;
mod mla;
mod moe;
mod norm;
mod position_scale;
mod quantized_attention;
mod rope;
mod shape;

pub use attention::{Attention, KvAppend, WindowAttention};
pub use conv::{ConvStep, DepthwiseConv1d};
pub use deltanet::{DeltaGate, FlattenHeads, GatedDelta, Silu, UnitNorm};
pub use elementwise::{AddScalar, Binary, Cast, ClampedSwiGlu, MultiplyScalar, Sigmoid, SwiGlu};
pub use geglu::GeGlu;
pub use groups::{MaskGroups, TopKOfNegated};
pub use indexer::TopPositions;
pub use linear::{Embedding, Linear, Tokens};
pub use mla::{MlaAttention, SparseMlaAttention};
pub(crate) use moe::SORT_FROM;
pub use moe::{AddWeight, ExpertLinear, ExpertSort, ExpertUnsort, TakeAlongLast, TopKIndices};
pub use norm::{LayerNorm, RmsNorm, Softmax};
pub use position_scale::PositionScale;
pub use quantized_attention::QuantizedAttention;
pub use rope::{Frequencies, Rope, RopeFrequencies};
pub use shape::{Concatenate, ExpandLast, MergeHeads, Split, SplitAt, SplitHeads, Sum, Transpose};
