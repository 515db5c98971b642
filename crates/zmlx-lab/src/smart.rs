//! Which patterns pay for a model on this machine: measured, and remembered.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use zmlx_mlx::locate;
use zmlx_models::{Model, PatchOptions};
use zmlx_tune::{Candidate, Decision, Ended, Key, Outcome, Store, Trial};

use crate::arms::Arm;
use crate::error::LabError;
use crate::hash::model_hash;
use crate::machine::Machine;
use crate::measure::{Progress, Subject, generate, in_range};
use crate::stats::{FEWEST_RUNS, Gain, GainKind, Spread};

/// How patterns are measured.
#[derive(Debug, Clone, PartialEq)]
pub struct SmartOptions {
    /// What there is to choose from: the patterns that these options would put in. The choice is for their threads.
    pub patch: PatchOptions,
    /// Rounds of each comparison, 3 to 1000.
    pub rounds: usize,
    /// Tokens generated in each, 2 or more.
    pub max_tokens: usize,
    /// Where the choice is kept; by default `patch` in the cache folder.
    pub directory: Option<PathBuf>,
}

impl Default for SmartOptions {
    fn default() -> Self {
        Self { patch: PatchOptions::default(), rounds: 5, max_tokens: 32, directory: None }
    }
}

/// What was found of one pattern.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SmartRow {
    /// Its name.
    pub name: String,
    /// Places where it matched among all the others.
    pub matched: usize,
    /// Patterns that match nowhere without it, and were left out with it.
    pub needed_by: Vec<String>,
    /// Decode speed of the full set over the set without it.
    pub gain: Gain,
    /// Decode speed without it, tokens a second.
    pub without: Spread,
    /// Whether it stays.
    pub kept: bool,
    /// Why.
    pub why: String,
}

/// What was measured and chosen.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SmartReport {
    /// Each pattern that matched.
    pub rows: Vec<SmartRow>,
    /// Those that stay, in no order that matters.
    pub chosen: Vec<String>,
    /// Decode speed of all patterns, tokens a second.
    pub full: Spread,
    /// Decode speed of those chosen.
    pub speed: Spread,
    /// Of those chosen over all.
    pub over_full: Gain,
    /// Of those chosen over stock.
    pub over_stock: Gain,
    /// The file that remembers it.
    pub file: Option<PathBuf>,
}

/// Decodes with some patterns, and says which of them match.
trait Speed {
    /// Tokens a second with these patterns and no others.
    fn decode(&mut self, patterns: &[String]) -> Result<f64, LabError>;
    /// How often each of these patterns matches when they and no others are tried.
    fn matched(&mut self, patterns: &[String]) -> Result<BTreeMap<String, usize>, LabError>;
}

/// Measures each pattern's part in the speed of `sample` (token ids), and patches the model with those that help.
///
/// Each pattern is left out of the full set in turn, with those that match nowhere without it, and the two sets are timed
/// in turn (AB, BA, ...). What makes the full set faster beyond noise stays; of what does not, each is put back if it then
/// helps. The result must not be slower than the full set, and faster than stock, or those are taken. Nothing is looser
/// than the class that the options allow. The choice is kept under model hash, processor, threads and versions.
///
/// There are some ten changes a pattern. A weight is read once and then stays, in the engine's form and, where a set leaves
/// it to MLX, in MLX's too, until all is measured: up to twice the memory.
///
/// # Errors
/// Options out of range, failures of the model, and a folder that cannot be written.
pub fn smart_patch(
    subject: &mut Subject<'_>,
    sample: &[u32],
    options: &SmartOptions,
    tell: &mut dyn FnMut(Progress),
) -> Result<SmartReport, LabError> {
    in_range("rounds", options.rounds, FEWEST_RUNS, 1000)?;
    in_range("max tokens", options.max_tokens, 2, 1 << 20)?;
    let path = subject.path;
    let key = key(path, options.patch.threads)?;
    let store = store(options.directory.as_deref())?;
    let mut here = Here { model: subject.model, sample, options };
    here.model.keep_weights(true);
    let report = here.choose(key, &store, tell);
    here.model.keep_weights(false);
    report
}

