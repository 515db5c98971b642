//! What can be typed behind `convert` and `models`, and how matrices are quantised.

use std::path::PathBuf;

use clap::Args;

use super::{Device, Dtype};

/// How matrices that are not quantised are.
#[derive(Debug, Default, Args)]
pub(crate) struct QuantizeArgs {
    /// Quantise the matrices that are not, as mlx-lm's converter would: to 2, 3, 4, 5, 6 or 8 bits, or to mxfp4, mxfp8 or
    /// nvfp4
    #[arg(long, value_name = "BITS|MODE", allow_hyphen_values = true)]
    pub(crate) quantize: Option<String>,
    /// With --quantize BITS: weights that share a scale, 32, 64 or 128 [default: 64]
    #[arg(long, value_name = "N", allow_hyphen_values = true, requires = "quantize")]
    pub(crate) group_size: Option<String>,
}

/// Arguments of `zmlx convert`.
#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// Model folder, GGUF file, or a Hugging Face id such as org/name
    #[arg(value_name = "DIR|FILE|ID")]
    pub(crate) model: String,
    /// Folder to write; it must not be there yet
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Quantisation.
    #[command(flatten)]
    pub(crate) quantize: QuantizeArgs,
    /// With --quantize: affine, mxfp4, mxfp8 or nvfp4 [default: affine]
    #[arg(long, value_name = "MODE", requires = "quantize")]
    pub(crate) mode: Option<String>,
    /// Unpack quantised matrices to floats instead
    #[arg(long, conflicts_with = "quantize")]
    pub(crate) dequantize: bool,
    /// Type of the floats, scales included; auto is the configuration's torch_dtype, else that of the files
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t = Dtype::Auto)]
    pub(crate) dtype: Dtype,
    /// Where to compute; auto takes a GPU when there is one
    #[arg(long, value_name = "DEVICE", value_enum, default_value_t = Device::Auto)]
    pub(crate) device: Device,
}

/// Arguments of `zmlx models`.
#[derive(Debug, Args)]
pub(crate) struct ModelsArgs {
    /// Print the table of patterns by family instead: how often each one's op runs for a token
    #[arg(long)]
    pub(crate) patterns: bool,
    /// With --patterns: print the whole page docs/models.md
    #[arg(long, requires = "patterns", conflicts_with = "json")]
    pub(crate) markdown: bool,
    /// Print one JSON record on stdout
    #[arg(long)]
    pub(crate) json: bool,
}
