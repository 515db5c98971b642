//! Products with the experts of each token.
//!
//! With few tokens a chunk is a piece of one chosen expert's matrix for one token. With many, tokens are grouped by expert
//! first, and a chunk is a piece of one expert's matrix for all tokens that chose it.

use super::{Activation, Source, add_rows, rows_per_chunk};
use crate::matrix::{Matrix, Tokens};
use crate::program::{Buffer, Frame, Local, Stage};

/// From this many tokens on, they are grouped by expert.
const GROUP_FROM: usize = 3;

/// The choices of a call: buffers that [`super::Route`] and [`Group`] fill.
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    /// Chosen experts `[tokens, k]`.
    pub indices: Buffer,
    /// How many a token uses.
    pub k: usize,
    /// Number of experts.
    pub experts: usize,
    /// Where each expert's list begins, then all lists: `experts + 1 + tokens * k` floats, see [`Group`].
    pub lists: Buffer,
}

impl Choice {
    /// Floats a token that the lists need, when tokens are grouped by expert.
    pub fn list_width(&self) -> usize {
        self.k + (self.experts + 1).div_ceil(GROUP_FROM)
    }

    fn grouped(frame: &Frame<'_>) -> bool {
        frame.rows() >= GROUP_FROM
    }

    /// The expert of a slot.
    fn expert(&self, frame: &Frame<'_>, slot: usize) -> usize {
        // SAFETY: the router stage is complete.
        unsafe { frame.buffer(self.indices).get(slot..slot + 1)[0] as usize }
    }

    /// The slots (token * k + choice) that chose an expert.
    fn list<'a>(&self, frame: &'a Frame<'_>, expert: usize) -> &'a [f32] {
        let lists = frame.buffer(self.lists);
        // SAFETY: the group stage is complete.
        unsafe {
            let bounds = lists.get(expert..expert + 2);
            let base = self.experts + 1;
            lists.get(base + bounds[0] as usize..base + bounds[1] as usize)
        }
    }
}

/// Lists the slots of each expert, when there are many tokens.
#[derive(Debug)]
pub struct Group(pub Choice);

impl Stage for Group {
    fn name(&self) -> &'static str {
        "group by expert"
    }

    fn in_decode(&self) -> bool {
        false
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        usize::from(Choice::grouped(frame))
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, _: usize, _: bool) {
        let (experts, slots) = (self.0.experts, frame.rows() * self.0.k);
        // SAFETY: the router stage is complete; the lists are this chunk's.
        let (indices, lists) = unsafe {
            (
                frame.buffer(self.0.indices).get(0..slots),
                frame.buffer(self.0.lists).get_mut(0..experts + 1 + slots),
            )
        };
        local.list.clear();
        local.list.resize(experts + 1, 0);
        indices.iter().for_each(|&e| local.list[e as usize + 1] += 1);
        for e in 0..experts {
            local.list[e + 1] += local.list[e];
        }
        let (bounds, rest) = lists.split_at_mut(experts + 1);
        bounds.iter_mut().zip(&local.list).for_each(|(b, n)| *b = *n as f32);
        for (slot, &e) in indices.iter().enumerate() {
            let at = &mut local.list[e as usize];
            rest[*at as usize] = slot as f32;
            *at += 1;
        }
    }
}

/// `out[slot] = act(x @ gate[e].T + bg[e]) * (x @ up[e].T + bu[e])` for the expert `e` of each slot.
#[derive(Debug)]
pub struct ExpertsUp {
    /// The activations, one row a token.
    pub source: Source,
    /// The choices.
    pub choice: Choice,
    /// The matrices whose products go through the activation.
    pub gate: Matrix,
    /// The others.
    pub up: Matrix,
    /// Added to their columns, `[experts, width]`.
    pub biases: [Option<Vec<f32>>; 2],
    /// The activation.
    pub activation: Activation,
    /// The result, `[tokens * k, width]`.
    pub out: Buffer,
}

