//! Gates of what attention gives.

use zmlx_simd::MathFn;

use crate::program::{Buffer, Frame, Local, Stage};
use crate::vector;

/// `x = x * sigmoid(gate)`.
#[derive(Debug)]
pub struct SigmoidGate {
    /// What is gated, in place.
    pub x: Buffer,
    /// The gates, of the same shape.
    pub gate: Buffer,
    /// Width of a row.
    pub width: usize,
}

/// Floats a chunk: a row of a large model is some.
const STEP: usize = 1024;

impl Stage for SigmoidGate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        (frame.rows() * self.width).div_ceil(STEP)
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let range = chunk * STEP..((chunk + 1) * STEP).min(frame.rows() * self.width);
        // SAFETY: earlier stages wrote the gates and what they gate; this part of both is this chunk's.
        let (gate, x) =
            unsafe { (frame.buffer(self.gate).get(range.clone()), frame.buffer(self.x).get_mut(range)) };
        local.b.clear();
        local.b.extend_from_slice(gate);
        vector::apply(MathFn::Sigmoid, &mut local.b, &mut local.a);
        x.iter_mut().zip(&local.b).for_each(|(x, g)| *x *= g);
    }
}
