//! Steps of optimisers.

use std::collections::HashMap;
use std::sync::LazyLock;

use zmlx_mlx::{Array, ops};

use super::case::{Case, Input, shapes};
use super::entry::{Domain, Entry};
use super::{argument, kernel};
use crate::{Kernel, Result};

/// The powers are taken as `e^(step ln beta)`, and `1 - beta^step` without cancellation.
const ADAMW: &str = "(parameter, gradient, first, second, learning_rate: scalar = 1e-3, step: scalar = 1.0,
           beta1: scalar = 0.9, beta2: scalar = 0.999, eps: scalar = 1e-8, weight_decay: scalar = 0.01)
    -> (new_parameterDTYPE, new_first: f32, new_second: f32) =
  let g = f32(gradient);
  let m = beta1 * first + (1 - beta1) * g;
  let v = beta2 * second + (1 - beta2) * g * g;
  let unbiased1 = m / -expm1(step * log(beta1));
  let unbiased2 = v / -expm1(step * log(beta2));
  parameter * (1 - learning_rate * weight_decay) - learning_rate * unbiased1 / (sqrt(unbiased2) + eps), m, v";

fn text(dtype: &str) -> String {
    format!("adamw_step{}", ADAMW.replace("DTYPE", dtype))
}

pub(super) fn entries() -> Vec<Entry> {
    vec![
        Entry::text(
            Domain::Optim,
            text(""),
            "p (1 - lr wd) - lr m' / (sqrt(v') + eps); m, v the moments, m', v' without bias",
            cases,
            |a, _| adamw_mlx(a),
        )
        .notes("Moments in f32. Loshchilov and Hutter 2019, arXiv:1711.05101.")
        .no_gradient("an optimiser's step is not differentiated"),
    ]
}

fn cases() -> Vec<Case> {
    let inputs = |s: &[i32], step: f64| {
        let second = Input::random(s, 1.0, 4).map(|v| v * v).f32();
        let arrays =
            [Input::random(s, 2.0, 1), Input::random(s, 1.0, 2), Input::random(s, 1.0, 3).f32(), second];
        let scalars = [1e-2, step, 0.9, 0.999, 1e-8, 0.02].map(Input::scalar);
        [arrays.to_vec(), scalars.to_vec()].concat()
    };
    let mut cases = shapes(|s| inputs(s, 3.0));
    cases.push(Case::new("first step", inputs(&[3, 5], 1.0)));
    cases.push(Case::new("late step", inputs(&[3, 5], 100_000.0)));
    // The corrections hang on how beta rounds; the reference computes them in f32.
    cases.into_iter().map(|c| c.slack(8.0)).collect()
}

fn adamw_mlx(a: &[Array]) -> zmlx_mlx::Result<Vec<Array>> {
    let one = Array::scalar(1.0f32)?;
    let rest = |x: &Array| ops::subtract(&one, x);
    let (lr, step, b1, b2, eps, decay) = (&a[4], &a[5], &a[6], &a[7], &a[8], &a[9]);
    let m = a[2].multiply(b1)?.add(&a[1].multiply(&rest(b1)?)?)?;
    let v = a[3].multiply(b2)?.add(&a[1].square()?.multiply(&rest(b2)?)?)?;
    let correction = |b: &Array| step.multiply(&b.log()?)?.expm1()?.negative();
    let (m1, v1) = (m.divide(&correction(b1)?)?, v.divide(&correction(b2)?)?);
    let update = m1.divide(&v1.sqrt()?.add(eps)?)?.multiply(lr)?;
    let kept = a[0].multiply(&rest(&lr.multiply(decay)?)?)?;
    Ok(vec![kept.subtract(&update)?, m, v])
}

/// Hyperparameters of [`adamw_step`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Step size.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root.
    pub eps: f32,
    /// Part of the parameter that is taken away, times the learning rate.
    pub weight_decay: f32,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// Kernels that keep a half-precision parameter's dtype beside moments of `f32`.
static HALF: LazyLock<HashMap<&str, Result<Kernel>>> =
    LazyLock::new(|| ["f16", "bf16"].map(|d| (d, Kernel::new(&text(&format!(": {d}"))))).into());

/// One step of AdamW with bias correction: `(parameter, first, second)` after it.
///
/// `step` counts from 1. All arrays have one shape; the parameter keeps its dtype, the moments are `f32`; everything is
/// computed in `f32`. Hyperparameters are run-time arguments: no step compiles anything.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when shapes differ or `step` is 0.
pub fn adamw_step(
    parameter: &Array,
    gradient: &Array,
    first: &Array,
    second: &Array,
    step: u64,
    choices: AdamW,
) -> Result<(Array, Array, Array)> {
    let name = "adamw_step";
    if step == 0 {
        return Err(argument(name, "steps count from 1"));
    }
    let others = [("gradient", gradient), ("first", first), ("second", second)];
    if let Some((what, a)) = others.into_iter().find(|(_, a)| a.shape() != parameter.shape()) {
        let (a, p) = (a.shape(), parameter.shape());
        return Err(argument(name, format!("{what} has shape {a:?}, the parameter {p:?}")));
    }
    let kernel = match parameter.dtype() {
        zmlx_mlx::Dtype::Float16 => HALF["f16"].as_ref().map_err(Clone::clone)?,
        zmlx_mlx::Dtype::Bfloat16 => HALF["bf16"].as_ref().map_err(Clone::clone)?,
        _ => kernel(name)?,
    };
    let AdamW { learning_rate, beta1, beta2, eps, weight_decay } = choices;
    let call = kernel.bind(&[parameter, gradient, first, second]);
    let call = call.scalar("learning_rate", learning_rate).scalar("step", step as f64);
    let call = call.scalar("beta1", beta1).scalar("beta2", beta2).scalar("eps", eps);
    let found: std::result::Result<[Array; 3], _> =
        call.scalar("weight_decay", weight_decay).run()?.try_into();
    found.map(|[p, m, v]| (p, m, v)).map_err(|all| argument(name, format!("{} outputs", all.len())))
}
