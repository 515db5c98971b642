//! Choosing experts.

use zmlx_simd::MathFn;

use crate::program::{Buffer, Frame, Local, Stage};
use crate::vector;

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scores {
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// Softmax over all experts.
    Softmax,
    /// Softmax over the chosen ones only; logits choose.
    SoftmaxOfChosen,
}

/// Which of equal experts is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ties {
    /// That of the higher index, as the last `k` of MLX's argpartition have it on the CPU.
    Higher,
    /// That of the lower index, as the first `k` of an argpartition of negated scores have it.
    Lower,
}

/// Experts in groups of equal size, of which some are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// How many groups; each has two experts or more.
    pub count: usize,
    /// How many are kept: those with the largest `(sum of the two largest scores + bias, index)`.
    pub keep: usize,
}

/// Logits to the chosen experts of each token and their weights.
///
/// Experts are ranked by `score + bias`; in groups that are not kept that is 0 (which may still be chosen, where others are
/// below). The `k` that rank highest are chosen, `ties` says which of equal ones. They come in ascending order of rank, the
/// one that a tie prefers after the other.
#[derive(Debug)]
pub struct Route {
    /// The logits, `[tokens, experts]`.
    pub logits: Buffer,
    /// Experts.
    pub experts: usize,
    /// How many a token uses.
    pub k: usize,
    /// How logits become scores.
    pub scores: Scores,
    /// Added to scores for the choice only.
    pub bias: Option<Vec<f32>>,
    /// Which of equal experts is chosen.
    pub ties: Ties,
    /// Groups, of which only some take part.
    pub groups: Option<Groups>,
    /// Divide the weights by their sum plus this.
    pub renormalise: Option<f32>,
    /// Multiplies the weights.
    pub scale: f32,
    /// The chosen experts `[tokens, k]`, as floats (exact below 2^24).
    pub indices: Buffer,
    /// Their weights `[tokens, k]`.
    pub weights: Buffer,
}

/// Tokens a chunk.
const TOKENS: usize = 16;

impl Stage for Route {
    fn name(&self) -> &'static str {
        "router"
    }

    fn chunks(&self, frame: &Frame<'_>) -> usize {
        frame.rows().div_ceil(TOKENS)
    }

    fn work(&self, frame: &Frame<'_>, local: &mut Local, chunk: usize, _: bool) {
        for t in chunk * TOKENS..((chunk + 1) * TOKENS).min(frame.rows()) {
            // SAFETY: an earlier stage wrote the logits; these rows of the results are this chunk's.
            let (logits, indices, weights) = unsafe {
                (
                    frame.buffer(self.logits).get(t * self.experts..(t + 1) * self.experts),
                    frame.buffer(self.indices).get_mut(t * self.k..(t + 1) * self.k),
                    frame.buffer(self.weights).get_mut(t * self.k..(t + 1) * self.k),
                )
            };
            self.choose(logits, indices, weights, local);
        }
    }
}

impl Route {
    fn choose(&self, logits: &[f32], indices: &mut [f32], weights: &mut [f32], local: &mut Local) {
        let scores = &mut local.b;
        scores.clear();
        scores.extend_from_slice(logits);
        match self.scores {
            Scores::Sigmoid => vector::apply(MathFn::Sigmoid, scores, &mut local.a),
            Scores::Softmax => vector::softmax(scores, &mut local.a),
            Scores::SoftmaxOfChosen => {}
        }
        let ranks = &mut local.c;
        ranks.clear();
        ranks.extend_from_slice(scores);
        if let Some(bias) = &self.bias {
            ranks.iter_mut().zip(bias).for_each(|(r, b)| *r += b);
        }
        if let Some(groups) = self.groups {
            groups.drop_lowest(ranks);
        }
        // The chosen so far, smallest first. NaN counts as the largest, so that it is not lost.
        let chosen = &mut local.list;
        chosen.clear();
        let below = |a: usize, b: usize| {
            let (x, y) = (ranks[a], ranks[b]);
            let by_index = if self.ties == Ties::Higher { a < b } else { a > b };
            match (x.is_nan(), y.is_nan()) {
                (false, false) => x < y || x == y && by_index,
                (x_nan, y_nan) => !x_nan && y_nan || x_nan == y_nan && by_index,
            }
        };
        for i in 0..self.experts {
            if chosen.len() == self.k {
                if !below(chosen[0] as usize, i) {
                    continue;
                }
                chosen.remove(0);
            }
            let at = chosen.iter().position(|&c| below(i, c as usize)).unwrap_or(chosen.len());
            chosen.insert(at, i as u32);
        }
        for ((index, weight), &c) in indices.iter_mut().zip(weights.iter_mut()).zip(chosen.iter()) {
            (*index, *weight) = (c as f32, scores[c as usize]);
        }
        if self.scores == Scores::SoftmaxOfChosen {
            vector::softmax(weights, &mut local.a);
        }
        if let Some(eps) = self.renormalise {
            let total = weights.iter().sum::<f32>() + eps;
            weights.iter_mut().for_each(|w| *w /= total);
        }
        weights.iter_mut().for_each(|w| *w *= self.scale);
    }
}

impl Groups {
    /// Sets the ranks of the groups that are not kept to zero.
    fn drop_lowest(self, ranks: &mut [f32]) {
        let size = ranks.len() / self.count;
        let score = |group: usize, ranks: &[f32]| {
            let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
            for &r in &ranks[group * size..(group + 1) * size] {
                if r > first || r.is_nan() {
                    (first, second) = (r, first);
                } else if r > second {
                    second = r;
                }
            }
            first + second
        };
        // Groups are few: the lowest that is left goes, until as many are left as are kept.
        let mut left: Vec<(usize, f32)> = (0..self.count).map(|g| (g, score(g, ranks))).collect();
        while left.len() > self.keep {
            let lowest = (1..left.len()).fold(0, |low, i| {
                let (a, b) = (left[low].1, left[i].1);
                if b < a || a.is_nan() && !b.is_nan() { i } else { low }
            });
            let (group, _) = left.remove(lowest);
            ranks[group * size..(group + 1) * size].fill(0.0);
        }
    }
}
