//! What `validate` and `bench` were asked for.

use std::path::PathBuf;
use std::time::Duration;

use zmlx_lab::{Arm, BenchOptions, BisectOptions, Reference, ValidateOptions, prompts};
use zmlx_models::LoadOptions;

use super::{ModelSource, loading, model_source, number, patch_options};
use crate::args::{LabModelArgs, LabRunArgs, ModelBenchArgs, ReferenceArg, ValidateArgs};
use crate::failure::Failure;

/// Longest rest, in seconds.
const LONGEST_COOLDOWN: f64 = 3600.0;

/// A model, and where the record of its measurement goes.
#[derive(Debug)]
pub(crate) struct Target {
    /// Which model.
    pub(crate) model: ModelSource,
    /// How to load it.
    pub(crate) load: LoadOptions,
    /// Print JSON.
    pub(crate) json: bool,
    /// Write the capsule here.
    pub(crate) capsule: Option<PathBuf>,
}

/// A checked `zmlx validate`.
#[derive(Debug)]
pub(crate) struct ValidateRequest {
    /// The model.
    pub(crate) target: Target,
    /// What to do.
    pub(crate) options: ValidateOptions,
    /// This instead.
    pub(crate) bisect: Option<BisectOptions>,
}

/// A checked `zmlx bench`.
#[derive(Debug)]
pub(crate) struct BenchRequest {
    /// The model.
    pub(crate) target: Target,
    /// What to do.
    pub(crate) options: BenchOptions,
}

impl TryFrom<ValidateArgs> for ValidateRequest {
    type Error = Failure;

    fn try_from(args: ValidateArgs) -> Result<Self, Failure> {
        let usual = ValidateOptions::default();
        let amount = Amount::new(&args.run)?;
        let prompts = match &args.prompts {
            Some(path) => prompts::from_file(path).map_err(Failure::lab)?,
            None => usual.prompts,
        };
        let options = ValidateOptions {
            prompts,
            max_tokens: amount.max_tokens.unwrap_or(usual.max_tokens),
            runs: amount.runs.unwrap_or(usual.runs),
            cooldown: amount.cooldown,
            patch: patch_options(&args.patch)?,
            reference: args.reference.map(|ReferenceArg::F32| Reference::F32),
        };
        let bisect = args.bisect.then(|| BisectOptions {
            prompts: options.prompts.clone(),
            max_tokens: amount.max_tokens.unwrap_or(BisectOptions::default().max_tokens),
            patch: options.patch.clone(),
        });
        Ok(Self { target: target(args.model, args.run)?, options, bisect })
    }
}

impl TryFrom<ModelBenchArgs> for BenchRequest {
    type Error = Failure;

    fn try_from(args: ModelBenchArgs) -> Result<Self, Failure> {
        let usual = BenchOptions::default();
        let amount = Amount::new(&args.run)?;
        let one_or_more = "a whole number of 1 or more";
        let prompt_tokens =
            number("--prompt-tokens", args.prompt_tokens.as_deref(), one_or_more, |n| n >= 1)?;
        let named: Result<Vec<Arm>, String> = args.arms.iter().map(|a| a.trim().parse()).collect();
        let arms = named.map_err(|wrong| {
            Failure::usage(format_args!("--arms: {wrong}: give stock, patched or stock,patched"))
        })?;
        let options = BenchOptions {
            prompt_tokens: prompt_tokens.unwrap_or(usual.prompt_tokens),
            max_tokens: amount.max_tokens.unwrap_or(usual.max_tokens),
            runs: amount.runs.unwrap_or(usual.runs),
            cooldown: amount.cooldown,
            arms: if arms.is_empty() { usual.arms } else { arms },
            patch: patch_options(&args.patch)?,
        };
        let mut target = target(args.model, args.run)?;
        if options.arms == [Arm::Patched] {
            // Not the stock form first: a model may just fit into memory.
            target.load.patch = Some(options.patch.clone());
        }
        Ok(Self { target, options })
    }
}

fn target(model: LabModelArgs, run: LabRunArgs) -> Result<Target, Failure> {
    Ok(Target {
        load: loading(model.dtype, model.device, &model.quantize)?,
        model: model_source(model.model)?,
        json: run.json,
        capsule: run.capsule,
    })
}

