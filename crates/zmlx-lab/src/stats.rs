//! Medians, spreads, and whether a gain is more than noise.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Fewest runs from which a gain can be told from noise.
pub const FEWEST_RUNS: usize = 3;

/// No gain below this fraction counts, however quiet the runs were: two equal programs differ by as much.
pub const NOISE_FLOOR: f64 = 0.01;

/// The middle of some measurements and how far they lie apart.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Spread {
    /// The median; of an even count, the mean of the middle two.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
    /// Median absolute deviation from the median.
    pub mad: f64,
}

impl Spread {
    /// Of some finite values; `None` without values.
    pub fn of(values: &[f64]) -> Option<Self> {
        let middle = median(values)?;
        let deviations: Vec<f64> = values.iter().map(|v| (v - middle).abs()).collect();
        Some(Self {
            median: middle,
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            mad: median(&deviations)?,
        })
    }
}

/// Median of finite values; the mean of the middle two for an even count. `None` without values.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[half]),
        _ => Some(sorted[half - 1] + (sorted[half] - sorted[half - 1]) / 2.0),
    }
}

/// What a ratio of speeds amounts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum GainKind {
    /// Faster by more than the noise.
    Faster,
    /// Slower by more than the noise.
    Slower,
    /// Nothing that these runs can tell.
    Noise,
}

/// One speed over another.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Gain {
    /// New over old, of medians; 1 is no change.
    pub ratio: f64,
    /// What the ratio may be off by for no reason, as a fraction of it.
    pub noise: f64,
    /// The verdict.
    pub kind: GainKind,
}

impl Gain {
    /// From runs that were taken in turn: the ratio is the median of each pair's own, so what slows both arms for a
    /// while drops out. `None` without pairs, or if a speed is not above 0.
    ///
    /// The noise is what the median of the pairs' ratios may be off by at 95 %, at least [`NOISE_FLOOR`]. Below
    /// [`FEWEST_RUNS`] pairs everything is noise.
    pub fn paired(old: &[f64], new: &[f64]) -> Option<Self> {
        if old.iter().chain(new).any(|v| *v <= 0.0) {
            return None;
        }
        let ratios: Vec<f64> = old.iter().zip(new).map(|(o, n)| n / o).collect();
        let spread = Spread::of(&ratios)?;
        Some(Self::judge(spread.median, relative_error(&spread, ratios.len()), ratios.len()))
    }

    /// From runs that were not taken in turn: ratio of the medians, the noise of both added in squares. `None` as for
    /// [`paired`](Self::paired).
    pub fn unpaired(old: &[f64], new: &[f64]) -> Option<Self> {
        if old.iter().chain(new).any(|v| *v <= 0.0) {
            return None;
        }
        let (o, n) = (Spread::of(old)?, Spread::of(new)?);
        let noise = relative_error(&o, old.len()).hypot(relative_error(&n, new.len()));
        Some(Self::judge(n.median / o.median, noise, old.len().min(new.len())))
    }

    /// One gain over another, as of two capsules' patched over stock; `runs` is the fewer of both. The noise of both is added
    /// in squares.
    pub fn over(self, old: Self, runs: usize) -> Self {
        Self::judge(self.ratio / old.ratio, self.noise.hypot(old.noise), runs)
    }

    fn judge(ratio: f64, noise: f64, runs: usize) -> Self {
        // JSON has no infinity, and of one run nothing is known.
        let noise = if noise.is_finite() { noise.max(NOISE_FLOOR) } else { 1.0 };
        let kind = match ratio - 1.0 {
            _ if runs < FEWEST_RUNS => GainKind::Noise,
            change if change > noise => GainKind::Faster,
            change if change < -noise => GainKind::Slower,
            _ => GainKind::Noise,
        };
        Self { ratio, noise, kind }
    }
}

/// How far the median of `n` values may be from what it estimates, relative to it, at 95 %.
///
/// Of up to 20 values from their range, after Lord's test ("The use of range in place of standard deviation in the
/// t-test", Biometrika 34, 1947), a quarter more because the median of normal values scatters that much more than their
/// mean. The MAD of a handful of values is 0 by luck too often. Of more values from the MAD: `sigma = 1.4826 MAD`, and the
/// median's standard error is `sqrt(pi / 2) sigma / sqrt(n)`, 2.3 times since the MAD itself scatters.
fn relative_error(spread: &Spread, n: usize) -> f64 {
    const MEDIAN_OVER_MEAN: f64 = 1.2533;
    let error = match LORD.get(n) {
        Some(factor) => factor * (spread.max - spread.min),
        None => 2.3 * 1.4826 * spread.mad / (n as f64).sqrt(),
    };
    MEDIAN_OVER_MEAN * error / spread.median
}

