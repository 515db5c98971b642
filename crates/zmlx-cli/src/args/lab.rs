//! What can be typed behind `lab`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::PatchArgs;

/// Arguments of `zmlx lab`.
#[derive(Debug, Args)]
pub(crate) struct LabArgs {
    /// The tool
    #[command(subcommand)]
    pub(crate) command: LabCommand,
}

/// The commands of `zmlx lab`.
#[derive(Debug, Subcommand)]
pub(crate) enum LabCommand {
    /// Write a model folder with random weights at the shapes of a published model, to measure speed with
    RandomModel(RandomModelArgs),
    /// Measure which patterns pay for a model on this machine, and remember it for --preset smart
    SmartPatch(SmartPatchArgs),
}

/// Arguments of `zmlx lab smart-patch`.
#[derive(Debug, Args)]
pub(crate) struct SmartPatchArgs {
    /// Model folder, GGUF file, or a Hugging Face id such as org/name [default: the embedded model]
    #[arg(value_name = "DIR|FILE|ID")]
    pub(crate) model: Option<String>,
    /// Rounds of each comparison, 3 to 1000 [default: 5]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) rounds: Option<String>,
    /// Tokens to generate in each, 2 or more [default: 32]
    #[arg(short = 'n', long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) max_tokens: Option<String>,
    /// Patching: what there is to choose from.
    #[command(flatten)]
    pub(crate) patch: PatchArgs,
    /// Print one JSON record on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `zmlx lab random-model`.
#[derive(Debug, Args)]
pub(crate) struct RandomModelArgs {
    /// Whose shapes: see --list
    #[arg(value_name = "NAME", required_unless_present = "list")]
    pub(crate) name: Option<String>,
    /// Folder to write; it must not be there yet
    #[arg(long, value_name = "DIR", required_unless_present = "list")]
    pub(crate) out: Option<PathBuf>,
    /// Bits of a weight: 2, 3, 4, 5, 6 or 8 [default: 4]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) bits: Option<String>,
    /// Weights that share a scale: 32, 64 or 128 [default: 64]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) group_size: Option<String>,
    /// Seed of the values; the same one gives the same bytes [default: 0]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) seed: Option<String>,
    /// List the names instead
    #[arg(long, conflicts_with_all = ["name", "out", "bits", "group_size", "seed"])]
    pub(crate) list: bool,
}