impl Stage for ExpertsUp {
    fn name(&self) -> &'static str {
        "experts gate + up + activation"
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        let pieces = self.gate.rows().div_ceil(rows_per_chunk(&self.gate));
        pieces * if Choice::grouped(frame) { self.choice.experts } else { frame.rows() * self.choice.k }
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, first: bool) {
        self.source.prepare(frame, local, first);
        let (n, step, k) = (self.gate.rows(), rows_per_chunk(&self.gate), self.choice.k);
        let pieces = n.div_ceil(step);
        let (which, piece) = (chunk / pieces, chunk % pieces);
        let rows = piece * step..((piece + 1) * step).min(n);
        let width = rows.len();
        local.list.clear();
        let single = [which as f32];
        let (expert, slots) = if Choice::grouped(frame) {
            (which, self.choice.list(frame, which))
        } else {
            (self.choice.expert(frame, which), &single[..])
        };
        if slots.is_empty() {
            return;
        }
        local.list.extend(slots.iter().map(|&s| s as u32 / k as u32));
        let x = self.source.packed(frame, &local.activations);
        let count = slots.len();
        for (matrix, out) in [(&self.gate, &mut local.b), (&self.up, &mut local.c)] {
            out.resize(count * width, 0.0);
            matrix.product(
                expert,
                rows.clone(),
                x,
                Tokens::List(&local.list),
                out,
                width,
                &mut local.scratch,
            );
        }
        for (bias, out) in self.biases.iter().zip([&mut local.b, &mut local.c]) {
            if let Some(bias) = bias {
                add_rows(&bias[expert * n..][rows.clone()], &mut out[..count * width]);
            }
        }
        let len = count * width;
        self.activation.apply(&mut local.b[..len], &mut local.c[..len], &mut local.a);
        for (i, &slot) in slots.iter().enumerate() {
            let at = slot as usize * n;
            // SAFETY: this part of the slot's row is this chunk's.
            let out = unsafe { frame.buffer(self.out).get_mut(at + rows.start..at + rows.end) };
            let (g, u) = (&local.b[i * width..][..width], &local.c[i * width..][..width]);
            out.iter_mut().zip(g).zip(u).for_each(|((o, g), u)| *o = g * u);
        }
    }
}

/// With few tokens `out = sum over choices of weight * (x @ down[e].T + bd[e]) + residuals`; with many, each slot's product
/// and bias to `slots`, which [`Combine`] adds up.
#[derive(Debug)]
pub struct ExpertsDown {
    /// The activations, `k` rows a token.
    pub source: Source,
    /// The choices.
    pub choice: Choice,
    /// The matrices.
    pub down: Matrix,
    /// Added to their columns, `[experts, width]`.
    pub bias: Option<Vec<f32>>,
    /// Weights of the choices, `[tokens, k]`.
    pub weights: Buffer,
    /// Added to the result, one after another.
    pub residuals: Vec<Buffer>,
    /// The products of all slots, when there are many tokens.
    pub slots: Buffer,
    /// The result.
    pub out: Buffer,
}

