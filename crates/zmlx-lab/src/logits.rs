//! Comparing the logits of two runs that were fed the same tokens.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fidelity::{EXCUSED_BELOW, Flip};

/// Logits of some steps, `[steps, vocabulary]`, float32.
#[derive(Debug, Clone, PartialEq)]
pub struct Logits {
    vocabulary: usize,
    data: Vec<f32>,
}

impl Logits {
    /// An empty table for this vocabulary (1 or more ids).
    pub fn new(vocabulary: usize) -> Self {
        Self { vocabulary: vocabulary.max(1), data: Vec::new() }
    }

    /// Adds a step. False, and nothing added, if the row has not one logit for each id.
    pub fn push(&mut self, row: &[f32]) -> bool {
        let fits = row.len() == self.vocabulary;
        if fits {
            self.data.extend_from_slice(row);
        }
        fits
    }

    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.data.len() / self.vocabulary
    }

    /// The logits of a step.
    pub fn row(&self, step: usize) -> Option<&[f32]> {
        self.data.get(step * self.vocabulary..(step + 1) * self.vocabulary)
    }

    fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.data.chunks_exact(self.vocabulary)
    }
}

/// How far the logits of `other` are from those of `base`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct LogitDifference {
    /// Steps compared.
    pub steps: u64,
    /// Largest absolute difference of two logits.
    pub max_abs: f64,
    /// Mean absolute difference over all logits of all steps.
    pub mean_abs: f64,
    /// Mean over the steps of `KL(base || other) = sum p (ln p - ln q)`, in nats, computed in float64.
    pub kl_mean: f64,
    /// The largest of them.
    pub kl_max: f64,
    /// Fraction of the steps whose likeliest token is the same.
    pub top1_agreement: f64,
    /// The steps whose likeliest token is not the same.
    pub flips: Vec<Flip>,
    /// The first step with a difference that is no number (NaN, or infinite on one side only). Such steps are in no other
    /// figure here.
    pub first_not_finite: Option<u64>,
}

/// Compares step by step. Steps that only one of them has are left out; rows of another length count as not finite.
pub fn compare(base: &Logits, other: &Logits) -> LogitDifference {
    let mut sum = LogitDifference::default();
    let (mut abs, mut same, mut finite) = (0.0, 0u64, 0u64);
    for (step, (p, q)) in base.rows().zip(other.rows()).enumerate() {
        sum.steps += 1;
        let Some(row) = compare_rows(p, q) else {
            sum.first_not_finite.get_or_insert(step as u64);
            continue;
        };
        finite += 1;
        abs += row.mean_abs;
        sum.max_abs = sum.max_abs.max(row.max_abs);
        sum.kl_mean += row.kl;
        sum.kl_max = sum.kl_max.max(row.kl);
        match flip(step, p, q) {
            Some(flip) => sum.flips.push(flip),
            None => same += 1,
        }
    }
    let count = finite.max(1) as f64;
    sum.mean_abs = abs / count;
    sum.kl_mean /= count;
    sum.top1_agreement = if sum.steps == 0 { 1.0 } else { same as f64 / sum.steps as f64 };
    sum
}

impl LogitDifference {
    /// Both together, as of several prompts; flips keep their own prompt's step numbers.
    pub fn merge(&mut self, other: &Self) {
        let (a, b) = (self.steps as f64, other.steps as f64);
        let weighted = |x: f64, y: f64| if a + b > 0.0 { (x * a + y * b) / (a + b) } else { 0.0 };
        self.mean_abs = weighted(self.mean_abs, other.mean_abs);
        self.kl_mean = weighted(self.kl_mean, other.kl_mean);
        self.top1_agreement =
            if a + b > 0.0 { weighted(self.top1_agreement, other.top1_agreement) } else { 1.0 };
        self.max_abs = self.max_abs.max(other.max_abs);
        self.kl_max = self.kl_max.max(other.kl_max);
        self.flips.extend(other.flips.iter().cloned());
        self.first_not_finite = self.first_not_finite.or(other.first_not_finite);
        self.steps += other.steps;
    }
}

struct RowDifference {
    max_abs: f64,
    mean_abs: f64,
    kl: f64,
}

