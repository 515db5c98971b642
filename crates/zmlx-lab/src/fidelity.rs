//! Tokens compared one by one, and the gate: the verdict on a patched model.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::logits::{LogitDifference, Logits, flip_to};

/// A flip is excused only where stock's own choice was closer than this, in logits.
pub const EXCUSED_BELOW: f64 = 1e-3;

/// Mean `KL(stock || patched)` that class `bounded` may reach, in nats.
pub const BOUNDED_KL: f64 = 1e-3;

/// Largest absolute difference of two logits that class `bounded` may reach: it moves the ratio of two probabilities by less
/// than a factor of three (`e^(2 * 0.5)`).
pub const BOUNDED_MAX_ABS: f64 = 0.5;

/// Top-1 agreement that class `bounded` must reach.
pub const BOUNDED_AGREEMENT: f64 = 0.99;

/// What a fused op promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// The same bits.
    BitExact,
    /// The same greedy tokens, but for flips that [`Flip::excused`] marks.
    TokenIdentical,
    /// An error no larger than stock's own against float32 (where stock is not float32 itself), mean KL up to [`BOUNDED_KL`],
    /// differences of logits up to [`BOUNDED_MAX_ABS`], top-1 agreement from [`BOUNDED_AGREEMENT`].
    Bounded,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::BitExact => "bit-exact",
            Self::TokenIdentical => "token-identical",
            Self::Bounded => "bounded",
        })
    }
}

/// A step where the two models choose different tokens after the same ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Flip {
    /// The step, from 0: the first token after the prompt.
    pub step: u64,
    /// Stock's token.
    pub stock: u32,
    /// The patched model's token.
    pub patched: u32,
    /// Stock's largest logit less its second largest.
    pub margin: f64,
    /// Stock's largest logit less its logit of the patched model's token: at least the margin.
    pub gap: f64,
    /// Whether both are below [`EXCUSED_BELOW`]: a near-tie of stock, and the patched model took the other of the two.
    pub excused: bool,
}

impl fmt::Display for Flip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, stock, patched, margin, gap, excused } = self;
        write!(f, "step {step}: stock {stock}, patched {patched}, stock's margin {margin:.2e}")?;
        // They differ where the patched model took neither of stock's best two.
        if gap > margin {
            write!(f, " (to that token {gap:.2e})")?;
        }
        f.write_str(if *excused { ", excused as a near-tie" } else { "" })
    }
}

/// Where two greedy continuations of one prompt part; after that they have seen different tokens, and comparing further
/// means nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum Divergence {
    /// Equal tokens, equally many.
    None,
    /// Different tokens at a step.
    Flip(Flip),
    /// One is the beginning of the other.
    Length {
        /// Stock's tokens.
        stock: usize,
        /// The patched model's tokens.
        patched: usize,
    },
}

/// Compares two greedy continuations. `logits` are stock's under its own continuation, so the row of the first
/// difference is what stock thought there.
pub fn divergence(stock: &[u32], patched: &[u32], logits: &Logits) -> Divergence {
    let Some(step) = stock.iter().zip(patched).position(|(a, b)| a != b) else {
        return match (stock.len(), patched.len()) {
            (a, b) if a == b => Divergence::None,
            (stock, patched) => Divergence::Length { stock, patched },
        };
    };
    let (a, b) = (stock[step], patched[step]);
    let row = logits.row(step).filter(|row| (a as usize) < row.len());
    Divergence::Flip(match row {
        Some(row) => flip_to(step, row, a as usize, b as usize),
        // Without stock's logits there is no excuse.
        None => Flip {
            step: step as u64,
            stock: a,
            patched: b,
            margin: f64::from(f32::MAX),
            gap: f64::from(f32::MAX),
            excused: false,
        },
    })
}

