//! Products, alone and in gated pairs.

use zmlx_simd::MathFn;

use super::{Activation, Source, add_rows, rows_per_chunk};
use crate::matrix::{Matrix, Tokens};
use crate::program::{Buffer, Frame, Local, Stage};
use crate::vector;

/// `out = sigmoid(gate) * (x @ w.T + bias) + residual`.
#[derive(Debug)]
pub struct Linear {
    /// The activations.
    pub source: Source,
    /// The matrix.
    pub matrix: Matrix,
    /// Added a column.
    pub bias: Option<Vec<f32>>,
    /// Gates of the rows, `[tokens, 1]`; without it there is no factor.
    pub gate: Option<Buffer>,
    /// Added an element, of the same shape as the result.
    pub residual: Option<Buffer>,
    /// The result.
    pub out: Buffer,
    /// Only the rows whose output the call wants (a head).
    pub wanted_only: bool,
}

impl Stage for Linear {
    fn name(&self) -> &'static str {
        if self.residual.is_some() { "linear + residual" } else { "linear" }
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        if self.wanted_only && frame.outputs == 0 {
            0
        } else {
            self.matrix.rows().div_ceil(rows_per_chunk(&self.matrix))
        }
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, first: bool) {
        self.source.prepare(frame, local, first);
        let (n, step) = (self.matrix.rows(), rows_per_chunk(&self.matrix));
        let rows = chunk * step..((chunk + 1) * step).min(n);
        let width = rows.len();
        let x = self.source.packed(frame, &local.activations);
        let mut product = |first: usize, count: usize| {
            local.b.resize(count * width, 0.0);
            self.matrix.product(
                0,
                rows.clone(),
                x,
                Tokens::Run(first, count),
                &mut local.b,
                width,
                &mut local.scratch,
            );
            for (t, y) in local.b.chunks_exact_mut(width).enumerate() {
                let range = (first + t) * n + rows.start..(first + t) * n + rows.end;
                if let Some(bias) = &self.bias {
                    y.iter_mut().zip(&bias[rows.clone()]).for_each(|(y, b)| *y += b);
                }
                if let Some(gate) = self.gate {
                    // SAFETY: an earlier stage wrote the gates.
                    let mut gate = [unsafe { frame.buffer(gate).get(first + t..first + t + 1)[0] }];
                    vector::apply(MathFn::Sigmoid, &mut gate, &mut local.a);
                    y.iter_mut().for_each(|y| *y *= gate[0]);
                }
                // SAFETY: earlier stages wrote the residual; this range of the result is this chunk's. The two may be one
                // buffer: then it is read before it is written.
                unsafe {
                    if let Some(residual) = self.residual {
                        let residual = frame.buffer(residual).get(range.clone());
                        y.iter_mut().zip(residual).for_each(|(y, r)| *y += r);
                    }
                    frame.buffer(self.out).get_mut(range).copy_from_slice(y);
                }
            }
        };
        if self.wanted_only && frame.outputs < frame.length {
            for b in 0..frame.batch {
                product((b + 1) * frame.length - frame.outputs, frame.outputs);
            }
        } else {
            product(0, frame.rows());
        }
    }
}

/// `out = act(x @ gate.T + bg) * (x @ up.T + bu)`.
#[derive(Debug)]
pub struct Gated {
    /// The activations.
    pub source: Source,
    /// The matrix whose product goes through the activation.
    pub gate: Matrix,
    /// The other.
    pub up: Matrix,
    /// Added to their columns.
    pub biases: [Option<Vec<f32>>; 2],
    /// The activation.
    pub activation: Activation,
    /// The result.
    pub out: Buffer,
}

impl Stage for Gated {
    fn name(&self) -> &'static str {
        "gate + up + activation"
    }

    fn chunks(&self, _: &Frame<'_>) -> usize {
        self.gate.rows().div_ceil(rows_per_chunk(&self.gate))
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, first: bool) {
        self.source.prepare(frame, local, first);
        let (n, step, count) = (self.gate.rows(), rows_per_chunk(&self.gate), frame.rows());
        let rows = chunk * step..((chunk + 1) * step).min(n);
        let width = rows.len();
        let x = self.source.packed(frame, &local.activations);
        for (matrix, out) in [(&self.gate, &mut local.b), (&self.up, &mut local.c)] {
            out.resize(count * width, 0.0);
            matrix.product(0, rows.clone(), x, Tokens::Run(0, count), out, width, &mut local.scratch);
        }
        for (bias, out) in self.biases.iter().zip([&mut local.b, &mut local.c]) {
            if let Some(bias) = bias {
                add_rows(&bias[rows.clone()], &mut out[..count * width]);
            }
        }
        let len = count * width;
        self.activation.apply(&mut local.b[..len], &mut local.c[..len], &mut local.a);
        for t in 0..count {
            // SAFETY: this part of the result is this chunk's.
            let out = unsafe { frame.buffer(self.out).get_mut(t * n + rows.start..t * n + rows.end) };
            let (g, u) = (&local.b[t * width..][..width], &local.c[t * width..][..width]);
            out.iter_mut().zip(g).zip(u).for_each(|((o, g), u)| *o = g * u);
        }
    }
}
