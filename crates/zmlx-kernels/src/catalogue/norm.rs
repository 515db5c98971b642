//! Normalisation over the row.
//!
//! Variances are taken of what is left after subtracting the mean, and corrected by what rounding left of that mean
//! (Chan, Golub, LeVeque 1983), so that a row of mean 1000 and deviation 0.01 comes out right. Sums with a residual are
//! `f32` sums: the norm is of the sum before it is rounded to the output's dtype.

use zmlx_lang::Dtype;
use zmlx_mlx::{Array, ops};

use super::case::{Case, Input, long_row, shapes};
use super::dropout::keep_mlx;
use super::entry::{Domain, Entry};
use super::{argument, kernel};
use crate::Result;

/// `h * rsqrt(mean h^2 + eps)`.
const RMS: &str = "h * rsqrt(row_mean(h * h) + eps)";

/// The lets that leave the normalised row in `n`.
const LAYER: &str = "let d = h - row_mean(h);
  let left = row_mean(d);
  let variance = max(row_mean(d * d) - left * left, 0);
  let n = (d - left) * rsqrt(variance + eps);";

const LAYER_NOTE: &str = "Two passes and a correction: right for mean 1000, deviation 0.01.";
const SUM_NOTE: &str = "The norm is of the f32 sum, not of the rounded one.";

type Mlx<T> = zmlx_mlx::Result<T>;

/// An entry from its header, the value `h` that is normalised, whether by layer, and what is given out.
fn entry(header: &str, h: &str, layer: bool, out: &str, formula: &'static str, kind: Kind) -> Entry {
    let normed = if layer { LAYER.to_owned() } else { format!("let n = {RMS};") };
    let text = format!("{header} =\n  let h = {h};\n  {normed}\n  {out}");
    Entry::text(Domain::Norm, text, formula, move || cases(kind), move |a, _| reference(a, kind))
        .notes(if layer { LAYER_NOTE } else { "Sums in f32." })
}

/// Which inputs an entry has, in this order.
#[derive(Clone, Copy)]
struct Kind {
    residual: bool,
    weight: bool,
    bias: bool,
    dropout: bool,
    layer: bool,
    /// The sum is the second output.
    both: bool,
}

const PLAIN: Kind =
    Kind { residual: false, weight: true, bias: false, dropout: false, layer: false, both: false };
const BARE: Kind = Kind { weight: false, ..PLAIN };
const ADDED: Kind = Kind { residual: true, ..PLAIN };

pub(super) fn entries() -> Vec<Entry> {
    let layer = Kind { layer: true, bias: true, ..PLAIN };
    let rms = entry(
        "rms_norm(x, weight, eps: scalar = 1e-6)",
        "f32(x)",
        false,
        "n * weight",
        "x / sqrt(mean x^2 + eps) weight",
        PLAIN,
    );
    let rms_grad = rms
        .gradient_entry("rms_norm_grad", "x", "the gradient of rms_norm with respect to x")
        .notes("The weight's gradient comes by differentiating rms_norm.");
    let advantage = "grpo_advantage_norm(rewards, eps: scalar = 1e-6) =
  let d = rewards - row_mean(rewards);
  let left = row_mean(d);
  let variance = max(row_mean(d * d) - left * left, 0);
  (d - left) / (sqrt(variance) + eps)";
    vec![
        rms,
        rms_grad,
        entry("rms_norm_no_weight(x, eps: scalar = 1e-6)", "f32(x)", false, "n", "x / sqrt(mean x^2 + eps)", BARE),
        entry(
            "layer_norm(x, weight, bias, eps: scalar = 1e-5)",
            "f32(x)",
            true,
            "n * weight + bias",
            "(x - mean) / sqrt(var + eps) weight + bias",
            layer,
        ),
        entry(
            "layer_norm_no_weight(x, eps: scalar = 1e-5)",
            "f32(x)",
            true,
            "n",
            "(x - mean) / sqrt(var + eps)",
            Kind { layer: true, ..BARE },
        ),
        entry(
            "add_rms_norm(x, residual, weight, eps: scalar = 1e-6) -> (normed, sum)",
            "f32(x) + residual",
            false,
            "n * weight, h",
            "rms_norm(h), h with h = x + residual",
            Kind { both: true, ..ADDED },
        )
        .aliases(&["rms_norm_residual"])
        .notes(SUM_NOTE),
        entry(
            "fused_add_rms_norm(x, residual, weight, eps: scalar = 1e-6)",
            "f32(x) + residual",
            false,
            "n * weight",
            "rms_norm(x + residual)",
            ADDED,
        )
        .aliases(&["residual_rms_norm"])
        .notes(SUM_NOTE),
        entry(
            "layer_norm_residual(x, residual, weight, bias, eps: scalar = 1e-5) -> (normed, sum)",
            "f32(x) + residual",
            true,
            "n * weight + bias, h",
            "layer_norm(h), h with h = x + residual",
            Kind { residual: true, both: true, ..layer },
        )
        .notes(SUM_NOTE),
        entry(
            "fused_add_layer_norm(x, residual, weight, bias, eps: scalar = 1e-5)",
            "f32(x) + residual",
            true,
            "n * weight + bias",
            "layer_norm(x + residual)",
            Kind { residual: true, ..layer },
        )
        .notes(SUM_NOTE),
        entry(
            "rms_norm_dropout(x, weight, p: scalar = 0.5, seed: scalar u64 = 0, eps: scalar = 1e-6)",
            "f32(x)",
            false,
            "dropout(n * weight, p, seed)",
            "dropout(rms_norm(x), p, seed)",
            Kind { dropout: true, ..PLAIN },
        ),
        entry(
            "layer_norm_dropout(x, weight, bias, p: scalar = 0.5, seed: scalar u64 = 0, eps: scalar = 1e-5)",
            "f32(x)",
            true,
            "dropout(n * weight + bias, p, seed)",
            "dropout(layer_norm(x), p, seed)",
            Kind { dropout: true, ..layer },
        ),
        Entry::text(
            Domain::Norm,
            advantage,
            "(r - mean) / (std + eps)",
            || {
                let mut cases = shapes(|s| vec![Input::random(s, 2.0, 1), Input::scalar(1e-6)]);
                cases.retain(|c| c.label != "[1, 1]");
                cases.push(Case::new("equal rewards", vec![Input::floats(&[2, 4], |_| 0.7), Input::scalar(1e-6)]).forward_only().slack(10.0));
                cases
            },
            |a, _| {
                let d = a[0].subtract(&a[0].mean(&[-1], true)?)?;
                let std = d.square()?.mean(&[-1], true)?.sqrt()?;
                Ok(vec![d.divide(&std.add(&a[1])?)?])
            },
        )
        .notes("Advantages of a group of rewards, one group a row; population deviation, eps outside of the root."),
    ]
}

