//! `validate`: stock against patched on the same prompts, token by token and logit by logit.

use std::time::Duration;

use zmlx_models::{DtypeChoice, LoadOptions, Model};

use zmlx_models::PatchOptions;

use crate::arms::{Arm, Arms};
use crate::bench::{MOST_RUNS, MOST_TOKENS, gains, notes, records, settings};
use crate::capsule::{Capsule, Kind};
use crate::error::LabError;
use crate::fidelity::{
    Class, Divergence, EXCUSED_BELOW, Fidelity, Gate, PromptFidelity, ReferenceErrors, divergence,
};
use crate::logits::{LogitDifference, Logits, compare, top1};
use crate::machine::{Machine, Watch};
use crate::measure::{
    Plan, Progress, Steps, Subject, TimedRun, Timings, blank, check_context, in_range, model_record,
    probe_for, roofline, teacher_forced, timed_runs,
};
use crate::prompts::{Prompt, Tokenised, built_in, tokenise};
use crate::roofline::AboveRoofline;

/// What both arms are held against besides each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reference {
    /// The same checkpoint, unpatched, with float32 activations.
    F32,
}

/// What `validate` does.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidateOptions {
    /// The prompts, 1 or more. For a model without a tokenizer, token ids take their place.
    pub prompts: Vec<Prompt>,
    /// Tokens to generate for each, 2 or more; ends of sequences do not end them.
    pub max_tokens: usize,
    /// Timed runs of each arm, 1 to 1000; the tokens of all are compared. Below 3 no gain is told from noise.
    pub runs: usize,
    /// Rest before each timed run.
    pub cooldown: Duration,
    /// What the patched arm is.
    pub patch: PatchOptions,
    /// A third model to hold both against.
    pub reference: Option<Reference>,
}

impl Default for ValidateOptions {
    fn default() -> Self {
        Self {
            prompts: built_in(),
            max_tokens: 128,
            runs: 3,
            cooldown: Duration::ZERO,
            patch: PatchOptions::default(),
            reference: None,
        }
    }
}

/// What `validate` found.
#[derive(Debug, Clone, PartialEq)]
pub struct Validated {
    /// The record; its `fidelity.gate` is the verdict.
    pub capsule: Capsule,
    /// Speeds that cannot be, if there were some: the record then has none, but the fidelity stands.
    pub above_roofline: Option<AboveRoofline>,
}

