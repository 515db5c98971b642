//! The stages: products with what comes before and after them, attention, convolution, routing.

mod attention;
mod conv;
mod delta;
mod experts;
mod gate;
mod heads;
mod indexer;
mod latent;
mod linear;
mod parts;
mod plain;
mod router;
mod source;

pub use attention::Attend;
pub use conv::ShortConv;
pub use delta::{Columns, ConvSilu, DeltaHeads, Unit};
pub use experts::{Choice, Combine, ExpertsDown, ExpertsUp, Group};
pub use gate::SigmoidGate;
pub use heads::{Angles, Heads, Qkv, Rope};
pub use indexer::{IndexAppend, IndexScores, PickPositions, SparseLatentAttend, TopK};
pub use latent::{HeadProducts, LatentAppend, LatentAttend, SplitRope};
pub use linear::{Gated, Linear};
pub use parts::AttendMerge;
pub use plain::{Add, Embed, LayerNorm, RmsNorm, Softmax};
pub use router::{Groups, Route, Scores, Ties};
pub use source::{Norm, Pack, Source};

use zmlx_simd::MathFn;

/// Bytes of weights that a chunk of a product should read: some microseconds' worth.
const CHUNK_BYTES: usize = 48 << 10;

/// The activation between the two products of a gated feed-forward part: `act(gate) * up`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// GELU with tanh.
    GeluTanh,
    /// GELU with erf.
    GeluErf,
}

impl Activation {
    fn function(self) -> MathFn {
        match self {
            Self::Silu => MathFn::Silu,
            Self::GeluTanh => MathFn::GeluTanh,
            Self::GeluErf => MathFn::GeluErf,
        }
    }
}

/// Rows of a matrix a chunk: about [`CHUNK_BYTES`], a multiple of the granule, and not so few that a product of many
/// tokens is all overhead.
fn rows_per_chunk(matrix: &crate::matrix::Matrix) -> usize {
    let granule = matrix.granule().max(4);
    (CHUNK_BYTES / matrix.row_bytes().max(1)).max(1).next_multiple_of(granule)
}
