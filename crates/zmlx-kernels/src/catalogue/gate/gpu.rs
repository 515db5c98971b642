//! The kernels' text for GPUs and how it is launched.

use zmlx_lang::emit::Dialect;

use crate::raw::{GpuLaunch, RawBuilder, Spec, TemplateArg};
use crate::{Error, Result};

use super::EPS;

const BODY: &str = include_str!("body.h");
const COMMON: &str = include_str!("common.h");
/// Threads of a warp, which does one row.
const WARP: i32 = 32;
/// Threads a group.
const THREADS: i32 = 128;
/// Most elements of a row that a lane keeps in registers.
const REGISTERS: i32 = 32;

/// What the one text is compiled to.
#[derive(Clone, Copy)]
pub(super) struct Variant {
    /// Weights instead of values.
    pub weights: bool,
    /// A bias as second input.
    pub bias: bool,
}

/// Gives a kernel both GPU bodies.
pub(super) fn bodies(builder: RawBuilder, variant: Variant) -> RawBuilder {
    let (metal, cuda) = (text(Dialect::Metal, variant), text(Dialect::Cuda, variant));
    builder.metal(&metal.0, &metal.1).cuda(&cuda.0, &cuda.1)
}

/// Header and body.
fn text(dialect: Dialect, Variant { weights, bias }: Variant) -> (String, String) {
    // MLX looks for these names in the body, not in the header.
    let (common, thread) = match dialect {
        Dialect::Metal => (include_str!("common.metal"), "thread_position_in_grid.x"),
        Dialect::Cuda => (include_str!("common.cu"), "blockIdx.x * blockDim.x + threadIdx.x"),
    };
    let (weights, bias) = (u8::from(weights), u8::from(bias));
    let defines =
        format!("#define GATE_WEIGHTS {weights}\n#define GATE_BIAS {bias}\n#define GATE_EPS {EPS:e}f\n");
    (format!("{defines}{common}{COMMON}"), format!("unsigned thread_id = {thread};\n{BODY}"))
}

/// A warp for each row; `k`, the elements a lane keeps and, for weights, `norm` decide the code.
///
/// # Errors
/// [`Error::Launch`] when there are more rows than a grid has warps.
pub(super) fn launch(kernel: &str, x: &Spec, k: usize, norm: Option<bool>) -> Result<GpuLaunch> {
    let (cols, outer) = x.shape.split_last().map_or((0, &[][..]), |(cols, outer)| (*cols, outer));
    let rows: i64 = outer.iter().map(|d| i64::from(*d)).product();
    let threads = i32::try_from(rows * i64::from(WARP)).map_err(|_| Error::Launch {
        kernel: kernel.to_owned(),
        what: "rows of one call",
        requested: rows.to_string(),
        allowed: (i32::MAX / WARP).to_string(),
    })?;
    let per_lane = (cols.max(1) as u32).div_ceil(WARP as u32).next_power_of_two() as i32;
    let kept = if per_lane <= REGISTERS { per_lane } else { 0 };
    let mut template =
        vec![("K".to_owned(), TemplateArg::Int(k as i32)), ("N".to_owned(), TemplateArg::Int(kept))];
    template.extend(norm.map(|norm| ("NORM".to_owned(), TemplateArg::Bool(norm))));
    Ok(GpuLaunch { grid: [threads.max(1), 1, 1], threadgroup: [THREADS, 1, 1], template, init_value: None })
}
