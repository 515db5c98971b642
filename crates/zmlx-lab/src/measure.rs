//! Timed generation with the arms taken in turn, and logits under teacher forcing.

use std::path::Path;
use std::thread;
use std::time::Duration;

use zmlx_mlx::stream::with_stream;
use zmlx_mlx::{Dtype, eval};
use zmlx_models::{Completion, Flow, GenerateError, GenerateOptions, LoadOptions, Model, Session, memory};

use crate::arms::{Arm, Arms, Counts};
use crate::bandwidth::Probe;
use crate::capsule::{
    ArmRecord, Capsule, Kind, ModelRecord, QuantizationRecord, RunRecord, SCHEMA, Settings, Versions,
};
use crate::error::LabError;
use crate::hash::model_hash;
use crate::logits::Logits;
use crate::machine::{Conditions, Machine};
use crate::prompts::Tokenised;
use crate::roofline::{AboveRoofline, Roofline};
use crate::stats::Spread;
use crate::time::now;

/// Prompt tokens in one step.
pub(crate) const PREFILL_CHUNK: usize = 2048;

/// Tokens that are generated, and not counted, after each change of arm.
const WARM_UP_TOKENS: usize = 4;

/// Passes of one bandwidth probe, between two timed runs.
const PROBE_PASSES: usize = 3;

/// A model to measure.
#[derive(Debug)]
pub struct Subject<'a> {
    /// Its folder or file, for the hash and for a second load as a reference.
    pub path: &'a Path,
    /// What to call it in capsules.
    pub name: &'a str,
    /// How it was loaded.
    pub load: &'a LoadOptions,
    /// The model. It is stock again when the measurement ends, unless that fails.
    pub model: &'a mut Model,
}

/// How far a measurement is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// What is being done, such as `run 2, stock`.
    pub step: String,
    /// Steps done.
    pub done: usize,
    /// Steps in all.
    pub total: usize,
}

/// Counts steps and tells about them.
pub(crate) struct Steps<'p> {
    pub(crate) done: usize,
    pub(crate) total: usize,
    pub(crate) tell: &'p mut dyn FnMut(Progress),
}

impl Steps<'_> {
    pub(crate) fn next(&mut self, step: String) {
        (self.tell)(Progress { step, done: self.done, total: self.total });
        self.done += 1;
    }
}

/// What to time.
pub(crate) struct Plan<'p> {
    pub(crate) arms: &'p [Arm],
    pub(crate) prompts: &'p [Tokenised],
    pub(crate) max_tokens: usize,
    pub(crate) runs: usize,
    pub(crate) cooldown: Duration,
}

/// A timed run over all prompts.
pub(crate) struct TimedRun {
    pub(crate) arm: Arm,
    pub(crate) record: RunRecord,
    pub(crate) peak_memory_bytes: u64,
    pub(crate) resident_peak_bytes: Option<u64>,
    /// The tokens of each prompt.
    pub(crate) tokens: Vec<Vec<u32>>,
}

/// All timed runs.
pub(crate) struct Timings {
    pub(crate) runs: Vec<TimedRun>,
    pub(crate) counts: Vec<(Arm, Counts)>,
    /// Read bandwidth between them, in bytes a second.
    pub(crate) probes: Vec<f64>,
}

