//! What was chosen, and why.

use crate::{Candidate, InvalidKey, Key};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What became of a candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The choice.
    Chosen,
    /// Measured to the end; slower than the choice by more than noise.
    Slower,
    /// Measured to the end; no faster than the default by more than noise, and no slower by more than it.
    WithinNoise,
    /// Dropped early: many times slower than the best.
    Eliminated,
    /// A run or the check failed, with the backend's message.
    Failed(String),
    /// Its output differs from the default's.
    WrongResult,
    /// A sample was faster than the bound; seconds a run of that sample.
    Unbelievable(f64),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chosen => f.pad("chosen"),
            Self::Slower => f.pad("slower"),
            Self::WithinNoise => f.pad("within noise"),
            Self::Eliminated => f.pad("eliminated"),
            Self::Failed(_) => f.pad("failed"),
            Self::WrongResult => f.pad("wrong result"),
            Self::Unbelievable(_) => f.pad("unbelievable"),
        }
    }
}

/// The evidence about one candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trial {
    /// Its parameters.
    pub candidate: Candidate,
    /// What became of it.
    pub outcome: Outcome,
    /// Samples behind the figures.
    pub samples: u32,
    /// Median over the samples of the seconds a run took; absent without samples.
    pub median: Option<f64>,
    /// Median absolute deviation of the same, in seconds.
    pub mad: Option<f64>,
}

/// Why measuring ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// `max_samples` rounds were done.
    AllRounds,
    /// The budget was spent.
    Budget,
    /// The backend asked to stop.
    Stopped,
    /// Nothing but the default was left.
    OnlyDefault,
}

/// The result of [`tune`](crate::tune): a choice with its evidence.
///
/// Figures are rounded to six significant digits. `Display` prints a table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// What the decision is valid for.
    pub key: Key,
    /// The parameters to launch with. From a file they are input like any other: validate the launch.
    pub choice: Candidate,
    /// The parameters that a launch has without tuning.
    pub default: Candidate,
    /// Median of the default over median of the choice; 1 when the default stays.
    pub gain: f64,
    /// Runs in a sample.
    pub iterations: u32,
    /// Rounds done.
    pub rounds: u32,
    /// Why measuring ended.
    pub ended: Ended,
    /// One entry for each candidate, the default first, else in the order given.
    pub evidence: Vec<Trial>,
    /// When it was decided, in seconds since 1970-01-01 UTC.
    pub when: u64,
    /// Version of this crate that decided.
    pub tool_version: String,
}

/// A decision that contradicts itself, as a damaged or hand-made file may hold.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum InvalidDecision {
    /// The key has an empty or overlong part.
    #[error(transparent)]
    Key(#[from] InvalidKey),
    /// A figure is not a positive finite number (for a deviation: not a finite number of at least 0).
    #[error("`{name}` is {value}")]
    Figure {
        /// Name of the field.
        name: &'static str,
        /// What it holds.
        value: f64,
    },
    /// The trial marked as chosen is not the choice, or there is not exactly one.
    #[error("the evidence does not show `{0}` as the one chosen")]
    Choice(Candidate),
    /// The evidence does not begin with the default.
    #[error("the evidence does not begin with the default `{0}`")]
    Default(Candidate),
}

impl Decision {
    /// Checks that the decision agrees with itself and that JSON can hold its figures.
    pub fn validate(&self) -> Result<(), InvalidDecision> {
        self.key.validate()?;
        let positive = |name, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(InvalidDecision::Figure { name, value }),
        };
        let not_negative = |name, value: f64| match value.is_finite() && value >= 0.0 {
            true => Ok(()),
            false => Err(InvalidDecision::Figure { name, value }),
        };
        positive("gain", self.gain)?;
        for trial in &self.evidence {
            trial.median.map_or(Ok(()), |value| positive("median", value))?;
            trial.mad.map_or(Ok(()), |value| not_negative("mad", value))?;
            if let Outcome::Unbelievable(value) = trial.outcome {
                not_negative("unbelievable", value)?;
            }
        }
        if self.evidence.first().is_none_or(|trial| trial.candidate != self.default) {
            return Err(InvalidDecision::Default(self.default.clone()));
        }
        let mut chosen = self.evidence.iter().filter(|trial| trial.outcome == Outcome::Chosen);
        match (chosen.next(), chosen.next()) {
            (Some(trial), None) if trial.candidate == self.choice => Ok(()),
            _ => Err(InvalidDecision::Choice(self.choice.clone())),
        }
    }

    /// Candidates that the evidence says nothing about: what a longer list has brought since.
    /// While this is empty a stored decision needs no new tuning.
    pub fn untried<'a>(&self, candidates: &'a [Candidate]) -> Vec<&'a Candidate> {
        let tried = |c: &Candidate| self.evidence.iter().any(|trial| trial.candidate == *c);
        candidates.iter().filter(|c| !tried(c)).collect()
    }

    /// One line: what was chosen and what it gains.
    pub fn summary(&self) -> String {
        if self.choice == self.default {
            return format!("{}: the default {} stays", self.key, self.default);
        }
        format!("{}: {} is {:.2}x as fast as the default {}", self.key, self.choice, self.gain, self.default)
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ended = match self.ended {
            Ended::AllRounds => "all rounds done",
            Ended::Budget => "the budget was spent",
            Ended::Stopped => "stopped by the caller",
            Ended::OnlyDefault => "nothing but the default was left",
        };
        writeln!(f, "{}", self.summary())?;
        writeln!(f, "{} rounds of {} runs; {ended}", self.rounds, self.iterations)?;
        let names: Vec<String> = self.evidence.iter().map(|trial| trial.candidate.to_string()).collect();
        let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0).max("candidate".len());
        let base = self.evidence.first().and_then(|trial| trial.median);
        write!(
            f,
            "  {:width$}  {:12} {:>11} {:>11} {:>7} {:>8}",
            "candidate", "outcome", "median", "mad", "samples", "gain"
        )?;
        for (trial, name) in self.evidence.iter().zip(&names) {
            let mark = if trial.outcome == Outcome::Chosen { '*' } else { ' ' };
            let gain = base
                .zip(trial.median)
                .map_or_else(|| "-".into(), |(base, own)| format!("{:.3}x", base / own));
            write!(
                f,
                "\n{mark} {name:width$}  {:12} {:>11} {:>11} {:>7} {gain:>8}",
                trial.outcome,
                seconds(trial.median),
                seconds(trial.mad),
                trial.samples
            )?;
            match &trial.outcome {
                // The first line is what a compiler or driver says; the file holds the rest.
                Outcome::Failed(message) => {
                    write!(f, "  {}", message.lines().next().unwrap_or_default().escape_debug())?;
                }
                Outcome::Unbelievable(value) => write!(f, "  {} a run", seconds(Some(*value)))?,
                _ => {}
            }
        }
        Ok(())
    }
}

