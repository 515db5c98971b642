//! The tuner: interleaved rounds, medians, and a choice only on evidence.

use crate::stats::{SplitMix64, mad, median, median_error, six_digits};
use crate::{Candidate, Decision, Ended, InvalidKey, InvalidSetting, Key, Outcome, Settings, Trial};
use std::fmt::Display;
use std::time::{Duration, SystemTime};

/// Longest failure message kept, in bytes: compilers can write megabytes.
const MAX_MESSAGE: usize = 2000;
/// Step by which the number of runs grows while slow candidates are looked for.
const LADDER: u32 = 8;
/// A gain counts as real when it is this many standard errors above none; more than the usual 2, for many
/// candidates have many chances to look lucky, and a few samples tell their own spread badly.
const SIGMAS: f64 = 4.0;

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Seconds that all runs of the sample took together, by a monotonic clock, the device's work included.
    pub seconds: f64,
}

impl From<Duration> for Sample {
    fn from(time: Duration) -> Self {
        Self { seconds: time.as_secs_f64() }
    }
}

/// Runs candidates for the tuner. One backend stands for one kernel with fixed inputs on one device.
pub trait Backend {
    /// What can go wrong; its text goes into the evidence.
    type Error: Display;

    /// Runs the kernel `iterations` times with the parameters `c`, waits for it, and reports the time.
    /// The first call for a candidate may compile: it is a warm-up, whose time is not used.
    fn run(&mut self, c: &Candidate, iterations: u32) -> Result<Sample, Self::Error>;

    /// Whether the kernel's output with `c` equals the default's. Called once for each candidate but the
    /// default, before it is timed.
    fn check(&mut self, c: &Candidate) -> Result<bool, Self::Error> {
        let _ = c;
        Ok(true)
    }

    /// Asked between candidates and rounds: `true` ends the tuning as a spent budget does. For a limit on
    /// the wall clock or a cancelled program.
    fn stop(&mut self) -> bool {
        false
    }
}

/// Why there is no [`Decision`].
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TuneError {
    /// The key has an empty or overlong part.
    #[error(transparent)]
    Key(#[from] InvalidKey),
    /// A setting is out of range.
    #[error(transparent)]
    Settings(#[from] InvalidSetting),
    /// The bound is not a positive finite number of seconds.
    #[error("the bound of {0} s a run is not a positive finite number")]
    Bound(f64),
    /// The default could not be measured, so nothing can be compared with it.
    #[error("the default `{candidate}` failed in the {stage}: {message}")]
    Default {
        /// The default.
        candidate: Candidate,
        /// `warm-up`, `calibration` or `rounds`.
        stage: &'static str,
        /// What went wrong, in the backend's words.
        message: String,
    },
    /// The default ran faster than the bound: the bound or the clock is wrong.
    #[error(
        "the default took {seconds:e} s a run, faster than the bound of {bound:e} s: \
         the bound or the clock is wrong"
    )]
    DefaultUnbelievable {
        /// Seconds a run of the sample.
        seconds: f64,
        /// The bound.
        bound: f64,
    },
    /// Too little was measured to decide on when the budget ended or the backend asked to stop.
    #[error(
        "tuning ended after {rounds} of at least {needed} rounds ({spent:.3} s measured, budget {budget:?}): \
         raise the budget or give fewer candidates"
    )]
    TooFewRounds {
        /// Rounds done.
        rounds: u32,
        /// `Settings::min_samples`.
        needed: u32,
        /// Seconds measured.
        spent: f64,
        /// `Settings::budget`.
        budget: Duration,
    },
}

