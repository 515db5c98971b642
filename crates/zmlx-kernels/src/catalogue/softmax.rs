//! Softmax over the row, and its relatives.

use zmlx_mlx::{Array, ops};

use super::case::{Case, Input, long_row, planted, shapes, unary};
use super::entry::{Domain, Entry};
use super::kernel;
use crate::Result;

const SOFTMAX: &str = "softmax(x) =
  let e = exp(x - row_max(x));
  e / row_sum(e)";

const LOG_SOFTMAX: &str = "log_softmax(x) =
  let d = x - row_max(x);
  d - log(row_sum(exp(d)))";

/// The sum is taken as 1 where nothing is kept, so that the gradient has no 0 / 0.
const MASKED: &str = "
  let m = row_max(mask ? SCORE : -inf);
  let shift = isinf(m) ? 0 : m;
  let e = mask ? exp(SCORE - shift) : 0;
  let total = row_sum(e);
  e / (total > 0 ? total : 1)";

pub(super) fn entries() -> Vec<Entry> {
    let soft = Domain::Softmax;
    let masked = MASKED.replace("SCORE", "x");
    let scaled = MASKED.replace("SCORE", "(x * scale)");
    vec![
        Entry::text(soft, SOFTMAX, "e^(x - m) / sum e^(x - m), m = max x", rows, |a, _| {
            Ok(vec![a[0].softmax(&[-1], true)?])
        })
        .notes("NaN for a row whose largest is infinite."),
        Entry::text(soft, LOG_SOFTMAX, "x - m - ln sum e^(x - m)", rows, |a, _| {
            Ok(vec![a[0].subtract(&a[0].logsumexp(&[-1], true)?)?])
        }),
        Entry::text(
            soft,
            "logsumexp(x) = row_logsumexp(x)",
            "m + ln sum e^(x - m)",
            rows_or_infinite,
            |a, _| Ok(vec![a[0].logsumexp(&[-1], false)?]),
        )
        .notes("One value a row. -inf for a row of -inf."),
        Entry::text(
            soft,
            format!("masked_softmax(x, mask: bool) ={masked}"),
            "softmax over the places where mask holds, 0 elsewhere",
            || masked_cases(false),
            |a, _| Ok(vec![masked_mlx(&a[0], &a[1])?]),
        )
        .notes("A row without any gives zeros, also as gradient."),
        Entry::text(
            soft,
            format!("scale_mask_softmax(x, mask: bool, scale: scalar = 1.0) ={scaled}"),
            "masked_softmax(scale x, mask)",
            || masked_cases(true),
            |a, _| Ok(vec![masked_mlx(&a[0].multiply(&a[2])?, &a[1])?]),
        )
        .notes("A row without any gives zeros, also as gradient."),
        Entry::text(
            soft,
            "softmax_grad(y, g) = y * (g - row_sum(g * y))",
            "y (g - sum g y), the gradient of y = softmax(x)",
            || shapes(|s| vec![Input::random(s, 0.5, 1).map(f64::abs), Input::random(s, 1.0, 2)]),
            |a, _| {
                let dot = a[0].multiply(&a[1])?.sum(&[-1], true)?;
                Ok(vec![a[0].multiply(&a[1].subtract(&dot)?)?])
            },
        )
        .notes("From the output, as stored."),
    ]
}

fn rows() -> Vec<Case> {
    let mut cases = shapes(|s| vec![Input::random(s, 6.0, 1)]);
    // MLX takes no logsumexp of nothing.
    cases.iter_mut().filter(|c| c.label == "empty").for_each(|c| *c = c.clone().alone());
    cases.push(long_row(|s| vec![Input::random(s, 6.0, 1)]));
    cases.push(Case::new("large values", vec![Input::random(&[3, 9], 3000.0, 3)]));
    cases.push(Case::new("equal values", vec![Input::floats(&[2, 5], |_| 1.25)]).kink());
    let some = planted(Input::random(&[2, 6], 4.0, 4), &[1, 8, 9], f64::NEG_INFINITY);
    cases.push(Case::new("some -inf", vec![some]).forward_only());
    cases.push(Case::new("rows of length 0", vec![Input::random(&[4, 0], 1.0, 1)]).alone());
    cases
}

