//! What can be typed. Numbers stay text here: [`crate::request`] gives them their meaning and
//! says the allowed range when they have none.

mod caches;
mod convert;
mod kernels;
mod lab;
mod measure;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use caches::CacheArgs;
pub(crate) use convert::{ConvertArgs, ModelsArgs, QuantizeArgs};
pub(crate) use kernels::{
    BenchArgs, KernelDtype, KernelInputArgs, KernelsArgs, KernelsCommand, ShowArgs, SourceLanguage, TuneArgs,
};
pub(crate) use lab::{LabArgs, LabCommand, RandomModelArgs, SmartPatchArgs};
pub(crate) use measure::{
    CapsuleCommand, CompareArgs, LabModelArgs, LabRunArgs, ModelBenchArgs, ReferenceArg, ReportArgs,
    ValidateArgs,
};

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed while running (doctor: no backend is usable)
  2    bad usage
  3    the model could not be found or loaded
  4    validate: the fidelity gate failed
  5    validate, bench: a speed was above the roofline, so it is withheld
  130  interrupted by ctrl-C

Results go to stdout; errors, statistics and progress go to stderr.";

/// Generate text with MLX models from the command line
#[derive(Debug, Parser)]
#[command(name = "zmlx", version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Print the causes of an error, one a line
    #[arg(short, long, global = true, display_order = 900)]
    pub(crate) verbose: bool,
    /// Print no progress and no remarks
    #[arg(short, long, global = true, display_order = 901)]
    pub(crate) quiet: bool,
    /// The command to run
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Continue a prompt and stream the text to stdout
    Generate(GenerateArgs),
    /// Talk with a model in the terminal
    Chat(ChatArgs),
    /// Write a model as a folder in MLX's format, quantised or not, which mlx-lm loads too
    Convert(ConvertArgs),
    /// List the families of models: their patterns, and what was verified where
    Models(ModelsArgs),
    /// Say what a model folder holds, without loading its weights
    Info(InfoArgs),
    /// Print a model's graph with the shapes of all values, or draw it
    Graph(GraphArgs),
    /// Count what a token costs: bytes, kernel launches, operations, the least time
    Plan(PlanArgs),
    /// Time decode steps node by node, on a GPU past MLX launch by launch too
    ///
    /// Times, bytes and rates by op and by module, each node waited for. Where a step runs on a GPU past MLX, first its
    /// launches as they overlap: how many, the bytes of each, microseconds from the end of the launch before to its own end,
    /// and the parts of that: wait (its first block waits for the launch before), all (its last does), place (activations are
    /// placed), sums (sums are done), end (the last block has ended); GB/s and the share of the step. With that the time of a
    /// token in undisturbed decode, and the part of it that memory needs for weights and state. --json has the same, times in
    /// seconds.
    Profile(ProfileArgs),
    /// Stream a short story from the embedded model
    Demo(DemoArgs),
    /// Say which MLX library and which backends can be used
    Doctor(DoctorArgs),
    /// Hold a patched model against stock: tokens, logits, speed; the exit code is the verdict
    Validate(ValidateArgs),
    /// Measure prefill and decode speed beside the read bandwidth; compare and report measurements
    Bench(ModelBenchArgs),
    /// List, show, time and tune the kernels of the catalogue
    Kernels(KernelsArgs),
    /// Tools for measuring: models with random weights
    Lab(LabArgs),
    /// Print a shell completion script
    Completions(CompletionsArgs),
    /// Print the man page, or write the pages of all commands into a folder
    Man(ManArgs),
}

/// Which model, and how it is loaded.
#[derive(Debug, Default, Args)]
pub(crate) struct ModelArgs {
    /// Model folder, GGUF file, or a Hugging Face id such as org/name [default: the embedded model]
    #[arg(short, long, value_name = "DIR|FILE|ID")]
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
    /// Patching.
    #[command(flatten)]
    pub(crate) patch: PatchArgs,
}

/// Which fused ops run.
#[derive(Debug, Default, Args)]
pub(crate) struct PatchArgs {
    /// Fused ops: default (the same greedy tokens), fast (bounded errors too), none (stock MLX); generate and chat also
    /// take smart (what lab smart-patch found)
    #[arg(long, value_name = "PRESET")]
    pub(crate) preset: Option<String>,
    /// Only these patterns, between commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',', conflicts_with = "preset")]
    pub(crate) patterns: Option<Vec<String>>,
    /// Not these patterns, between commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub(crate) exclude: Vec<String>,
    /// Threads of the CPU's fused ops [default: as many as the process may use]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<String>,
}

