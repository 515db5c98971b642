//! What the catalogue says of these ops.

use zmlx_mlx::{Array, Dtype, ops};

use super::super::case::{Case, Input, Setting};
use super::super::entry::{Domain, Entry};
use super::{EPS, top_k_gating_bias_kernel, top_k_gating_kernel, top_k_kernel};

type Mlx<T> = zmlx_mlx::Result<T>;

/// Random rows and rows with ties, of the usual lengths, each with some k; `make` gives a call's inputs and settings.
fn cases(make: impl Fn(Input, i64) -> Vec<(Vec<Input>, Vec<i64>)>) -> Vec<Case> {
    let sizes: [(&[i32], i64); 8] = [
        (&[1, 1], 1),
        (&[1, 7], 3),
        (&[5, 33], 8),
        (&[2, 3, 17], 17),
        (&[40, 64], 2),
        (&[9, 128], 6),
        (&[3, 2500], 40),
        (&[0, 5], 2),
    ];
    let mut all = Vec::new();
    for (shape, k) in sizes {
        for (what, x) in
            [("random", Input::random(shape, 3.0, 5)), ("ties", Input::floats(shape, |i| (i % 5) as f64))]
        {
            for (inputs, parameters) in make(x, k) {
                let mut case = Case::new(format!("{shape:?}, {what}, parameters {parameters:?}"), inputs);
                case.setting.parameters = parameters;
                all.push(case.kink());
            }
        }
    }
    all
}

/// With and without normalisation.
fn both(inputs: Vec<Input>, k: i64) -> Vec<(Vec<Input>, Vec<i64>)> {
    vec![(inputs.clone(), vec![k, 1]), (inputs, vec![k, 0])]
}

fn biased(x: Input, k: i64) -> Vec<(Vec<Input>, Vec<i64>)> {
    let bias = Input::floats(&[x.shape.last().copied().unwrap_or(1)], |i| 0.25 + (i % 7) as f64 / 64.0).f32();
    both(vec![x, bias], k)
}

/// Places of the k largest, in order: MLX's sort keeps equals in order.
fn places(x: &Array, k: i64) -> Mlx<Array> {
    let sorted = ops::argsort(&x.astype(Dtype::Float32)?.negative()?, -1)?;
    // Places have no gradient; MLX wants to be told so.
    ops::stop_gradient(&sorted.slice_axis(-1, 0, k as i32)?)
}

fn gating(a: &[Array], k: i64, norm: bool) -> Mlx<Vec<Array>> {
    let p = ops::softmax(&a[0].astype(Dtype::Float32)?, &[-1], true)?;
    let (score, of) = match a.get(1) {
        Some(bias) => (p.add(bias)?, None),
        None => (p, Some(&a[0])),
    };
    let places = places(of.unwrap_or(&score), k)?;
    let chosen = ops::take_along_axis(&score, &places, -1)?;
    let sum = chosen.sum(&[-1], true)?.add(&Array::from_slice(&[EPS], &[1])?)?;
    Ok(vec![if norm { chosen.divide(&sum)? } else { chosen }, places])
}

pub(in super::super) fn entries() -> Vec<Entry> {
    let reference = |a: &[Array], s: &Setting| {
        let places = places(&a[0], s.parameters[0])?;
        Ok(vec![ops::take_along_axis(&a[0], &places, -1)?, places])
    };
    let plain = |a: &[Array], s: &Setting| gating(a, s.parameters[0], s.parameters[1] == 1);
    vec![
        Entry::raw(
            Domain::Gate,
            "top_k",
            top_k_kernel,
            "values and places of the k largest of the row, largest first",
            || cases(|x, k| vec![(vec![x], vec![k])]),
            reference,
        )
        .notes("k up to 1024. Equals: lower place first. NaN counts as largest. Places are u32 and have no gradient."),
        Entry::raw(
            Domain::Gate,
            "top_k_gating",
            top_k_gating_kernel,
            "softmax weights of the k largest of the row, and their places",
            || cases(|x, k| both(vec![x], k)),
            plain,
        )
        .notes("Weights are f32, normalised over the chosen or over the row. Order as in `top_k`."),
        Entry::raw(
            Domain::Gate,
            "top_k_gating_bias",
            top_k_gating_bias_kernel,
            "the k largest of s = softmax(x) + bias, and their places; normalised: s / (sum of the chosen s + 1e-20)",
            || cases(biased),
            plain,
        )
        .notes("Weights are f32 and include the bias. Order as in `top_k`, of sums rounded to f32."),
    ]
}
