//! `zmlx lab`: tools for measuring.

use std::fmt::Write;
use std::time::Instant;

use zmlx_lab::{SmartOptions, Subject, smart_patch};
use zmlx_models::random::{MODELS, RandomError, RandomOptions, write_random_model};
use zmlx_models::{Flow, LoadOptions};

use crate::args::{LabArgs, LabCommand, RandomModelArgs, SmartPatchArgs};
use crate::failure::Failure;
use crate::interrupt::{Interrupt, SecondPress};
use crate::model;
use crate::output::{self, Console, Unit, bytes, count};
use crate::request::{self, number};

/// Runs the tool that was typed.
pub(crate) fn run(args: &LabArgs, console: &Console) -> Result<(), Failure> {
    match &args.command {
        LabCommand::RandomModel(args) => random_model(args, console),
        LabCommand::SmartPatch(args) => smart(args, console),
    }
}

/// Pseudo-random tokens of the prompt that patterns are timed after.
const SAMPLE_TOKENS: u32 = 16;

fn smart(args: &SmartPatchArgs, console: &Console) -> Result<(), Failure> {
    let source = request::model_source(args.model.clone())?;
    let usual = SmartOptions::default();
    let rounds = number("--rounds", args.rounds.as_deref(), "a whole number from 3 to 1000", |n| {
        (3..=1000).contains(&n)
    })?;
    let max_tokens =
        number("--max-tokens", args.max_tokens.as_deref(), "a whole number of 2 or more", |n| n >= 2)?;
    let options = SmartOptions {
        patch: request::patch_options(&args.patch)?,
        rounds: rounds.unwrap_or(usual.rounds),
        max_tokens: max_tokens.unwrap_or(usual.max_tokens),
        directory: None,
    };
    let _interrupt = Interrupt::install(SecondPress::Exits)?;
    let quiet = console.without_progress();
    let console = if args.json { &quiet } else { console };
    let path = model::locate(&source, console)?;
    // With the patterns that come first, so that the weights are not read for stock alone.
    let load = LoadOptions { patch: Some(options.patch.clone()), ..LoadOptions::default() };
    let mut model = model::load(&path, &load, console)?;
    let vocabulary = u32::try_from(model.vocab_size()).unwrap_or(u32::MAX).max(1);
    let sample: Vec<u32> =
        (0..SAMPLE_TOKENS).map(|i| i.wrapping_mul(2_654_435_761).rotate_right(7) % vocabulary).collect();
    let name = super::validate::name_of(&source);
    let mut subject = Subject { path: &path, name: &name, load: &load, model: &mut model };
    let found = smart_patch(&mut subject, &sample, &options, &mut |p| super::validate::tell(&p, console));
    let found = found.map_err(Failure::lab)?;
    if let Some(file) = &found.file {
        console.note(&format!("remembered in {}: --preset smart takes it", file.display()));
    }
    match args.json {
        true => output::write_json(&found),
        false => output::write_stdout(format!("{found}\n").as_bytes()),
    }
}

fn random_model(args: &RandomModelArgs, console: &Console) -> Result<(), Failure> {
    let (Some(name), Some(out)) = (&args.name, &args.out) else {
        let mut text = String::new();
        for model in MODELS {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{:<14} {}", model.name, model.about);
        }
        return output::write_stdout(text.as_bytes());
    };
    let options = random_options(args)?;
    let interrupt = Interrupt::install(SecondPress::Exits)?;
    let guard = interrupt.during_reply();
    let started = Instant::now();
    let mut bar = None;
    let written = write_random_model(name, out, &options, &mut |done, total| {
        bar.get_or_insert_with(|| console.bar("writing", Unit::Bytes, total)).set_position(done);
        if guard.stop_requested() { Flow::Stop } else { Flow::Continue }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let model = written.map_err(|error| match error {
        RandomError::UnknownModel { .. } | RandomError::Option { .. } => Failure::bad_input(error),
        RandomError::Folder(error) => Failure::folder(error),
        error => Failure::runtime(error),
    })?;
    console.note(&format!(
        "{} parameters, {} in {} file(s), {:.1} s; it has no tokenizer: use --prompt-ids",
        count(model.parameters),
        bytes(model.bytes),
        model.shards.len(),
        started.elapsed().as_secs_f64()
    ));
    output::write_stdout(format!("{}\n", model.dir.display()).as_bytes())
}

fn random_options(args: &RandomModelArgs) -> Result<RandomOptions, Failure> {
    let default = RandomOptions::default();
    let bits = number("--bits", args.bits.as_deref(), "2, 3, 4, 5, 6 or 8", |b: i32| matches!(b, 2..=6 | 8))?;
    let group = |g: i32| matches!(g, 32 | 64 | 128);
    let group_size = number("--group-size", args.group_size.as_deref(), "32, 64 or 128", group)?;
    let any = "a whole number from 0 to 18446744073709551615";
    let seed = number("--seed", args.seed.as_deref(), any, |_| true)?;
    Ok(RandomOptions {
        bits: bits.unwrap_or(default.bits),
        group_size: group_size.unwrap_or(default.group_size),
        seed: seed.unwrap_or(default.seed),
    })
}
