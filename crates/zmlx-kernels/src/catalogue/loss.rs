//! Losses. Kernels give a value a row or an element; the functions reduce them if asked.

use zmlx_lang::Dtype;
use zmlx_mlx::{Array, ops};

use super::case::{Case, Input, shapes};
use super::entry::{Domain, Entry};
use super::{argument, kernel};
use crate::Result;

type Mlx<T> = zmlx_mlx::Result<T>;

/// What is made of a loss for each row or element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reduction {
    /// Nothing: one for each.
    None,
    /// Their mean; for [`cross_entropy`] weighted, over the rows that are not ignored.
    #[default]
    Mean,
    /// Their sum.
    Sum,
}

/// The row's class is read from `class_weight` even when all weights are 1, which finds classes that are not there.
const CROSS_ENTROPY: &str =
    "cross_entropy(logits, target: row i32, class_weight: array[1], ignore_index: scalar i32 = -100,
              label_smoothing: scalar = 0.0) -> (loss: f32, weight: f32) =
  let ignored = target == ignore_index;
  let total = row_logsumexp(logits);
  let picked = row_sum(index(0) == target ? logits : 0);
  let sharp = total - picked;
  let even = label_smoothing == 0 ? sharp : total - row_mean(logits);
  let weight = ignored ? 0 : class_weight[ignored ? 0 : target; checked];
  ignored ? 0 : weight * lerp(sharp, even, label_smoothing), weight";

pub(super) fn entries() -> Vec<Entry> {
    let loss = Domain::Loss;
    vec![
        Entry::text(
            loss,
            CROSS_ENTROPY,
            "w[t] ((1 - s) (lse - x[t]) + s (lse - mean x)), 0 where t = ignore_index; and the weight",
            cross_entropy_cases,
            cross_entropy_mlx,
        )
        .notes("f32, one a row. A class that is not there: an error on the CPU, NaN on a GPU."),
        pair("mse(x, y) = square(x - y)", "(x - y)^2", |x, y| x.subtract(y)?.square()),
        pair("l1(x, y) = abs(x - y)", "|x - y|", |x, y| x.subtract(y)?.abs()),
        Entry::text(
            loss,
            "huber(x, y, delta: scalar = 1.0) =
  let d = abs(x - y);
  d <= delta ? 0.5 * d * d : delta * (d - 0.5 * delta)",
            "d^2 / 2 up to delta, then delta (d - delta / 2), d = |x - y|",
            || {
                let with =
                    |s: &[i32]| vec![Input::random(s, 2.0, 1), Input::random(s, 2.0, 2), Input::scalar(0.8)];
                shapes(with)
            },
            |a, _| {
                let d = a[0].subtract(&a[1])?.abs()?;
                let far = d.subtract(&a[2].multiply_scalar(0.5)?)?.multiply(&a[2])?;
                Ok(vec![ops::where_(&d.less_equal(&a[2])?, &d.square()?.multiply_scalar(0.5)?, &far)?])
            },
        ),
        Entry::text(
            loss,
            "bce_with_logits(x, target) = softplus(x) - x * target",
            "-t ln s(x) - (1 - t) ln(1 - s(x)), s = sigmoid",
            || shapes(|s| vec![Input::random(s, 5.0, 1), Input::random(s, 0.5, 2).map(|v| v + 0.5)]),
            |a, _| Ok(vec![a[0].logaddexp(&Array::scalar(0.0f32)?)?.subtract(&a[0].multiply(&a[1])?)?]),
        )
        .notes("Does not overflow."),
        Entry::text(
            loss,
            "kl_div(log_input, target) -> (loss: f32) =
  let t = target > 0 ? target : 1;
  row_sum(target > 0 ? t * (log(t) - log_input) : 0)",
            "sum t (ln t - log_input)",
            || {
                let mut cases = shapes(|s| {
                    vec![Input::random(s, 3.0, 1), Input::random(s, 0.4, 2).map(|v| v.abs() + 0.05)]
                });
                let zeros = Input::floats(&[3, 4], |i| if i % 3 == 0 { 0.0 } else { 0.2 });
                cases.push(Case::new("zeros", vec![Input::random(&[3, 4], 3.0, 1), zeros]).kink());
                cases
            },
            |a, _| {
                let (zero, one) = (Array::scalar(0.0f32)?, Array::scalar(1.0f32)?);
                let t = ops::where_(&a[1].greater(&zero)?, &a[1], &one)?;
                let each = t.multiply(&t.log()?.subtract(&a[0])?)?;
                Ok(vec![ops::where_(&a[1].greater(&zero)?, &each, &zero)?.sum(&[-1], false)?])
            },
        )
        .notes("f32, one a row. A target of 0 counts nothing."),
    ]
}