struct Amount {
    max_tokens: Option<usize>,
    runs: Option<usize>,
    cooldown: Duration,
}

impl Amount {
    fn new(args: &LabRunArgs) -> Result<Self, Failure> {
        let allowed = format!("a number of seconds from 0 to {LONGEST_COOLDOWN}");
        let cooldown = number("--cooldown", args.cooldown.as_deref(), &allowed, |s| {
            (0.0..=LONGEST_COOLDOWN).contains(&s)
        })?;
        Ok(Self {
            max_tokens: number(
                "--max-tokens",
                args.max_tokens.as_deref(),
                "a whole number of 2 or more",
                |n| n >= 2,
            )?,
            runs: number("--runs", args.runs.as_deref(), "a whole number from 1 to 1000", |n| {
                (1..=1000).contains(&n)
            })?,
            cooldown: Duration::from_secs_f64(cooldown.unwrap_or(0.0)),
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn bench(typed: &[&str]) -> Result<BenchRequest, Failure> {
        let line = ["zmlx", "bench"].iter().chain(typed);
        match Cli::try_parse_from(line).expect("parses").command {
            Command::Bench(args) => args.try_into(),
            other => panic!("{other:?}"),
        }
    }

    fn validate(typed: &[&str]) -> Result<ValidateRequest, Failure> {
        let line = ["zmlx", "validate"].iter().chain(typed);
        match Cli::try_parse_from(line).expect("parses").command {
            Command::Validate(args) => args.try_into(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_not_given_is_the_librarys_default() {
        assert_eq!(bench(&[]).expect("fine").options, BenchOptions::default());
        let request = validate(&[]).expect("fine");
        assert_eq!(request.options, ValidateOptions::default());
        assert_eq!(request.target.model, ModelSource::Embedded);
    }

    #[test]
    fn what_is_given_arrives() {
        let options =
            bench(&["dir", "-n", "9", "--runs", "2", "--arms", "patched, stock", "--cooldown", "0.5"]);
        let BenchRequest { options, target } = options.expect("fine");
        assert_eq!((options.max_tokens, options.runs), (9, 2));
        assert_eq!(options.arms, [Arm::Patched, Arm::Stock]);
        assert_eq!(options.cooldown, Duration::from_millis(500));
        assert_eq!(target.model, ModelSource::Named("dir".into()));
        let options =
            validate(&["--patterns", "a, b", "--exclude", "c", "--threads", "2", "--reference", "f32"]);
        let options = options.expect("fine").options;
        assert_eq!(options.patch.patterns, Some(vec!["a".into(), "b".into()]));
        assert_eq!((options.patch.exclude, options.patch.threads), (vec!["c".into()], Some(2)));
        assert_eq!(options.reference, Some(Reference::F32));
        let bisect = validate(&["--bisect", "--exclude", "c"]).expect("fine").bisect.expect("asked for");
        assert_eq!((bisect.max_tokens, bisect.patch.exclude), (32, vec!["c".to_owned()]));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for typed in [
            &["--runs", "0"][..],
            &["--runs", "1001"],
            &["--max-tokens", "1"],
            &["--prompt-tokens", "0"],
            &["--cooldown", "-1"],
            &["--cooldown", "nan"],
            &["--threads", "0"],
            &["--arms", "stock,third"],
            &["--patterns", "a,,b"],
        ] {
            let failure = bench(typed).err().unwrap_or_else(|| panic!("{typed:?}"));
            assert_eq!(failure.code(), 2, "{typed:?}");
        }
    }

    #[test]
    fn commands_and_models_do_not_mix() {
        for (typed, fine) in [
            (&["bench", "schema"][..], true),
            (&["bench", "compare", "a", "b"], true),
            (&["bench", "compare", "a"], false),
            (&["bench", "report"], false),
            (&["bench", "./schema", "--runs", "3"], true),
            (&["validate", "--preset", "none", "--patterns", "a"], false),
            (&["validate", "--bisect", "--runs", "3"], false),
            (&["validate", "--bisect", "-n", "3"], true),
        ] {
            let line = ["zmlx"].iter().chain(typed);
            assert_eq!(Cli::try_parse_from(line).is_ok(), fine, "{typed:?}");
        }
    }
}
