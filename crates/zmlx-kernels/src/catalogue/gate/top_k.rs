//! The k largest elements of each row.

use std::sync::LazyLock;

use zmlx_mlx::{Array, Dtype, ops};

use super::gpu::{self, Variant};
use super::{chosen, rows};
use crate::Result;
use crate::raw::{RawKernel, Spec, raw_kernel};

const NAME: &str = "top_k";

static KERNEL: LazyLock<RawKernel> = LazyLock::new(|| {
    let specs = |inputs: &[Spec], parameters: &[i64]| {
        let (_, shape) = chosen(NAME, "x", &inputs[0], parameters)?;
        Ok(vec![Spec::new(&shape, inputs[0].dtype), Spec::new(&shape, Dtype::Uint32)])
    };
    let builder = raw_kernel(NAME, &["x"], &["values", "indices"], specs)
        .cpu(|inputs, outputs, parameters| rows::top_k(inputs, outputs, parameters[0] as usize))
        .launch(|inputs, parameters| {
            gpu::launch(NAME, &inputs[0], chosen(NAME, "x", &inputs[0], parameters)?.0, None)
        })
        .gradient(|primals, cotangents, outputs, _, _| {
            let zeros = primals[0].zeros_like()?;
            Ok(vec![ops::put_along_axis(&zeros, &outputs[1], &cotangents[0], -1)?])
        });
    let built = gpu::bodies(builder, Variant { weights: false, bias: false }).build();
    built.expect("names are identifiers, and GPU bodies have a launch")
});

/// The kernel of [`top_k`]; its parameter is `k`.
pub fn top_k_kernel() -> &'static RawKernel {
    &KERNEL
}

/// The `k` largest elements of each row of `x (..., D)`: `(values (..., k), indices (..., k))`.
///
/// Largest first; equal elements (the two zeros are equal) by lower index first; NaN counts as larger than any number.
/// `x` is float32, float16 or bfloat16; values have its dtype and exact bits, indices are uint32. The gradient of the
/// values goes to the elements they were taken from; indices have none.
///
/// # Errors
/// [`crate::Error::Argument`] unless `1 <= k <= min(D, 1024)`, and for other dtypes.
pub fn top_k(x: &Array, k: usize) -> Result<(Array, Array)> {
    super::pair(KERNEL.call(&[x], &[super::parameter(k)])?)
}
