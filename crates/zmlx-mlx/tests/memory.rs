//! Memory counters. They are the process's, so this file holds one test: others would move them.

use zmlx_mlx::{Dtype, Result, memory, ops};

#[test]
fn memory_counters_move() -> Result<()> {
    let before = memory::active()?;
    let a = ops::ones(&[1 << 20], Dtype::Float32)?.contiguous()?.add_scalar(1.0)?;
    a.eval()?;
    assert!(memory::active()? >= before + (1 << 22));
    assert!(memory::peak()? >= 1 << 22);
    let old = memory::set_cache_limit(1 << 30)?;
    memory::set_cache_limit(old)?;
    Ok(())
}
