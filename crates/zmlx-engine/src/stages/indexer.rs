//! Sparse latent attention: an indexer scores positions by small keys of its own, and attention looks at the best.

use std::cmp::Ordering;
use std::ops::Range;
use std::sync::Arc;

use super::Rope;
use crate::program::{Buffer, Call, Frame, Local, Slot, Stage};
use crate::vector;

/// Tokens a chunk.
const TOKENS: usize = 4;

/// Positions that a chunk scores.
const POSITIONS: usize = 256;

/// Turns the leading parts of the indexer's queries, and normalises, turns and appends its keys to a cache of one head.
#[derive(Debug)]
pub struct IndexAppend {
    /// The queries, `[tokens, heads * width]`.
    pub queries: Buffer,
    /// How many heads.
    pub heads: usize,
    /// The keys, `[tokens, width]`.
    pub keys: Buffer,
    /// Width of a query and of a key.
    pub width: usize,
    /// Weight of the layer norm of keys.
    pub weight: Option<Vec<f32>>,
    /// Its bias.
    pub bias: Option<Vec<f32>>,
    /// Added under its root.
    pub eps: f32,
    /// How queries are turned.
    pub query_rope: Arc<Rope>,
    /// How keys are turned.
    pub key_rope: Arc<Rope>,
    /// The cache; its values are the first column of its keys.
    pub slot: usize,
    /// The turned queries.
    pub turned: Buffer,
}

impl Stage for IndexAppend {
    fn name(&self) -> &'static str {
        "indexer norm + rope + append"
    }

    fn prepare(&self, positions: usize) {
        self.query_rope.reach(positions);
        self.key_rope.reach(positions);
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        frame.rows().div_ceil(TOKENS)
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let Slot::Kv { keys, values, capacity, .. } = &frame.slots[self.slot] else { return };
        let width = self.width;
        for t in chunk * TOKENS..((chunk + 1) * TOKENS).min(frame.rows()) {
            let (sequence, position) = (t / frame.length, frame.position + t % frame.length);
            let at = sequence * capacity + position;
            // SAFETY: earlier stages wrote queries and keys; this token's results and its place in the cache are this
            // chunk's.
            unsafe {
                let key = frame.buffer(self.keys).get(t * width..(t + 1) * width);
                local.c.resize(width, 0.0);
                let to = &mut local.c[..width];
                vector::layer_norm(key, self.weight.as_deref(), self.bias.as_deref(), self.eps, to);
                self.key_rope.turn(position, to);
                keys.write(at * width, to);
                values.write(at, &to[..1]);
                for head in t * self.heads..(t + 1) * self.heads {
                    let to = frame.buffer(self.turned).get_mut(head * width..(head + 1) * width);
                    to.copy_from_slice(frame.buffer(self.queries).get(head * width..(head + 1) * width));
                    self.query_rope.turn(position, to);
                }
            }
        }
    }
}

/// How many positions a query looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopK(pub usize);

impl TopK {
    /// Whether a call has to choose.
    fn chooses(self, position: usize, length: usize) -> bool {
        position + length > self.0
    }

    /// Whether the token of a row sees more positions than it looks at, and how many it sees.
    fn of_row(self, frame: &Frame<'_>, row: usize) -> (bool, usize) {
        let seen = frame.position + row % frame.length + 1;
        (seen > self.0, seen)
    }
}

/// Where the scores of a row are in the scratch.
fn place(frame: &Frame<'_>, row: usize) -> usize {
    row * (frame.position + frame.length)
}

/// The score of each position for each query, `sum over heads of weight * max(0, query . key)`, for [`PickPositions`]; no
/// chunks where nothing is to be chosen.
#[derive(Debug)]
pub struct IndexScores {
    /// The queries, `[tokens, heads * width]`.
    pub queries: Buffer,
    /// How many heads.
    pub heads: usize,
    /// The heads' weights, `[tokens, heads]`.
    pub weights: Buffer,
    /// Multiplies the weights.
    pub scale: f32,
    /// The cache.
    pub slot: usize,
    /// How many positions are wanted.
    pub top_k: TopK,
}

impl Stage for IndexScores {
    fn name(&self) -> &'static str {
        "indexer scores"
    }

    /// Not before there is a choice.
    fn in_decode(&self) -> bool {
        false
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        match self.top_k.chooses(frame.position, frame.length) {
            true => frame.rows() * (frame.position + frame.length).div_ceil(POSITIONS),
            false => 0,
        }
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let Slot::Kv { keys, key_width: d, capacity, .. } = &frame.slots[self.slot] else { return };
        let pieces = (frame.position + frame.length).div_ceil(POSITIONS);
        let (row, piece) = (chunk / pieces, chunk % pieces);
        let (chooses, seen) = self.top_k.of_row(frame, row);
        let Range { start, end } = piece * POSITIONS..((piece + 1) * POSITIONS).min(seen);
        if !chooses || start >= end {
            return;
        }
        let base = row / frame.length * capacity;
        // SAFETY: earlier stages wrote queries, weights and cache; these positions of this row are this chunk's.
        unsafe {
            let keys = keys.read((base + start) * d..(base + end) * d);
            let weights = frame.buffer(self.weights).get(row * self.heads..(row + 1) * self.heads);
            let queries = frame.buffer(self.queries).get(row * self.heads * d..(row + 1) * self.heads * d);
            let total = frame.scratch.get_mut(place(frame, row) + start..place(frame, row) + end);
            total.fill(0.0);
            local.b.resize(end - start, 0.0);
            for (q, weight) in queries.chunks_exact(*d).zip(weights) {
                vector::scores(q, keys, 1.0, &mut local.b);
                let weight = weight * self.scale;
                total.iter_mut().zip(&local.b).for_each(|(t, s)| *t += s.max(0.0) * weight);
            }
        }
    }
}

