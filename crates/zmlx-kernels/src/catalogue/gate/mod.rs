//! Choice of the largest elements of rows, and routing weights.
//!
//! One text serves both GPU dialects (`body.h`): a warp for each row, `k` rounds. On the CPU rows are the lanes of vector
//! registers, or are partially sorted where `k` is large ([`select`]). The order is the same everywhere: larger first,
//! lower index first among equals, NaN above all.

mod entries;
mod gating;
mod gpu;
mod rows;
mod select;
mod top_k;

pub(super) use entries::entries;
pub use gating::{top_k_gating, top_k_gating_bias, top_k_gating_bias_kernel, top_k_gating_kernel};
pub use top_k::{top_k, top_k_kernel};

use zmlx_mlx::{Array, Dtype};

use crate::raw::Spec;
use crate::{Error, Result};

/// Most elements chosen of a row: a GPU does as many rounds one after another.
pub const MAX_TOP_K: usize = 1024;
/// Added to the sum that biased weights are divided by.
const EPS: f32 = 1e-20;

fn argument(kernel: &str, what: String) -> Error {
    Error::Argument { kernel: kernel.to_owned(), what }
}

/// `k` and the outputs' shape, from a kernel's first input and parameters.
fn chosen(kernel: &str, name: &str, x: &Spec, parameters: &[i64]) -> Result<(usize, Vec<i32>)> {
    if !matches!(x.dtype, Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16) {
        return Err(argument(
            kernel,
            format!("{name} is {}; it must be float32, float16 or bfloat16", x.dtype),
        ));
    }
    let Some((cols, outer)) = x.shape.split_last() else {
        return Err(argument(kernel, format!("{name} is a scalar; it must have rows of D elements")));
    };
    let Some(k) = parameters.first() else {
        return Err(argument(kernel, "the first parameter is k; it is missing".to_owned()));
    };
    if *k < 1 || *k > i64::from(*cols).min(MAX_TOP_K as i64) {
        return Err(argument(
            kernel,
            format!("k = {k} with D = {cols}; it must be 1 <= k <= min(D, {MAX_TOP_K})"),
        ));
    }
    let shape = outer.iter().copied().chain([*k as i32]).collect();
    Ok((*k as usize, shape))
}

/// A `k` as the parameter of a call; one beyond the range is refused there.
fn parameter(k: usize) -> i64 {
    i64::try_from(k).unwrap_or(i64::MAX)
}

fn pair(arrays: Vec<Array>) -> Result<(Array, Array)> {
    match <[Array; 2]>::try_from(arrays) {
        Ok([a, b]) => Ok((a, b)),
        Err(other) => Err(argument("top_k", format!("{} outputs where two are due", other.len()))),
    }
}
