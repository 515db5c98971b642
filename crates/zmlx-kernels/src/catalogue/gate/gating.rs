//! Routing weights of the k best experts of each row.

use std::sync::LazyLock;

use zmlx_mlx::{Array, Dtype, ops};

use super::gpu::{self, Variant};
use super::{EPS, argument, chosen, rows};
use crate::Result;
use crate::raw::{RawKernel, Spec, raw_kernel};

const PLAIN: &str = "top_k_gating";
const BIASED: &str = "top_k_gating_bias";

static KERNEL: LazyLock<RawKernel> = LazyLock::new(|| kernel(PLAIN, &["x"]));
static WITH_BIAS: LazyLock<RawKernel> = LazyLock::new(|| kernel(BIASED, &["x", "bias"]));

fn kernel(name: &'static str, inputs: &'static [&'static str]) -> RawKernel {
    let check = move |inputs: &[Spec], parameters: &[i64]| {
        let found = chosen(name, "logits", &inputs[0], parameters)?;
        let norm = match parameters {
            [_, norm @ 0..=1] => *norm == 1,
            _ => {
                return Err(argument(
                    name,
                    format!("parameters are k and norm (0 or 1), not {parameters:?}"),
                ));
            }
        };
        let cols = inputs[0].shape.last().copied().unwrap_or(0);
        match inputs.get(1) {
            Some(b) if b.shape != [cols] || b.dtype != Dtype::Float32 => {
                let found = format!("bias is {} {:?}; it must be float32 [{cols}]", b.dtype, b.shape);
                Err(argument(name, found))
            }
            _ => Ok((found.0, found.1, norm)),
        }
    };
    let specs = move |inputs: &[Spec], parameters: &[i64]| {
        let (_, shape, _) = check(inputs, parameters)?;
        Ok(vec![Spec::new(&shape, Dtype::Float32), Spec::new(&shape, Dtype::Uint32)])
    };
    let builder = raw_kernel(name, inputs, &["weights", "indices"], specs)
        .cpu(|inputs, outputs, p| rows::gating(inputs, outputs, p[0] as usize, (p[1] == 1, EPS)))
        .launch(move |inputs, parameters| {
            let (k, _, norm) = check(inputs, parameters)?;
            gpu::launch(name, &inputs[0], k, Some(norm))
        })
        .gradient(|primals, cotangents, outputs, wanted, parameters| {
            let all = gradient(primals, &cotangents[0], outputs, parameters[1] == 1)?;
            Ok(wanted.iter().map(|n| all[*n].clone()).collect())
        });
    let built = gpu::bodies(builder, Variant { weights: true, bias: inputs.len() == 2 }).build();
    built.expect("names are identifiers, and GPU bodies have a launch")
}

/// Gradients of logits and bias. With w the weights, g their cotangent, p the softmax of all logits and G the cotangent
/// of what was chosen from, zero where nothing was chosen:
///
/// * softmax of the chosen: `dx_i = w_i (g_i - sum g w)` for the chosen, 0 for others;
/// * otherwise `dx = p (G - sum G p)`, and the bias gets the sum of G over rows;
/// * G is g, or `(g - sum g w) / (s + eps)` with s the sum of the chosen where a bias was added and the sum divided by.
fn gradient(primals: &[Array], g: &Array, outputs: &[Array], norm: bool) -> Result<Vec<Array>> {
    let (x, bias, weights, indices) = (&primals[0], primals.get(1), &outputs[0], &outputs[1]);
    let zeros = ops::zeros(x.shape(), Dtype::Float32)?;
    let scatter = |values: &Array| ops::put_along_axis(&zeros, indices, values, -1);
    let centred = || g.subtract(&g.multiply(weights)?.sum(&[-1], true)?);
    if norm && bias.is_none() {
        return Ok(vec![scatter(&weights.multiply(&centred()?)?)?.astype(x.dtype())?]);
    }
    let p = ops::softmax(&x.astype(Dtype::Float32)?, &[-1], true)?;
    let full = match bias {
        Some(bias) if norm => {
            let chosen = ops::take_along_axis(&p.add(bias)?, indices, -1)?;
            let sum = chosen.sum(&[-1], true)?.add(&Array::from_slice(&[EPS], &[1])?)?;
            scatter(&centred()?.divide(&sum)?)?
        }
        _ => scatter(g)?,
    };
    let dx = p.multiply(&full.subtract(&full.multiply(&p)?.sum(&[-1], true)?)?)?.astype(x.dtype())?;
    let rows: Vec<i32> = (0..x.ndim() as i32 - 1).collect();
    let dbias = if rows.is_empty() { full } else { full.sum(&rows, false)? };
    Ok(vec![dx, dbias])
}

/// The kernel of [`top_k_gating`]; its parameters are `k` and `norm` (0 or 1).
pub fn top_k_gating_kernel() -> &'static RawKernel {
    &KERNEL
}

/// The kernel of [`top_k_gating_bias`]; its parameters are `k` and `norm` (0 or 1), its bias is float32.
pub fn top_k_gating_bias_kernel() -> &'static RawKernel {
    &WITH_BIAS
}

/// The `k` largest logits of each row of `logits (..., D)` and their weights: `(weights (..., k), indices (..., k))`.
///
/// Weights are `e^(l_i - m) / sum_j e^(l_j - m)`, m the row's largest logit, the sum over the chosen when `norm` holds,
/// else over all logits. Largest first; equal logits by lower index first; a NaN counts as largest. A row whose largest
/// logit is NaN or infinite has NaN weights. Logits are float32, float16 or bfloat16, computed in float32; weights are
/// float32, indices uint32. The logits have a gradient, indices have none.
///
/// # Errors
/// [`crate::Error::Argument`] unless `1 <= k <= min(D, 1024)`, and for other dtypes.
pub fn top_k_gating(logits: &Array, k: usize, norm: bool) -> Result<(Array, Array)> {
    super::pair(KERNEL.call(&[logits], &[super::parameter(k), norm.into()])?)
}

/// As [`top_k_gating`], chosen by `s = softmax(logits) + bias (D)`, the softmax over all logits: the weights are `s_i`,
/// bias included, or `s_i / (sum_j s_j + 1e-20)` over the chosen when `norm` holds.
///
/// The bias is computed with in float32; its gradient has its dtype. The sum s is rounded to float32 before the choice:
/// sums that differ by less may be told apart on one device and not on another.
///
/// # Errors
/// As [`top_k_gating`]; also when the bias's shape is not `(D)`.
pub fn top_k_gating_bias(logits: &Array, bias: &Array, k: usize, norm: bool) -> Result<(Array, Array)> {
    let bias = bias.astype(Dtype::Float32)?;
    super::pair(WITH_BIAS.call(&[logits, &bias], &[super::parameter(k), norm.into()])?)
}
