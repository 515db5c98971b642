//! Host overhead: the same chain of small ops from C++ and from Rust, for `benches/host_overhead.rs`.

use std::time::{Duration, Instant};

use crate::api::{api, check};
use crate::error::Result;
use crate::{Stream, async_eval, eval, ops, stream};

/// `repeats` times `length` dependent adds of 16 floats, built and evaluated in C++ alone. When `pipelined`, a batch
/// is submitted before the one before it is done.
pub fn chain_in_cpp(s: Stream, length: u64, repeats: u64, pipelined: bool) -> Result<Duration> {
    let api = api()?;
    let mut nanoseconds = 0;
    // SAFETY: a valid out pointer.
    let status = unsafe { (api.bench_chain)(s.index(), length, repeats, pipelined, &mut nanoseconds) };
    check(api, status, "bench")?;
    Ok(Duration::from_nanos(nanoseconds))
}

/// The same from Rust.
pub fn chain_in_rust(s: Stream, length: u64, repeats: u64, pipelined: bool) -> Result<Duration> {
    stream::with_stream(s, || {
        let mut z = ops::zeros(&[16], crate::Dtype::Float32)?;
        let one = ops::ones(&[16], crate::Dtype::Float32)?;
        eval(&[&z, &one])?;
        let start = Instant::now();
        for _ in 0..repeats {
            for _ in 0..length {
                z = ops::add(&z, &one)?;
            }
            if pipelined {
                async_eval(&[&z])?;
            } else {
                eval(&[&z])?;
            }
        }
        s.synchronize()?;
        Ok(start.elapsed())
    })
}