/// Type of the activations.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dtype {
    #[default]
    Auto,
    #[value(alias = "float32")]
    F32,
    #[value(alias = "bfloat16")]
    Bf16,
    #[value(alias = "float16")]
    F16,
}

/// Where to compute.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Device {
    #[default]
    Auto,
    Cpu,
    Gpu,
}

/// How tokens are chosen and when to stop.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Most tokens to write, 1 or more [default: generate and demo 256, chat 512]
    #[arg(short = 'n', long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) max_tokens: Option<String>,
    /// Temperature, 0 or more; 0 is greedy [default: 0]
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    pub(crate) temp: Option<String>,
    /// Keep the likeliest tokens up to this total probability, above 0 up to 1; 1 is off [default: 1]
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    pub(crate) top_p: Option<String>,
    /// Keep the N likeliest tokens; 0 is off [default: 0]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) top_k: Option<String>,
    /// Drop tokens below this fraction of the likeliest one's probability, 0 to 1; 0 is off [default: 0]
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    pub(crate) min_p: Option<String>,
    /// Make tokens seen in the last 20 less likely, above 0; 1 is off [default: 1]
    #[arg(long, value_name = "F", allow_hyphen_values = true)]
    pub(crate) repetition_penalty: Option<String>,
    /// Add F to the logit of token ID; may be given more than once
    #[arg(long, value_name = "ID=F", allow_hyphen_values = true)]
    pub(crate) logit_bias: Vec<String>,
    /// Seed of the sampler, for the same text each time [default: a new one each time]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) seed: Option<String>,
    /// Stop before this text; may be given more than once
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// Most prompt tokens in one step, 1 or more [default: 2048]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) prefill_chunk: Option<String>,
}

/// Arguments of `zmlx generate`.
#[derive(Debug, Default, Args)]
pub(crate) struct GenerateArgs {
    /// Model and loading.
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// The prompt; `-`, or nothing when stdin is not a terminal, reads it from stdin (one line end at its end is dropped)
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: Option<String>,
    /// The prompt as token ids, such as 1,17,5; needs no tokenizer
    #[arg(long, value_name = "IDS", allow_hyphen_values = true, conflicts_with_all = ["prompt", "system", "raw"])]
    pub(crate) prompt_ids: Option<String>,
    /// System message, for models with a chat template
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, conflicts_with = "raw")]
    pub(crate) system: Option<String>,
    /// Give the prompt to the model as it is, without the chat template
    #[arg(long)]
    pub(crate) raw: bool,
    /// Go on past end-of-sequence tokens
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Print speeds, memory, type, device and finish reason on stderr
    #[arg(long)]
    pub(crate) stats: bool,
    /// Print one JSON record on stdout and nothing else
    #[arg(long)]
    pub(crate) json: bool,
    /// Caches.
    #[command(flatten)]
    pub(crate) caches: CacheArgs,
    /// Sampling.
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

/// Arguments of `zmlx chat`.
#[derive(Debug, Default, Args)]
pub(crate) struct ChatArgs {
    /// Model and loading.
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// System message
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) system: Option<String>,
    /// Print speeds, memory, type, device and finish reason on stderr after each reply
    #[arg(long)]
    pub(crate) stats: bool,
    /// Caches.
    #[command(flatten)]
    pub(crate) caches: CacheArgs,
    /// Sampling.
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
}

/// Arguments of `zmlx info`.
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// Model folder (one with only a config.json will do), GGUF file, or a Hugging Face id such as org/name [default:
    /// the embedded model]
    #[arg(value_name = "DIR|FILE|ID")]
    pub(crate) model: Option<String>,
    /// Print one JSON record on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `zmlx graph`.