/// Seconds with a fitting unit; `-` for none.
fn seconds(value: Option<f64>) -> String {
    let Some(value) = value else { return "-".into() };
    let (scale, unit) = match value {
        v if v >= 1.0 => (1.0, "s"),
        v if v >= 1e-3 => (1e3, "ms"),
        v if v >= 1e-6 => (1e6, "us"),
        _ => (1e9, "ns"),
    };
    format!("{:.3} {unit}", value * scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(value: i64, outcome: Outcome, median: Option<f64>) -> Trial {
        let candidate = Candidate::from([("threads", value)]);
        Trial { candidate, outcome, samples: 5, median, mad: median.map(|m| m / 100.0) }
    }

    fn decision() -> Decision {
        Decision {
            key: Key::new("cpu", "zmlx 0.1.0", "softmax", "9f3c", "f32 rows=64"),
            choice: Candidate::from([("threads", 256)]),
            default: Candidate::from([("threads", 64)]),
            gain: 1.25,
            iterations: 100,
            rounds: 5,
            ended: Ended::AllRounds,
            evidence: vec![
                trial(64, Outcome::Slower, Some(1e-5)),
                trial(256, Outcome::Chosen, Some(8e-6)),
                trial(1024, Outcome::Failed("too many threads\nmore".into()), None),
                trial(2, Outcome::Unbelievable(1e-9), None),
            ],
            when: 1_700_000_000,
            tool_version: "0.1.0".into(),
        }
    }

    #[test]
    fn prints_a_table() {
        let expected = "\
softmax [9f3c] f32 rows=64 on cpu, zmlx 0.1.0: threads=256 is 1.25x as fast as the default threads=64
5 rounds of 100 runs; all rounds done
  candidate     outcome           median         mad samples     gain
  threads=64    slower         10.000 us  100.000 ns       5   1.000x
* threads=256   chosen          8.000 us   80.000 ns       5   1.250x
  threads=1024  failed                 -           -       5        -  too many threads
  threads=2     unbelievable           -           -       5        -  1.000 ns a run";
        assert_eq!(decision().to_string(), expected);
    }

    #[test]
    fn contradictions_are_refused() {
        type Harm = fn(&mut Decision);
        let cases: [(&str, Harm); 9] = [
            ("key: `hash` has 0 bytes", |d| d.key.hash.clear()),
            ("`gain` is NaN", |d| d.gain = f64::NAN),
            ("`gain` is 0", |d| d.gain = 0.0),
            ("`median` is inf", |d| d.evidence[0].median = Some(f64::INFINITY)),
            ("`mad` is -1", |d| d.evidence[1].mad = Some(-1.0)),
            ("begin with the default", |d| d.evidence.clear()),
            ("begin with the default", |d| d.evidence.swap(0, 1)),
            ("does not show `threads=64`", |d| d.choice = d.default.clone()),
            ("does not show `threads=256`", |d| d.evidence[2].outcome = Outcome::Chosen),
        ];
        assert_eq!(decision().validate(), Ok(()));
        for (expected, harm) in cases {
            let mut bad = decision();
            harm(&mut bad);
            let message = bad.validate().unwrap_err().to_string();
            assert!(message.contains(expected), "{message} lacks {expected}");
        }
    }

    #[test]
    fn untried_names_only_new_candidates() {
        let list = [64, 128, 1024].map(|n| Candidate::from([("threads", n)]));
        assert_eq!(decision().untried(&list), [&list[1]]);
        assert!(decision().untried(&list[..1]).is_empty());
    }
}
