//! `bench`: prefill and decode speeds beside the read bandwidth of the same run.

use std::time::Duration;

use zmlx_models::PatchOptions;

use crate::arms::{Arm, Arms};
use crate::capsule::{ArmRecord, Capsule, Gains, Kind, Settings};
use crate::error::LabError;
use crate::machine::{Machine, Watch};
use crate::measure::{
    Plan, Progress, Steps, Subject, Timings, arm_record, blank, check_context, in_range, model_record,
    probe_for, roofline, timed_runs,
};
use crate::prompts::made;
use crate::roofline::{AboveRoofline, Roofline};
use crate::stats::{FEWEST_RUNS, Gain};

/// Most runs of an arm.
pub(crate) const MOST_RUNS: usize = 1000;

/// Most tokens of a prompt or a continuation.
pub(crate) const MOST_TOKENS: usize = 1 << 20;

/// What `bench` does.
#[derive(Debug, Clone, PartialEq)]
pub struct BenchOptions {
    /// Tokens of the prompt, 1 or more: pseudo-random ids, the same for each vocabulary.
    pub prompt_tokens: usize,
    /// Tokens to generate, 2 or more, since the first counts as prefill.
    pub max_tokens: usize,
    /// Timed runs of each arm, 1 to 1000. Below 3 no gain is told from noise.
    pub runs: usize,
    /// Rest before each timed run.
    pub cooldown: Duration,
    /// The arms, in the order of the first run.
    pub arms: Vec<Arm>,
    /// What the patched arm is.
    pub patch: PatchOptions,
}

impl Default for BenchOptions {
    fn default() -> Self {
        Self {
            prompt_tokens: 64,
            max_tokens: 128,
            runs: 5,
            cooldown: Duration::ZERO,
            arms: vec![Arm::Stock, Arm::Patched],
            patch: PatchOptions::default(),
        }
    }
}

/// Times the arms in turn (AB, BA, AB, ...), each run in a fresh state and greedily, with a bandwidth probe before each.
/// Only the weights of the arms that run are read, if the model is loaded as the first of them.
///
/// # Errors
/// [`LabError::AboveRoofline`] if an arm would read its weights faster than the best probe and they do not fit into the
/// caches: such a figure is not given out. Options out of range, and failures of the model.
pub fn bench(
    subject: &mut Subject<'_>,
    options: &BenchOptions,
    tell: &mut dyn FnMut(Progress),
) -> Result<Capsule, LabError> {
    in_range("prompt tokens", options.prompt_tokens, 1, MOST_TOKENS)?;
    in_range("max tokens", options.max_tokens, 2, MOST_TOKENS)?;
    in_range("runs", options.runs, 1, MOST_RUNS)?;
    check_arms(&options.arms)?;
    let prompts = [made(subject.model, "ids", options.prompt_tokens)];
    check_context(subject.model, &prompts, options.max_tokens)?;

    let machine = Machine::look();
    let model = model_record(subject)?;
    let probe = probe_for(subject.model, &machine, options.patch.threads);
    let plan = Plan {
        arms: &options.arms,
        prompts: &prompts,
        max_tokens: options.max_tokens,
        runs: options.runs,
        cooldown: options.cooldown,
    };
    let mut steps = Steps { done: 0, total: options.runs * options.arms.len(), tell };
    let mut arms = Arms::new(subject.model, &options.patch, options.arms.len() > 1)?;
    let watch = Watch::start();
    let timings = timed_runs(&mut arms, &plan, probe.as_ref(), &mut steps)?;
    let conditions = watch.end(options.patch.threads.unwrap_or(1));

    let settings =
        settings(&options.patch, options.max_tokens, options.runs, options.cooldown, &options.arms);
    let mut capsule = blank(Kind::Bench, machine, model, settings, &prompts, conditions);
    capsule.roofline = roofline(probe.as_ref(), &timings.probes, &capsule.machine, &capsule.model);
    capsule.arms = records(&timings, capsule.roofline.as_ref())?;
    capsule.gains = gains(&capsule);
    capsule.notes = notes(options.runs);
    if options.arms.contains(&Arm::Patched) {
        arms.describe(&mut capsule)?;
    }
    Ok(capsule)
}

/// The figures of the arms that ran. [`AboveRoofline`] for a speed that cannot be.
pub(crate) fn records(
    timings: &Timings,
    roofline: Option<&Roofline>,
) -> Result<Vec<ArmRecord>, AboveRoofline> {
    let arms = [Arm::Stock, Arm::Patched].map(|arm| arm_record(timings, arm, roofline));
    let records: Result<Vec<_>, _> = arms.into_iter().collect();
    Ok(records?.into_iter().flatten().collect())
}

fn check_arms(arms: &[Arm]) -> Result<(), LabError> {
    let twice = arms.len() == 2 && arms[0] == arms[1];
    if arms.is_empty() || arms.len() > 2 || twice {
        let value = arms.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let allowed = "stock, patched, or both".to_owned();
        return Err(LabError::Option { name: "arms", value, allowed });
    }
    Ok(())
}

/// What to know of so many runs.
pub(crate) fn notes(runs: usize) -> Vec<String> {
    if runs < FEWEST_RUNS {
        vec![format!("runs: {runs} is too few to tell a gain from noise; give --runs {FEWEST_RUNS} or more")]
    } else {
        Vec::new()
    }
}

/// Patched over stock, where both ran.
pub(crate) fn gains(capsule: &Capsule) -> Option<Gains> {
    let (stock, patched) = (capsule.arm(Arm::Stock)?, capsule.arm(Arm::Patched)?);
    Some(Gains {
        prefill: Gain::paired(&stock.prefill_runs(), &patched.prefill_runs())?,
        decode: Gain::paired(&stock.decode_runs(), &patched.decode_runs())?,
    })
}

/// What a capsule says of what was asked for.
pub(crate) fn settings(
    patch: &PatchOptions,
    max_tokens: usize,
    runs: usize,
    cooldown: Duration,
    arms: &[Arm],
) -> Settings {
    Settings {
        preset: patch.preset.to_string(),
        patterns: patch.patterns.clone(),
        exclude: patch.exclude.clone(),
        threads: patch.threads.map(|n| n as u64),
        max_tokens: max_tokens as u64,
        runs: runs as u64,
        cooldown_seconds: cooldown.as_secs_f64(),
        order: if arms.len() == 2 { "AB/BA" } else { "A" }.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arms_are_one_or_two_different_ones() {
        use Arm::{Patched, Stock};
        for (arms, fine) in [
            (&[Stock][..], true),
            (&[Patched, Stock], true),
            (&[], false),
            (&[Stock, Stock], false),
            (&[Stock, Patched, Stock], false),
        ] {
            assert_eq!(check_arms(arms).is_ok(), fine, "{arms:?}");
        }
    }

    #[test]
    fn few_runs_are_remarked_on() {
        assert!(notes(2)[0].contains("--runs 3") && notes(3).is_empty());
    }
}