/// Runs both arms on the prompts and judges.
///
/// 1. Greedy tokens and speeds: `runs` times over all prompts, the arms in turn (AB, BA, ...).
/// 2. Teacher forcing: stock's continuation is fed to both arms token by token, and the logits of each step are compared.
/// 3. With a reference, the same is fed to a float32 model, and both arms' errors against it are compared.
///
/// The memory beside the models is two or three times tokens x vocabulary x 4 bytes, one prompt at a time.
///
/// # Errors
/// Options out of range, prompts that do not fit, and failures of the model. A gate that fails is no error.
pub fn validate(
    subject: &mut Subject<'_>,
    options: &ValidateOptions,
    tell: &mut dyn FnMut(Progress),
) -> Result<Validated, LabError> {
    in_range("max tokens", options.max_tokens, 2, MOST_TOKENS)?;
    in_range("runs", options.runs, 1, MOST_RUNS)?;
    in_range("number of prompts", options.prompts.len(), 1, MOST_RUNS)?;
    let mut notes = notes(options.runs);
    let prompts = tokenise(subject.model, &options.prompts, &mut notes)?;
    check_context(subject.model, &prompts, options.max_tokens)?;

    let machine = Machine::look();
    let model = model_record(subject)?;
    let probe = probe_for(subject.model, &machine, options.patch.threads);
    let stock_is_reference = model.dtype == "float32";
    let both = [Arm::Stock, Arm::Patched];
    let plan = Plan {
        arms: &both,
        prompts: &prompts,
        max_tokens: options.max_tokens,
        runs: options.runs,
        cooldown: options.cooldown,
    };
    let mut steps = Steps { done: 0, total: 2 * options.runs + prompts.len(), tell };
    let mut arms = Arms::new(subject.model, &options.patch, true)?;
    let watch = Watch::start();
    let timings = timed_runs(&mut arms, &plan, probe.as_ref(), &mut steps)?;
    let conditions = watch.end(options.patch.threads.unwrap_or(1));
    // After the timing: it would take the arms' memory bandwidth and caches.
    let reference = match options.reference {
        Some(Reference::F32) if !stock_is_reference => {
            let load = LoadOptions { dtype: DtypeChoice::F32, ..subject.load.clone() };
            Some(Model::load(subject.path, &load, &mut |_| {})?)
        }
        _ => None,
    };
    let forced = teacher_force(&mut arms, &prompts, &timings, reference.as_ref(), &mut steps)?;
    arms.select(Arm::Stock)?;

    let settings = settings(&options.patch, options.max_tokens, options.runs, options.cooldown, &both);
    let mut capsule = blank(Kind::Validate, machine, model, settings, &prompts, conditions);
    capsule.notes = notes;
    arms.describe(&mut capsule)?;
    let errors = options.reference.map(|Reference::F32| forced.errors(stock_is_reference));
    let fidelity = judge(arms.class(), forced, errors);
    capsule.notes.extend(dtype_note(&capsule.model.dtype, &fidelity));
    capsule.fidelity = Some(fidelity);
    capsule.roofline = roofline(probe.as_ref(), &timings.probes, &capsule.machine, &capsule.model);
    let above_roofline = match records(&timings, capsule.roofline.as_ref()) {
        Ok(records) => {
            capsule.arms = records;
            None
        }
        // The fidelity stands without the speeds.
        Err(above) => {
            capsule.notes.push(format!("no speeds: {above}"));
            Some(above)
        }
    };
    capsule.gains = gains(&capsule);
    Ok(Validated { capsule, above_roofline })
}

/// What a failure in 16 bits does not say.
fn dtype_note(dtype: &str, fidelity: &Fidelity) -> Option<String> {
    let told = dtype != "float32" && !fidelity.gate.passed;
    told.then(|| {
        format!(
            "{dtype}: stock rounds every value to it, fused ops keep float32 within, so margins as small as that rounding \
             tip; --dtype f32 holds the ops to their class, --reference f32 shows which side is nearer to float32"
        )
    })
}

fn judge(class: Class, forced: Forced, reference: Option<ReferenceErrors>) -> Fidelity {
    let gate = Gate::judge(class, &forced.prompts, reference.as_ref());
    Fidelity { class, prompts: forced.prompts, logits: forced.all, reference, gate }
}

/// What teacher forcing gave.
#[derive(Default)]
struct Forced {
    prompts: Vec<PromptFidelity>,
    /// Patched from stock.
    all: LogitDifference,
    /// Stock from the reference.
    stock: LogitDifference,
    /// Patched from the reference.
    patched: LogitDifference,
}

impl Forced {
    fn errors(&self, stock_is_reference: bool) -> ReferenceErrors {
        let (stock, patched) = match stock_is_reference {
            true => {
                let steps = self.all.steps;
                let none = LogitDifference { steps, top1_agreement: 1.0, ..LogitDifference::default() };
                (none, self.all.clone())
            }
            false => (self.stock.clone(), self.patched.clone()),
        };
        ReferenceErrors { stock_is_reference, stock, patched }
    }
}