/// Two-sided 5 % points of |mean - expectation| / range of `n` normal values; below two values there is no range.
const LORD: [f64; 21] = [
    f64::INFINITY,
    f64::INFINITY,
    6.353,
    1.304,
    0.717,
    0.507,
    0.399,
    0.333,
    0.288,
    0.255,
    0.230,
    0.210,
    0.194,
    0.181,
    0.170,
    0.160,
    0.151,
    0.144,
    0.137,
    0.131,
    0.126,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(Spread::of(&[]), None);
        let one = Spread { median: 3.0, min: 3.0, max: 3.0, mad: 0.0 };
        assert_eq!(Spread::of(&[3.0]), Some(one));
        let five = Spread { median: 3.0, min: 1.0, max: 100.0, mad: 1.0 };
        assert_eq!(Spread::of(&[4.0, 1.0, 100.0, 2.0, 3.0]), Some(five));
        assert_eq!(median(&[9.0, 1.0, 2.0, 4.0]), Some(3.0));
    }

    #[test]
    fn a_clear_gain_counts_and_a_small_one_does_not() {
        let stock = [100.0, 98.0, 102.0, 101.0, 99.0];
        let by = |factor: f64| stock.map(|v| v * factor);
        let cases = [
            (1.5, GainKind::Faster),
            (1.02, GainKind::Faster),
            (1.005, GainKind::Noise),
            (1.0, GainKind::Noise),
            (0.995, GainKind::Noise),
            (0.9, GainKind::Slower),
        ];
        for (factor, kind) in cases {
            let gain = Gain::paired(&stock, &by(factor)).unwrap();
            assert_eq!(gain.kind, kind, "{factor}: {gain:?}");
            assert!((gain.ratio - factor).abs() < 1e-12);
        }
    }

    #[test]
    fn a_gain_within_the_spread_is_noise() {
        let stock = [100.0, 80.0, 120.0, 95.0, 110.0];
        let patched = [118.0, 84.0, 99.0, 112.0, 104.0];
        assert_eq!(Gain::paired(&stock, &patched).unwrap().kind, GainKind::Noise);
        assert_eq!(Gain::unpaired(&stock, &patched).unwrap().kind, GainKind::Noise);
        // The same ratio in every pair, though both arms drift by far more: pairing sees it, medians alone do not.
        let drift = [100.0, 60.0, 140.0, 75.0, 125.0];
        let faster = drift.map(|v| v * 1.1);
        assert_eq!(Gain::paired(&drift, &faster).unwrap().kind, GainKind::Faster);
        assert_eq!(Gain::unpaired(&drift, &faster).unwrap().kind, GainKind::Noise);
    }

    #[test]
    fn two_equal_values_of_three_are_no_proof_of_quiet() {
        let gain = Gain::paired(&[100.0; 3], &[105.0, 105.0, 85.0]).unwrap();
        assert_eq!(gain.kind, GainKind::Noise, "{gain:?}");
    }

    /// Two equal programs on a busy machine, as measured: 3 pairs that look like 19 % and are nothing.
    #[test]
    fn a_lucky_streak_of_three_is_noise() {
        let gain = Gain::paired(&[80.8, 65.9, 95.8], &[96.1, 72.3, 98.0]).unwrap();
        assert_eq!(gain.kind, GainKind::Noise, "{gain:?}");
    }

    /// Equal programs with normal noise are called different once in twenty times, or less.
    #[test]
    fn false_alarms_are_rare() {
        let mut state = 7u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / (1u64 << 31) as f64
        };
        let mut speed = || 100.0 + 10.0 * ((0..12).map(|_| uniform()).sum::<f64>() - 6.0);
        for n in [3, 5, 9, 25] {
            let alarms = (0..2000).filter(|_| {
                let (old, new): (Vec<f64>, Vec<f64>) = (0..n).map(|_| (speed(), speed())).unzip();
                Gain::paired(&old, &new).unwrap().kind != GainKind::Noise
            });
            let alarms = alarms.count();
            assert!((10..=140).contains(&alarms), "{n} runs: {alarms} of 2000");
        }
    }

    #[test]
    fn too_few_runs_tell_nothing() {
        assert_eq!(Gain::paired(&[1.0, 1.0], &[9.0, 9.0]).unwrap().kind, GainKind::Noise);
        assert_eq!(Gain::unpaired(&[1.0; 5], &[9.0, 9.0]).unwrap().kind, GainKind::Noise);
        assert_eq!(Gain::paired(&[], &[]), None);
        assert_eq!(Gain::paired(&[0.0; 3], &[1.0; 3]), None);
    }

    #[test]
    fn a_gain_over_a_gain() {
        let twice = Gain::paired(&[1.0; 3], &[2.0; 3]).unwrap();
        let thrice = Gain::paired(&[1.0; 3], &[3.0; 3]).unwrap();
        let over = thrice.over(twice, 3);
        assert!((over.ratio - 1.5).abs() < 1e-12 && over.kind == GainKind::Faster);
        assert_eq!(twice.over(twice, 3).kind, GainKind::Noise);
        assert_eq!(thrice.over(twice, 2).kind, GainKind::Noise);
    }
}