fn pair(text: &'static str, formula: &'static str, reference: fn(&Array, &Array) -> Mlx<Array>) -> Entry {
    let cases = || shapes(|s| vec![Input::random(s, 2.0, 1), Input::random(s, 2.0, 2)]);
    Entry::text(Domain::Loss, text, formula, cases, move |a, _| Ok(vec![reference(&a[0], &a[1])?]))
}

fn cross_entropy_cases() -> Vec<Case> {
    let one = |label: &str, rows: i32, classes: i32, smoothing: f64, weighted: bool| {
        let targets = Input::ints(Dtype::I32, &[rows, 1], |i| {
            if i % 4 == 2 { -100 } else { (i as i64 * 7 + 3) % i64::from(classes) }
        });
        let weight = Input::floats(&[classes], |i| if weighted { 0.5 + (i % 3) as f64 } else { 1.0 });
        let logits = Input::random(&[rows, classes], 4.0, 1);
        let scalars = [Input::int(Dtype::I32, -100), Input::scalar(smoothing)];
        let case = Case::new(label, [vec![logits, targets, weight], scalars.to_vec()].concat());
        // Without smoothing the loss has a kink in the smoothing.
        if smoothing == 0.0 { case.kink() } else { case }
    };
    let mut cases = vec![
        one("a little smoothed", 5, 7, 0.01, false),
        one("plain", 5, 7, 0.0, false),
        one("smoothed and weighted", 6, 33, 0.1, true),
        one("one class", 2, 1, 0.0, false),
        one("many classes", 3, 2500, 0.2, false),
        one("no rows", 0, 4, 0.0, false).alone(),
    ];
    let mut infinite = one("a class of -inf", 2, 5, 0.0, false).forward_only();
    infinite.inputs[0] = super::case::planted(infinite.inputs[0].clone(), &[0, 8], f64::NEG_INFINITY);
    cases.push(infinite);
    cases
}

fn cross_entropy_mlx(a: &[Array], _: &super::Setting) -> Mlx<Vec<Array>> {
    let zero = Array::scalar(0.0f32)?;
    let ignored = a[1].equal(&a[3])?;
    let target = ops::where_(&ignored, &a[1].zeros_like()?, &a[1])?;
    let total = a[0].logsumexp(&[-1], true)?;
    let picked = a[0].take_along_axis(&target, -1)?;
    let sharp = total.subtract(&picked)?;
    // Without smoothing, 0 * inf must not come in.
    let mean = ops::where_(&a[4].equal(&zero)?, &picked, &a[0].mean(&[-1], true)?)?;
    let even = total.subtract(&mean)?;
    let mixed = sharp.add(&even.subtract(&sharp)?.multiply(&a[4])?)?;
    let weight = ops::where_(&ignored, &zero, &a[2].take(&target, 0)?)?;
    let loss = ops::where_(&ignored, &zero, &mixed.multiply(&weight)?)?;
    Ok(vec![loss.squeeze(&[-1])?, weight.squeeze(&[-1])?])
}

/// Choices of [`cross_entropy`]; the default is a plain mean.
#[derive(Debug, Clone, Copy)]
pub struct CrossEntropy<'a> {
    /// A factor for each class, `[classes]`; 1 without. It scales the whole loss of its rows, smoothing included.
    pub class_weight: Option<&'a Array>,
    /// Rows with this target count nothing.
    pub ignore_index: i32,
    /// The part `s` of the target that is spread evenly over all classes, in `0..=1`.
    pub label_smoothing: f32,
    /// What is made of the rows' losses.
    pub reduction: Reduction,
}

impl Default for CrossEntropy<'_> {
    fn default() -> Self {
        Self { class_weight: None, ignore_index: -100, label_smoothing: 0.0, reduction: Reduction::Mean }
    }
}