/// What was found of one prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PromptFidelity {
    /// Its name.
    pub prompt: String,
    /// Tokens compared.
    pub tokens: u64,
    /// Tokens equal before the first difference, over all runs the fewest.
    pub equal: u64,
    /// The first difference of the greedy tokens, if there is one: of the run that parted earliest.
    pub divergence: Option<Flip>,
    /// Whether the continuations have different lengths.
    pub length_differs: bool,
    /// Whether stock gave the same tokens in all of its runs, and under teacher forcing.
    pub stock_repeats: bool,
    /// Logits under teacher forcing with stock's continuation: patched from stock.
    pub logits: LogitDifference,
}

/// Errors against a float32 run of the same checkpoint, fed the same tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ReferenceErrors {
    /// Stock computes in float32 already, so it is the reference: its error is 0 by definition, and nothing is asked of the
    /// patched model's beyond its class.
    pub stock_is_reference: bool,
    /// Stock from the reference.
    pub stock: LogitDifference,
    /// Patched from the reference.
    pub patched: LogitDifference,
}

/// All that the gate looks at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Fidelity {
    /// The class that the patterns which matched promise: the weakest of them, `bit-exact` if none did.
    pub class: Class,
    /// Each prompt.
    pub prompts: Vec<PromptFidelity>,
    /// Patched from stock over all prompts.
    pub logits: LogitDifference,
    /// Errors against float32, where that was asked for.
    pub reference: Option<ReferenceErrors>,
    /// The verdict.
    pub gate: Gate,
}

/// The verdict.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Gate {
    /// Whether nothing failed.
    pub passed: bool,
    /// What failed.
    pub failures: Vec<String>,
    /// What to know though it is no failure, such as excused flips.
    pub remarks: Vec<String>,
}

impl Gate {
    /// Judges what was found by the class that was promised.
    ///
    /// * Any class: stock repeats itself (else there is nothing to compare with), no logit is NaN, continuations have the
    ///   same length; with an independent reference, neither the largest nor the mean error exceeds stock's own.
    /// * `bit-exact`: no difference at all, in tokens or logits.
    /// * `token-identical`: no flip that is not excused, in greedy tokens or under teacher forcing.
    /// * `bounded`: mean KL, largest difference and top-1 agreement within their bounds; flips are remarks.
    pub fn judge(class: Class, prompts: &[PromptFidelity], reference: Option<&ReferenceErrors>) -> Self {
        let mut gate = Self::default();
        for prompt in prompts {
            gate.judge_prompt(class, prompt);
        }
        if class == Class::Bounded {
            gate.judge_bounds(prompts);
        }
        if let Some(reference) = reference.filter(|r| !r.stock_is_reference) {
            gate.judge_reference(reference);
        }
        if prompts.iter().all(|p| p.tokens == 0) {
            gate.failures.push("no token was compared".to_owned());
        }
        gate.passed = gate.failures.is_empty();
        gate
    }

    fn judge_prompt(&mut self, class: Class, found: &PromptFidelity) {
        let name = &found.prompt;
        if !found.stock_repeats {
            self.failures.push(format!(
                "{name}: stock does not repeat its own tokens, so there is nothing to hold patched to"
            ));
        }
        if let Some(step) = found.logits.first_not_finite {
            self.failures.push(format!("{name}: the patched model's logits are no numbers at step {step}"));
        }
        if found.length_differs {
            self.failures.push(format!("{name}: the continuations have different lengths"));
        }
        let mut flips: Vec<(&str, &Flip)> = found.divergence.iter().map(|f| ("tokens part at", f)).collect();
        let forced = found.logits.flips.iter().filter(|f| found.divergence.as_ref() != Some(f));
        flips.extend(forced.map(|f| ("teacher forcing,", f)));
        for (what, flip) in flips {
            let line = format!("{name}: {what} {flip}");
            let fine = match class {
                Class::BitExact => false,
                Class::TokenIdentical => flip.excused,
                Class::Bounded => true,
            };
            if fine { self.remarks.push(line) } else { self.failures.push(line) }
        }
        if class == Class::BitExact && found.logits.max_abs > 0.0 {
            self.failures.push(format!(
                "{name}: logits differ by up to {:.2e}, and the patterns that matched promise the same bits",
                found.logits.max_abs
            ));
        }
    }

