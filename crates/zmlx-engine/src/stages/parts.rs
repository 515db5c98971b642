//! Attention of few tokens over many positions: cut into parts that threads share, and put together again.
//!
//! A part leaves, for each query head, the largest score `m`, `l = sum(exp(s - m))` and `a = sum(exp(s - m) * v)` of its
//! positions. With `M` the largest `m` of all parts, the result is `sum(exp(m - M) * a) / sum(exp(m - M) * l)`.

use crate::program::{Buffer, Call, Frame, Local, Stage};
use crate::vector;

/// Calls of up to so many tokens a sequence are cut by positions; longer ones have enough chunks without.
const FEW_TOKENS: usize = 4;

/// How attention is cut by positions: always at the same ones, so that the result does not depend on the number of threads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// Positions a part.
    pub(super) part: usize,
    /// Only so many positions back, the own one included.
    pub(super) window: Option<usize>,
}

/// The parts of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parts {
    /// Positions a part.
    part: usize,
    /// Number of the first, counted from position 0.
    first: usize,
    /// How many.
    pub(super) count: usize,
}

/// Floats of a part of one head beside its values: `m` and `l`.
const HEADER: usize = 2;

impl Cut {
    /// The positions that token `t` of a call at `position` sees.
    pub(super) fn seen(&self, position: usize, t: usize) -> std::ops::Range<usize> {
        let end = position + t + 1;
        self.window.map_or(0, |w| end.saturating_sub(w))..end
    }

    /// The parts of a call of `length` tokens at `position`; none if it is not to be cut.
    pub(super) fn parts(&self, position: usize, length: usize) -> Option<Parts> {
        let first = self.seen(position, 0).start / self.part;
        let count = (position + length).div_ceil(self.part) - first;
        (length <= FEW_TOKENS && count > 1).then_some(Parts { part: self.part, first, count })
    }
}

impl Parts {
    /// What part `number` has of `seen`.
    pub(super) fn within(&self, seen: std::ops::Range<usize>, number: usize) -> std::ops::Range<usize> {
        let start = (self.first + number) * self.part;
        seen.start.max(start)..seen.end.min(start + self.part)
    }

    /// Where the part `number` of a head of a row is in the scratch, `width` values each.
    pub(super) fn place(&self, head: usize, number: usize, width: usize) -> std::ops::Range<usize> {
        let each = HEADER + width;
        let at = (head * self.count + number) * each;
        at..at + each
    }
}

/// Writes a part of one head: from `scores`, which become their exponentials, and the rows of values that `sum` adds up.
pub(super) fn write_part(
    scores: &mut [f32],
    room: &mut Vec<f32>,
    to: &mut [f32],
    sum: impl FnOnce(&[f32], &mut [f32]),
) {
    let (header, values) = to.split_at_mut(HEADER);
    (header[0], header[1]) = vector::exponentials(scores, room);
    if header[1] == 0.0 {
        // No position, or none with a finite score: what is here must not count.
        values.fill(0.0);
    } else {
        sum(scores, values);
    }
}

/// Puts the parts of each head together; no chunks where there are none.
#[derive(Debug)]
pub struct AttendMerge {
    pub(super) cut: Cut,
    /// Query heads.
    pub(super) heads: usize,
    /// A score of each head that takes part in its softmax and has no value.
    pub(super) sinks: Option<Vec<f32>>,
    /// Values of a head.
    pub(super) width: usize,
    /// The result, `[tokens, heads * width]`.
    pub(super) out: Buffer,
}

/// Heads a chunk.
const HEADS: usize = 8;

impl Stage for AttendMerge {
    fn name(&self) -> &'static str {
        "attention, parts together"
    }

    /// Not before the cache has a second part.
    fn in_decode(&self) -> bool {
        false
    }

    fn scratch(&self, call: &Call<'_>) -> usize {
        let rows = call.tokens.len();
        let parts = self.cut.parts(call.position, rows / call.batch.max(1));
        parts.map_or(0, |parts| rows * self.heads * parts.count * (HEADER + self.width))
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        match self.cut.parts(frame.position, frame.length) {
            Some(_) => frame.rows() * self.heads.div_ceil(HEADS),
            None => 0,
        }
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let Some(parts) = self.cut.parts(frame.position, frame.length) else { return };
        let pieces = self.heads.div_ceil(HEADS);
        let (row, piece) = (chunk / pieces, chunk % pieces);
        for head in row * self.heads + piece * HEADS..row * self.heads + self.heads.min((piece + 1) * HEADS) {
            // SAFETY: the stage before wrote the parts; this head of the result is this chunk's.
            unsafe {
                let part = |number| frame.scratch.get(parts.place(head, number, self.width));
                let out = frame.buffer(self.out).get_mut(head * self.width..(head + 1) * self.width);
                local.b.clear();
                local.b.extend((0..parts.count).map(|number| part(number)[0]));
                // A sink stands after the parts: it adds to their total and has no value.
                local.b.extend(self.sinks.as_ref().map(|sinks| sinks[head % self.heads]));
                let largest = local.b.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
                local.b.iter_mut().for_each(|m| *m -= largest);
                vector::apply(zmlx_simd::MathFn::Exp, &mut local.b, &mut local.a);
                out.fill(0.0);
                let mut total: f32 = local.b[parts.count..].iter().sum();
                for (number, weight) in local.b[..parts.count].iter().enumerate() {
                    let (header, values) = part(number).split_at(HEADER);
                    // Nothing of what is seen lies in it.
                    if header[1] != 0.0 {
                        total += weight * header[1];
                        vector::axpy(*weight, values, out);
                    }
                }
                let inverse = 1.0 / total;
                out.iter_mut().for_each(|v| *v *= inverse);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_what_is_seen_once() {
        for (window, position, length, count) in [
            (None, 255, 1, 1),
            (None, 256, 1, 2),
            (None, 700, 4, 3),
            (Some(300), 1000, 1, 2),
            (Some(5), 511, 3, 2),
            (Some(256), 511, 1, 1),
            (Some(4), 600, 1, 1),
            // Many tokens have enough chunks without.
            (None, 600, 64, 1),
        ] {
            let cut = Cut { part: 256, window };
            let parts = cut.parts(position, length);
            assert_eq!(parts.map_or(1, |p| p.count), count, "{window:?} {position}+{length}");
            for (parts, t) in parts.iter().flat_map(|parts| (0..length).map(move |t| (parts, t))) {
                let seen = cut.seen(position, t);
                let mut covered = Vec::new();
                (0..parts.count).for_each(|n| covered.extend(parts.within(seen.clone(), n)));
                assert_eq!(covered, seen.collect::<Vec<_>>(), "{window:?} {position}+{t}");
            }
        }
    }
}
