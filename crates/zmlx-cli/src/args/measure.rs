//! What can be typed behind `validate` and `bench`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{Device, Dtype, PatchArgs, QuantizeArgs};

/// Which model the lab measures, and how it is loaded.
#[derive(Debug, Default, Args)]
pub(crate) struct LabModelArgs {
    /// Model folder, GGUF file, or a Hugging Face id such as org/name [default: the embedded model]
    #[arg(value_name = "DIR|FILE|ID")]
    pub(crate) model: Option<String>,
    /// Type of the activations; auto is f32 on a CPU and the checkpoint's own on a GPU
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t = Dtype::Auto)]
    pub(crate) dtype: Dtype,
    /// Where to compute; auto takes a GPU when there is one
    #[arg(long, value_name = "DEVICE", value_enum, default_value_t = Device::Auto)]
    pub(crate) device: Device,
    /// Quantisation.
    #[command(flatten)]
    pub(crate) quantize: QuantizeArgs,
}

/// What both arms are held against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ReferenceArg {
    F32,
}

/// How much is run, and where the record goes.
#[derive(Debug, Default, Args)]
pub(crate) struct LabRunArgs {
    /// Tokens to generate, 2 or more [default: 128]
    #[arg(short = 'n', long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) max_tokens: Option<String>,
    /// Timed runs of each arm, 1 or more, taken in turn; below 3 every gain counts as noise [default: validate 3, bench 5]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) runs: Option<String>,
    /// Rest before each timed run, 0 or more [default: 0]
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    pub(crate) cooldown: Option<String>,
    /// Print the capsule as one line of JSON instead of the report
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the capsule into this file
    #[arg(long, value_name = "FILE")]
    pub(crate) capsule: Option<PathBuf>,
}

const VALIDATE_EXIT: &str = "\
Exit codes: 0 the gate passed; 4 it failed (with --bisect: an op leaves its class); 5 it passed, but a speed was above the roofline and is withheld.
How to read the report: docs/validation.md.";

/// Arguments of `zmlx validate`.
#[derive(Debug, Default, Args)]
#[command(after_help = VALIDATE_EXIT)]
pub(crate) struct ValidateArgs {
    /// Model and loading.
    #[command(flatten)]
    pub(crate) model: LabModelArgs,
    /// Prompts in place of the built-in ones: one a line, or with .json an array of texts or {"name", "text", "chat"}
    #[arg(long, value_name = "FILE")]
    pub(crate) prompts: Option<PathBuf>,
    /// Also hold both arms against an unpatched float32 model; the patched error must not exceed stock's
    #[arg(long, value_name = "DTYPE", value_enum)]
    pub(crate) reference: Option<ReferenceArg>,
    /// Instead, hold each fused op against what it replaces, on stock's values, and name the first that leaves its class
    /// [default with it: 32 tokens]
    #[arg(long, conflicts_with_all = ["reference", "runs", "cooldown", "capsule"])]
    pub(crate) bisect: bool,
    /// Amount of work.
    #[command(flatten)]
    pub(crate) run: LabRunArgs,
    /// Patching.
    #[command(flatten)]
    pub(crate) patch: PatchArgs,
}

const BENCH_EXIT: &str = "\
Exit codes: 0 done; 5 a speed was above the roofline, so none is printed.
A folder named like one of the commands is written ./compare, ./report or ./schema.";

/// Arguments of `zmlx bench`.
#[derive(Debug, Default, Args)]
#[command(after_help = BENCH_EXIT, args_conflicts_with_subcommands = true)]
pub(crate) struct ModelBenchArgs {
    /// What to do with capsules [default: measure a model]
    #[command(subcommand)]
    pub(crate) command: Option<CapsuleCommand>,
    /// Model and loading.
    #[command(flatten)]
    pub(crate) model: LabModelArgs,
    /// Tokens of the prompt, 1 or more; pseudo-random ids [default: 64]
    #[arg(short, long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) prompt_tokens: Option<String>,
    /// The arms: stock, patched, or both separated by a comma [default: stock,patched]
    #[arg(long, value_name = "ARMS", value_delimiter = ',')]
    pub(crate) arms: Vec<String>,
    /// Amount of work.
    #[command(flatten)]
    pub(crate) run: LabRunArgs,
    /// Patching.
    #[command(flatten)]
    pub(crate) patch: PatchArgs,
}

/// The commands of `zmlx bench`.
#[derive(Debug, Subcommand)]
pub(crate) enum CapsuleCommand {
    /// Say what changed from one capsule to another, and what of it is noise
    Compare(CompareArgs),
    /// Print reports of capsules, and write a page with charts
    Report(ReportArgs),
    /// Print the JSON Schema of capsules
    Schema,
}

/// Arguments of `zmlx bench compare`.
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// The old capsule
    #[arg(value_name = "A.json")]
    pub(crate) old: PathBuf,
    /// The new capsule
    #[arg(value_name = "B.json")]
    pub(crate) new: PathBuf,
    /// Print one JSON record on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `zmlx bench report`.
#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// The capsules
    #[arg(value_name = "CAPSULE", required = true)]
    pub(crate) capsules: Vec<PathBuf>,
    /// Write a self-contained page with charts into this file
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}