fn cases(kind: Kind) -> Vec<Case> {
    let inputs = |s: &[i32], x: Input| {
        let cols = &s[s.len() - 1..];
        let mut all = vec![x];
        if kind.residual {
            all.push(Input::random(s, 2.0, 2));
        }
        if kind.weight {
            all.push(Input::random(cols, 1.0, 3).map(|v| v + 1.5));
        }
        if kind.bias {
            all.push(Input::random(cols, 1.0, 4));
        }
        if kind.dropout {
            all.extend([Input::scalar(0.25), Input::int(Dtype::U64, 0x1_2345_6789)]);
        }
        all.push(Input::scalar(1e-5));
        all
    };
    let mut cases = shapes(|s| inputs(s, Input::random(s, 2.0, 1)));
    cases.push(long_row(|s| inputs(s, Input::random(s, 2.0, 1))));
    if kind.layer {
        // One element a row is at its own mean: 0 whatever it is, and its slope too.
        cases.iter_mut().filter(|c| c.label == "[1, 1]").for_each(|c| c.differences = false);
        let far = Input::random(&[2, 300], 0.017, 7).map(|v| v + 1000.0).f32();
        // The sum with a residual rounds at 1000 before it is normalised. MLX's means are off by too much to compare.
        if !kind.residual {
            cases.push(Case::new("mean 1000, deviation 0.01", inputs(&[2, 300], far)).alone().slack(4.0));
        }
    }
    cases.push(Case::new("rows of length 0", inputs(&[3, 0], Input::random(&[3, 0], 1.0, 1))).alone());
    cases
}

fn reference(a: &[Array], kind: Kind) -> Mlx<Vec<Array>> {
    let mut rest = a.iter();
    let mut next =
        || rest.next().cloned().ok_or_else(|| zmlx_mlx::Error::Argument("too few inputs".to_owned()));
    let mut h = next()?;
    if kind.residual {
        h = h.add(&next()?)?;
    }
    let (mut n, sum) = (h.clone(), h);
    if kind.layer {
        n = n.subtract(&n.mean(&[-1], true)?)?;
    }
    let weight = if kind.weight { Some(next()?) } else { None };
    let bias = if kind.bias { Some(next()?) } else { None };
    let dropout = if kind.dropout { Some((next()?, next()?)) } else { None };
    let eps = next()?;
    n = n.multiply(&n.square()?.mean(&[-1], true)?.add(&eps)?.rsqrt()?)?;
    if let Some(weight) = weight {
        n = n.multiply(&weight)?;
    }
    if let Some(bias) = bias {
        n = n.add(&bias)?;
    }
    if let Some((p, seed)) = dropout {
        let scaled = n.divide(&ops::subtract(&Array::scalar(1.0f32)?, &p)?)?;
        n = ops::where_(&keep_mlx(n.shape(), &p, &seed)?, &scaled, &scaled.zeros_like()?)?;
    }
    Ok(if kind.both { vec![n, sum] } else { vec![n] })
}

/// `x / sqrt(mean(x^2) + eps) * weight` over the last axis; without the product when there is no weight.
///
/// `weight` broadcasts, usually `[D]`. The result has the promoted float dtype of both; sums are in `f32`. Zhang and
/// Sennrich 2019, arXiv:1910.07467.
///
/// # Errors
/// When shapes do not broadcast.
pub fn rms_norm(x: &Array, weight: Option<&Array>, eps: f32) -> Result<Array> {
    match weight {
        Some(weight) => kernel("rms_norm")?.bind(&[x, weight]).scalar("eps", eps).run1(),
        None => kernel("rms_norm_no_weight")?.bind(&[x]).scalar("eps", eps).run1(),
    }
}

