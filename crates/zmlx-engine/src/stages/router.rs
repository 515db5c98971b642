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

/// Logits to the chosen experts of each token and their weights.
///
/// The `k` experts with the largest `(score + bias, index)` are chosen: of equal ones the higher index, as MLX's
/// argpartition does on the CPU. They come in ascending order of that pair.
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
        let rank = |i: usize| scores[i] + self.bias.as_ref().map_or(0.0, |b| b[i]);
        // The chosen so far, smallest first. NaN counts as the largest, so that it is not lost.
        let chosen = &mut local.list;
        chosen.clear();
        let below = |a: usize, b: usize| {
            let (x, y) = (rank(a), rank(b));
            match (x.is_nan(), y.is_nan()) {
                (false, false) => x < y || x == y && a < b,
                (x_nan, y_nan) => !x_nan && y_nan || x_nan == y_nan && a < b,
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