/// `None` if a difference is not a finite number.
fn compare_rows(p: &[f32], q: &[f32]) -> Option<RowDifference> {
    let (mut max_abs, mut total) = (0.0f64, 0.0f64);
    for (&a, &b) in p.iter().zip(q) {
        // Two equal infinities (masked ids) are no difference.
        let difference = if a == b { 0.0 } else { (f64::from(a) - f64::from(b)).abs() };
        if !difference.is_finite() {
            return None;
        }
        max_abs = max_abs.max(difference);
        total += difference;
    }
    let kl = kl_divergence(p, q);
    kl.is_finite().then(|| RowDifference { max_abs, mean_abs: total / p.len().max(1) as f64, kl })
}

/// `KL(softmax(p) || softmax(q))` in nats, in float64. Infinite where `q` rules out what `p` allows; NaN for NaN.
pub fn kl_divergence(p: &[f32], q: &[f32]) -> f64 {
    let (zp, zq) = (log_sum_exp(p), log_sum_exp(q));
    let terms = p.iter().zip(q).map(|(&a, &b)| {
        let log_p = f64::from(a) - zp;
        let weight = log_p.exp();
        // 0 ln 0 is 0.
        if weight == 0.0 { 0.0 } else { weight * (log_p - (f64::from(b) - zq)) }
    });
    let kl: f64 = terms.sum();
    // Rounding can leave a little below 0; `max` would hide NaN.
    if kl < 0.0 { 0.0 } else { kl }
}

fn log_sum_exp(x: &[f32]) -> f64 {
    let largest = f64::from(x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    largest + x.iter().map(|&v| (f64::from(v) - largest).exp()).sum::<f64>().ln()
}

/// The likeliest id, the lowest of equal ones; `None` for an empty row.
pub fn top1(row: &[f32]) -> Option<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (id, &value) in row.iter().enumerate() {
        if best.is_none_or(|(_, b)| value > b || (b.is_nan() && !value.is_nan())) {
            best = Some((id, value));
        }
    }
    best.map(|(id, _)| id)
}

/// Difference of the largest and the second largest logit, 0 for a tie.
pub fn margin(row: &[f32]) -> f64 {
    let Some(best) = top1(row) else { return 0.0 };
    let others = row.iter().enumerate().filter(|&(id, _)| id != best).map(|(_, &v)| v);
    let second = others.fold(f32::NEG_INFINITY, f32::max);
    f64::from(row[best]) - f64::from(second)
}

/// Where the likeliest ids differ: what `p` makes of it.
fn flip(step: usize, p: &[f32], q: &[f32]) -> Option<Flip> {
    let (a, b) = (top1(p)?, top1(q)?);
    (a != b).then(|| flip_to(step, p, a, b))
}

/// A flip from id `a`, the choice of `p`, to id `b`.
pub(crate) fn flip_to(step: usize, p: &[f32], a: usize, b: usize) -> Flip {
    let gap = f64::from(p[a]) - p.get(b).copied().map_or(f64::NEG_INFINITY, f64::from);
    let margin = margin(p);
    Flip {
        step: step as u64,
        stock: a as u32,
        patched: b as u32,
        margin: finite(margin),
        gap: finite(gap),
        excused: margin < EXCUSED_BELOW && gap < EXCUSED_BELOW,
    }
}