fn rows_or_infinite() -> Vec<Case> {
    let mut cases = rows();
    let infinite = planted(Input::random(&[3, 4], 1.0, 5), &[0, 1, 2, 3], f64::NEG_INFINITY);
    let infinite = planted(infinite, &[9], f64::INFINITY);
    cases.push(Case::new("rows of -inf and with inf", vec![infinite]).forward_only());
    cases
}

fn masked_cases(scale: bool) -> Vec<Case> {
    let one = |label: &str, shape: &[i32], mask: Input| {
        let mut inputs = vec![Input::random(shape, 4.0, 1), mask];
        if scale {
            inputs.push(Input::scalar(0.35));
        }
        Case::new(label, inputs)
    };
    let mut cases: Vec<Case> = unary(1.0)
        .iter()
        .filter(|c| c.inputs[0].shape.len() > 1)
        .map(|c| one(&c.label, &c.inputs[0].shape, Input::mask(&c.inputs[0].shape, 0.7, 2)))
        .collect();
    let second = Input::ints(zmlx_lang::Dtype::Bool, &[3, 5], |i| i64::from(i / 5 != 1));
    cases.push(one("a row without any", &[3, 5], second));
    cases.push(one("mask of a row", &[3, 8], Input::mask(&[8], 0.5, 3)));
    cases
}

fn masked_mlx(x: &Array, mask: &Array) -> zmlx_mlx::Result<Array> {
    let none = Array::scalar(-1e30f32)?;
    let y = ops::where_(mask, x, &none)?.softmax(&[-1], true)?;
    ops::where_(mask, &y, &Array::scalar(0.0f32)?)
}

/// `softmax(x)` over the last axis: `e^(x - m) / sum e^(x - m)` with the row's maximum `m`.
///
/// Same shape and float dtype as `x`; computed and summed in `f32`.
///
/// # Errors
/// For dtypes that kernels do not take.
pub fn softmax(x: &Array) -> Result<Array> {
    kernel("softmax")?.call1(&[x])
}

/// `x - logsumexp(x)` over the last axis.
///
/// Same shape and float dtype as `x`.
///
/// # Errors
/// For dtypes that kernels do not take.
pub fn log_softmax(x: &Array) -> Result<Array> {
    kernel("log_softmax")?.call1(&[x])
}

/// `ln sum e^x` over the last axis, which is dropped; `-inf` for a row of `-inf`.
///
/// # Errors
/// For dtypes that kernels do not take.
pub fn logsumexp(x: &Array) -> Result<Array> {
    kernel("logsumexp")?.call1(&[x])
}

/// Softmax over the places of the last axis where `mask` (bool, broadcast) holds; 0 elsewhere, and in rows without any.
///
/// # Errors
/// When shapes do not broadcast, or `mask` is not of booleans.
pub fn masked_softmax(x: &Array, mask: &Array) -> Result<Array> {
    kernel("masked_softmax")?.call1(&[x, mask])
}

/// [`masked_softmax`] of `scale * x`.
///
/// # Errors
/// As `masked_softmax`.
pub fn scale_mask_softmax(x: &Array, mask: &Array, scale: f32) -> Result<Array> {
    kernel("scale_mask_softmax")?.bind(&[x, mask]).scalar("scale", scale).run1()
}

/// The gradient of `y = softmax(x)` from its output and the cotangent `g`: `y (g - sum g y)`.
///
/// # Errors
/// When shapes do not broadcast.
pub fn softmax_grad(y: &Array, g: &Array) -> Result<Array> {
    kernel("softmax_grad")?.call1(&[y, g])
}
