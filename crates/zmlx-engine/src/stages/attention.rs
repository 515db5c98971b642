//! Attention over a cache.

use crate::program::{Buffer, Frame, Local, Slot, Stage};
use crate::vector;

/// `softmax(scale * q @ k.T) @ v`, causal; query heads in groups that share a key/value head.
#[derive(Debug)]
pub struct Attend {
    /// Queries `[tokens, heads * key_width]`.
    pub queries: Buffer,
    /// Query heads.
    pub heads: usize,
    /// The cache.
    pub slot: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// Only so many positions back, the own one included.
    pub window: Option<usize>,
    /// The result, `[tokens, heads * value_width]`.
    pub out: Buffer,
}

/// Tokens a chunk.
const TOKENS: usize = 16;

/// From this many key/value heads on, a chunk is all query heads that share one.
const ENOUGH_HEADS: usize = 8;

impl Attend {
    /// Into how many parts the heads of a sequence are cut.
    fn units(&self, kv_heads: usize) -> usize {
        if kv_heads >= ENOUGH_HEADS { kv_heads } else { self.heads }
    }

    fn blocks(frame: &Frame<'_>) -> usize {
        frame.length.div_ceil(TOKENS)
    }
}

impl Stage for Attend {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        let Slot::Kv { heads, .. } = &frame.slots[self.slot] else { return 0 };
        frame.batch * self.units(*heads) * Self::blocks(frame)
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let Slot::Kv { keys, values, heads, key_width, value_width, capacity } = &frame.slots[self.slot]
        else {
            return;
        };
        let (heads, d, dv, blocks) = (*heads, *key_width, *value_width, Self::blocks(frame));
        let units = self.units(heads);
        // Later tokens see more: they come first, so that the last chunk is not the longest.
        let (block, pair) = (blocks - 1 - chunk / (frame.batch * units), chunk % (frame.batch * units));
        let (sequence, unit) = (pair / units, pair % units);
        // Query heads of this chunk, which share a key/value head.
        let group = self.heads / units;
        let head = unit * group * heads / self.heads;
        let base = (sequence * heads + head) * capacity;
        for t in block * TOKENS..((block + 1) * TOKENS).min(frame.length) {
            let end = frame.position + t + 1;
            let start = self.window.map_or(0, |w| end.saturating_sub(w));
            let row = sequence * frame.length + t;
            for g in 0..group {
                let q_head = unit * group + g;
                // SAFETY: earlier stages wrote queries and cache; this part of the result is this chunk's.
                unsafe {
                    let at = (row * self.heads + q_head) * d;
                    let q = frame.buffer(self.queries).get(at..at + d);
                    let k = keys.get((base + start) * d..(base + end) * d);
                    let v = values.get((base + start) * dv..(base + end) * dv);
                    local.b.resize(end - start, 0.0);
                    vector::scores(q, k, self.scale, &mut local.b);
                    vector::softmax(&mut local.b, &mut local.a);
                    let at = (row * self.heads + q_head) * dv;
                    let out = frame.buffer(self.out).get_mut(at..at + dv);
                    vector::weighted_sum(&local.b, v, out);
                }
            }
        }
    }
}
