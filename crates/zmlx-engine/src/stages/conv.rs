//! The short convolution of LFM2 with the product before it.

use super::{Source, rows_per_chunk};
use crate::matrix::{Matrix, Tokens};
use crate::program::{Buffer, Frame, Local, Slot, Stage};

/// `[b, c, x] = source @ w.T + bias`, then `out = c * conv(b * x)`, a causal depthwise convolution whose last inputs are
/// kept in a slot.
#[derive(Debug)]
pub struct ShortConv {
    /// The activations.
    pub source: Source,
    /// The matrix `[3 * channels, width]`.
    pub matrix: Matrix,
    /// Added to the product.
    pub bias: Option<Vec<f32>>,
    /// The kernels, `[channels, taps]`.
    pub kernel: Vec<f32>,
    /// Taps of a kernel.
    pub taps: usize,
    /// Added to the convolution, one a channel.
    pub conv_bias: Option<Vec<f32>>,
    /// The slot of the last `taps - 1` inputs.
    pub slot: usize,
    /// The result.
    pub out: Buffer,
}

impl ShortConv {
    fn channels(&self) -> usize {
        self.matrix.rows() / 3
    }

    /// Channels a chunk.
    fn step(&self) -> usize {
        (rows_per_chunk(&self.matrix) / 2).next_multiple_of(self.matrix.granule().max(4))
    }
}

impl Stage for ShortConv {
    fn name(&self) -> &'static str {
        "short_conv"
    }

    fn chunks(&self, _: &Frame<'_>) -> usize {
        self.channels().div_ceil(self.step())
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, first: bool) {
        self.source.prepare(frame, local, first);
        let (channels, step, count) = (self.channels(), self.step(), frame.rows());
        let mine = chunk * step..((chunk + 1) * step).min(channels);
        let width = mine.len();
        let x = self.source.packed(frame, &local.activations);
        // The three parts one after another, each [tokens, width].
        local.b.resize(3 * count * width, 0.0);
        for (part, out) in local.b.chunks_exact_mut(count * width).enumerate() {
            let rows = part * channels + mine.start..part * channels + mine.end;
            self.matrix.product(0, rows.clone(), x, Tokens::Run(0, count), out, width, &mut local.scratch);
            if let Some(bias) = &self.bias {
                for y in out.chunks_exact_mut(width) {
                    y.iter_mut().zip(&bias[rows.clone()]).for_each(|(y, b)| *y += b);
                }
            }
        }
        let Slot::Rows { values, keep, .. } = &frame.slots[self.slot] else { return };
        let keep = *keep;
        let (gate, rest) = local.b.split_at(count * width);
        let (out_gate, x) = rest.split_at(count * width);
        for b in 0..frame.batch {
            // The kept inputs, then this call's: [keep + length, width].
            local.c.clear();
            for k in 0..keep {
                let at = (b * keep + k) * channels;
                // SAFETY: this chunk alone uses these channels of the slot.
                local.c.extend_from_slice(unsafe { values.get(at + mine.start..at + mine.end) });
            }
            let range = b * frame.length * width..(b + 1) * frame.length * width;
            local.c.extend(gate[range.clone()].iter().zip(&x[range]).map(|(g, x)| g * x));
            for t in 0..frame.length {
                let row = b * frame.length + t;
                // SAFETY: this part of the result is this chunk's.
                let out = unsafe {
                    frame.buffer(self.out).get_mut(row * channels + mine.start..row * channels + mine.end)
                };
                for (i, o) in out.iter_mut().enumerate() {
                    let taps = &self.kernel[(mine.start + i) * self.taps..][..self.taps];
                    let y: f32 = taps.iter().enumerate().map(|(k, w)| w * local.c[(t + k) * width + i]).sum();
                    let y = self.conv_bias.as_ref().map_or(y, |b| y + b[mine.start + i]);
                    *o = out_gate[row * width + i] * y;
                }
            }
            for k in 0..keep {
                let at = (b * keep + k) * channels;
                let last = &local.c[(frame.length + k) * width..][..width];
                // SAFETY: as above.
                unsafe { values.get_mut(at + mine.start..at + mine.end) }.copy_from_slice(last);
            }
        }
    }
}
