//! What can be typed behind `kernels`.

use clap::{Args, Subcommand, ValueEnum};

use super::Device;

/// Arguments of `zmlx kernels`.
#[derive(Debug, Args)]
pub(crate) struct KernelsArgs {
    /// What to do with kernels [default: list the catalogue]
    #[command(subcommand)]
    pub(crate) command: Option<KernelsCommand>,
    /// List this family only, such as softmax
    #[arg(long, value_name = "FAMILY")]
    pub(crate) family: Option<String>,
    /// Print one JSON record on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// The commands of `zmlx kernels`.
#[derive(Debug, Subcommand)]
pub(crate) enum KernelsCommand {
    /// Show a kernel: text, gradient, generated source, costs
    Show(ShowArgs),
    /// Time kernels beside the same computation in plain MLX ops
    Bench(BenchArgs),
    /// Measure launch parameters of a kernel and store the best
    Tune(TuneArgs),
}

/// Shape and type of a kernel's inputs.
#[derive(Debug, Args)]
pub(crate) struct KernelInputArgs {
    /// Shape that the kernel runs over, such as 4096x4096 [default: 4096x4096, for gates 4096x128, for kernels that
    /// read at computed places their own]
    #[arg(long, value_name = "SHAPE", allow_hyphen_values = true)]
    pub(crate) shape: Option<String>,
    /// Type of the float inputs
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t = KernelDtype::F32)]
    pub(crate) dtype: KernelDtype,
}

/// Type of a kernel's float inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KernelDtype {
    F32,
    F16,
    Bf16,
}

/// A language of generated source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SourceLanguage {
    Metal,
    Cuda,
}

/// Arguments of `zmlx kernels show`.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// A name of the catalogue, or an expression such as 'x * sigmoid(x)'
    #[arg(value_name = "NAME|EXPRESSION", allow_hyphen_values = true)]
    pub(crate) kernel: String,
    /// Print the whole source for a GPU instead
    #[arg(long, value_name = "LANGUAGE", value_enum, conflicts_with = "explain")]
    pub(crate) source: Option<SourceLanguage>,
    /// Print passes, bytes, operations and the least time instead
    #[arg(long)]
    pub(crate) explain: bool,
    /// With --source or --explain: of the gradient's kernel
    #[arg(long)]
    pub(crate) grad: bool,
    /// With --explain: GB/s that the device moves [default: what a copy on this device moves]
    #[arg(long, value_name = "GB/S", allow_hyphen_values = true, requires = "explain")]
    pub(crate) bandwidth: Option<String>,
    /// Shape and type.
    #[command(flatten)]
    pub(crate) inputs: KernelInputArgs,
}

/// Arguments of `zmlx kernels bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Names of the catalogue [default: ten usual ones]
    #[arg(value_name = "NAME")]
    pub(crate) kernels: Vec<String>,
    /// Shape and type.
    #[command(flatten)]
    pub(crate) inputs: KernelInputArgs,
    /// Where to compute; auto takes a GPU when there is one
    #[arg(long, value_name = "DEVICE", value_enum, default_value_t = Device::Auto)]
    pub(crate) device: Device,
    /// Timings of each, 3 to 10000 [default: 11]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) samples: Option<String>,
    /// Print one JSON record on stdout
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `zmlx kernels tune`.
#[derive(Debug, Args)]
pub(crate) struct TuneArgs {
    /// A name of the catalogue, or an expression such as 'x * sigmoid(x)'
    #[arg(value_name = "NAME|EXPRESSION", allow_hyphen_values = true)]
    pub(crate) kernel: String,
    /// Shape and type.
    #[command(flatten)]
    pub(crate) inputs: KernelInputArgs,
    /// Where to compute; auto takes a GPU when there is one
    #[arg(long, value_name = "DEVICE", value_enum, default_value_t = Device::Auto)]
    pub(crate) device: Device,
}
