//! Multi-head latent attention: queries and keys in a part without and a part with a rotary embedding, and attention in the
//! space of the latents.

use std::ops::Range;
use std::sync::Arc;

use super::parts::{AttendMerge, Cut, Parts, write_part};
use super::{Norm, Rope, Source, rows_per_chunk};
use crate::matrix::{Matrix, Tokens};
use crate::program::{Buffer, Frame, Local, Slot, Stage};
use crate::store::Part;
use crate::vector;

/// Tokens a chunk.
const TOKENS: usize = 4;

/// Splits queries `[tokens, heads * (nope + rope)]` into the parts that are not turned and those that are, and turns those.
#[derive(Debug)]
pub struct SplitRope {
    /// The queries.
    pub queries: Buffer,
    /// How many heads.
    pub heads: usize,
    /// Width of the part of a query that is not turned.
    pub nope: usize,
    /// Width of the part that is.
    pub rope_width: usize,
    /// How it is turned.
    pub rope: Arc<Rope>,
    /// The parts that are not turned, `[tokens, heads * nope]`.
    pub out: Buffer,
    /// Those that are, `[tokens, heads * rope_width]`.
    pub turned: Buffer,
}

impl Stage for SplitRope {
    fn name(&self) -> &'static str {
        "split + rope"
    }

    fn prepare(&self, positions: usize) {
        self.rope.reach(positions);
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        frame.rows().div_ceil(TOKENS)
    }

    fn work(&self, frame: &Frame<'_>, _: &mut Local, chunk: usize, _: bool) {
        let (nope, rope, both) = (self.nope, self.rope_width, self.nope + self.rope_width);
        for t in chunk * TOKENS..((chunk + 1) * TOKENS).min(frame.rows()) {
            let position = frame.position + t % frame.length;
            for head in t * self.heads..(t + 1) * self.heads {
                // SAFETY: an earlier stage wrote the queries; this token's parts of the results are this chunk's.
                unsafe {
                    let q = frame.buffer(self.queries).get(head * both..(head + 1) * both);
                    let plain = frame.buffer(self.out).get_mut(head * nope..(head + 1) * nope);
                    plain.copy_from_slice(&q[..nope]);
                    let turned = frame.buffer(self.turned).get_mut(head * rope..(head + 1) * rope);
                    turned.copy_from_slice(&q[nope..]);
                    self.rope.turn(position, turned);
                }
            }
        }
    }
}

/// Splits `[latent | rotary key]` rows, normalises the latent, turns the key, and appends both to a cache of one head.
#[derive(Debug)]
pub struct LatentAppend {
    /// Latent and rotary key, one row a token.
    pub compressed: Buffer,
    /// Width of the latent.
    pub latent: usize,
    /// Width of the rotary key.
    pub rope_width: usize,
    /// Norm over the latent.
    pub norm: Norm,
    /// How the key is turned.
    pub rope: Arc<Rope>,
    /// The cache: latents as keys, rotary keys as values.
    pub slot: usize,
}

impl Stage for LatentAppend {
    fn name(&self) -> &'static str {
        "latent norm + rope + append"
    }

    fn prepare(&self, positions: usize) {
        self.rope.reach(positions);
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        frame.rows().div_ceil(TOKENS)
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let Slot::Kv { keys, values, capacity, .. } = &frame.slots[self.slot] else { return };
        let (rope, latent) = (self.rope_width, self.latent);
        for t in chunk * TOKENS..((chunk + 1) * TOKENS).min(frame.rows()) {
            let (sequence, position) = (t / frame.length, frame.position + t % frame.length);
            let at = sequence * capacity + position;
            // SAFETY: an earlier stage wrote the rows; this token's place in the cache is this chunk's.
            unsafe {
                let row = frame.buffer(self.compressed).get(t * (latent + rope)..(t + 1) * (latent + rope));
                local.a.resize(latent.max(rope), 0.0);
                let normed = &mut local.a[..latent];
                vector::rms_norm(&row[..latent], self.norm.weight.as_deref(), self.norm.eps, normed);
                keys.write(at * latent, normed);
                let turned = &mut local.a[..rope];
                turned.copy_from_slice(&row[latent..]);
                self.rope.turn(position, turned);
                values.write(at * rope, turned);
            }
        }
    }
}

/// `out[t, h] = x[t, h] @ w[h].T`: each head has a matrix of its own.
#[derive(Debug)]
pub struct HeadProducts {
    /// The activations, a row a head.
    pub source: Source,
    /// The matrices, one a head.
    pub matrix: Matrix,
    /// The result, `[tokens, heads * rows]`.
    pub out: Buffer,
}

