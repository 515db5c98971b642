//! How hard to look and what to believe.

use std::time::Duration;

/// How [`tune`](crate::tune) measures and decides.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Rounds before anything is dropped for being slow; at least 3, so that a median means something.
    pub min_samples: u32,
    /// Rounds at most.
    pub max_samples: u32,
    /// A candidate whose median is more than this many times the best median is dropped; above 1.
    pub eliminate_factor: f64,
    /// Relative gain over the default that a choice must exceed: 0.03 asks for more than 3 %.
    pub noise: f64,
    /// Measured time to spend, in the seconds that the backend reports. Warm-up runs (which may compile)
    /// and checks do not count. It is not the wall clock's: the same samples give the same runs.
    pub budget: Duration,
    /// Seed of the order inside the rounds.
    pub seed: u64,
    /// A sample of the default lasts at least this long: its number of runs is chosen so.
    pub min_sample: Duration,
    /// Runs in a sample at most.
    pub max_iterations: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            min_samples: 5,
            max_samples: 25,
            eliminate_factor: 2.0,
            noise: 0.03,
            budget: Duration::from_secs(10),
            seed: 0,
            min_sample: Duration::from_micros(500),
            max_iterations: 1 << 16,
        }
    }
}

/// A setting is out of range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("settings: `{name}` is {value}; it must be {expected}")]
pub struct InvalidSetting {
    /// Name of the field.
    pub name: &'static str,
    /// What it holds.
    pub value: String,
    /// What is allowed.
    pub expected: &'static str,
}

impl Settings {
    /// Checks the ranges given at each field.
    pub fn validate(&self) -> Result<(), InvalidSetting> {
        let factor = self.eliminate_factor;
        let checks = [
            (self.min_samples >= 3, "min_samples", self.min_samples.to_string(), "at least 3"),
            (
                self.max_samples >= self.min_samples,
                "max_samples",
                self.max_samples.to_string(),
                "at least min_samples",
            ),
            (
                factor.is_finite() && factor > 1.0,
                "eliminate_factor",
                factor.to_string(),
                "a finite number above 1",
            ),
            (
                self.noise.is_finite() && self.noise >= 0.0,
                "noise",
                self.noise.to_string(),
                "a finite number of at least 0",
            ),
            (!self.budget.is_zero(), "budget", format!("{:?}", self.budget), "above 0"),
            (!self.min_sample.is_zero(), "min_sample", format!("{:?}", self.min_sample), "above 0"),
            (self.max_iterations > 0, "max_iterations", self.max_iterations.to_string(), "at least 1"),
        ];
        match checks.into_iter().find(|(good, ..)| !good) {
            Some((_, name, value, expected)) => Err(InvalidSetting { name, value, expected }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_range_is_checked() {
        let good = Settings::default();
        assert_eq!(good.validate(), Ok(()));
        let cases = [
            ("min_samples", Settings { min_samples: 2, ..good.clone() }),
            ("max_samples", Settings { max_samples: 4, ..good.clone() }),
            ("eliminate_factor", Settings { eliminate_factor: 1.0, ..good.clone() }),
            ("eliminate_factor", Settings { eliminate_factor: f64::NAN, ..good.clone() }),
            ("noise", Settings { noise: -0.1, ..good.clone() }),
            ("noise", Settings { noise: f64::INFINITY, ..good.clone() }),
            ("budget", Settings { budget: Duration::ZERO, ..good.clone() }),
            ("min_sample", Settings { min_sample: Duration::ZERO, ..good.clone() }),
            ("max_iterations", Settings { max_iterations: 0, ..good.clone() }),
        ];
        for (name, settings) in cases {
            assert_eq!(settings.validate().unwrap_err().name, name, "{settings:?}");
        }
    }
}
