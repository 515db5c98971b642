//! Kernels of prompts among MLX's: products of sorted rows with quantised experts, and what comes after them.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use zmlx_cuda::kernels::{self, CombineRows, Float, Format, Grouped, KernelError, SortRows, Tile};
use zmlx_mlx::kernel::{Kernel, Launch, Source, Spec, cuda_kernel};
use zmlx_mlx::runtime::{Backend, backend_available};
use zmlx_mlx::stream::{Device, current_device};
use zmlx_mlx::{Array, Dtype, Error, Result};

use crate::weights::BoundWeight;

/// Kernels by what they are made for: MLX compiles one at its first launch, which takes seconds.
static KERNELS: LazyLock<Mutex<HashMap<Made, Arc<Kernel>>>> = LazyLock::new(Mutex::default);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Made {
    Grouped(Grouped),
    CombineRows(CombineRows),
    SortRows(SortRows),
}

impl Made {
    fn source(&self) -> std::result::Result<kernels::Source, KernelError> {
        match self {
            Self::Grouped(kernel) => kernel.source(),
            Self::CombineRows(kernel) => kernel.source(),
            Self::SortRows(kernel) => kernel.source(),
        }
    }

    fn shared(&self) -> std::result::Result<usize, KernelError> {
        match self {
            Self::Grouped(kernel) => kernel.shared(),
            Self::CombineRows(_) | Self::SortRows(_) => Ok(0),
        }
    }

    /// The input whose first dimension is the number of rows, where the text asks for that.
    fn counted(&self) -> Option<&'static str> {
        match self {
            Self::Grouped(_) => Some("experts"),
            Self::CombineRows(_) => None,
            Self::SortRows(_) => Some("chosen"),
        }
    }

    /// Launches it in so many blocks.
    fn launch(
        self,
        blocks: usize,
        threads: usize,
        inputs: &[&Array],
        outputs: &[Spec],
    ) -> Result<Vec<Array>> {
        let launch = Launch {
            outputs,
            grid: [(blocks * threads) as i32, 1, 1],
            threadgroup: [threads as i32, 1, 1],
            template: &[],
            init_value: None,
            verbose: false,
        };
        compiled(self)?.call(inputs, &launch)
    }
}

/// Whether the current stream is one of an NVIDIA GPU.
fn on_cuda() -> Result<bool> {
    Ok(backend_available(Backend::Cuda)? && current_device()? == Device::Gpu)
}

/// The 16-bit float of a dtype.
fn narrow(dtype: Dtype) -> Option<Float> {
    match dtype {
        Dtype::Bfloat16 => Some(Float::Bf16),
        Dtype::Float16 => Some(Float::F16),
        _ => None,
    }
}

/// `x[r] @ w[experts[r]].T` for rows `[rows, 1, columns]` in the order of their experts (`[rows]`), as `[rows, 1, outputs]`,
/// cut as `tile` says or, without it, as suits so many rows.
///
/// `None` where the kernel is not made for it: off NVIDIA GPUs, other formats than affine codes of 4 or 8 bits, floats
/// other than the scales' 16 bits, shapes that fill no step.
///
/// # Errors
/// Those of MLX.
pub fn grouped_linear(
    weight: &BoundWeight,
    x: &Array,
    experts: &Array,
    tile: Option<Tile>,
) -> Result<Option<Array>> {
    let BoundWeight::Quantized { packed, scales, biases: Some(biases), quantization: q } = weight else {
        return Ok(None);
    };
    let (&[matrices, outputs, _], &[rows, 1, columns]) = (packed.shape(), x.shape()) else { return Ok(None) };
    let Some(float) = narrow(scales.dtype()) else { return Ok(None) };
    let floats = [x, biases].iter().all(|a| a.dtype() == scales.dtype());
    if q.mode != "affine"
        || !floats
        || experts.dtype() != Dtype::Uint32
        || experts.shape() != [rows]
        || rows < 1
    {
        return Ok(None);
    }
    let (bits, group) = (q.bits.unsigned_abs(), q.group_size.unsigned_abs() as usize);
    let sizes = [matrices, outputs, columns, rows].map(|n| n.unsigned_abs() as usize);
    let [experts_of, outputs_of, columns_of, rows_of] = sizes;
    let kernel = Grouped {
        experts: experts_of,
        outputs: outputs_of,
        columns: columns_of,
        format: Format::Affine { bits, group, scales: float },
        tile: tile.unwrap_or_else(|| Tile::new(rows_of / experts_of.max(1))),
    };
    let (true, Ok(blocks)) = (on_cuda()?, kernel.blocks(rows_of)) else { return Ok(None) };
    let out = Spec::new(&[rows, 1, outputs], scales.dtype());
    let inputs = [x, experts, packed, scales, biases];
    Ok(Made::Grouped(kernel).launch(blocks, kernel.tile.threads(), &inputs, &[out])?.pop())
}