/// Takes the arms in turn: in order in one run, in reverse in the next, so that neither always has the colder machine.
pub(crate) fn timed_runs(
    arms: &mut Arms<'_>,
    plan: &Plan<'_>,
    probe: Option<&Probe>,
    steps: &mut Steps<'_>,
) -> Result<Timings, LabError> {
    let mut timings = Timings { runs: Vec::new(), counts: Vec::new(), probes: Vec::new() };
    for run in 0..plan.runs {
        let mut order = plan.arms.to_vec();
        if run % 2 == 1 {
            order.reverse();
        }
        for arm in order {
            steps.next(format!("run {} of {}, {arm}", run + 1, plan.runs));
            let model = arms.select(arm)?;
            if let Some(first) = plan.prompts.first() {
                let short = &first.ids[..first.ids.len().min(WARM_UP_TOKENS)];
                generate(model, arm, "warm-up", short, WARM_UP_TOKENS)?;
            }
            if !plan.cooldown.is_zero() {
                thread::sleep(plan.cooldown);
            }
            timings.probes.extend(probe.map(|p| p.measure(PROBE_PASSES)));
            let timed = timed_run(arms.model(), arm, plan, timings.runs.len())?;
            timings.runs.push(timed);
            if !timings.counts.iter().any(|(a, _)| *a == arm) {
                timings.counts.push((arm, arms.counts()?));
            }
        }
    }
    timings.probes.extend(probe.map(|p| p.measure(PROBE_PASSES)));
    Ok(timings)
}

fn timed_run(model: &Model, arm: Arm, plan: &Plan<'_>, order: usize) -> Result<TimedRun, LabError> {
    memory::reset_peak()?;
    memory::reset_resident_peak();
    let (mut prefill, mut decode) = (Rate::default(), Rate::default());
    let mut tokens = Vec::new();
    for prompt in plan.prompts {
        let done = generate(model, arm, &prompt.record.name, &prompt.ids, plan.max_tokens)?;
        prefill.add(prompt.ids.len(), done.prompt_tps);
        decode.add(done.tokens.len().saturating_sub(1), done.decode_tps);
        tokens.push(done.tokens);
    }
    let record = RunRecord {
        order: order as u64,
        prefill_tok_s: prefill.per_second(),
        decode_tok_s: decode.per_second(),
    };
    let (peak_memory_bytes, resident_peak_bytes) = (memory::peak()?, memory::resident_peak());
    Ok(TimedRun { arm, record, peak_memory_bytes, resident_peak_bytes, tokens })
}

/// Tokens and the time they took, from rates of several prompts.
#[derive(Default)]
struct Rate {
    tokens: f64,
    seconds: f64,
}

impl Rate {
    fn add(&mut self, tokens: usize, per_second: f64) {
        if per_second > 0.0 {
            self.tokens += tokens as f64;
            self.seconds += tokens as f64 / per_second;
        }
    }

    fn per_second(&self) -> f64 {
        if self.seconds > 0.0 { self.tokens / self.seconds } else { 0.0 }
    }
}

/// Greedy tokens after a prompt in a fresh state, past any end of sequence, so that the budget is the same for all.
pub(crate) fn generate(
    model: &Model,
    arm: Arm,
    name: &str,
    prompt: &[u32],
    max_tokens: usize,
) -> Result<Completion, LabError> {
    let options = GenerateOptions {
        max_tokens,
        ignore_eos: true,
        prefill_chunk: PREFILL_CHUNK,
        ..GenerateOptions::default()
    };
    match Session::new(model).generate(prompt, &options, &mut |_| Flow::Continue) {
        Err(GenerateError::NotANumber { position }) if arm == Arm::Patched => {
            Err(LabError::PatchedNotANumber { prompt: name.to_owned(), position })
        }
        other => Ok(other?),
    }
}

/// Logits of each step when the model is fed `prompt` and then, whatever it says itself, `continuation`. The prompt goes in
/// as generation feeds it (all but the last token in chunks), then single tokens: what decodes also is what is compared.
pub(crate) fn teacher_forced(
    model: &Model,
    prompt: &[u32],
    continuation: &[u32],
) -> Result<Logits, LabError> {
    let mut table = Logits::new(model.vocab_size());
    let Some((&last, head)) = prompt.split_last() else { return Ok(table) };
    let mut state = model.new_state();
    with_stream(model.stream(), || {
        for part in head.chunks(PREFILL_CHUNK) {
            model.run(part, &mut state)?;
            eval(&state.arrays())?;
        }
        let fed = std::iter::once(last).chain(continuation.iter().copied());
        for token in fed.take(continuation.len()) {
            let logits = model.run(&[token], &mut state)?.astype(Dtype::Float32)?;
            let row = logits.to_vec::<f32>()?;
            if !table.push(&row) {
                let message = format!("{} logits for a vocabulary of {}", row.len(), model.vocab_size());
                return Err(zmlx_graph::GraphError::Malformed(message).into());
            }
        }
        Ok(table)
    })
}

