//! Bytes a second against what the machine can read: no figure above that is printed.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::stats::Spread;

/// The read bandwidth of the run, and what it is to be compared with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Roofline {
    /// Threads of the probe.
    pub threads: u64,
    /// Bytes of the buffer that it sums.
    pub buffer_bytes: u64,
    /// The probes of this run, taken between the timings, in bytes a second; each is the median of its passes.
    pub probes: Vec<f64>,
    /// Their spread.
    pub bandwidth: Spread,
    /// Bytes of the last level of caches, if the system says.
    pub last_level_cache_bytes: Option<u64>,
    /// Bytes that decoding keeps coming back to: all of the model's weights.
    pub working_set_bytes: u64,
}

/// What bounds an arm's decoding.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Bound {
    /// Memory: the weights are read from it for each token.
    Memory {
        /// Decoded bytes a second over the read bandwidth, at most 1.
        fraction: f64,
        /// Which bandwidth that is.
        against: Against,
    },
    /// Nothing that was measured: all weights fit into the last level of caches, which is faster than memory.
    CacheResident,
}

/// A bandwidth of a [`Roofline`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Against {
    /// The median of the probes.
    Median,
    /// The best of the probes: decoding was faster than the median of them, so the bandwidth drifted during the run.
    Best,
}

/// A figure that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error(
    "decoding at {decode_gb_s:.2} GB/s ({tok_s:.1} tok/s of {bytes_per_token} bytes) is above the {best_gb_s:.2} GB/s that this machine \
     read at best in this run, so the figure is not printed: the clock, the count of bytes or the probe is wrong; \
     measure again on a quiet machine, and if it stays report it"
)]
pub struct AboveRoofline {
    /// Bytes of weights read a second if the figure were true, in GB.
    pub decode_gb_s: f64,
    /// Tokens a second.
    pub tok_s: f64,
    /// Bytes of weights that a token reads.
    pub bytes_per_token: u64,
    /// The best probe, in GB/s.
    pub best_gb_s: f64,
}

impl Roofline {
    /// What bounds decoding at `tok_s` tokens a second. [`AboveRoofline`] if it would read faster than the best probe and the
    /// weights do not fit into the caches.
    pub fn bound(&self, tok_s: f64, bytes_per_token: u64) -> Result<Bound, AboveRoofline> {
        if self.last_level_cache_bytes.is_some_and(|cache| self.working_set_bytes <= cache) {
            return Ok(Bound::CacheResident);
        }
        let bytes_per_s = tok_s * bytes_per_token as f64;
        let Spread { median, max, .. } = self.bandwidth;
        if bytes_per_s <= median {
            Ok(Bound::Memory { fraction: bytes_per_s / median, against: Against::Median })
        } else if bytes_per_s <= max {
            Ok(Bound::Memory { fraction: bytes_per_s / max, against: Against::Best })
        } else {
            let (decode_gb_s, best_gb_s) = (bytes_per_s / 1e9, max / 1e9);
            Err(AboveRoofline { decode_gb_s, tok_s, bytes_per_token, best_gb_s })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roofline(working_set_bytes: u64, cache: Option<u64>) -> Roofline {
        let probes = vec![19e9, 20e9, 25e9];
        Roofline {
            threads: 2,
            buffer_bytes: 1 << 29,
            bandwidth: Spread::of(&probes).unwrap(),
            probes,
            last_level_cache_bytes: cache,
            working_set_bytes,
        }
    }

    #[test]
    fn fractions_never_pass_1() {
        let roofline = roofline(5_000_000_000, Some(32 << 20));
        let cases = [
            (10.0, Bound::Memory { fraction: 0.5, against: Against::Median }),
            (20.0, Bound::Memory { fraction: 1.0, against: Against::Median }),
            (22.5, Bound::Memory { fraction: 0.9, against: Against::Best }),
            (25.0, Bound::Memory { fraction: 1.0, against: Against::Best }),
        ];
        for (tok_s, bound) in cases {
            assert_eq!(roofline.bound(tok_s, 1_000_000_000), Ok(bound), "{tok_s}");
        }
    }

    #[test]
    fn a_figure_above_the_best_probe_is_refused() {
        let error = roofline(5_000_000_000, Some(32 << 20)).bound(25.1, 1_000_000_000).unwrap_err();
        assert_eq!(error.best_gb_s, 25.0);
        let line = error.to_string();
        assert!(line.contains("25.10 GB/s") && line.contains("not printed"), "{line}");
        // A cache of unknown size excuses nothing.
        assert!(roofline(1_000, None).bound(1e9, 1_000).is_err());
    }

    #[test]
    fn weights_that_fit_into_the_cache_have_another_bound() {
        assert_eq!(roofline(32 << 20, Some(32 << 20)).bound(1e6, 10_000_000), Ok(Bound::CacheResident));
        assert!(roofline((32 << 20) + 1, Some(32 << 20)).bound(1e6, 10_000_000).is_err());
    }
}
