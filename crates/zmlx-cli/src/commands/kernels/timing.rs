//! Timing of calls on the current device.

use std::time::Instant;

use zmlx_kernels::{Array, Kernel};
use zmlx_mlx::{stream, transforms};

/// A sample lasts at least about this long, by as many calls as it needs.
const SAMPLE_SECONDS: f64 = 1e-3;
/// On a GPU, where the wait at the end counts too.
const GPU_SAMPLE_SECONDS: f64 = 5e-3;
const MAX_CALLS: f64 = 1000.0;

type Body<'a> = Box<dyn Fn() -> zmlx_kernels::Result<Vec<Array>> + 'a>;

/// A call that is timed again and again.
pub(super) struct Job<'a> {
    body: Body<'a>,
    calls: u32,
    gpu: bool,
    seconds: Vec<f64>,
}

impl<'a> Job<'a> {
    /// Runs the call twice (the first may compile) and decides how many calls a sample takes.
    pub(super) fn new(body: Body<'a>) -> zmlx_kernels::Result<Self> {
        let gpu = stream::current_device()? == stream::Device::Gpu;
        let mut job = Self { body, calls: 1, gpu, seconds: Vec::new() };
        job.once()?;
        let least = if gpu { GPU_SAMPLE_SECONDS } else { SAMPLE_SECONDS };
        let wanted = (least / job.once()?.max(1e-9)).ceil().clamp(1.0, MAX_CALLS);
        job.calls = wanted as u32;
        Ok(job)
    }

    /// Seconds a call, over one sample.
    fn once(&self) -> zmlx_kernels::Result<f64> {
        let start = Instant::now();
        for _ in 0..self.calls {
            let outputs = (self.body)()?;
            let outputs: Vec<&Array> = outputs.iter().collect();
            // A GPU works off a queue; the CPU's calls are waited for one by one, so that buffers are used again.
            if self.gpu { transforms::async_eval(&outputs)? } else { transforms::eval(&outputs)? }
        }
        stream::synchronize()?;
        Ok(start.elapsed().as_secs_f64() / f64::from(self.calls))
    }

    /// Takes a sample; the first of a series warms up and is not counted.
    pub(super) fn sample(&mut self, counted: bool) -> zmlx_kernels::Result<()> {
        let seconds = self.once()?;
        if counted {
            self.seconds.push(seconds);
        }
        Ok(())
    }

    /// The median sample, in seconds a call.
    pub(super) fn median(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

/// A copy that moves about `bytes`, half read and half written, and what it moves exactly.
pub(super) fn copy_job(bytes: u64) -> zmlx_kernels::Result<(Job<'static>, u64)> {
    let count = i32::try_from((bytes / 8).max(1)).unwrap_or(i32::MAX);
    let copy = Kernel::new("copy(x) = +x")?;
    let x =
        copy.call1(&[&zmlx_mlx::ops::full(&[count], &Array::scalar(1.5f32)?, zmlx_mlx::Dtype::Float32)?])?;
    x.eval()?;
    let job = Job::new(Box::new(move || copy.call(&[&x])))?;
    Ok((job, 8 * u64::from(count.unsigned_abs())))
}

/// Bytes a second that a copy of this much moves, as the median of a few.
pub(super) fn copy_bandwidth(bytes: u64) -> zmlx_kernels::Result<f64> {
    let (mut job, bytes) = copy_job(bytes)?;
    for round in 0..8 {
        job.sample(round > 0)?;
    }
    Ok(bytes as f64 / job.median())
}
