//! MLX's memory counters and limits, in bytes.

use crate::api::{api, check};
use crate::error::Result;

fn read(which: i32) -> Result<u64> {
    let api = api()?;
    let mut out = 0;
    // SAFETY: a valid out pointer.
    let status = unsafe { (api.memory)(which, &mut out) };
    check(api, status, "memory")?;
    Ok(out)
}

fn limit(which: i32, bytes: u64) -> Result<u64> {
    let api = api()?;
    let mut out = 0;
    // SAFETY: a valid out pointer.
    let status = unsafe { (api.memory_limit)(which, bytes, &mut out) };
    check(api, status, "memory limit")?;
    Ok(out)
}

/// Memory that arrays hold now.
pub fn active() -> Result<u64> {
    read(0)
}

/// The most that [`active`] has been since the start or the last [`reset_peak`].
pub fn peak() -> Result<u64> {
    read(1)
}

/// Memory kept for reuse.
pub fn cache() -> Result<u64> {
    read(2)
}

/// The guideline set by [`set_limit`].
pub fn get_limit() -> Result<u64> {
    read(3)
}

/// Sets [`peak`] to zero.
pub fn reset_peak() -> Result<()> {
    let api = api()?;
    // SAFETY: no arguments.
    let status = unsafe { (api.reset_peak_memory)() };
    check(api, status, "memory")
}

/// Gives kept memory back to the system.
pub fn clear_cache() -> Result<()> {
    let api = api()?;
    // SAFETY: no arguments.
    let status = unsafe { (api.clear_cache)() };
    check(api, status, "memory")
}

/// Sets the guideline for the most memory to use during evaluation; returns the one before.
pub fn set_limit(bytes: u64) -> Result<u64> {
    limit(0, bytes)
}

/// Sets the most memory to keep for reuse; returns the limit before.
pub fn set_cache_limit(bytes: u64) -> Result<u64> {
    limit(1, bytes)
}

/// Sets how much memory Metal keeps resident (no effect elsewhere); returns the limit before.
pub fn set_wired_limit(bytes: u64) -> Result<u64> {
    limit(2, bytes)
}