/// JSON has no infinity.
fn finite(x: f64) -> f64 {
    if x.is_finite() { x } else { f64::from(f32::MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(rows: &[&[f32]]) -> Logits {
        let mut table = Logits::new(rows[0].len());
        assert!(rows.iter().all(|row| table.push(row)));
        table
    }

    #[test]
    fn kl_against_values_worked_out_by_hand() {
        // p = (1/2, 1/2), q = (1/4, 3/4): KL = ln 2 - (ln 3) / 2.
        let q = [0.25f32.ln(), 0.75f32.ln()];
        let expected = 2f64.ln() - 3f64.ln() / 2.0;
        assert!((kl_divergence(&[0.0, 0.0], &q) - expected).abs() < 1e-7);
        assert_eq!(kl_divergence(&q, &q), 0.0);
        // Adding a constant changes no probability. In float32 exp(1000) would overflow.
        assert!(kl_divergence(&[1000.0, 1000.0], &[-1000.0, -1000.0]).abs() < 1e-12);
        // Masked on both sides: nothing. On one side only: infinite.
        let masked = [1.0, f32::NEG_INFINITY];
        assert_eq!(kl_divergence(&masked, &masked), 0.0);
        assert_eq!(kl_divergence(&[1.0, 1.0], &masked), f64::INFINITY);
        assert!(kl_divergence(&[f32::NAN, 1.0], &[0.0, 1.0]).is_nan());
    }

    #[test]
    fn kl_sees_differences_that_float32_would_lose() {
        let p: Vec<f32> = (0..4096).map(|i| (i % 17) as f32 * 0.1).collect();
        let mut q = p.clone();
        q[5] += 1e-3;
        let kl = kl_divergence(&p, &q);
        // About p5 e^2 / 2 for a nudge e of one logit.
        let p5 = (f64::from(p[5]) - log_sum_exp(&p)).exp();
        assert!((kl / (p5 * 5e-7) - 1.0).abs() < 1e-2, "{kl:e}");
    }

    #[test]
    fn equal_logits_differ_by_nothing() {
        let a = logits(&[&[1.0, 2.0, f32::NEG_INFINITY], &[0.5, 0.0, 0.25]]);
        let difference = compare(&a, &a);
        let nothing = LogitDifference { steps: 2, top1_agreement: 1.0, ..LogitDifference::default() };
        assert_eq!(difference, nothing);
    }

    #[test]
    fn differences_and_flips() {
        let a = logits(&[&[1.0, 2.0, 0.0], &[3.0, 2.9995, 0.0]]);
        let b = logits(&[&[1.5, 2.0, 0.0], &[3.0, 3.5, 0.0]]);
        let d = compare(&a, &b);
        assert_eq!((d.steps, d.max_abs, d.top1_agreement), (2, f64::from(3.5f32 - 2.9995), 0.5));
        assert!((d.mean_abs - (0.5 + d.max_abs) / 6.0).abs() < 1e-12);
        assert!(d.kl_max > d.kl_mean && d.kl_mean > 0.0);
        let [flip] = &d.flips[..] else { panic!("{d:?}") };
        assert_eq!((flip.step, flip.stock, flip.patched, flip.excused), (1, 0, 1, true));
        assert!((flip.margin - 5e-4).abs() < 1e-6);
    }

    #[test]
    fn a_flip_to_a_third_token_is_not_excused_by_a_small_margin() {
        // Tokens 0 and 1 nearly tie, but the other run takes token 2.
        let d = compare(&logits(&[&[3.0, 2.9999, 1.0]]), &logits(&[&[3.0, 2.9999, 3.5]]));
        assert!(!d.flips[0].excused && d.flips[0].margin < 1e-3 && d.flips[0].gap > 1.9);
        let d = compare(&logits(&[&[3.0, 2.9, 1.0]]), &logits(&[&[2.8, 2.9, 1.0]]));
        assert!(!d.flips[0].excused, "a clear margin");
    }

    #[test]
    fn nan_is_reported_and_not_averaged_away() {
        let a = logits(&[&[1.0, 2.0], &[1.0, 2.0], &[1.0, 2.0]]);
        let b = logits(&[&[1.0, 2.0], &[f32::NAN, 2.0], &[f32::INFINITY, 2.0]]);
        let d = compare(&a, &b);
        assert_eq!(d.first_not_finite, Some(1));
        assert!((d.top1_agreement - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!((d.max_abs, d.kl_max), (0.0, 0.0));
    }

    #[test]
    fn ties_take_the_lowest_id() {
        assert_eq!(top1(&[1.0, 3.0, 3.0]), Some(1));
        assert_eq!(top1(&[]), None);
        assert_eq!(top1(&[f32::NAN, 1.0]), Some(1));
        assert_eq!(margin(&[1.0, 3.0, 3.0]), 0.0);
    }

    #[test]
    fn merging_weighs_by_steps() {
        let mut a = compare(&logits(&[&[0.0, 1.0]]), &logits(&[&[0.0, 1.5]]));
        let three: [&[f32]; 3] = [&[0.0, 1.0]; 3];
        let b = compare(&logits(&three), &logits(&three));
        let mean = a.mean_abs;
        a.merge(&b);
        assert_eq!((a.steps, a.top1_agreement, a.max_abs), (4, 1.0, 0.5));
        assert!((a.mean_abs - mean / 4.0).abs() < 1e-12);
        let mut empty = LogitDifference::default();
        empty.merge(&b);
        assert_eq!(empty.top1_agreement, 1.0);
    }

    #[test]
    fn rows_of_another_length_are_refused() {
        let mut table = Logits::new(3);
        assert!(!table.push(&[1.0]) && table.steps() == 0 && table.row(0).is_none());
    }
}
