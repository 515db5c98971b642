//! `zmlx plan --device gpu`: a token on an NVIDIA GPU, counted without one.

use std::fmt::Write;

use serde::Serialize;
use zmlx_graph::{Cost, cuda};
use zmlx_models::{Blueprint, CudaBlueprint, CudaLaunches};

use crate::output::{self, bytes, count, grouped};

/// The GPU that is counted for.
#[derive(Serialize)]
pub(super) struct Gpu {
    name: String,
    /// Whether it is this machine's; if not, it is an example.
    found: bool,
    bytes_per_second: f64,
}

impl Gpu {
    /// This machine's.
    pub(super) fn found() -> Option<Self> {
        let device = cuda::device().ok()?;
        Some(Self { name: device.name, found: true, bytes_per_second: device.bandwidth as f64 })
    }

    /// One that most are compared with.
    pub(super) fn assumed() -> Self {
        Self { name: "NVIDIA H100 80GB HBM3".to_owned(), found: false, bytes_per_second: 3.35e12 }
    }
}

/// The JSON record.
#[derive(Serialize)]
pub(super) struct Plan<'a> {
    family: &'a str,
    parameters_total: u64,
    parameters_active: u64,
    position: u32,
    gpu: Gpu,
    /// Whether decode runs past MLX.
    past_mlx: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<&'a str>,
    launches_stock: u64,
    launches: u64,
    weight_bytes: u64,
    state_read: u64,
    state_written: u64,
    seconds_per_token: f64,
    tokens_per_second: f64,
    kernels: &'a [CudaLaunches],
}

impl<'a> Plan<'a> {
    /// `given`: bytes a second, in place of the GPU's.
    pub(super) fn new(
        blueprint: &'a Blueprint,
        gpu: Gpu,
        given: Option<f64>,
        position: u32,
        cost: &Cost,
        counted: &'a CudaBlueprint,
    ) -> Self {
        let gpu = Gpu { bytes_per_second: given.unwrap_or(gpu.bytes_per_second), ..gpu };
        let seconds = cost.roofline_seconds(gpu.bytes_per_second);
        let total = &cost.total;
        Self {
            family: &blueprint.info.family,
            parameters_total: blueprint.info.parameters_total,
            parameters_active: blueprint.info.parameters_active,
            position,
            gpu,
            past_mlx: counted.launches.is_ok(),
            refused: counted.launches.as_ref().err().map(String::as_str),
            launches_stock: total.launches,
            launches: counted.count().unwrap_or(total.launches),
            weight_bytes: total.weight_bytes,
            state_read: total.state_read,
            state_written: total.state_written,
            seconds_per_token: seconds,
            tokens_per_second: 1.0 / seconds,
            kernels: counted.launches.as_deref().unwrap_or_default(),
        }
    }

    pub(super) fn describe(&self, model: &str) -> String {
        let active = count(self.parameters_active);
        let gpu = if self.gpu.found { "" } else { ", as an example: this machine has none" };
        let (read, written) = (bytes(self.state_read), bytes(self.state_written));
        let mut rows = vec![
            ("model", format!("{model}, {}", self.family)),
            ("parameters", format!("{}, {active} of them a token", count(self.parameters_total))),
            ("token", format!("one, after {} others", grouped(self.position.into()))),
            ("GPU", format!("{}{gpu}", self.gpu.name)),
            ("bandwidth", format!("{:.1} GB/s", self.gpu.bytes_per_second / 1e9)),
            ("stock", format!("{} launches of MLX", grouped(self.launches_stock))),
            (
                "bytes",
                format!("{} of weights, state {read} read, {written} written", bytes(self.weight_bytes)),
            ),
            ("least time", format!("{:.3} ms", self.seconds_per_token * 1e3)),
            ("at most", format!("{:.1} tok/s", self.tokens_per_second)),
        ];
        let patched = match self.refused {
            Some(why) => format!("MLX runs the stock graph: {why}"),
            None => format!("{} launches past MLX, as one graph", grouped(self.launches)),
        };
        rows.insert(6, ("patched", patched));
        let mut text = String::new();
        for (name, value) in rows {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<12} {}", output::one_line(&value));
        }
        let wide = self.kernels.iter().map(|k| k.name.len()).max().unwrap_or(0);
        if wide > 0 {
            let _ = writeln!(text, "\n{:<wide$}  launches        bytes", "kernel");
        }
        for kernel in self.kernels {
            let (name, launches, read) = (kernel.name, kernel.launches, bytes(kernel.bytes));
            let _ = writeln!(text, "{name:<wide$}  {launches:>8}  {read:>11}");
        }
        text
    }
}
