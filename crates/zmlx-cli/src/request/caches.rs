//! What is meant with files of caches.

use std::path::PathBuf;

use zmlx_models::KvQuantization;

use super::number;
use crate::args::CacheArgs;
use crate::failure::Failure;

/// Files of caches.
#[derive(Debug, Default)]
pub(crate) struct CacheRequest {
    /// What to go on from.
    pub(crate) load: Option<PathBuf>,
    /// Where to write them.
    pub(crate) save: Option<PathBuf>,
}

impl CacheRequest {
    /// Whether the file to go on from is one that this run will write, and need not be there yet.
    pub(crate) fn first_time(&self) -> bool {
        self.load.is_some() && self.load == self.save && self.load.as_ref().is_some_and(|p| !p.exists())
    }
}

impl From<&CacheArgs> for CacheRequest {
    fn from(args: &CacheArgs) -> Self {
        Self { load: args.prompt_cache.clone(), save: args.save_prompt_cache.clone() }
    }
}

/// How keys and values are to be held.
pub(super) fn kv_quantization(args: &CacheArgs) -> Result<Option<KvQuantization>, Failure> {
    let bits = number("--kv-bits", args.kv_bits.as_deref(), "4 or 8", |b: i32| b == 4 || b == 8)?;
    let group = number("--kv-group-size", args.kv_group_size.as_deref(), "32, 64 or 128", |g: i32| {
        [32, 64, 128].contains(&g)
    })?;
    let start =
        number("--kv-start", args.kv_start.as_deref(), "a whole number from 0 to 2147483647", |s: i32| {
            s >= 0
        })?;
    Ok(bits.map(|bits| KvQuantization { bits, group_size: group.unwrap_or(64), start: start.unwrap_or(0) }))
}