/// `sum over c of scores[.., c] * rows[order[.., c]]` as `out` says, for sorted rows `[tokens * choices, 1, columns]`, the order
/// that undoes the sorting (as many) and scores `[batch, length, choices]`.
///
/// `None` where the kernel is not made for it: off NVIDIA GPUs, rows that are not sorted or have no floats of 16 bits.
///
/// # Errors
/// Those of MLX.
pub(crate) fn combine_rows(rows: &Array, order: &Array, scores: &Array, out: Spec) -> Result<Option<Array>> {
    let (&[all, 1, columns], &[batch, length, choices]) = (rows.shape(), scores.shape()) else {
        return Ok(None);
    };
    let Some(float) = narrow(rows.dtype()) else { return Ok(None) };
    // Float32, or as the rows.
    let wide = |dtype: Dtype| {
        if dtype == rows.dtype() { Some(false) } else { (dtype == Dtype::Float32).then_some(true) }
    };
    let (Some(wide_scores), Some(wide_out)) = (wide(scores.dtype()), wide(out.dtype)) else {
        return Ok(None);
    };
    let fits = order.shape() == [all]
        && order.dtype() == Dtype::Uint32
        && out.shape == [batch, length, columns]
        && i64::from(batch) * i64::from(length) * i64::from(choices) == i64::from(all);
    let [columns, choices] = [columns, choices].map(|n| n.unsigned_abs() as usize);
    let kernel = CombineRows { choices, columns, rows: float, wide_scores, wide_out };
    if !fits || kernel.source().is_err() || !on_cuda()? {
        return Ok(None);
    }
    let tokens = batch.unsigned_abs() as usize * length.unsigned_abs() as usize;
    Ok(Made::CombineRows(kernel).launch(tokens, kernel.threads(), &[rows, order, scores], &[out])?.pop())
}

/// Choices `[batch, length, choices]` of so many experts in the order of experts: of each row the token and the expert, and
/// the row that each choice became; `[rows]` each.
///
/// `None` off NVIDIA GPUs.
///
/// # Errors
/// Those of MLX.
pub(crate) fn sort_rows(chosen: &Array, experts: i32) -> Result<Option<[Array; 3]>> {
    let &[_, _, choices] = chosen.shape() else { return Ok(None) };
    let [experts, choices] = [experts, choices].map(|n| n.unsigned_abs() as usize);
    let kernel = SortRows { experts, choices };
    let countable = chosen.dtype() == Dtype::Uint32 && (1..1 << 30).contains(&chosen.size());
    if !countable || kernel.source().is_err() || !on_cuda()? {
        return Ok(None);
    }
    let spec = Spec::new(&[chosen.size() as i32], Dtype::Uint32);
    let outputs = [spec.clone(), spec.clone(), spec];
    let made =
        Made::SortRows(kernel).launch(experts, kernel.threads(), &[&chosen.flatten(0, -1)?], &outputs)?;
    Ok(made.try_into().ok())
}

/// The kernel as MLX takes it.
fn compiled(kernel: Made) -> Result<Arc<Kernel>> {
    let mut kernels = KERNELS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(made) = kernels.get(&kernel) {
        return Ok(Arc::clone(made));
    }
    let refused = |e: KernelError| Error::Argument(e.to_string());
    let (source, shared) = (kernel.source().map_err(refused)?, kernel.shared().map_err(refused)?);
    let inputs: Vec<&str> =
        source.params.iter().filter(|p| !p.written && !p.by_value).map(|p| p.name).collect();
    // What is passed by value elsewhere MLX gives with the shape.
    let rows = kernel.counted().map_or(String::new(), |name| format!("const int rows = {name}_shape[0];\n"));
    let body = format!("{rows}{}", source.body);
    let outputs: Vec<&str> = source.params.iter().filter(|p| p.written).map(|p| p.name).collect();
    let made = Arc::new(cuda_kernel(&Source {
        name: source.name,
        inputs: &inputs,
        outputs: &outputs,
        body: &body,
        header: &source.device,
        atomic_outputs: false,
        shared_memory: shared as i32,
    })?);
    kernels.insert(kernel, Arc::clone(&made));
    Ok(made)
}
