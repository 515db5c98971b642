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
pub use heads::{Angles, Finish, Growth, HeadRows, Heads, Qkv, QkvRows, Rope};
pub use indexer::{IndexAppend, IndexScores, PickPositions, SparseLatentAttend, TopK};
pub use latent::{HeadProducts, LatentAppend, LatentAttend, SplitRope};
pub use linear::{Gated, Linear};
pub use parts::AttendMerge;
pub use plain::{Add, Embed, LayerNorm, RmsNorm, Softmax};
pub use router::{Groups, Route, Scores, Ties};
pub use source::{Norm, Pack, Source};

use zmlx_simd::MathFn;

use crate::vector;

/// Bytes of weights that a chunk of a product should read: some microseconds' worth.
const CHUNK_BYTES: usize = 48 << 10;

/// The activation between the two products of a gated feed-forward part: `act(gate) * up` if nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// GELU with tanh.
    GeluTanh,
    /// GELU with erf.
    GeluErf,
    /// `g * sigmoid(alpha * g) * (1 + u)`, where `g` is the gate, at most `limit`, and `u` is `up` within `-limit..limit`.
    ClampedSwiGlu {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// Where gate and up are cut off.
        limit: f32,
    },
}

impl Activation {
    /// Makes of the products the two factors whose product is the result.
    fn apply(self, gate: &mut [f32], up: &mut [f32], room: &mut Vec<f32>) {
        let (alpha, limit) = match self {
            Self::Silu => return vector::apply(MathFn::Silu, gate, room),
            Self::GeluTanh => return vector::apply(MathFn::GeluTanh, gate, room),
            Self::GeluErf => return vector::apply(MathFn::GeluErf, gate, room),
            Self::ClampedSwiGlu { alpha, limit } => (alpha, limit),
        };
        // Comparisons that NaN passes through, as it does through MLX's minimum and maximum.
        gate.iter_mut().filter(|g| **g > limit).for_each(|g| *g = limit);
        let mut steep: Vec<f32> = gate.iter().map(|g| alpha * g).collect();
        vector::apply(MathFn::Sigmoid, &mut steep, room);
        gate.iter_mut().zip(&steep).for_each(|(g, s)| *g *= s);
        for u in up {
            *u = 1.0
                + if *u > limit {
                    limit
                } else if *u < -limit {
                    -limit
                } else {
                    *u
                };
        }
    }
}

/// Adds a vector to every row as wide as it.
fn add_rows(bias: &[f32], rows: &mut [f32]) {
    for row in rows.chunks_exact_mut(bias.len().max(1)) {
        row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
    }
}

/// Rows of a matrix a chunk: about [`CHUNK_BYTES`], a multiple of the granule, and not so few that a product of many
/// tokens is all overhead.
fn rows_per_chunk(matrix: &crate::matrix::Matrix) -> usize {
    let granule = matrix.granule().max(4);
    (CHUNK_BYTES / matrix.row_bytes().max(1)).max(1).next_multiple_of(granule)
}