/// The patterns that [`smart_patch`] chose for the model at `path`, as options with which to patch it. `directory` as in
/// [`SmartOptions`].
///
/// # Errors
/// [`LabError::NotMeasured`] if it was never run for this model, these threads, this machine and this version.
pub fn smart_choice(
    path: &Path,
    threads: Option<usize>,
    directory: Option<&Path>,
) -> Result<PatchOptions, LabError> {
    let found = store(directory)?.get(&key(path, threads)?)?;
    let found = found.ok_or_else(|| LabError::NotMeasured { path: path.to_owned() })?;
    let kept = found.decision.choice.iter().filter(|(_, on)| *on == 1);
    let patterns = Some(kept.map(|(name, _)| name.to_owned()).collect());
    Ok(PatchOptions { patterns, threads, ..PatchOptions::default() })
}

fn store(directory: Option<&Path>) -> Result<Store, LabError> {
    let directory = match directory {
        Some(directory) => directory.to_owned(),
        None => locate::cache_dir()?.join("patch"),
    };
    Ok(Store::open(directory))
}

fn key(path: &Path, threads: Option<usize>) -> Result<Key, LabError> {
    let machine = Machine::look();
    let cpu = machine.cpu.unwrap_or_else(|| machine.arch.clone());
    let threads = threads.map_or(machine.cores, |n| n as u64);
    let library = format!("zmlx {} mlx {}", env!("CARGO_PKG_VERSION"), locate::MLX_VERSION);
    Ok(Key::new(format!("{cpu} {threads} threads"), library, "smart_patch", model_hash(path)?, "decode"))
}

/// The model on this machine.
struct Here<'a> {
    model: &'a mut Model,
    sample: &'a [u32],
    options: &'a SmartOptions,
}

impl Here<'_> {
    fn only(&self, patterns: &[String]) -> PatchOptions {
        let patterns = Some(patterns.to_vec());
        PatchOptions { patterns, exclude: Vec::new(), environment: false, ..self.options.patch.clone() }
    }

    /// Measures, remembers, and leaves the model patched with the choice.
    fn choose(
        &mut self,
        key: Key,
        store: &Store,
        tell: &mut dyn FnMut(Progress),
    ) -> Result<SmartReport, LabError> {
        let full = self.full()?;
        let rounds = self.options.rounds;
        let mut report = choose(self, full, rounds, tell)?;
        let saved = store.put(&decision(key, &report))?;
        report.file = Some(saved.path);
        self.decode(&report.chosen)?;
        Ok(report)
    }

    /// The patterns that the options put in somewhere.
    fn full(&self) -> Result<Vec<String>, LabError> {
        let reports = self.model.would_patch(&self.options.patch);
        let reports = reports.map_err(|e| LabError::Patch(e.to_string()))?;
        Ok(reports.into_iter().filter(|p| p.matched > 0).map(|p| p.name).collect())
    }
}

impl Speed for Here<'_> {
    fn decode(&mut self, patterns: &[String]) -> Result<f64, LabError> {
        let options = self.only(patterns);
        self.model.patch(&options).map_err(|e| LabError::Patch(e.to_string()))?;
        generate(self.model, Arm::Patched, "warm-up", self.sample, 2)?;
        Ok(generate(self.model, Arm::Patched, "sample", self.sample, self.options.max_tokens)?.decode_tps)
    }

    fn matched(&mut self, patterns: &[String]) -> Result<BTreeMap<String, usize>, LabError> {
        let reports = self.model.would_patch(&self.only(patterns));
        let reports = reports.map_err(|e| LabError::Patch(e.to_string()))?;
        Ok(reports.into_iter().map(|p| (p.name, p.matched)).collect())
    }
}

/// One set of patterns timed against another.
struct Compared {
    gain: Gain,
    old: Spread,
    new: Spread,
}

