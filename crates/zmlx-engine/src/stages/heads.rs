//! Products that give heads: queries, keys and values with their norms, rotary embedding and cache.

use std::sync::{Arc, PoisonError, RwLock};

use super::{Norm, Source};
use crate::matrix::{Matrix, Tokens};
use crate::program::{Buffer, Frame, Local, Slot, Stage};
use crate::vector;

/// Gives cosines and sines of positions: for each of `count` positions from `first` on, all cosines, then all sines.
pub type Angles = dyn Fn(usize, usize) -> Vec<f32> + Send + Sync;

/// Rotary position embedding, from a table that grows with the positions.
pub struct Rope {
    /// Pairs of a head that are turned.
    half: usize,
    /// Neighbours are pairs, not halves.
    traditional: bool,
    /// Multiplies what is turned, first.
    magnitude: f32,
    angles: Box<Angles>,
    table: RwLock<Vec<f32>>,
}

impl std::fmt::Debug for Rope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rope({} pairs)", self.half)
    }
}

/// Positions by which the table grows at least.
const TABLE_STEP: usize = 256;

impl Rope {
    /// A rotary embedding of `half` pairs: neighbours if `traditional`, else the first half with the second.
    pub fn new(half: usize, traditional: bool, angles: Box<Angles>) -> Self {
        Self { half, traditional, magnitude: 1.0, angles, table: RwLock::default() }
    }

    /// The same, which multiplies what it turns by `magnitude` first (YaRN).
    pub fn magnified(self, magnitude: f32) -> Self {
        Self { magnitude, ..self }
    }

    /// Pairs of a head that are turned.
    pub fn half(&self) -> usize {
        self.half
    }

    /// Whether neighbours are pairs, and not halves.
    pub fn is_traditional(&self) -> bool {
        self.traditional
    }

    /// Multiplies what is turned, first.
    pub fn magnitude(&self) -> f32 {
        self.magnitude
    }

    /// Cosines and sines of the first `positions` positions: for each, all cosines, then all sines.
    pub fn table(&self, positions: usize) -> Vec<f32> {
        self.reach(positions);
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table[..2 * self.half * positions].to_vec()
    }

    /// Makes the table reach that many positions.
    pub(super) fn reach(&self, positions: usize) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let known = table.len() / (2 * self.half);
        if known < positions {
            let more = (positions - known).max(known).next_multiple_of(TABLE_STEP);
            table.extend((self.angles)(known, more));
        }
    }

    /// Turns the leading part of a head.
    pub(super) fn turn(&self, position: usize, head: &mut [f32]) {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let (cos, sin) = table[2 * self.half * position..][..2 * self.half].split_at(self.half);
        if self.magnitude != 1.0 {
            head[..2 * self.half].iter_mut().for_each(|x| *x *= self.magnitude);
        }
        if self.traditional {
            for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[0] * s + pair[1] * c);
            }
        } else {
            let (first, second) = head[..2 * self.half].split_at_mut(self.half);
            for (((x, y), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                (*x, *y) = (*x * c - *y * s, *x * s + *y * c);
            }
        }
    }
}

/// Growth of queries with the stretch of the context that they stand in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Growth {
    /// How fast.
    pub beta: f32,
    /// Positions below which nothing changes.
    pub original_context: f32,
}

impl Growth {
    /// `1 + beta * ln(1 + floor(position / original_context))`
    fn factor(self, position: usize) -> f32 {
        1.0 + self.beta * (1.0 + (position as f32 / self.original_context).floor()).ln()
    }
}

/// What a head goes through on its way to its place.
#[derive(Debug, Clone, Default)]
pub struct Finish {
    /// Norm over the head.
    pub norm: Option<Norm>,
    /// Whether it is turned.
    pub rope: Option<Arc<Rope>>,
    /// Whether it grows after that.
    pub growth: Option<Growth>,
}

impl Finish {
    fn apply(&self, position: usize, head: &mut [f32], room: &mut Vec<f32>) {
        if let Some(norm) = &self.norm {
            room.clear();
            room.extend_from_slice(head);
            vector::rms_norm(room, norm.weight.as_deref(), norm.eps, head);
        }
        if let Some(rope) = &self.rope {
            rope.turn(position, head);
        }
        if let Some(growth) = self.growth {
            let factor = growth.factor(position);
            head.iter_mut().for_each(|x| *x *= factor);
        }
    }
}

/// Which of queries, keys and values head `chunk` of all belongs to, and its number there.
fn kind_of(mut chunk: usize, heads: [usize; 3]) -> (usize, usize) {
    let mut kind = 0;
    while chunk >= heads[kind] {
        chunk -= heads[kind];
        kind += 1;
    }
    (kind, chunk)
}

