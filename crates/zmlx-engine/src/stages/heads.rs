//! Products that give heads: queries, keys and values with their norms, rotary embedding and cache.

use super::{Norm, Source};
use crate::matrix::{Matrix, Tokens};
use crate::program::{Buffer, Frame, Local, Slot, Stage};
use crate::vector;

/// Rotary position embedding.
#[derive(Debug, Clone)]
pub struct Rope {
    /// `1 / frequency` of each pair, in radians a position.
    pub inverse_frequencies: Vec<f32>,
    /// Neighbours are pairs, not halves.
    pub traditional: bool,
}

impl Rope {
    /// The usual frequencies: `base^(-2 i / dims)`, positions multiplied by `scale`.
    pub fn new(dims: usize, base: f32, scale: f32, traditional: bool) -> Self {
        // As MLX's CPU rope computes them.
        let step = base.log2() / (dims / 2) as f32;
        let inverse_frequencies = (0..dims / 2).map(|i| scale * (-(i as f32) * step).exp2()).collect();
        Self { inverse_frequencies, traditional }
    }

    /// Cosines and sines of a position: first all cosines.
    fn angles(&self, position: usize, out: &mut Vec<f32>) {
        out.clear();
        out.extend(self.inverse_frequencies.iter().map(|f| (position as f32 * f).cos()));
        out.extend(self.inverse_frequencies.iter().map(|f| (position as f32 * f).sin()));
    }

    /// Turns the leading part of a head.
    fn turn(&self, angles: &[f32], head: &mut [f32]) {
        let half = self.inverse_frequencies.len();
        let (cos, sin) = angles.split_at(half);
        for i in 0..half {
            let (a, b) = if self.traditional { (2 * i, 2 * i + 1) } else { (i, i + half) };
            let (x, y) = (head[a], head[b]);
            (head[a], head[b]) = (x * cos[i] - y * sin[i], x * sin[i] + y * cos[i]);
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
    /// Norm over a head.
    pub norm: Option<Norm>,
    /// Whether it is turned.
    pub rope: Option<Rope>,
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
}

impl Stage for Qkv {
    fn name(&self) -> &'static str {
        "qkv + norm + rope + append"
    }

    fn chunks(&self, _: &Frame<'_>) -> usize {
        self.parts.iter().map(|p| p.heads).sum()
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, first: bool) {
        self.source.prepare(frame, local, first);
        let (mut head, mut kind) = (chunk, 0);
        while head >= self.parts[kind].heads {
            head -= self.parts[kind].heads;
            kind += 1;
        }
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
        let Slot::Kv { keys, values, heads: kv_heads, capacity, .. } = &frame.slots[self.slot] else {
            return;
        };
        for t in 0..count {
            let y = &mut local.b[t * width..][..width];
            let (sequence, position) = (t / frame.length, frame.position + t % frame.length);
            if let Some(bias) = &part.bias {
                y.iter_mut().zip(&bias[rows.clone()]).for_each(|(y, b)| *y += b);
            }
            if let Some(norm) = &part.norm {
                local.c.clear();
                local.c.extend_from_slice(y);
                vector::rms_norm(&local.c, norm.weight.as_deref(), norm.eps, y);
            }
            if let Some(rope) = &part.rope {
                rope.angles(position, &mut local.c);
                rope.turn(&local.c, y);
            }
            let at = ((sequence * kv_heads + head) * capacity + position) * width;
            // SAFETY: this head of this token is this chunk's.
            let to = unsafe {
                match kind {
                    0 => {
                        let at = t * part.heads * width + rows.start;
                        frame.buffer(self.out).get_mut(at..at + width)
                    }
                    1 => keys.get_mut(at..at + width),
                    _ => values.get_mut(at..at + width),
                }
            };
            to.copy_from_slice(y);
        }
    }
}