/// Times two sets in turn: AB, BA, AB.
fn timed(speed: &mut dyn Speed, old: &[String], new: &[String], rounds: usize) -> Result<Compared, LabError> {
    let (mut olds, mut news) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        if round % 2 == 0 {
            olds.push(speed.decode(old)?);
            news.push(speed.decode(new)?);
        } else {
            news.push(speed.decode(new)?);
            olds.push(speed.decode(old)?);
        }
    }
    let all = (Gain::paired(&olds, &news), Spread::of(&olds), Spread::of(&news));
    let (Some(gain), Some(old), Some(new)) = all else {
        return Err(LabError::NoSpeed);
    };
    Ok(Compared { gain, old, new })
}

fn without(all: &[String], gone: &[String]) -> Vec<String> {
    all.iter().filter(|name| !gone.contains(name)).cloned().collect()
}

fn choose(
    speed: &mut dyn Speed,
    full: Vec<String>,
    rounds: usize,
    tell: &mut dyn FnMut(Progress),
) -> Result<SmartReport, LabError> {
    // Each left out, each perhaps put back, against all and against stock.
    let total = 2 * full.len() + 2;
    let mut step = |done: usize, step: String| tell(Progress { step, done, total });
    let matched = speed.matched(&full)?;
    let mut rows: Vec<SmartRow> = Vec::new();
    for (done, name) in full.iter().enumerate() {
        step(done, format!("without {name}"));
        let left = speed.matched(&without(&full, std::slice::from_ref(name)))?;
        let idle = |other: &&String| *other != name && left.get(*other).is_none_or(|n| *n == 0);
        let needed_by: Vec<String> = full.iter().filter(idle).cloned().collect();
        let gone: Vec<String> = needed_by.iter().chain([name]).cloned().collect();
        let found = timed(speed, &without(&full, &gone), &full, rounds)?;
        let kept = found.gain.kind == GainKind::Faster;
        let why = if kept { "it helps" } else { "it does not help beyond noise" }.to_owned();
        let matched = matched.get(name).copied().unwrap_or(0);
        let name = name.clone();
        rows.push(SmartRow { name, matched, needed_by, gain: found.gain, without: found.old, kept, why });
    }
    need(&mut rows);
    put_back(speed, &mut rows, rounds, &mut step)?;
    finish(speed, full, rows, rounds, &mut step)
}

/// What needs a pattern that goes has to go with it: the two were measured together.
fn need(rows: &mut [SmartRow]) {
    for index in 0..rows.len() {
        if rows[index].kept {
            continue;
        }
        let (needed, users) = (rows[index].name.clone(), rows[index].needed_by.clone());
        for row in rows.iter_mut().filter(|r| r.kept && users.contains(&r.name)) {
            row.kept = false;
            row.why = format!("it needs {needed}, and together they do not help beyond noise");
        }
    }
}

fn kept(rows: &[SmartRow]) -> Vec<String> {
    rows.iter().filter(|r| r.kept).map(|r| r.name.clone()).collect()
}

/// Tries what was set aside again, the most promising first, beside what was kept.
fn put_back(
    speed: &mut dyn Speed,
    rows: &mut [SmartRow],
    rounds: usize,
    step: &mut dyn FnMut(usize, String),
) -> Result<(), LabError> {
    let mut aside: Vec<usize> = (0..rows.len()).filter(|&i| !rows[i].kept).collect();
    aside.sort_by(|&a, &b| rows[b].gain.ratio.total_cmp(&rows[a].gain.ratio));
    for (done, index) in aside.into_iter().enumerate() {
        step(rows.len() + done, format!("{} put back", rows[index].name));
        let now = kept(rows);
        let more: Vec<String> = now.iter().chain([&rows[index].name]).cloned().collect();
        // What it needs is still out: nothing to measure.
        if speed.matched(&more)?.get(&rows[index].name).is_none_or(|n| *n == 0) {
            continue;
        }
        if timed(speed, &now, &more, rounds)?.gain.kind == GainKind::Faster {
            rows[index].kept = true;
            rows[index].why = "it helps beside the others that were kept".to_owned();
        }
    }
    Ok(())
}