/// Writes head `head` of token `t`: queries to rows `[tokens, heads * width]` of `out`, keys (kind 1) and values (2) to the
/// cache.
///
/// # Safety
/// Nobody else may use that head of that token now.
unsafe fn put(
    frame: &Frame<'_>,
    (slot, out): (usize, Buffer),
    (kind, head): (usize, usize),
    t: usize,
    heads: usize,
    y: &[f32],
) {
    let Slot::Kv { keys, values, heads: kv_heads, capacity, dropped, .. } = &frame.slots[slot] else {
        return;
    };
    let (sequence, position) = (t / frame.length, frame.position + t % frame.length);
    let at = ((sequence * kv_heads + head) * capacity + position - dropped) * y.len();
    // SAFETY: as the caller promises.
    unsafe {
        match kind {
            0 => {
                let at = (t * heads + head) * y.len();
                frame.buffer(out).get_mut(at..at + y.len()).copy_from_slice(y);
            }
            1 => keys.write(at, y),
            _ => values.write(at, y),
        }
    }
}

/// Heads of one kind.
#[derive(Debug)]
pub struct Heads {
    /// The matrix `[heads * width, ...]`.
    pub matrix: Matrix,
    /// Added to the product.
    pub bias: Option<Vec<f32>>,
    /// How many.
    pub heads: usize,
    /// What is done to the product.
    pub finish: Finish,
}

/// Queries to a buffer `[tokens, heads * width]`, keys and values to a cache.
#[derive(Debug)]
pub struct Qkv {
    /// The activations.
    pub source: Source,
    /// Queries, keys, values.
    pub parts: [Heads; 3],
    /// The cache.
    pub slot: usize,
    /// The queries.
    pub out: Buffer,
    /// Where the second halves of the queries' heads go, `[tokens, heads * width]`: gates, which are neither normalised
    /// nor turned. Without it heads are queries whole.
    pub gate: Option<Buffer>,
}

impl Stage for Qkv {
    fn name(&self) -> &'static str {
        "qkv + norm + rope + append"
    }

    fn prepare(&self, positions: usize) {
        self.parts.iter().filter_map(|p| p.finish.rope.as_ref()).for_each(|rope| rope.reach(positions));
    }

    fn chunks(&self, _: &Frame<'_>) -> usize {
        self.parts.iter().map(|p| p.heads).sum()
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, first: bool) {
        self.source.prepare(frame, local, first);
        let (kind, head) = kind_of(chunk, [0, 1, 2].map(|i| self.parts[i].heads));
        let part = &self.parts[kind];
        let (count, width) = (frame.rows(), part.matrix.rows() / part.heads);
        let rows = head * width..(head + 1) * width;
        let x = self.source.packed(frame, &local.activations);
        local.b.resize(count * width, 0.0);
        part.matrix.product(
            0,
            rows.clone(),
            x,
            Tokens::Run(0, count),
            &mut local.b,
            width,
            &mut local.scratch,
        );
        for t in 0..count {
            let mut y = &mut local.b[t * width..][..width];
            if let Some(bias) = &part.bias {
                y.iter_mut().zip(&bias[rows.clone()]).for_each(|(y, b)| *y += b);
            }
            if let (0, Some(gate)) = (kind, self.gate) {
                let (query, rest) = y.split_at_mut(width / 2);
                let at = (t * part.heads + head) * rest.len();
                // SAFETY: this head of this token is this chunk's.
                unsafe { frame.buffer(gate).get_mut(at..at + rest.len()) }.copy_from_slice(rest);
                y = query;
            }
            part.finish.apply(frame.position + t % frame.length, y, &mut local.c);
            // SAFETY: this head of this token is this chunk's.
            unsafe { put(frame, (self.slot, self.out), (kind, head), t, part.heads, y) };
        }
    }
}

/// Heads of one kind that lie in rows of a buffer.
#[derive(Debug)]
pub struct HeadRows {
    /// Rows `[tokens, heads * width]`.
    pub buffer: Buffer,
    /// How many heads.
    pub heads: usize,
    /// Width of a head.
    pub width: usize,
    /// What is done to each.
    pub finish: Finish,
}

/// Queries to a buffer `[tokens, heads * width]`, keys and values to a cache, where their products are stages before.
#[derive(Debug)]
pub struct QkvRows {
    /// Queries, keys, values.
    pub parts: [HeadRows; 3],
    /// The cache.
    pub slot: usize,
    /// The queries.
    pub out: Buffer,
}

impl Stage for QkvRows {
    fn name(&self) -> &'static str {
        "norm + rope + append"
    }

    fn prepare(&self, positions: usize) {
        self.parts.iter().filter_map(|p| p.finish.rope.as_ref()).for_each(|rope| rope.reach(positions));
    }

    fn chunks(&self, _: &Frame<'_>) -> usize {
        self.parts.iter().map(|p| p.heads).sum()
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let (kind, head) = kind_of(chunk, [0, 1, 2].map(|i| self.parts[i].heads));
        let HeadRows { buffer, heads, width, finish } = &self.parts[kind];
        for t in 0..frame.rows() {
            let from = (t * heads + head) * width;
            local.b.clear();
            // SAFETY: an earlier stage wrote it.
            local.b.extend_from_slice(unsafe { frame.buffer(*buffer).get(from..from + width) });
            finish.apply(frame.position + t % frame.length, &mut local.b, &mut local.c);
            // SAFETY: this head of this token is this chunk's.
            unsafe { put(frame, (self.slot, self.out), (kind, head), t, *heads, &local.b) };
        }
    }
}
