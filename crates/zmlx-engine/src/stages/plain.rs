//! Stages without a product.

use std::ops::Range;

use half::bf16;

use super::Norm;
use crate::matrix::Matrix;
use crate::program::{Buffer, Frame, Local, Stage};
use crate::vector;

/// Rows a chunk.
const ROWS: usize = 8;

/// How many chunks a call's rows make.
fn chunks(frame: &Frame<'_>) -> usize {
    frame.rows().div_ceil(ROWS)
}

/// The rows of a chunk.
fn rows(frame: &Frame<'_>, chunk: usize) -> Range<usize> {
    chunk * ROWS..((chunk + 1) * ROWS).min(frame.rows())
}

/// Writes `f` of each row of `x` in a chunk to `out`, which may be the same buffer; `f` writes into room of the row's width.
fn map_rows(
    frame: &Frame<'_>,
    chunk: usize,
    [x, out]: [Buffer; 2],
    width: usize,
    room: &mut Vec<f32>,
    mut f: impl FnMut(&[f32], &mut [f32]),
) {
    room.resize(width, 0.0);
    for t in rows(frame, chunk) {
        let range = t * width..(t + 1) * width;
        // SAFETY: an earlier stage wrote `x`; this row of the result is this chunk's, and is written after `x` is read.
        unsafe {
            f(frame.buffer(x).get(range.clone()), room);
            frame.buffer(out).get_mut(range).copy_from_slice(room);
        }
    }
}

/// Rows of a matrix, one a token.
#[derive(Debug)]
pub struct Embed {
    /// The matrix `[vocabulary, width]`.
    pub matrix: Matrix,
    /// Multiplies the rows.
    pub scale: f32,
    /// Whether scaled rows are rounded to bfloat16, in which MLX has those of 4-bit and 8-bit floats.
    pub rounded: bool,
    /// The result.
    pub out: Buffer,
}

impl Stage for Embed {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        chunks(frame)
    }

    fn work(&self, frame: &Frame<'_>, _: &mut Local, chunk: usize, _: bool) {
        let width = self.matrix.columns();
        for t in rows(frame, chunk) {
            // SAFETY: this row of the result is this chunk's.
            let out = unsafe { frame.buffer(self.out).get_mut(t * width..(t + 1) * width) };
            // Ids beyond the vocabulary are refused before a run; the last row stands in rather than a panic.
            let id = (frame.tokens[t] as usize).min(self.matrix.rows() - 1);
            self.matrix.row(0, id, out);
            if self.scale != 1.0 && self.rounded {
                let scale = bf16::from_f32(self.scale).to_f32();
                out.iter_mut().for_each(|v| *v = bf16::from_f32(*v * scale).to_f32());
            } else if self.scale != 1.0 {
                out.iter_mut().for_each(|v| *v *= self.scale);
            }
        }
    }
}

/// `a + b`.
#[derive(Debug)]
pub struct Add {
    /// One.
    pub a: Buffer,
    /// The other.
    pub b: Buffer,
    /// The result.
    pub out: Buffer,
    /// Width of a row.
    pub width: usize,
}

impl Stage for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        chunks(frame)
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let rows = rows(frame, chunk);
        let range = rows.start * self.width..rows.end * self.width;
        // SAFETY: earlier stages wrote the operands; this range of the result is this chunk's, and is written after they
        // are read.
        unsafe {
            let (a, b) = (frame.buffer(self.a).get(range.clone()), frame.buffer(self.b).get(range.clone()));
            local.a.clear();
            local.a.extend(a.iter().zip(b).map(|(a, b)| a + b));
            frame.buffer(self.out).get_mut(range).copy_from_slice(&local.a);
        }
    }
}

/// RMS norm of each row.
#[derive(Debug)]
pub struct RmsNorm {
    /// Its parameters.
    pub norm: Norm,
    /// What is normalised.
    pub x: Buffer,
    /// The result.
    pub out: Buffer,
    /// Width of a row.
    pub width: usize,
}

impl Stage for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        chunks(frame)
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        map_rows(frame, chunk, [self.x, self.out], self.width, &mut local.a, |x, out| {
            vector::rms_norm(x, self.norm.weight.as_deref(), self.norm.eps, out);
        });
    }
}

/// Layer norm of each row.
#[derive(Debug)]
pub struct LayerNorm {
    /// The factors, one an element; ones if absent.
    pub weight: Option<Vec<f32>>,
    /// What is added, one an element; zeros if absent.
    pub bias: Option<Vec<f32>>,
    /// Added under the root.
    pub eps: f32,
    /// What is normalised.
    pub x: Buffer,
    /// The result.
    pub out: Buffer,
    /// Width of a row.
    pub width: usize,
}

impl Stage for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        chunks(frame)
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        map_rows(frame, chunk, [self.x, self.out], self.width, &mut local.a, |x, out| {
            vector::layer_norm(x, self.weight.as_deref(), self.bias.as_deref(), self.eps, out);
        });
    }
}

/// Softmax of each row.
#[derive(Debug)]
pub struct Softmax {
    /// The logits.
    pub x: Buffer,
    /// The result.
    pub out: Buffer,
    /// Width of a row.
    pub width: usize,
}

impl Stage for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        chunks(frame)
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let Local { a, b, .. } = local;
        map_rows(frame, chunk, [self.x, self.out], self.width, b, |x, out| {
            out.copy_from_slice(x);
            vector::softmax(out, a);
        });
    }
}