/// The choice is no slower than all patterns and faster than none of them, or one of these is taken.
fn finish(
    speed: &mut dyn Speed,
    full: Vec<String>,
    mut rows: Vec<SmartRow>,
    rounds: usize,
    step: &mut dyn FnMut(usize, String),
) -> Result<SmartReport, LabError> {
    step(2 * full.len(), "the choice against all patterns".to_owned());
    let mut against = timed(speed, &full, &kept(&rows), rounds)?;
    let all = against.old;
    if against.gain.kind == GainKind::Slower {
        rows.iter_mut().filter(|r| !r.kept).for_each(|row| {
            row.kept = true;
            row.why = "alone it does not help, but all together are faster".to_owned();
        });
        against = timed(speed, &full, &full, rounds)?;
    }
    step(2 * full.len() + 1, "the choice against stock".to_owned());
    let stock = timed(speed, &[], &kept(&rows), rounds)?;
    let (mut over_full, mut over_stock, mut fastest) = (against.gain, stock.gain, stock.new);
    if stock.gain.kind != GainKind::Faster && rows.iter().any(|r| r.kept) {
        rows.iter_mut().for_each(|row| {
            row.kept = false;
            row.why = "stock is as fast".to_owned();
        });
        let against = timed(speed, &full, &[], rounds)?;
        (over_full, fastest) = (against.gain, against.new);
        over_stock = Gain { ratio: 1.0, kind: GainKind::Noise, ..stock.gain };
    }
    let chosen = kept(&rows);
    Ok(SmartReport { rows, chosen, full: all, speed: fastest, over_full, over_stock, file: None })
}

/// The record for the store: patterns as parameters that are 0 or 1, seconds a token as times.
fn decision(key: Key, report: &SmartReport) -> Decision {
    let set = |on: &dyn Fn(&SmartRow) -> bool| {
        report.rows.iter().fold(Candidate::new(), |c, row| c.with(row.name.as_str(), i64::from(on(row))))
    };
    let trial = |candidate: Candidate, speed: &Spread, outcome| Trial {
        candidate,
        outcome,
        samples: 0,
        median: Some(1.0 / speed.median),
        mad: Some(speed.mad / speed.median.powi(2)),
    };
    let (default, choice) = (set(&|_| true), set(&|row| row.kept));
    let stays = default == choice;
    let outcome = |gain: &Gain| match gain.kind {
        GainKind::Faster => Outcome::Slower,
        _ => Outcome::WithinNoise,
    };
    let first = if stays { Outcome::Chosen } else { outcome(&report.over_full) };
    let mut evidence = vec![trial(default.clone(), &report.full, first)];
    if !stays {
        evidence.push(trial(choice.clone(), &report.speed, Outcome::Chosen));
    }
    for row in &report.rows {
        let gone = |other: &SmartRow| other.name != row.name && !row.needed_by.contains(&other.name);
        let candidate = set(&gone);
        if evidence.iter().all(|t| t.candidate != candidate) {
            evidence.push(trial(candidate, &row.without, outcome(&row.gain)));
        }
    }
    let when = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    Decision {
        key,
        choice,
        default,
        gain: if stays { 1.0 } else { report.over_full.ratio },
        iterations: 1,
        rounds: 0,
        ended: Ended::AllRounds,
        evidence,
        when,
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

impl fmt::Display for SmartReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<18} {:>7} {:>8} {:>8}  kept", "pattern", "matched", "gain", "noise")?;
        for row in &self.rows {
            let (gain, noise) = (row.gain.ratio, 100.0 * row.gain.noise);
            let kept = if row.kept { "yes" } else { "no" };
            writeln!(
                f,
                "{:<18} {:>7} {gain:>7.3}x {noise:>7.1}%  {kept}: {}",
                row.name, row.matched, row.why
            )?;
        }
        let (full, stock) = (self.over_full.ratio, self.over_stock.ratio);
        let (count, all) = (self.chosen.len(), self.rows.len());
        write!(
            f,
            "{count} of {all} patterns: {:.1} tok/s, {full:.3}x of all patterns, {stock:.3}x of stock",
            self.speed.median
        )
    }
}

#[cfg(test)]
#[path = "smart_tests.rs"]
mod tests;
