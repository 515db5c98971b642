//! Graphs for readers: text with shapes, a record for JSON, DOT, and a picture.

mod dot;
mod flame;
pub(crate) mod groups;
mod html;
mod layout;
mod picture;
mod record;
pub(crate) mod svg;
mod text;

pub use groups::{layer_of, pooled_path};
pub use record::{GraphRecord, NodeRecord, SlotRecord, TypeRecord, WeightRecord};

/// Which layers a picture shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Detail {
    /// Equal layers are drawn once, under the list of their numbers.
    #[default]
    Distinct,
    /// Every layer is drawn.
    Every,
}

use crate::weights::{Format, Weight};

/// How a weight is stored, in words: `affine 4-bit group 64`, `dense`, `float32`.
pub(crate) fn format_words(weight: &Weight) -> String {
    match &weight.format {
        Format::Dense if weight.keep_f32 => "float32".to_owned(),
        Format::Dense => "dense".to_owned(),
        Format::Quantized(q) => format!("{} {}-bit group {}", q.mode, q.bits, q.group_size),
    }
}