impl Stage for HeadProducts {
    fn name(&self) -> &'static str {
        "products of heads"
    }

    fn chunks(&self, _: &Frame<'_>) -> usize {
        self.matrix.experts() * self.matrix.rows().div_ceil(rows_per_chunk(&self.matrix))
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, first: bool) {
        self.source.prepare(frame, local, first);
        let (heads, n, step) = (self.matrix.experts(), self.matrix.rows(), rows_per_chunk(&self.matrix));
        let pieces = n.div_ceil(step);
        let (head, piece) = (chunk / pieces, chunk % pieces);
        let rows = piece * step..((piece + 1) * step).min(n);
        let (width, count) = (rows.len(), frame.rows());
        local.list.clear();
        local.list.extend((0..count).map(|t| (t * heads + head) as u32));
        local.b.resize(count * width, 0.0);
        let x = self.source.packed(frame, &local.activations);
        let tokens = Tokens::List(&local.list);
        self.matrix.product(head, rows.clone(), x, tokens, &mut local.b, width, &mut local.scratch);
        for (t, y) in local.b.chunks_exact(width).take(count).enumerate() {
            let at = (t * heads + head) * n;
            // SAFETY: these rows of this head are this chunk's.
            unsafe { frame.buffer(self.out).get_mut(at + rows.start..at + rows.end) }.copy_from_slice(y);
        }
    }
}

/// `softmax(scale * (q . c + q_pe . k_pe)) @ c` over the cached latents `c`, causal. [`AttendMerge`] comes after it.
#[derive(Debug)]
pub struct LatentAttend {
    /// Queries in the latents' space, `[tokens, heads * latent]`.
    pub queries: Buffer,
    /// Their rotary parts, `[tokens, heads * rope]`.
    pub turned: Buffer,
    /// Query heads.
    pub heads: usize,
    /// The cache: latents as keys, rotary keys as values.
    pub slot: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// Mixed latents, `[tokens, heads * latent]`.
    pub out: Buffer,
}

/// Positions a part, where few tokens see many: latents and rotary keys that stay in the second-level cache while the heads
/// pass by.
const PART: usize = 128;

impl LatentAttend {
    /// The stage that comes after it; `latent` is the width of the cache's latents.
    pub fn merge(&self, latent: usize) -> AttendMerge {
        AttendMerge { cut: CUT, heads: self.heads, sinks: None, width: latent, out: self.out }
    }

    /// Scores of a row of queries over `seen` into `local.b`; gives the latents.
    ///
    /// # Safety
    /// Earlier stages wrote queries and cache.
    unsafe fn scores<'a>(
        &self,
        frame: &'a Frame<'_>,
        local: &mut Local,
        row: usize,
        seen: Range<usize>,
    ) -> Part<'a> {
        let Slot::Kv { keys, values, key_width: d, value_width: rope, capacity, .. } =
            &frame.slots[self.slot]
        else {
            return Part::F32(&[]);
        };
        let base = row / self.heads / frame.length * capacity;
        let (start, end) = (base + seen.start, base + seen.end.max(seen.start));
        // SAFETY: as the caller promises.
        let (q, q_pe, latents, turned) = unsafe {
            (
                frame.buffer(self.queries).get(row * d..(row + 1) * d),
                frame.buffer(self.turned).get(row * rope..(row + 1) * rope),
                keys.read(start * d..end * d),
                values.read(start * rope..end * rope),
            )
        };
        local.b.resize(seen.len(), 0.0);
        local.c.resize(seen.len(), 0.0);
        vector::scores(q, latents, self.scale, &mut local.b);
        vector::scores(q_pe, turned, self.scale, &mut local.c);
        local.b.iter_mut().zip(&local.c).for_each(|(s, turned)| *s += turned);
        latents
    }

    /// All heads of a sequence's tokens over one part of the positions.
    fn part(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, parts: Parts) {
        let Slot::Kv { key_width: d, .. } = &frame.slots[self.slot] else { return };
        let (sequence, number) = (chunk / parts.count, chunk % parts.count);
        for t in 0..frame.length {
            let seen = parts.within(CUT.seen(frame.position, t), number);
            for row in ((sequence * frame.length + t) * self.heads..).take(self.heads) {
                // SAFETY: earlier stages wrote queries and cache; this part of this head is this chunk's.
                unsafe {
                    let latents = self.scores(frame, local, row, seen.clone());
                    let to = frame.scratch.get_mut(parts.place(row, number, *d));
                    let add = |p: &[f32], out: &mut [f32]| vector::weighted_sum(p, latents, out);
                    write_part(&mut local.b, &mut local.a, to, add);
                }
            }
        }
    }
}

const CUT: Cut = Cut { part: PART, window: None };

impl Stage for LatentAttend {
    fn name(&self) -> &'static str {
        "latent attention"
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        match CUT.parts(frame.position, frame.length) {
            Some(parts) => frame.batch * parts.count,
            None => frame.rows() * self.heads,
        }
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        if let Some(parts) = CUT.parts(frame.position, frame.length) {
            return self.part(frame, local, chunk, parts);
        }
        let Slot::Kv { key_width: d, .. } = &frame.slots[self.slot] else { return };
        // Later tokens see more: they come first, so that the last chunk is not the longest.
        let row = frame.rows() * self.heads - 1 - chunk;
        let seen = CUT.seen(frame.position, row / self.heads % frame.length);
        // SAFETY: earlier stages wrote queries and cache; this row of the result is this chunk's.
        unsafe {
            let latents = self.scores(frame, local, row, seen);
            vector::softmax(&mut local.b, &mut local.a);
            vector::weighted_sum(&local.b, latents, frame.buffer(self.out).get_mut(row * d..(row + 1) * d));
        }
    }
}
