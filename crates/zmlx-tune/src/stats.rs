//! Robust statistics and the shuffle.

/// Median of finite values; the mean of the middle two for an even count. `None` without values.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[half]),
        _ => Some(sorted[half - 1] + (sorted[half] - sorted[half - 1]) / 2.0),
    }
}

/// Median absolute deviation from the median.
pub(crate) fn mad(values: &[f64]) -> Option<f64> {
    let centre = median(values)?;
    median(&values.iter().map(|v| (v - centre).abs()).collect::<Vec<_>>())
}

/// Standard error of the median, from the MAD: sigma = 1.4826 MAD and se = sqrt(pi / 2) sigma / sqrt(n)
/// for normal noise.
pub(crate) fn median_error(values: &[f64]) -> Option<f64> {
    Some(1.4826 * std::f64::consts::FRAC_PI_2.sqrt() * mad(values)? / (values.len() as f64).sqrt())
}

/// Rounds to six significant decimal digits: more than timing holds, and short enough that JSON text
/// gives back the same `f64`, so files do not drift as they are rewritten.
pub(crate) fn six_digits(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// SplitMix64 (Steele, Lea, Flood 2014): enough for shuffling, equal on every platform.
pub(crate) struct SplitMix64(pub(crate) u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Fisher-Yates. The modulo's bias is below 2^-50 for lists of this size.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, (self.next() % (last as u64 + 1)) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 100.0, 2.0]), Some(3.0));
        assert_eq!(mad(&[1.0, 2.0, 3.0, 4.0, 100.0]), Some(1.0));
        assert_eq!(median(&[f64::MAX, f64::MAX]), Some(f64::MAX));
    }

    #[test]
    fn six_digits_survive_json() {
        for value in [1.234_567_89e-5, 9.999_999_9e-1, 3.0, 7.123_456e-10, 123_456.789] {
            let short = six_digits(value);
            assert!((short / value - 1.0).abs() < 5e-6, "{value}");
            let back: f64 = serde_json::from_str(&serde_json::to_string(&short).unwrap()).unwrap();
            assert_eq!(back.to_bits(), short.to_bits(), "{value}");
        }
    }

    #[test]
    fn shuffle_reaches_every_order_evenly() {
        let mut counts = std::collections::BTreeMap::new();
        let mut random = SplitMix64(7);
        for _ in 0..6000 {
            let mut items = [0, 1, 2];
            random.shuffle(&mut items);
            *counts.entry(items).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|&n| (850..1150).contains(&n)), "{counts:?}");
    }
}