/// The figures of an arm; none if it did not run. [`AboveRoofline`] for a speed that cannot be.
pub(crate) fn arm_record(
    timings: &Timings,
    arm: Arm,
    roofline: Option<&Roofline>,
) -> Result<Option<ArmRecord>, AboveRoofline> {
    let of_arm = || timings.runs.iter().filter(|r| r.arm == arm);
    let runs: Vec<RunRecord> = of_arm().map(|r| r.record).collect();
    let spread = |f: fn(&RunRecord) -> f64| Spread::of(&runs.iter().map(f).collect::<Vec<_>>());
    let counts = timings.counts.iter().find(|(a, _)| *a == arm).map(|(_, c)| c);
    let (Some(prefill), Some(decode), Some(counts)) =
        (spread(|r| r.prefill_tok_s), spread(|r| r.decode_tok_s), counts)
    else {
        return Ok(None);
    };
    let bound = roofline.map(|r| r.bound(decode.median, counts.bytes_per_token)).transpose()?;
    Ok(Some(ArmRecord {
        arm,
        prefill,
        decode,
        peak_memory_bytes: of_arm().map(|r| r.peak_memory_bytes).max().unwrap_or(0),
        resident_peak_bytes: of_arm().filter_map(|r| r.resident_peak_bytes).max(),
        bytes_per_token: counts.bytes_per_token,
        graph_nodes: counts.graph_nodes,
        launches_per_token: counts.launches_per_token,
        bound,
        runs,
    }))
}

/// A probe for a model on the CPU; the CPU's bandwidth says nothing of a GPU.
pub(crate) fn probe_for(model: &Model, machine: &Machine, threads: Option<usize>) -> Option<Probe> {
    let threads = threads.unwrap_or(machine.cores as usize);
    (model.device_name() == "cpu").then(|| Probe::new(threads, machine.last_level_cache_bytes))
}

/// The roofline of a run, from its probes.
pub(crate) fn roofline(
    probe: Option<&Probe>,
    probes: &[f64],
    machine: &Machine,
    model: &ModelRecord,
) -> Option<Roofline> {
    let (probe, bandwidth) = (probe?, Spread::of(probes)?);
    Some(Roofline {
        threads: probe.threads() as u64,
        buffer_bytes: probe.bytes(),
        probes: probes.to_vec(),
        bandwidth,
        last_level_cache_bytes: machine.last_level_cache_bytes,
        working_set_bytes: model.file_bytes,
    })
}

/// What a capsule says of a model.
pub(crate) fn model_record(subject: &Subject<'_>) -> Result<ModelRecord, LabError> {
    let info = subject.model.info();
    // A path may hold names that are nobody's business.
    let name = Path::new(subject.name).file_name().map(|n| n.to_string_lossy().into_owned());
    let is_path = Path::new(subject.name).exists();
    let name = name.filter(|_| is_path).unwrap_or_else(|| subject.name.to_owned());
    let quantization = info.quantization.iter().map(|q| QuantizationRecord {
        mode: q.mode.clone(),
        bits: q.bits,
        group_size: q.group_size,
        bytes: q.bytes,
    });
    Ok(ModelRecord {
        name,
        family: info.family.clone(),
        hash: model_hash(subject.path)?,
        file_bytes: info.file_bytes,
        parameters_total: info.parameters_total,
        parameters_active: info.parameters_active,
        quantization: quantization.collect(),
        dtype: subject.model.dtype_name().to_owned(),
        device: subject.model.device_name(),
    })
}