/// Finds the fastest of `default` and `candidates` for `key`.
///
/// * Each candidate is checked, warmed up, and dropped at once if hopelessly slow; then rounds run every
///   candidate left once, in an order shuffled by the seed, so that drift of clocks and heat hits all alike.
/// * A sample is the same number of runs for all, chosen so that the default's lasts `min_sample`.
/// * After `min_samples` rounds, whatever is `eliminate_factor` slower than the best is dropped.
/// * The choice is the smallest median among those whose gain `median(default) / median(candidate)` exceeds
///   `1 + noise`, and whose ratio to the default within rounds lies four standard errors above 1.
///   If there is none, the default stays. Equal medians: the earlier candidate.
/// * `bound_seconds` is the least time a run can take (roofline). A faster sample is not believed, and its
///   candidate is out.
///
/// Repeated candidates count once. With the same samples from the backend, runs and choice are the same.
///
/// # Errors
/// Invalid key, settings or bound; a default that fails or beats the bound; too few rounds for a decision.
/// Failures of other candidates are no errors: they are part of the evidence.
pub fn tune<B: Backend>(
    key: &Key,
    default: &Candidate,
    candidates: &[Candidate],
    bound_seconds: Option<f64>,
    settings: &Settings,
    backend: &mut B,
) -> Result<Decision, TuneError> {
    key.validate()?;
    settings.validate()?;
    if let Some(bound) = bound_seconds.filter(|bound| !(bound.is_finite() && *bound > 0.0)) {
        return Err(TuneError::Bound(bound));
    }
    let mut entrants = vec![Entrant::new(default)];
    for candidate in candidates {
        if entrants.iter().all(|e| e.candidate != *candidate) {
            entrants.push(Entrant::new(candidate));
        }
    }
    let mut race =
        Race { settings, bound: bound_seconds, backend, entrants, iterations: 1, rounds: 0, spent: 0.0 };
    race.prepare()?;
    let ended = race.run_rounds()?;
    let choice = race.choose();
    Ok(race.decision(key, choice, ended))
}

/// A candidate in the race; the default is the first.
struct Entrant {
    candidate: Candidate,
    /// Seconds a run, one value a round.
    samples: Vec<f64>,
    /// Set once it is out of the race.
    out: Option<Outcome>,
}

impl Entrant {
    fn new(candidate: &Candidate) -> Self {
        Self { candidate: candidate.clone(), samples: Vec::new(), out: None }
    }

    fn median(&self) -> f64 {
        median(&self.samples).unwrap_or(f64::INFINITY)
    }
}

struct Race<'a, B> {
    settings: &'a Settings,
    bound: Option<f64>,
    backend: &'a mut B,
    entrants: Vec<Entrant>,
    /// Runs in a sample.
    iterations: u32,
    rounds: u32,
    /// Seconds measured so far.
    spent: f64,
}