/// The gradient of [`rms_norm`] with respect to `x`, for the cotangent `g`.
///
/// # Errors
/// When shapes do not broadcast.
pub fn rms_norm_grad(x: &Array, weight: &Array, g: &Array, eps: f32) -> Result<Array> {
    kernel("rms_norm_grad")?.bind(&[x, weight, g]).scalar("eps", eps).run1()
}

/// `(x - mean) / sqrt(var + eps) * weight + bias` over the last axis, with the population variance.
///
/// `weight_and_bias` broadcast, usually `[D]` each. The variance is right for rows far from 0. Ba, Kiros, Hinton 2016,
/// arXiv:1607.06450.
///
/// # Errors
/// When shapes do not broadcast.
pub fn layer_norm(x: &Array, weight_and_bias: Option<(&Array, &Array)>, eps: f32) -> Result<Array> {
    match weight_and_bias {
        Some((w, b)) => kernel("layer_norm")?.bind(&[x, w, b]).scalar("eps", eps).run1(),
        None => kernel("layer_norm_no_weight")?.bind(&[x]).scalar("eps", eps).run1(),
    }
}

/// `(rms_norm(h), h)` with `h = x + residual`. The norm is of the sum in `f32`, before it is rounded for the second
/// output.
///
/// # Errors
/// When shapes do not broadcast.
pub fn add_rms_norm(x: &Array, residual: &Array, weight: &Array, eps: f32) -> Result<(Array, Array)> {
    two("add_rms_norm", kernel("add_rms_norm")?.bind(&[x, residual, weight]).scalar("eps", eps).run()?)
}

/// `rms_norm(x + residual)`, with the sum in `f32`.
///
/// # Errors
/// When shapes do not broadcast.
pub fn fused_add_rms_norm(x: &Array, residual: &Array, weight: &Array, eps: f32) -> Result<Array> {
    kernel("fused_add_rms_norm")?.bind(&[x, residual, weight]).scalar("eps", eps).run1()
}

/// `(layer_norm(h), h)` with `h = x + residual`. The norm is of the sum in `f32`.
///
/// # Errors
/// When shapes do not broadcast.
pub fn layer_norm_residual(
    x: &Array,
    residual: &Array,
    weight: &Array,
    bias: &Array,
    eps: f32,
) -> Result<(Array, Array)> {
    let call = kernel("layer_norm_residual")?.bind(&[x, residual, weight, bias]).scalar("eps", eps).run()?;
    two("layer_norm_residual", call)
}

/// `layer_norm(x + residual)`, with the sum in `f32`.
///
/// # Errors
/// When shapes do not broadcast.
pub fn fused_add_layer_norm(
    x: &Array,
    residual: &Array,
    weight: &Array,
    bias: &Array,
    eps: f32,
) -> Result<Array> {
    kernel("fused_add_layer_norm")?.bind(&[x, residual, weight, bias]).scalar("eps", eps).run1()
}

/// `dropout(rms_norm(x), p, seed)`; see [`dropout`](super::dropout()).
///
/// # Errors
/// When shapes do not broadcast; [`Error::Argument`](crate::Error::Argument) unless `0 <= p < 1`.
pub fn rms_norm_dropout(x: &Array, weight: &Array, p: f32, seed: u64, eps: f32) -> Result<Array> {
    super::dropout::check("rms_norm_dropout", p)?;
    let call = kernel("rms_norm_dropout")?.bind(&[x, weight]);
    call.scalar("p", p).scalar("seed", seed).scalar("eps", eps).run1()
}

/// `dropout(layer_norm(x), p, seed)`; see [`dropout`](super::dropout()).
///
/// # Errors
/// When shapes do not broadcast; [`Error::Argument`](crate::Error::Argument) unless `0 <= p < 1`.
pub fn layer_norm_dropout(
    x: &Array,
    weight: &Array,
    bias: &Array,
    p: f32,
    seed: u64,
    eps: f32,
) -> Result<Array> {
    super::dropout::check("layer_norm_dropout", p)?;
    let call = kernel("layer_norm_dropout")?.bind(&[x, weight, bias]);
    call.scalar("p", p).scalar("seed", seed).scalar("eps", eps).run1()
}

/// `(r - mean) / (std + eps)` over the last axis, with the population deviation: advantages of groups of rewards.
///
/// # Errors
/// For dtypes that kernels do not take.
pub fn grpo_advantage_norm(rewards: &Array, eps: f32) -> Result<Array> {
    kernel("grpo_advantage_norm")?.bind(&[rewards]).scalar("eps", eps).run1()
}

fn two(name: &str, outputs: Vec<Array>) -> Result<(Array, Array)> {
    let found: std::result::Result<[Array; 2], _> = outputs.try_into();
    found.map(|[a, b]| (a, b)).map_err(|all| argument(name, format!("{} outputs instead of two", all.len())))
}