    fn judge_bounds(&mut self, prompts: &[PromptFidelity]) {
        for found in prompts {
            let (kl, agreement) = (found.logits.kl_mean, found.logits.top1_agreement);
            if kl > BOUNDED_KL {
                self.failures.push(format!("{}: mean KL {kl:.2e} is above {BOUNDED_KL:.0e}", found.prompt));
            }
            let largest = found.logits.max_abs;
            if largest > BOUNDED_MAX_ABS {
                self.failures.push(format!(
                    "{}: logits differ by up to {largest:.2e}, above {BOUNDED_MAX_ABS}",
                    found.prompt
                ));
            }
            // A near-tie says nothing of a kernel, so an excused flip counts as agreement.
            let excused = found.logits.flips.iter().filter(|f| f.excused).count() as f64;
            let agreement = agreement + excused / found.logits.steps.max(1) as f64;
            if agreement < BOUNDED_AGREEMENT {
                self.failures.push(format!(
                    "{}: top-1 agreement {:.2} % is below {:.0} %",
                    found.prompt,
                    100.0 * agreement,
                    100.0 * BOUNDED_AGREEMENT
                ));
            }
        }
    }

    fn judge_reference(&mut self, reference: &ReferenceErrors) {
        let ReferenceErrors { stock, patched, .. } = reference;
        if patched.first_not_finite.is_some() || stock.first_not_finite.is_some() {
            self.failures.push("errors against float32 are no numbers".to_owned());
        }
        for (what, own, theirs) in
            [("largest", patched.max_abs, stock.max_abs), ("mean", patched.mean_abs, stock.mean_abs)]
        {
            if own > theirs {
                self.failures.push(format!(
                    "the patched model's {what} error against float32 is {own:.3e}, above stock's own {theirs:.3e}"
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(logits: LogitDifference) -> PromptFidelity {
        PromptFidelity {
            prompt: "short".into(),
            tokens: 100,
            equal: 100,
            divergence: None,
            length_differs: false,
            stock_repeats: true,
            logits: LogitDifference { steps: 100, ..logits },
        }
    }

    fn same() -> PromptFidelity {
        found(LogitDifference { top1_agreement: 1.0, ..LogitDifference::default() })
    }

    fn flip(margin: f64) -> Flip {
        Flip { step: 7, stock: 1, patched: 2, margin, gap: margin, excused: margin < EXCUSED_BELOW }
    }

    fn passes(class: Class, found: &PromptFidelity) -> bool {
        Gate::judge(class, std::slice::from_ref(found), None).passed
    }

    #[test]
    fn divergence_names_step_tokens_and_margin() {
        let mut logits = Logits::new(4);
        assert!(logits.push(&[0.0, 1.0, 2.0, 3.0]) && logits.push(&[0.0, 5.0, 4.5, 1.0]));
        assert_eq!(divergence(&[3, 1], &[3, 1], &logits), Divergence::None);
        assert_eq!(divergence(&[3, 1], &[3], &logits), Divergence::Length { stock: 2, patched: 1 });
        let Divergence::Flip(f) = divergence(&[3, 1, 0], &[3, 2, 9], &logits) else { panic!() };
        assert_eq!((f.step, f.stock, f.patched, f.margin, f.gap, f.excused), (1, 1, 2, 0.5, 0.5, false));
        // A token outside the vocabulary, and a step without logits: never excused.
        let Divergence::Flip(f) = divergence(&[3, 1], &[3, 77], &logits) else { panic!() };
        assert!(!f.excused && f.gap > 1e30);
        let Divergence::Flip(f) = divergence(&[3, 1, 0], &[3, 1, 2], &logits) else { panic!() };
        assert!(!f.excused && f.step == 2);
    }

    #[test]
    fn equal_models_pass_every_class() {
        for class in [Class::BitExact, Class::TokenIdentical, Class::Bounded] {
            assert!(passes(class, &same()), "{class}");
        }
    }

    #[test]
    fn rounding_differences_break_bit_exactness_only() {
        let close =
            found(LogitDifference { max_abs: 1e-6, top1_agreement: 1.0, ..LogitDifference::default() });
        assert!(!passes(Class::BitExact, &close));
        assert!(passes(Class::TokenIdentical, &close) && passes(Class::Bounded, &close));
    }

    #[test]
    fn flips_are_excused_at_near_ties_only_and_reported() {
        for (margin, fine) in [(9e-4, true), (1e-3, false), (0.5, false)] {
            let prompt = PromptFidelity { divergence: Some(flip(margin)), ..same() };
            let gate = Gate::judge(Class::TokenIdentical, std::slice::from_ref(&prompt), None);
            assert_eq!(gate.passed, fine, "{margin}");
            let lines = if fine { &gate.remarks } else { &gate.failures };
            assert_eq!(lines.len(), 1);
            assert!(lines[0].contains("step 7: stock 1, patched 2"), "{lines:?}");
            assert_eq!(lines[0].contains("excused"), fine);
            assert!(!passes(Class::BitExact, &prompt));
        }
        // A flip under teacher forcing counts as well, though the tokens happened to agree.
        let forced = LogitDifference { flips: vec![flip(0.2)], top1_agreement: 0.99, ..Default::default() };
        assert!(!passes(Class::TokenIdentical, &found(forced.clone())));
        assert!(passes(Class::Bounded, &found(forced)));
    }

    #[test]
    fn bounds_of_class_bounded() {
        let with = |kl_mean, top1_agreement, flips| {
            found(LogitDifference { kl_mean, top1_agreement, flips, max_abs: 0.3, ..Default::default() })
        };
        assert!(passes(Class::Bounded, &with(1e-3, 0.99, vec![])));
        assert!(!passes(Class::Bounded, &with(1.1e-3, 1.0, vec![])));
        assert!(!passes(Class::Bounded, &with(0.0, 0.98, vec![flip(0.1), flip(0.2)])));
        assert!(passes(Class::Bounded, &with(0.0, 0.98, vec![flip(1e-4), flip(0.2)])), "one is a near-tie");
        let far = |max_abs| found(LogitDifference { max_abs, top1_agreement: 1.0, ..Default::default() });
        assert!(passes(Class::Bounded, &far(0.5)) && !passes(Class::Bounded, &far(0.51)));
    }

    #[test]
    fn what_no_class_allows() {
        let not_a_number = found(LogitDifference {
            first_not_finite: Some(3),
            top1_agreement: 1.0,
            ..LogitDifference::default()
        });
        let cases = [
            not_a_number,
            PromptFidelity { stock_repeats: false, ..same() },
            PromptFidelity { length_differs: true, ..same() },
            PromptFidelity { tokens: 0, ..same() },
        ];
        for case in cases {
            assert!(!passes(Class::Bounded, &case), "{case:?}");
        }
        assert!(!Gate::judge(Class::BitExact, &[], None).passed, "nothing compared is no pass");
    }

    #[test]
    fn the_error_against_float32_must_not_exceed_stocks() {
        let errors = |stock: (f64, f64), patched: (f64, f64), stock_is_reference| {
            let of = |(max_abs, mean_abs)| LogitDifference { max_abs, mean_abs, ..Default::default() };
            ReferenceErrors { stock_is_reference, stock: of(stock), patched: of(patched) }
        };
        let passed = |r: &ReferenceErrors| Gate::judge(Class::Bounded, &[same()], Some(r)).passed;
        assert!(passed(&errors((0.1, 0.01), (0.1, 0.01), false)));
        assert!(passed(&errors((0.1, 0.01), (0.05, 0.001), false)));
        assert!(!passed(&errors((0.1, 0.01), (0.11, 0.01), false)));
        assert!(!passed(&errors((0.1, 0.01), (0.1, 0.02), false)));
        assert!(passed(&errors((0.0, 0.0), (1e-5, 1e-6), true)), "stock is the reference itself");
    }
}