/// Cross entropy of `logits` (`[..., classes]`) against class numbers `targets` (`[...]`, integers), in `f32`:
/// `w[t] ((1 - s) (lse - x[t]) + s (lse - mean x))`.
///
/// The result is a scalar, or `[...]` without reduction. The mean is `sum loss / sum w[t]` over the rows that are not
/// ignored; NaN when all are.
///
/// # Errors
/// When shapes do not fit; [`Error::Argument`](crate::Error::Argument) for a `label_smoothing` outside of `0..=1`. A
/// target that is no class is an error when the result is computed on the CPU; on a GPU it gives NaN.
pub fn cross_entropy(logits: &Array, targets: &Array, choices: &CrossEntropy<'_>) -> Result<Array> {
    let name = "cross_entropy";
    let (Some(&classes), s) = (logits.shape().last(), choices.label_smoothing) else {
        return Err(argument(name, "logits need an axis of classes"));
    };
    if !(0.0..=1.0).contains(&s) {
        return Err(argument(name, format!("label_smoothing is {s}, not between 0 and 1")));
    }
    if targets.shape() != &logits.shape()[..logits.ndim() - 1] {
        let (t, l) = (targets.shape(), logits.shape());
        return Err(argument(
            name,
            format!("targets of shape {t:?} are not one for each row of logits {l:?}"),
        ));
    }
    let weight = match choices.class_weight {
        Some(weight) if weight.shape() == [classes] => weight.clone(),
        Some(weight) => {
            return Err(argument(
                name,
                format!("class_weight has shape {:?}, not [{classes}]", weight.shape()),
            ));
        }
        None => ops::ones(&[classes], logits.dtype())?,
    };
    let targets = targets.astype(zmlx_mlx::Dtype::Int32)?.expand_dims(&[-1])?;
    let call = kernel(name)?.bind(&[logits, &targets, &weight]);
    let rows = call.scalar("ignore_index", choices.ignore_index).scalar("label_smoothing", s).run()?;
    Ok(match choices.reduction {
        Reduction::None => rows[0].clone(),
        Reduction::Sum => rows[0].sum_all()?,
        Reduction::Mean => rows[0].sum_all()?.divide(&rows[1].sum_all()?)?,
    })
}

fn reduced(each: Array, reduction: Reduction) -> Result<Array> {
    Ok(match reduction {
        Reduction::None => each,
        Reduction::Sum => each.sum_all()?,
        Reduction::Mean => each.mean_all()?,
    })
}

/// `(x - y)^2`, broadcast; reduced in the result's dtype.
///
/// # Errors
/// When shapes do not broadcast.
pub fn mse(x: &Array, y: &Array, reduction: Reduction) -> Result<Array> {
    reduced(kernel("mse")?.call1(&[x, y])?, reduction)
}

/// `|x - y|`, broadcast.
///
/// # Errors
/// When shapes do not broadcast.
pub fn l1(x: &Array, y: &Array, reduction: Reduction) -> Result<Array> {
    reduced(kernel("l1")?.call1(&[x, y])?, reduction)
}

/// With `d = |x - y|`: `d^2 / 2` up to `delta`, then `delta (d - delta / 2)`.
///
/// # Errors
/// When shapes do not broadcast.
pub fn huber(x: &Array, y: &Array, delta: f32, reduction: Reduction) -> Result<Array> {
    reduced(kernel("huber")?.bind(&[x, y]).scalar("delta", delta).run1()?, reduction)
}

/// `-t ln s(x) - (1 - t) ln(1 - s(x))` with `s` the sigmoid, without overflow.
///
/// # Errors
/// When shapes do not broadcast.
pub fn bce_with_logits(x: &Array, target: &Array, reduction: Reduction) -> Result<Array> {
    reduced(kernel("bce_with_logits")?.call1(&[x, target])?, reduction)
}

/// `sum t (ln t - log_input)` over the last axis, in `f32`; the mean and the sum are over rows.
///
/// # Errors
/// When shapes do not broadcast.
pub fn kl_div(log_input: &Array, target: &Array, reduction: Reduction) -> Result<Array> {
    reduced(kernel("kl_div")?.call1(&[log_input, target])?, reduction)
}
