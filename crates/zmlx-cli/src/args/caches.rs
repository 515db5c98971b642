//! Arguments about what a model remembers of a sequence.

use std::path::PathBuf;

use clap::Args;

/// Caches: how they are held, and files of them.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Caches")]
pub(crate) struct CacheArgs {
    /// Hold keys and values in 4 or 8 bits, as mlx-lm does; their attention then runs on MLX
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub(crate) kv_bits: Option<String>,
    /// With --kv-bits: elements that share a scale, 32, 64 or 128 [default: 64]
    #[arg(long, value_name = "N", allow_hyphen_values = true, requires = "kv_bits")]
    pub(crate) kv_group_size: Option<String>,
    /// With --kv-bits: positions before that; the first step of a prompt is never quantised [default: 0]
    #[arg(long, value_name = "N", allow_hyphen_values = true, requires = "kv_bits")]
    pub(crate) kv_start: Option<String>,
    /// Go on from the caches in this file instead of processing again what the prompt shares with them
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_cache: Option<PathBuf>,
    /// Write the caches into this file at the end; with --prompt-cache of the same file, that need not be there yet
    #[arg(long, value_name = "FILE")]
    pub(crate) save_prompt_cache: Option<PathBuf>,
}