impl Stage for ExpertsDown {
    fn name(&self) -> &'static str {
        "experts down + combine + residual"
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        let pieces = self.down.rows().div_ceil(self.step(frame));
        pieces * if Choice::grouped(frame) { self.choice.experts } else { 1 }
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, first: bool) {
        self.source.prepare(frame, local, first);
        let (n, step, k) = (self.down.rows(), self.step(frame), self.choice.k);
        let pieces = n.div_ceil(step);
        let (which, piece) = (chunk / pieces, chunk % pieces);
        let rows = piece * step..((piece + 1) * step).min(n);
        let width = rows.len();
        let x = self.source.packed(frame, &local.activations);
        if Choice::grouped(frame) {
            let slots = self.choice.list(frame, which);
            local.list.clear();
            local.list.extend(slots.iter().map(|&s| s as u32));
            local.b.resize(slots.len() * width, 0.0);
            self.down.product(
                which,
                rows.clone(),
                x,
                Tokens::List(&local.list),
                &mut local.b,
                width,
                &mut local.scratch,
            );
            if let Some(bias) = &self.bias {
                add_rows(&bias[which * n..][rows.clone()], &mut local.b);
            }
            for (y, &slot) in local.b.chunks_exact(width).zip(slots) {
                let at = slot as usize * n;
                // SAFETY: this part of the slot's row is this chunk's.
                unsafe { frame.buffer(self.slots).get_mut(at + rows.start..at + rows.end) }
                    .copy_from_slice(y);
            }
            return;
        }
        for t in 0..frame.rows() {
            local.c.clear();
            local.c.resize(width, 0.0);
            for s in 0..k {
                let slot = t * k + s;
                let expert = self.choice.expert(frame, slot);
                local.b.resize(width, 0.0);
                let tokens = Tokens::Run(slot, 1);
                self.down.product(expert, rows.clone(), x, tokens, &mut local.b, width, &mut local.scratch);
                if let Some(bias) = &self.bias {
                    add_rows(&bias[expert * n..][rows.clone()], &mut local.b[..width]);
                }
                // SAFETY: the router stage is complete.
                let weight = unsafe { frame.buffer(self.weights).get(slot..slot + 1)[0] };
                add_weighted(weight, &local.b[..width], s == 0, &mut local.c);
            }
            finish(frame, &self.residuals, self.out, t * n + rows.start, &mut local.c);
        }
    }
}

impl ExpertsDown {
    /// Rows a chunk: with few tokens a chunk reads as many rows of each chosen expert.
    fn step(&self, frame: &Frame<'_>) -> usize {
        let step = rows_per_chunk(&self.down);
        if Choice::grouped(frame) {
            step
        } else {
            (step / self.choice.k).next_multiple_of(self.down.granule().max(4))
        }
    }
}

/// `out = sum over choices of weight * slots[choice] + residuals`, when there are many tokens.
#[derive(Debug)]
pub struct Combine {
    /// The choices.
    pub choice: Choice,
    /// Weights of the choices, `[tokens, k]`.
    pub weights: Buffer,
    /// The products of all slots.
    pub slots: Buffer,
    /// Added to the result, one after another.
    pub residuals: Vec<Buffer>,
    /// The result.
    pub out: Buffer,
    /// Width of a row.
    pub width: usize,
}

/// Tokens a chunk.
const TOKENS: usize = 8;

impl Stage for Combine {
    fn name(&self) -> &'static str {
        "combine"
    }

    fn in_decode(&self) -> bool {
        false
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        if Choice::grouped(frame) { frame.rows().div_ceil(TOKENS) } else { 0 }
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        let (n, k) = (self.width, self.choice.k);
        for t in chunk * TOKENS..((chunk + 1) * TOKENS).min(frame.rows()) {
            local.c.clear();
            local.c.resize(n, 0.0);
            for s in 0..k {
                let slot = t * k + s;
                // SAFETY: the stages that wrote them are complete.
                let (weight, y) = unsafe {
                    (
                        frame.buffer(self.weights).get(slot..slot + 1)[0],
                        frame.buffer(self.slots).get(slot * n..(slot + 1) * n),
                    )
                };
                add_weighted(weight, y, s == 0, &mut local.c);
            }
            finish(frame, &self.residuals, self.out, t * n, &mut local.c);
        }
    }
}

/// `total += weight * y`, product and sum rounded apart as two ops would; the first starts the sum.
fn add_weighted(weight: f32, y: &[f32], first: bool, total: &mut [f32]) {
    if first {
        total.iter_mut().zip(y).for_each(|(t, y)| *t = y * weight);
    } else {
        total.iter_mut().zip(y).for_each(|(t, y)| *t += y * weight);
    }
}

/// Adds the residuals and stores from element `at` on.
fn finish(frame: &Frame<'_>, residuals: &[Buffer], out: Buffer, at: usize, y: &mut [f32]) {
    let range = at..at + y.len();
    // SAFETY: earlier stages wrote the residuals; this range of the result is the caller's chunk's.
    unsafe {
        for &residual in residuals {
            y.iter_mut().zip(frame.buffer(residual).get(range.clone())).for_each(|(y, r)| *y += r);
        }
        frame.buffer(out).get_mut(range).copy_from_slice(y);
    }
}