fn teacher_force(
    arms: &mut Arms<'_>,
    prompts: &[Tokenised],
    timings: &Timings,
    reference: Option<&Model>,
    steps: &mut Steps<'_>,
) -> Result<Forced, LabError> {
    let mut forced = Forced::default();
    for (index, prompt) in prompts.iter().enumerate() {
        steps.next(format!("teacher forcing, {}", prompt.record.name));
        let of = |arm: Arm| timings.runs.iter().filter(move |r| r.arm == arm);
        let tokens = |run: &TimedRun| run.tokens.get(index).cloned().unwrap_or_default();
        let stock: Vec<Vec<u32>> = of(Arm::Stock).map(tokens).collect();
        let patched: Vec<Vec<u32>> = of(Arm::Patched).map(tokens).collect();
        let first = stock.first().cloned().unwrap_or_default();
        let slack = tie_slack(arms.model().dtype_name());
        let base = teacher_forced(arms.select(Arm::Stock)?, &prompt.ids, &first)?;
        let other = teacher_forced(arms.select(Arm::Patched)?, &prompt.ids, &first)?;
        let logits = compare(&base, &other);
        forced.all.merge(&logits);
        if let Some(reference) = reference {
            let exact = teacher_forced(reference, &prompt.ids, &first)?;
            forced.stock.merge(&compare(&exact, &base));
            forced.patched.merge(&compare(&exact, &other));
        }
        let repeats = stock.iter().all(|s| *s == first) && follows(&first, &base, slack);
        forced.prompts.push(fidelity_of(&prompt.record.name, &first, &patched, &base, logits, repeats));
    }
    Ok(forced)
}

/// Puts together what was found of one prompt; of several patched runs, the one that parted earliest counts.
fn fidelity_of(
    name: &str,
    stock: &[u32],
    patched: &[Vec<u32>],
    base: &Logits,
    logits: LogitDifference,
    stock_repeats: bool,
) -> PromptFidelity {
    let mut found = PromptFidelity {
        prompt: name.to_owned(),
        tokens: stock.len() as u64,
        equal: stock.len() as u64,
        divergence: None,
        length_differs: false,
        stock_repeats,
        logits,
    };
    for tokens in patched {
        match divergence(stock, tokens, base) {
            Divergence::None => {}
            Divergence::Length { stock, patched } => {
                found.length_differs = true;
                found.equal = found.equal.min(stock.min(patched) as u64);
            }
            Divergence::Flip(flip) => {
                found.equal = found.equal.min(flip.step);
                if found.divergence.as_ref().is_none_or(|known| flip.step < known.step) {
                    found.divergence = Some(flip);
                }
            }
        }
    }
    found
}

/// Whether tokens are the choice of these logits at each step, but for ties: generation takes the largest of
/// log-probabilities that are rounded to the activations' dtype, `slack` of the largest logit at most.
fn follows(tokens: &[u32], logits: &Logits, slack: f64) -> bool {
    tokens.iter().enumerate().all(|(step, &token)| {
        let Some(row) = logits.row(step) else { return false };
        let (Some(best), Some(&own)) = (top1(row), row.get(token as usize)) else { return false };
        let best = f64::from(row[best]);
        best - f64::from(own) <= EXCUSED_BELOW + slack * best.abs()
    })
}

