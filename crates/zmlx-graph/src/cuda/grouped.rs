//! Products of sorted rows with quantised experts as a kernel of its own among MLX's.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use zmlx_cuda::kernels::{Float, Format, Grouped, Tile};
use zmlx_mlx::kernel::{Kernel, Launch, Source, Spec, cuda_kernel};
use zmlx_mlx::runtime::{Backend, backend_available};
use zmlx_mlx::stream::{Device, current_device};
use zmlx_mlx::{Array, Dtype, Error, Result};

use crate::weights::BoundWeight;

/// Kernels by what they are made for: MLX compiles one at its first launch, which takes seconds.
static KERNELS: LazyLock<Mutex<HashMap<Grouped, Arc<Kernel>>>> = LazyLock::new(Mutex::default);

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
    let float = match scales.dtype() {
        Dtype::Bfloat16 => Float::Bf16,
        Dtype::Float16 => Float::F16,
        _ => return Ok(None),
    };
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
    let (Ok(shared), Ok(blocks)) = (kernel.shared(), kernel.blocks(rows_of)) else { return Ok(None) };
    if !backend_available(Backend::Cuda)? || current_device()? != Device::Gpu {
        return Ok(None);
    }
    let made = compiled(kernel, shared)?;
    let threads = kernel.tile.threads() as i32;
    let out = Spec::new(&[rows, 1, outputs], scales.dtype());
    let launch = Launch {
        outputs: &[out],
        grid: [blocks as i32 * threads, 1, 1],
        threadgroup: [threads, 1, 1],
        template: &[],
        init_value: None,
        verbose: false,
    };
    Ok(made.call(&[x, experts, packed, scales, biases], &launch)?.pop())
}

/// The kernel as MLX takes it.
fn compiled(kernel: Grouped, shared: usize) -> Result<Arc<Kernel>> {
    let mut kernels = KERNELS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(made) = kernels.get(&kernel) {
        return Ok(Arc::clone(made));
    }
    let source = kernel.source().map_err(|e| Error::Argument(e.to_string()))?;
    let inputs: Vec<&str> =
        source.params.iter().filter(|p| !p.written && !p.by_value).map(|p| p.name).collect();
    // What is passed by value elsewhere MLX gives with the shape.
    let body = format!("const int rows = experts_shape[0];\n{}", source.body);
    let made = Arc::new(cuda_kernel(&Source {
        name: source.name,
        inputs: &inputs,
        outputs: &["out"],
        body: &body,
        header: &source.device,
        atomic_outputs: false,
        shared_memory: shared as i32,
    })?);
    kernels.insert(kernel, Arc::clone(&made));
    Ok(made)
}