/// A capsule of what is known however the measurement went: no figures yet.
pub(crate) fn blank(
    kind: Kind,
    machine: Machine,
    model: ModelRecord,
    settings: Settings,
    prompts: &[Tokenised],
    conditions: Conditions,
) -> Capsule {
    Capsule {
        schema: SCHEMA.to_owned(),
        kind,
        created: now(),
        machine,
        versions: Versions::current(),
        model,
        settings,
        prompts: prompts.iter().map(|p| p.record.clone()).collect(),
        conditions,
        arms: Vec::new(),
        gains: None,
        roofline: None,
        patterns: Vec::new(),
        native: false,
        fidelity: None,
        notes: Vec::new(),
    }
}

/// Checks a number of tokens or runs.
pub(crate) fn in_range(name: &'static str, value: usize, least: usize, most: usize) -> Result<(), LabError> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    let allowed = format!("a whole number from {least} to {most}");
    Err(LabError::Option { name, value: value.to_string(), allowed })
}

/// Checks that prompt and budget fit into the model's context.
pub(crate) fn check_context(model: &Model, prompts: &[Tokenised], max_tokens: usize) -> Result<(), LabError> {
    let Some(context) = model.context_length() else { return Ok(()) };
    match prompts.iter().find(|p| p.ids.len() + max_tokens > context) {
        None => Ok(()),
        Some(long) => Err(LabError::TooLong {
            name: long.record.name.clone(),
            prompt: long.ids.len(),
            max_tokens,
            context,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::roofline::Bound;

    #[test]
    fn rates_add_up_by_time() {
        let mut rate = Rate::default();
        rate.add(100, 100.0);
        rate.add(100, 50.0);
        rate.add(0, 0.0);
        assert!((rate.per_second() - 200.0 / 3.0).abs() < 1e-9);
        assert_eq!(Rate::default().per_second(), 0.0);
    }

    fn timings(decode_tok_s: f64) -> Timings {
        let record = |order| RunRecord { order, prefill_tok_s: 100.0, decode_tok_s };
        let run = |order| TimedRun {
            arm: Arm::Stock,
            record: record(order),
            peak_memory_bytes: 7 + order,
            resident_peak_bytes: Some(9 - order),
            tokens: Vec::new(),
        };
        let counts = Counts { bytes_per_token: 1_000_000_000, graph_nodes: 9, launches_per_token: None };
        Timings { runs: vec![run(0), run(1)], counts: vec![(Arm::Stock, counts)], probes: vec![20e9] }
    }

    #[test]
    fn an_arm_above_the_roofline_has_no_record() {
        let roofline = Roofline {
            threads: 2,
            buffer_bytes: 1,
            probes: vec![20e9],
            bandwidth: Spread::of(&[20e9]).unwrap(),
            last_level_cache_bytes: Some(32 << 20),
            working_set_bytes: 5_000_000_000,
        };
        let fine = arm_record(&timings(10.0), Arm::Stock, Some(&roofline)).unwrap().unwrap();
        assert!(matches!(fine.bound, Some(Bound::Memory { fraction, .. }) if (fraction - 0.5).abs() < 1e-12));
        assert_eq!((fine.peak_memory_bytes, fine.runs.len()), (8, 2));
        assert!(arm_record(&timings(20.1), Arm::Stock, Some(&roofline)).is_err());
        assert!(arm_record(&timings(20.1), Arm::Stock, None).unwrap().unwrap().bound.is_none());
        assert_eq!(arm_record(&timings(10.0), Arm::Patched, None).unwrap(), None);
    }

    #[test]
    fn ranges_are_said() {
        assert!(in_range("runs", 1, 1, 9).is_ok());
        let line = in_range("runs", 10, 1, 9).unwrap_err().to_string();
        assert_eq!(line, "runs = 10: must be a whole number from 1 to 9");
    }
}
