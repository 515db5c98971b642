//! Memory that models take.

use zmlx_mlx::{Result, memory};

/// The most bytes that MLX's arrays, and the most that weights on the CPU's engine have taken since [`reset_peak`], added
/// up. Activations and caches of the engine are not counted: they are small beside weights.
///
/// # Errors
/// MLX's own.
pub fn peak() -> Result<u64> {
    Ok(memory::peak()? + zmlx_engine::memory::peak())
}

/// From now on [`peak`] counts from what is held now.
///
/// # Errors
/// MLX's own.
pub fn reset_peak() -> Result<()> {
    zmlx_engine::memory::reset_peak();
    memory::reset_peak()
}

/// The most physical memory that the process has held since [`reset_resident_peak`], in bytes; `None` where the system does
/// not say it in `/proc`.
pub fn resident_peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// From now on [`resident_peak`] counts from what is held now, where the system can do that.
pub fn reset_resident_peak() {
    // A system that refuses goes on counting from the start of the process, which is an upper bound.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engines_weights_count() {
        const BYTES: usize = 3 << 20;
        let before = peak().unwrap();
        let held = zmlx_engine::memory::Huge::new(BYTES).unwrap();
        assert!(peak().unwrap() >= before.min(BYTES as u64) && peak().unwrap() >= BYTES as u64);
        drop(held);
        assert!(peak().unwrap() >= BYTES as u64, "a peak stays");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_process_holds_something() {
        assert!(resident_peak().unwrap() > 1 << 20);
    }
}