/// Two units of the last place of a dtype, relative.
fn tie_slack(dtype: &str) -> f64 {
    match dtype {
        "bfloat16" => 2.0 / 128.0,
        "float16" => 2.0 / 1024.0,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: &[[f32; 3]]) -> Logits {
        let mut table = Logits::new(3);
        assert!(rows.iter().all(|row| table.push(row)));
        table
    }

    #[test]
    fn the_earliest_of_several_runs_counts() {
        let base = table(&[[0.0, 1.0, 0.0], [0.0, 1.0, 0.9999], [2.0, 1.0, 0.0]]);
        let runs = [vec![1, 1, 0], vec![1, 1, 2], vec![1, 2, 2]];
        let found = fidelity_of("p", &[1, 1, 0], &runs, &base, LogitDifference::default(), true);
        let flip = found.divergence.unwrap();
        assert_eq!((found.equal, flip.step, flip.patched, flip.excused), (1, 1, 2, true));
        let found = fidelity_of("p", &[1, 1, 0], &runs[..1], &base, LogitDifference::default(), true);
        assert_eq!((found.equal, found.divergence, found.length_differs), (3, None, false));
        let short = [vec![1, 1]];
        let found = fidelity_of("p", &[1, 1, 0], &short, &base, LogitDifference::default(), true);
        assert!(found.length_differs && found.equal == 2);
    }

    #[test]
    fn stock_must_follow_its_own_logits() {
        let base = table(&[[0.0, 8.0, 7.95], [3.0, 1.0, 0.0]]);
        assert!(follows(&[1, 0], &base, 0.0));
        assert!(!follows(&[2, 0], &base, 0.0));
        assert!(follows(&[2, 0], &base, tie_slack("bfloat16")), "a tie after rounding");
        assert!(!follows(&[1, 1], &base, tie_slack("bfloat16")));
        assert!(!follows(&[1, 0, 0], &base, 0.0), "a step without logits");
        assert!(!follows(&[9, 0], &base, 0.0), "an id outside the vocabulary");
    }

    /// The embedded model in bfloat16 stands for a patched model whose numbers are wrong: MLX sums quantised products in
    /// that type on the CPU. No class may let it pass.
    #[test]
    fn a_model_with_wrong_numbers_fails_every_class() {
        let dir = zmlx_models::embedded_model_dir().unwrap();
        let load = |dtype| {
            let options =
                LoadOptions { dtype, device: zmlx_models::DeviceChoice::Cpu, ..LoadOptions::default() };
            Model::load(&dir, &options, &mut |_| {}).unwrap()
        };
        let (right, wrong) = (load(DtypeChoice::F32), load(DtypeChoice::Bf16));
        let text = &built_in()[3].text;
        let prompt = right.tokenizer().unwrap().encode(text, true).unwrap();
        let mut stock: Vec<u32> = Vec::new();
        for _ in 0..4 {
            let fed = [&stock[..], &[0]].concat();
            let logits = teacher_forced(&right, &prompt, &fed).unwrap();
            stock.push(top1(logits.row(stock.len()).unwrap()).unwrap() as u32);
        }
        let base = teacher_forced(&right, &prompt, &stock).unwrap();
        assert!(follows(&stock, &base, 0.0));
        let logits = compare(&base, &teacher_forced(&wrong, &prompt, &stock).unwrap());
        assert!(logits.kl_mean > 1e-3 && logits.first_not_finite.is_none(), "{logits:?}");
        // A token changed by hand, whether or not one flipped by itself.
        let mut flipped = stock.clone();
        flipped[2] = (flipped[2] + 1) % 4096;
        let found = fidelity_of("short", &stock, &[flipped], &base, logits, true);
        for class in [Class::BitExact, Class::TokenIdentical, Class::Bounded] {
            let gate = Gate::judge(class, std::slice::from_ref(&found), None);
            assert!(!gate.passed, "{class}: {gate:?}");
        }
    }

    #[test]
    fn a_failure_in_16_bits_names_what_would_tell_more() {
        let with = |passed| Fidelity {
            class: Class::TokenIdentical,
            prompts: Vec::new(),
            logits: LogitDifference::default(),
            reference: None,
            gate: Gate { passed, ..Gate::default() },
        };
        assert_eq!(dtype_note("float32", &with(false)), None);
        assert_eq!(dtype_note("bfloat16", &with(true)), None);
        let note = dtype_note("bfloat16", &with(false)).unwrap();
        assert!(note.starts_with("bfloat16: ") && note.contains("--dtype f32"), "{note}");
    }

    #[test]
    fn stock_in_float32_is_the_reference() {
        let all = LogitDifference { steps: 5, max_abs: 0.25, ..LogitDifference::default() };
        let forced = Forced { all: all.clone(), ..Forced::default() };
        let errors = forced.errors(true);
        assert_eq!((errors.stock.max_abs, errors.stock.steps, &errors.patched), (0.0, 5, &all));
        assert_eq!(forced.errors(false).patched, LogitDifference::default());
    }
}
