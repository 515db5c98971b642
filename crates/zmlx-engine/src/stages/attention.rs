//! Attention over a cache.

use std::ops::Range;

use super::parts::{AttendMerge, Cut, Parts, write_part};
use crate::program::{Buffer, Frame, Local, Slot, Stage};
use crate::vector;

/// `softmax(scale * q @ k.T) @ v`, causal; query heads in groups that share a key/value head. [`AttendMerge`] comes after it.
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
    /// A score of each head that takes part in its softmax and has no value.
    pub sinks: Option<Vec<f32>>,
    /// The result, `[tokens, heads * value_width]`.
    pub out: Buffer,
}

/// Tokens a chunk.
const TOKENS: usize = 16;

/// From this many key/value heads on, a chunk is all query heads that share one.
const ENOUGH_HEADS: usize = 8;

/// Positions a part, where few tokens see many: keys and values of one head that stay in the second-level cache while the
/// query heads that share them pass by.
const PART: usize = 256;

impl Attend {
    /// The stage that comes after it; `value_width` is that of the cache.
    pub fn merge(&self, value_width: usize) -> AttendMerge {
        let (cut, heads, sinks) = (self.cut(), self.heads, self.sinks.clone());
        AttendMerge { cut, heads, sinks, width: value_width, out: self.out }
    }

    fn cut(&self) -> Cut {
        Cut { part: PART, window: self.window }
    }

    /// Into how many parts the heads of a sequence are cut.
    fn units(&self, kv_heads: usize) -> usize {
        if kv_heads >= ENOUGH_HEADS { kv_heads } else { self.heads }
    }

    fn blocks(frame: &Frame<'_>) -> usize {
        frame.length.div_ceil(TOKENS)
    }

    /// All query heads that share a key/value head, over one part of the positions.
    fn part(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, parts: Parts) {
        let Slot::Kv { keys, values, heads, key_width, value_width, capacity, dropped, .. } =
            &frame.slots[self.slot]
        else {
            return;
        };
        let (d, dv, group) = (*key_width, *value_width, self.heads / heads);
        // Neighbouring chunks are neighbouring positions of one head.
        let (pair, number) = (chunk / parts.count, chunk % parts.count);
        let (sequence, head, base) = (pair / heads, pair % heads, pair * capacity);
        for t in 0..frame.length {
            let seen = parts.within(self.cut().seen(frame.position, t), number);
            let places = base + seen.start - dropped..base + seen.end.max(seen.start) - dropped;
            let row = sequence * frame.length + t;
            for q_head in (row * self.heads + head * group..).take(group) {
                // SAFETY: earlier stages wrote queries and cache; this part of this head is this chunk's.
                unsafe {
                    let q = frame.buffer(self.queries).get(q_head * d..(q_head + 1) * d);
                    let to = frame.scratch.get_mut(parts.place(q_head, number, dv));
                    let k = keys.read(places.start * d..places.end * d);
                    let v = values.read(places.start * dv..places.end * dv);
                    local.b.resize(seen.len(), 0.0);
                    vector::scores(q, k, self.scale, &mut local.b);
                    write_part(&mut local.b, &mut local.a, to, |p, out| vector::weighted_sum(p, v, out));
                }
            }
        }
    }
}

impl Stage for Attend {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        let Slot::Kv { heads, .. } = &frame.slots[self.slot] else { return 0 };
        match self.cut().parts(frame.position, frame.length) {
            Some(parts) => frame.batch * heads * parts.count,
            None => frame.batch * self.units(*heads) * Self::blocks(frame),
        }
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        if let Some(parts) = self.cut().parts(frame.position, frame.length) {
            return self.part(frame, local, chunk, parts);
        }
        let Slot::Kv { keys, values, heads, key_width, value_width, capacity, dropped, .. } =
            &frame.slots[self.slot]
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
            let Range { start, end } = self.cut().seen(frame.position, t);
            let places = base + start - dropped..base + end - dropped;
            let row = sequence * frame.length + t;
            for g in 0..group {
                let q_head = unit * group + g;
                // SAFETY: earlier stages wrote queries and cache; this part of the result is this chunk's.
                unsafe {
                    let at = (row * self.heads + q_head) * d;
                    let q = frame.buffer(self.queries).get(at..at + d);
                    let k = keys.read(places.start * d..places.end * d);
                    let v = values.read(places.start * dv..places.end * dv);
                    local.b.resize(end - start, 0.0);
                    vector::scores(q, k, self.scale, &mut local.b);
                    // A sink stands after the others, and has no value.
                    local.b.extend(self.sinks.as_ref().map(|s| s[q_head]));
                    vector::softmax(&mut local.b, &mut local.a);
                    let at = (row * self.heads + q_head) * dv;
                    let out = frame.buffer(self.out).get_mut(at..at + dv);
                    vector::weighted_sum(&local.b[..end - start], v, out);
                }
            }
        }
    }
}
