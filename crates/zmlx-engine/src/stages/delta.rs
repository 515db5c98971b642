//! The gated delta net: a convolution with SiLU, then a recurrence a head.

use std::ops::Range;

use zmlx_simd::MathFn;

use super::Norm;
use crate::program::{Buffer, Frame, Local, Slot, Stage};
use crate::vector;

/// Columns of a buffer's rows: pieces, one after another.
#[derive(Debug, Clone)]
pub struct Columns {
    /// The buffer.
    pub buffer: Buffer,
    /// Floats of a row.
    pub width: usize,
    /// Where each piece begins in a row, and how long it is.
    pub pieces: Vec<(usize, usize)>,
}

impl Columns {
    /// Floats of all pieces of a row.
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|(_, len)| len).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The floats `range` of the pieces of row `t`, appended to `to`.
    ///
    /// # Safety
    /// Nobody writes the buffer meanwhile.
    unsafe fn append(&self, frame: &Frame<'_>, t: usize, range: Range<usize>, to: &mut Vec<f32>) {
        // SAFETY: as the caller promises.
        let row = unsafe { frame.buffer(self.buffer).get(t * self.width..(t + 1) * self.width) };
        let mut first = 0;
        for &(start, len) in &self.pieces {
            let (from, end) = (range.start.max(first), range.end.min(first + len));
            if from < end {
                to.extend_from_slice(&row[start + from - first..start + end - first]);
            }
            first += len;
        }
    }

    /// Piece `index` of row `t`.
    ///
    /// # Safety
    /// Nobody writes the buffer meanwhile.
    unsafe fn piece<'a>(&self, frame: &'a Frame<'_>, t: usize, index: usize) -> &'a [f32] {
        let (start, len) = self.pieces[index];
        let at = t * self.width + start;
        // SAFETY: as the caller promises.
        unsafe { frame.buffer(self.buffer).get(at..at + len) }
    }
}

/// `out = silu(conv(x))`, a causal depthwise convolution whose last inputs are kept in a slot.
#[derive(Debug)]
pub struct ConvSilu {
    /// The inputs, one a channel.
    pub x: Columns,
    /// How many channels.
    pub channels: usize,
    /// The kernels, `[taps, channels]`.
    pub kernel: Vec<f32>,
    /// Taps of a kernel.
    pub taps: usize,
    /// Added to the convolution, one a channel.
    pub bias: Option<Vec<f32>>,
    /// The slot of the last `taps - 1` inputs.
    pub slot: usize,
    /// The result.
    pub out: Buffer,
}

/// Channels a chunk.
const CHANNELS: usize = 256;

impl Stage for ConvSilu {
    fn name(&self) -> &'static str {
        "convolution + silu"
    }

    fn chunks(&self, _: &Frame<'_>) -> usize {
        self.channels.div_ceil(CHANNELS)
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let Slot::Rows { values, keep, .. } = &frame.slots[self.slot] else { return };
        let (channels, keep, length) = (self.channels, *keep, frame.length);
        let mine = chunk * CHANNELS..((chunk + 1) * CHANNELS).min(channels);
        let width = mine.len();
        for b in 0..frame.batch {
            // The kept inputs, then this call's: [keep + length, width].
            local.c.clear();
            for k in 0..keep {
                let at = (b * keep + k) * channels;
                // SAFETY: this chunk alone uses these channels of the slot.
                local.c.extend_from_slice(unsafe { values.get(at + mine.start..at + mine.end) });
            }
            for t in b * length..(b + 1) * length {
                // SAFETY: an earlier stage wrote the inputs.
                unsafe { self.x.append(frame, t, mine.clone(), &mut local.c) };
            }
            for t in 0..length {
                let row = (b * length + t) * channels;
                // SAFETY: this part of the result is this chunk's.
                let out = unsafe { frame.buffer(self.out).get_mut(row + mine.start..row + mine.end) };
                out.fill(0.0);
                for tap in 0..self.taps {
                    let weights = &self.kernel[tap * channels..][mine.clone()];
                    let x = &local.c[(t + tap) * width..][..width];
                    out.iter_mut().zip(weights).zip(x).for_each(|((o, w), x)| *o += w * x);
                }
                if let Some(bias) = &self.bias {
                    out.iter_mut().zip(&bias[mine.clone()]).for_each(|(o, b)| *o += b);
                }
                vector::apply(MathFn::Silu, out, &mut local.a);
            }
            for k in 0..keep {
                let at = (b * keep + k) * channels;
                let last = &local.c[(length + k) * width..][..width];
                // SAFETY: as above.
                unsafe { values.get_mut(at + mine.start..at + mine.end) }.copy_from_slice(last);
            }
        }
    }
}