/// The best positions of each query in ascending order, of equal scores the later, as MLX's argpartition on the CPU has
/// them. No chunks where nothing is to be chosen.
#[derive(Debug)]
pub struct PickPositions {
    /// How many are wanted.
    pub top_k: TopK,
    /// The positions `[tokens, top_k]`, as floats (exact below 2^24). Rows of tokens that see no more than that are left as
    /// they are.
    pub out: Buffer,
}

impl Stage for PickPositions {
    fn name(&self) -> &'static str {
        "indexer top-k"
    }

    fn scratch(&self, call: &Call<'_>) -> usize {
        let rows = call.tokens.len();
        let length = rows / call.batch.max(1);
        if self.top_k.chooses(call.position, length) { rows * (call.position + length) } else { 0 }
    }

    fn in_decode(&self) -> bool {
        false
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        if self.top_k.chooses(frame.position, frame.length) { frame.rows() } else { 0 }
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, row: usize, _: bool) {
        let (TopK(k), (chooses, seen)) = (self.top_k, self.top_k.of_row(frame, row));
        if !chooses {
            return;
        }
        // SAFETY: the stage before wrote the scores; this row of positions is this chunk's.
        let (scores, out) = unsafe {
            let at = place(frame, row);
            (frame.scratch.get(at..at + seen), frame.buffer(self.out).get_mut(row * k..(row + 1) * k))
        };
        let positions = &mut local.list;
        positions.clear();
        positions.extend(0..seen as u32);
        // NaN counts as the largest, so that it is not lost.
        let order = |a: &u32, b: &u32| -> Ordering {
            let (x, y) = (scores[*a as usize], scores[*b as usize]);
            x.partial_cmp(&y).unwrap_or_else(|| x.is_nan().cmp(&y.is_nan())).then(a.cmp(b))
        };
        positions.select_nth_unstable_by(seen - k, order);
        let chosen = &mut positions[seen - k..];
        chosen.sort_unstable();
        out.iter_mut().zip(chosen).for_each(|(o, p)| *o = *p as f32);
    }
}

/// [`LatentAttend`](super::LatentAttend) over chosen positions.
#[derive(Debug)]
pub struct SparseLatentAttend {
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
    /// The chosen positions, `[tokens, top_k]`.
    pub chosen: Buffer,
    /// How many there are; a token that sees no more looks at all.
    pub top_k: TopK,
    /// Mixed latents, `[tokens, heads * latent]`.
    pub out: Buffer,
}

impl Stage for SparseLatentAttend {
    fn name(&self) -> &'static str {
        "sparse latent attention"
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        frame.rows() * self.heads
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let Slot::Kv { keys, values, key_width: d, value_width: rope, capacity, .. } =
            &frame.slots[self.slot]
        else {
            return;
        };
        // Later tokens see more: they come first, so that the last chunk is not the longest.
        let head = frame.rows() * self.heads - 1 - chunk;
        let row = head / self.heads;
        let base = row / frame.length * capacity;
        let (TopK(k), (chooses, seen)) = (self.top_k, self.top_k.of_row(frame, row));
        local.list.clear();
        // SAFETY: earlier stages wrote queries, cache and positions; this head of this row is this chunk's.
        unsafe {
            if chooses {
                let chosen = frame.buffer(self.chosen).get(row * k..(row + 1) * k);
                local.list.extend(chosen.iter().map(|&p| p as u32));
            } else {
                local.list.extend(0..seen as u32);
            }
            let latent = |p: u32| keys.read((base + p as usize) * d..(base + p as usize + 1) * d);
            let key = |p: u32| values.read((base + p as usize) * rope..(base + p as usize + 1) * rope);
            let q = frame.buffer(self.queries).get(head * d..(head + 1) * d);
            let q_pe = frame.buffer(self.turned).get(head * rope..(head + 1) * rope);
            let score = |&p: &u32| {
                let (mut nope, mut pe) = ([0.0], [0.0]);
                vector::scores(q, latent(p), 1.0, &mut nope);
                vector::scores(q_pe, key(p), 1.0, &mut pe);
                self.scale * (nope[0] + pe[0])
            };
            local.b.clear();
            local.b.extend(local.list.iter().map(score));
            vector::softmax(&mut local.b, &mut local.a);
            let out = frame.buffer(self.out).get_mut(head * d..(head + 1) * d);
            out.fill(0.0);
            for (weight, &p) in local.b.iter().zip(&local.list) {
                latent(p).add_to(*weight, out);
            }
        }
    }
}
