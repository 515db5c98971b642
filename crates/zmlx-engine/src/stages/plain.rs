//! Stages without a product.

use half::bf16;

use super::Norm;
use crate::matrix::Matrix;
use crate::program::{Buffer, Frame, Local, Stage};
use crate::vector;

/// Rows a chunk.
const ROWS: usize = 8;

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
        frame.rows().div_ceil(ROWS)
    }

    fn work(&self, frame: &Frame<'_>, _: &mut Local, chunk: usize, _: bool) {
        let width = self.matrix.columns();
        for t in chunk * ROWS..((chunk + 1) * ROWS).min(frame.rows()) {
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
        frame.rows().div_ceil(ROWS)
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let range = chunk * ROWS * self.width..((chunk + 1) * ROWS).min(frame.rows()) * self.width;
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
        frame.rows().div_ceil(ROWS)
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        for t in chunk * ROWS..((chunk + 1) * ROWS).min(frame.rows()) {
            let range = t * self.width..(t + 1) * self.width;
            local.a.resize(self.width, 0.0);
            // SAFETY: as in `Add`.
            unsafe {
                vector::rms_norm(
                    frame.buffer(self.x).get(range.clone()),
                    self.norm.weight.as_deref(),
                    self.norm.eps,
                    &mut local.a,
                );
                frame.buffer(self.out).get_mut(range).copy_from_slice(&local.a);
            }
        }
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
        frame.rows().div_ceil(ROWS)
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        for t in chunk * ROWS..((chunk + 1) * ROWS).min(frame.rows()) {
            let range = t * self.width..(t + 1) * self.width;
            local.a.resize(self.width, 0.0);
            // SAFETY: as in `Add`.
            unsafe {
                let x = frame.buffer(self.x).get(range.clone());
                vector::layer_norm(x, self.weight.as_deref(), self.bias.as_deref(), self.eps, &mut local.a);
                frame.buffer(self.out).get_mut(range).copy_from_slice(&local.a);
            }
        }
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
        frame.rows().div_ceil(ROWS)
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        for t in chunk * ROWS..((chunk + 1) * ROWS).min(frame.rows()) {
            let range = t * self.width..(t + 1) * self.width;
            local.b.clear();
            // SAFETY: as in `Add`.
            unsafe {
                local.b.extend_from_slice(frame.buffer(self.x).get(range.clone()));
                vector::softmax(&mut local.b, &mut local.a);
                frame.buffer(self.out).get_mut(range).copy_from_slice(&local.b);
            }
        }
    }
}