/// A norm of queries or keys: `scale * x / sqrt(mean(x^2) + eps)`.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    /// Multiplies the result.
    pub scale: f32,
    /// Added under the root.
    pub eps: f32,
}

/// The gated delta rule with what is around it. With `S` the state of a head, `[value, key]`:
///
/// `S = g S; S = S + beta (v - S k) k^T; out = silu(z) * rms_norm(S q)`, where `g = exp(-exp(a_log) softplus(a + dt_bias))` and
/// `beta = sigmoid(b)`.
#[derive(Debug)]
pub struct DeltaHeads {
    /// `[tokens, 2 * key_heads * key + heads * value]`: queries, keys, values.
    pub mixed: Buffer,
    /// A piece of 1 a head.
    pub a: Columns,
    /// A piece of 1 a head.
    pub b: Columns,
    /// A piece of `value` a head.
    pub z: Columns,
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values.
    pub heads: usize,
    /// Width of a key.
    pub key: usize,
    /// Width of a value.
    pub value: usize,
    /// Norms of queries and keys.
    pub units: [Unit; 2],
    /// One a head.
    pub a_log: Vec<f32>,
    /// One a head.
    pub dt_bias: Vec<f32>,
    /// Norm over a head's result.
    pub norm: Norm,
    /// The states: rows `heads * value`, channels `key`.
    pub slot: usize,
    /// The result, `[tokens, heads * value]`.
    pub out: Buffer,
}

impl Stage for DeltaHeads {
    fn name(&self) -> &'static str {
        "gated delta rule"
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        frame.batch * self.heads
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let Slot::Rows { values, .. } = &frame.slots[self.slot] else { return };
        let (sequence, head) = (chunk / self.heads, chunk % self.heads);
        let (key, value) = (self.key, self.value);
        let cells = value * key;
        // SAFETY: this head of this sequence is this chunk's.
        let state = unsafe { values.get_mut(chunk * cells..(chunk + 1) * cells) };
        let rate = -self.a_log[head].exp();
        local.b.resize(2 * key, 0.0);
        local.c.resize(2 * value, 0.0);
        for t in sequence * frame.length..(sequence + 1) * frame.length {
            let (q, k) = local.b.split_at_mut(key);
            let (y, gate) = local.c.split_at_mut(value);
            // SAFETY: earlier stages wrote the inputs.
            let (v, z, a, b) = unsafe { self.inputs(frame, t, head, q, k) };
            let softplus = |x: f32| x.max(0.0) + (-x.abs()).exp().ln_1p();
            let (x, beta) = (a + self.dt_bias[head], 1.0 / (1.0 + (-b).exp()));
            // The largest of NaN and a number is the number: keep what is not one.
            let g = if x.is_nan() { x } else { (rate * softplus(x)).exp() };
            for ((row, v), y) in state.chunks_exact_mut(key).zip(v).zip(y.iter_mut()) {
                *y = vector::delta_row(row, [k, q], g, *v, beta);
            }
            gate.copy_from_slice(z);
            vector::apply(MathFn::Silu, gate, &mut local.a);
            let at = (t * self.heads + head) * value;
            // SAFETY: this head of this token is this chunk's.
            let out = unsafe { frame.buffer(self.out).get_mut(at..at + value) };
            vector::rms_norm(y, self.norm.weight.as_deref(), self.norm.eps, out);
            out.iter_mut().zip(gate.iter()).for_each(|(o, g)| *o *= g);
        }
    }
}

impl DeltaHeads {
    /// Normalised queries and keys of a token to `q` and `k`; its value, its `z`, `a` and `b`.
    ///
    /// # Safety
    /// Nobody writes the inputs meanwhile.
    unsafe fn inputs<'a>(
        &self,
        frame: &'a Frame<'_>,
        t: usize,
        head: usize,
        q: &mut [f32],
        k: &mut [f32],
    ) -> (&'a [f32], &'a [f32], f32, f32) {
        let (key, value, all) = (self.key, self.value, self.key_heads * self.key);
        let width = 2 * all + self.heads * value;
        let shared = head / (self.heads / self.key_heads) * key;
        // SAFETY: as the caller promises.
        unsafe {
            let mixed = frame.buffer(self.mixed).get(t * width..(t + 1) * width);
            for (part, (to, unit)) in [q, k].into_iter().zip(self.units).enumerate() {
                vector::rms_norm(&mixed[part * all + shared..][..key], None, unit.eps, to);
                to.iter_mut().for_each(|v| *v *= unit.scale);
            }
            let (a, b) = (self.a.piece(frame, t, head)[0], self.b.piece(frame, t, head)[0]);
            (&mixed[2 * all + head * value..][..value], self.z.piece(frame, t, head), a, b)
        }
    }
}