impl<B: Backend> Race<'_, B> {
    /// Total seconds of `iterations` runs of entrant `index`.
    fn measure(&mut self, index: usize, iterations: u32) -> Result<f64, String> {
        match self.backend.run(&self.entrants[index].candidate, iterations) {
            Ok(Sample { seconds }) if seconds.is_finite() && seconds >= 0.0 => {
                self.spent += seconds;
                Ok(seconds)
            }
            Ok(Sample { seconds }) => Err(format!("the backend reported {seconds} s for {iterations} runs")),
            Err(error) => Err(shorten(error.to_string())),
        }
    }

    /// The first run, which may compile: neither its time nor its cost counts.
    fn warm_up(&mut self, index: usize) -> Result<(), String> {
        let spent = self.spent;
        let result = self.measure(index, 1).map(drop);
        self.spent = spent;
        result
    }

    fn default_failed(&self, stage: &'static str) -> impl FnOnce(String) -> TuneError + use<B> {
        let candidate = self.entrants[0].candidate.clone();
        move |message| TuneError::Default { candidate, stage, message }
    }

    /// Warms up and calibrates the default, then readies the others.
    fn prepare(&mut self) -> Result<(), TuneError> {
        self.warm_up(0).map_err(self.default_failed("warm-up"))?;
        let default_sample = self.calibrate().map_err(self.default_failed("calibration"))?;
        for index in 1..self.entrants.len() {
            if self.must_end().is_some() {
                return Err(self.too_few_rounds());
            }
            let out =
                self.screen(index, default_sample).unwrap_or_else(|message| Some(Outcome::Failed(message)));
            self.entrants[index].out = out;
        }
        Ok(())
    }

    /// Chooses the number of runs in a sample; returns the seconds that such a sample of the default takes.
    fn calibrate(&mut self) -> Result<f64, String> {
        let wanted = self.settings.min_sample.as_secs_f64();
        loop {
            // The lesser of two: a hiccup must not pass for a long sample.
            let seconds = self.measure(0, self.iterations)?.min(self.measure(0, self.iterations)?);
            if seconds >= wanted || self.iterations >= self.settings.max_iterations {
                return Ok(seconds);
            }
            // At most eightfold, for short samples say little about long ones (and may be 0).
            let growth = (wanted / seconds).ceil().clamp(2.0, 8.0) as u32;
            self.iterations = self.iterations.saturating_mul(growth).min(self.settings.max_iterations);
        }
    }

    /// Checks and warms up a candidate, and drops it if it takes much longer than a whole sample of the
    /// default, with few runs first: a full sample could eat the budget. `None`: it may enter the rounds.
    fn screen(&mut self, index: usize, default_sample: f64) -> Result<Option<Outcome>, String> {
        match self.backend.check(&self.entrants[index].candidate) {
            Ok(true) => {}
            Ok(false) => return Ok(Some(Outcome::WrongResult)),
            Err(error) => return Err(shorten(error.to_string())),
        }
        self.warm_up(index)?;
        let limit = self.settings.eliminate_factor * default_sample;
        let mut iterations = 1;
        loop {
            let first = self.measure(index, iterations)?;
            // Twice, for one slow sample may be bad luck.
            if first > limit {
                let second = self.measure(index, iterations)?;
                if second > limit {
                    self.entrants[index].samples = vec![first, second];
                    self.entrants[index].samples.iter_mut().for_each(|t| *t /= f64::from(iterations));
                    return Ok(Some(Outcome::Eliminated));
                }
            }
            if iterations == self.iterations {
                return Ok(None);
            }
            iterations = iterations.saturating_mul(LADDER).min(self.iterations);
        }
    }

    /// Why measuring must end now, if it must.
    fn must_end(&mut self) -> Option<Ended> {
        if self.spent >= self.settings.budget.as_secs_f64() {
            return Some(Ended::Budget);
        }
        self.backend.stop().then_some(Ended::Stopped)
    }

    fn too_few_rounds(&self) -> TuneError {
        TuneError::TooFewRounds {
            rounds: self.rounds,
            needed: self.settings.min_samples,
            spent: self.spent,
            budget: self.settings.budget,
        }
    }

    /// Whole rounds only, so that every candidate left has a sample beside each of the default's.
    fn run_rounds(&mut self) -> Result<Ended, TuneError> {
        let mut random = SplitMix64(self.settings.seed);
        while self.rounds < self.settings.max_samples {
            if let Some(ended) = self.must_end() {
                let enough = self.rounds >= self.settings.min_samples;
                return if enough { Ok(ended) } else { Err(self.too_few_rounds()) };
            }
            let mut order: Vec<usize> = self.left().collect();
            random.shuffle(&mut order);
            for index in order {
                self.take_sample(index)?;
            }
            self.rounds += 1;
            if self.rounds >= self.settings.min_samples {
                self.eliminate();
                if self.left().count() == 1 {
                    return Ok(Ended::OnlyDefault);
                }
            }
        }
        Ok(Ended::AllRounds)
    }

    fn left(&self) -> impl Iterator<Item = usize> {
        (0..self.entrants.len()).filter(|&index| self.entrants[index].out.is_none())
    }

    /// One sample for a round; a candidate that fails or cannot be believed is out.
    fn take_sample(&mut self, index: usize) -> Result<(), TuneError> {
        let result = self.measure(index, self.iterations);
        let too_fast = |seconds: f64| self.bound.filter(|bound| seconds < *bound);
        let out = match result.map(|total| total / f64::from(self.iterations)) {
            Ok(seconds) if too_fast(seconds).is_some() => Outcome::Unbelievable(six_digits(seconds)),
            Ok(seconds) if seconds > 0.0 => {
                self.entrants[index].samples.push(seconds);
                return Ok(());
            }
            Ok(_) => Outcome::Failed(format!(
                "{} runs took 0 s: the clock is too coarse or nothing ran",
                self.iterations
            )),
            Err(message) => Outcome::Failed(message),
        };
        match out {
            Outcome::Unbelievable(seconds) if index == 0 => {
                Err(TuneError::DefaultUnbelievable { seconds, bound: self.bound.unwrap_or_default() })
            }
            Outcome::Failed(message) if index == 0 => Err(self.default_failed("rounds")(message)),
            out => {
                self.entrants[index].out = Some(out);
                Ok(())
            }
        }
    }

    /// Drops what is much slower than the best. The default stays: all else is measured against it.
    fn eliminate(&mut self) {
        let best = self.left().map(|index| self.entrants[index].median()).fold(f64::INFINITY, f64::min);
        let limit = best * self.settings.eliminate_factor;
        for entrant in self.entrants.iter_mut().skip(1).filter(|e| e.out.is_none()) {
            if entrant.median() > limit {
                entrant.out = Some(Outcome::Eliminated);
            }
        }
    }

    /// Whether the entrant is faster than the default beyond doubt.
    fn beats_default(&self, entrant: &Entrant) -> bool {
        let default = &self.entrants[0];
        // Within a round both ran close together, so slow drift cancels in the ratio.
        let ratios: Vec<f64> = default.samples.iter().zip(&entrant.samples).map(|(d, own)| d / own).collect();
        let (Some(ratio), Some(error)) = (median(&ratios), median_error(&ratios)) else { return false };
        default.median() / entrant.median() > 1.0 + self.settings.noise && ratio - SIGMAS * error > 1.0
    }

    /// The winner's index; sets the outcome of all that are still in the race.
    fn choose(&mut self) -> usize {
        let winners: Vec<usize> =
            self.left().filter(|&i| i != 0 && self.beats_default(&self.entrants[i])).collect();
        let choice = winners
            .iter()
            .copied()
            .min_by(|&a, &b| self.entrants[a].median().total_cmp(&self.entrants[b].median()))
            .unwrap_or(0);
        let near = self.entrants[0].median() * (1.0 + self.settings.noise);
        for (index, entrant) in self.entrants.iter_mut().enumerate().filter(|(_, e)| e.out.is_none()) {
            entrant.out = Some(if index == choice {
                Outcome::Chosen
            } else if index == 0 || winners.contains(&index) || entrant.median() > near {
                Outcome::Slower
            } else {
                Outcome::WithinNoise
            });
        }
        choice
    }

    fn decision(self, key: &Key, choice: usize, ended: Ended) -> Decision {
        let gain = self.entrants[0].median() / self.entrants[choice].median();
        let (default, chosen) = (self.entrants[0].candidate.clone(), self.entrants[choice].candidate.clone());
        let trial = |entrant: Entrant| Trial {
            samples: entrant.samples.len() as u32,
            median: median(&entrant.samples).map(six_digits),
            mad: mad(&entrant.samples).map(six_digits),
            candidate: entrant.candidate,
            // `choose` has set every outcome that was still open.
            outcome: entrant.out.unwrap_or(Outcome::WithinNoise),
        };
        Decision {
            key: key.clone(),
            choice: chosen,
            default,
            gain: six_digits(gain),
            iterations: self.iterations,
            rounds: self.rounds,
            ended,
            evidence: self.entrants.into_iter().map(trial).collect(),
            // A clock before 1970 is no reason to refuse a result.
            when: SystemTime::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_secs()),
            tool_version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}

/// Cuts a message to a length that a file can hold many of.
fn shorten(mut message: String) -> String {
    let len = message.len();
    if len > MAX_MESSAGE {
        let cut = (0..=MAX_MESSAGE).rev().find(|&at| message.is_char_boundary(at)).unwrap_or(0);
        message.truncate(cut);
        message.push_str(&format!(" ... ({len} bytes in all)"));
    }
    message
}