#[derive(Debug, Args)]
pub(crate) struct GraphArgs {
    /// Model folder (one with only a config.json will do), GGUF file, or a Hugging Face id such as org/name [default:
    /// the embedded model]
    #[arg(value_name = "DIR|ID")]
    pub(crate) model: Option<String>,
    /// Write the graph into this file in Graphviz's language, instead of printing it
    #[arg(long, value_name = "FILE")]
    pub(crate) dot: Option<PathBuf>,
    /// Draw the graph into this file, instead of printing it; equal layers are drawn once
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    /// With --svg: draw every layer
    #[arg(long, requires = "svg")]
    pub(crate) all_layers: bool,
    /// The graph as the CPU runs it patched; --preset, --patterns and --exclude mean it too
    #[arg(long)]
    pub(crate) patched: bool,
    /// Patching.
    #[command(flatten)]
    pub(crate) patch: PatchArgs,
    /// Print one JSON record on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `zmlx plan`.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// Model folder (one with only a config.json will do), GGUF file, or a Hugging Face id such as org/name [default:
    /// the embedded model]
    #[arg(value_name = "DIR|ID")]
    pub(crate) model: Option<String>,
    /// Positions that come before the token, 0 to 2147483646 [default: 0]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) context: Option<String>,
    /// GB/s that memory moves [default: what all threads of this machine read, measured; of a GPU what its clock and bus
    /// allow]
    #[arg(long, value_name = "GB/S", allow_hyphen_values = true)]
    pub(crate) bandwidth: Option<String>,
    /// For what to count; gpu is this machine's NVIDIA GPU, or an H100 where there is none, auto the former if there is one
    #[arg(long, value_name = "DEVICE", value_enum, default_value_t = Device::Cpu)]
    pub(crate) device: Device,
    /// List modules too, all layers together
    #[arg(long)]
    pub(crate) modules: bool,
    /// List the ops of the patched graph only; the totals are always of both
    #[arg(long)]
    pub(crate) patched: bool,
    /// Patching.
    #[command(flatten)]
    pub(crate) patch: PatchArgs,
    /// Print one JSON record on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `zmlx profile`.
#[derive(Debug, Args)]
pub(crate) struct ProfileArgs {
    /// Model folder, GGUF file, or a Hugging Face id such as org/name [default: the embedded model]
    #[arg(value_name = "DIR|ID")]
    pub(crate) model: Option<String>,
    /// Type of the activations; auto is f32 on a CPU and the checkpoint's own on a GPU
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t = Dtype::Auto)]
    pub(crate) dtype: Dtype,
    /// Where to compute; auto takes a GPU when there is one
    #[arg(long, value_name = "DEVICE", value_enum, default_value_t = Device::Auto)]
    pub(crate) device: Device,
    /// Steps of one token that are timed, 1 or more; the medians count [default: 16]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) steps: Option<String>,
    /// Made-up tokens that come before, 1 or more [default: 128]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) prompt_tokens: Option<String>,
    /// GB/s that memory moves [default: what the driver states of a GPU that decodes past MLX, else what all threads of this
    /// machine read, measured]
    #[arg(long, value_name = "GB/S", allow_hyphen_values = true)]
    pub(crate) bandwidth: Option<String>,
    /// Write a picture of the times into this file
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    /// Write a page with picture and tables into this file
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// Quantisation.
    #[command(flatten)]
    pub(crate) quantize: QuantizeArgs,
    /// Patching; --preset none times stock MLX.
    #[command(flatten)]
    pub(crate) patch: PatchArgs,
    /// Print one JSON record on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `zmlx demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Most tokens to write, 1 or more [default: 256]
    #[arg(short = 'n', long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) max_tokens: Option<String>,
    /// Picks the story's subject and the sampler's seed (temperature 0.6, min-p 0.1, repetition penalty 1.15) [default: 12, so the same story each time]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) seed: Option<String>,
    /// Print the full statistics line instead of the short one
    #[arg(long)]
    pub(crate) stats: bool,
}

/// Arguments of `zmlx doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// First download this variant of the MLX library into the cache: cpu, cuda12, cuda13 or metal [default: the
    /// platform's ordinary one]
    #[arg(long, value_name = "VARIANT", num_args = 0..=1, default_missing_value = "")]
    pub(crate) fetch: Option<String>,
    /// Print one JSON record on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `zmlx completions`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub(crate) shell: clap_complete::Shell,
}

/// Arguments of `zmlx man`.
#[derive(Debug, Args)]
pub(crate) struct ManArgs {
    /// Write one page a command into this folder instead of printing zmlx(1)
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn combinations_that_exclude_each_other() {
        let cases: [(&[&str], bool); 6] = [
            (&["--prompt", "a"], true),
            (&["--prompt-ids", "1", "--prompt", "a"], false),
            (&["--prompt-ids", "1", "--system", "a"], false),
            (&["--raw", "--system", "a"], false),
            (&["--prompt", "- a list", "--temp", "-1"], true),
            (&["--prompt", "-"], true),
        ];
        for (typed, fine) in cases {
            let line = ["zmlx", "generate"].iter().chain(typed);
            assert_eq!(Cli::try_parse_from(line).is_ok(), fine, "{typed:?}");
        }
    }
}
