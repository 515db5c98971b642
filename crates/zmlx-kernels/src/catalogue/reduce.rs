//! Reductions of the row to one value; the last axis is dropped.

use zmlx_mlx::Array;

use super::case::{Case, Input, long_row, planted, shapes};
use super::entry::{Domain, Entry};
use super::kernel;
use crate::Result;

type Mlx<T> = zmlx_mlx::Result<T>;

/// A sum in which no order of additions matters until the rest is 2^-24 of the whole: each element is cut at two powers
/// of two that lie so high above the row's largest that the sums of the pieces are exact (Rump, Ogita, Oishi 2008;
/// Demmel and Nguyen 2013). A row without a finite largest, or too large for the cuts, is summed as it is.
const COMPENSATED: &str = "
  let v = f32(x);
  let largest = row_max(abs(v));
  let n = f32(len(0));
  let terms = 4.0 * bitcast_f32(bitcast_u32(n) & 0x7f800000);
  let cut1 = 2.0 * terms * bitcast_f32(bitcast_u32(largest) & 0x7f800000);
  let usable = isfinite(cut1);
  let cut = usable ? cut1 : 0.0;
  let high = (cut + v) - cut;
  let rest = v - high;
  let cut2 = cut * (terms * 5.960464477539063e-8);
  let middle = (cut2 + rest) - cut2;
  let low = rest - middle;
  let a = row_sum(usable ? high : 0.0);
  let b = row_sum(usable ? middle : 0.0);
  let c = row_sum(usable ? low : v);
  let ab = a + b;
  let t = ab - a;
  let lost = (a - (ab - t)) + (b - t);
  let total = usable ? ab + (lost + c) : c;
  ";

fn entry(
    text: &'static str,
    formula: &'static str,
    cases: fn() -> Vec<Case>,
    reference: fn(&Array) -> Mlx<Array>,
) -> Entry {
    Entry::text(Domain::Reduce, text, formula, cases, move |a, _| Ok(vec![reference(&a[0])?]))
}

fn variance(x: &Array) -> Mlx<Array> {
    x.subtract(&x.mean(&[-1], true)?)?.square()?.mean(&[-1], false)
}

/// The product of the others by the number of zeros in the row: none, this one alone, or more. The derived gradient has
/// running products from both ends, which a GPU's text can't hold.
const PROD_GRADIENT: &str = "let zeros = row_sum(x == 0);
  let rest = row_prod(x == 0 ? 1 : x);
  let one = x == 0 ? 1 : x;
  g_out * (zeros == 0 ? rest / one : zeros == 1 && x == 0 ? rest : 0)";

/// As in the norms: the variance corrected by what rounding left of the mean.
const VARIANCE: &str = "
  let d = x - row_mean(x);
  let left = row_mean(d);
  let variance = max(row_mean(d * d) - left * left, 0);
  ";

pub(super) fn entries() -> Vec<Entry> {
    let sums = "Sums in f32 or better; half precision is rounded once, at the end.";
    let ties = "NaN if any is. Equal extremes share the gradient.";
    let places = "u32. The first of equals; the first NaN.";
    let because = "a position does not change smoothly";
    let exact =
        "Independent of the order of additions, hence of backend and thread count. No forward mode (jvp).";
    let compensated = |header: &str,
                       out: &str,
                       formula: &'static str,
                       reference: fn(&Array) -> Mlx<Array>| {
        let text = format!("strict {header} ={COMPENSATED}{out}");
        Entry::text(Domain::Reduce, text, formula, compensated_rows, move |a, _| Ok(vec![reference(&a[0])?]))
            .notes(exact)
    };
    vec![
        entry("sum(x) = row_sum(x)", "sum of the row", rows, |x| x.sum(&[-1], false)).notes(sums),
        compensated("sum_compensated(x)", "total", "sum of the row, as if in double precision", |x| {
            x.sum(&[-1], false)
        })
        .given_gradient(&[("x", "g_out")]),
        entry("mean(x) = row_mean(x)", "mean of the row", rows, |x| x.mean(&[-1], false)).notes(sums),
        compensated("mean_compensated(x)", "total / n", "mean of the row, as if in double precision", |x| {
            x.mean(&[-1], false)
        })
        .given_gradient(&[("x", "g_out / f32(len(0))")]),
        entry("prod(x) = row_prod(x)", "product of the row", products, |x| x.prod(&[-1], false))
            .given_gradient(&[("x", PROD_GRADIENT)])
            .notes("The gradient is right with zeros in the row. No forward mode (jvp)."),
        entry("max(x) = row_max(x)", "largest of the row", ties_too, |x| x.max(&[-1], false)).notes(ties),
        entry("min(x) = row_min(x)", "smallest of the row", ties_too, |x| x.min(&[-1], false)).notes(ties),
        Entry::text(
            Domain::Reduce,
            format!("var(x) ={VARIANCE}variance"),
            "mean (x - mean)^2",
            spreads,
            |a, _| Ok(vec![variance(&a[0])?]),
        )
        .notes("Population variance; two passes and a correction."),
        Entry::text(
            Domain::Reduce,
            format!("std(x, eps: scalar = 0.0) ={VARIANCE}sqrt(variance + eps)"),
            "sqrt(var + eps)",
            || {
                let with = |mut c: Case| {
                    c.inputs.push(Input::scalar(1e-6));
                    c
                };
                spreads().into_iter().map(with).collect()
            },
            |a, _| Ok(vec![variance(&a[0])?.add(&a[1].reshape(&[])?)?.sqrt()?]),
        )
        .notes("Population deviation. With eps = 0 the gradient of a row of equal values is not finite."),
        entry("argmax(x) = row_argmax(x)", "position of the row's largest", ties_too, |x| {
            x.argmax(-1, false)
        })
        .notes(places)
        .no_gradient(because),
        entry("argmin(x) = row_argmin(x)", "position of the row's smallest", ties_too, |x| {
            x.argmin(-1, false)
        })
        .notes(places)
        .no_gradient(because),
    ]
}

fn rows() -> Vec<Case> {
    let mut cases = shapes(|s| vec![Input::random(s, 2.0, 1)]);
    cases.push(long_row(|s| vec![Input::random(s, 2.0, 1)]));
    cases
}

fn compensated_rows() -> Vec<Case> {
    let mut cases = rows();
    let cancelling = |i: usize| [1e6, 1.25, -1e6, 0.5, 3.0e-3][i % 5] * (1.0 + (i / 25) as f64 / 512.0);
    cases.push(Case::new("cancelling", vec![Input::floats(&[2, 1000], cancelling).f32()]).alone());
    let infinite = planted(Input::random(&[3, 7], 1.0, 2), &[3], f64::INFINITY);
    cases.push(Case::new("inf and NaN", vec![planted(infinite, &[9], f64::NAN)]).forward_only());
    cases.push(Case::new("zeros", vec![Input::floats(&[2, 9], |_| 0.0)]));
    cases.push(
        Case::new("huge", vec![Input::floats(&[1, 6], |i| 1e38 * (i as f64 - 2.5)).f32()]).forward_only(),
    );
    cases
}

fn products() -> Vec<Case> {
    let mut cases: Vec<Case> = shapes(|s| vec![Input::random(s, 0.2, 1).map(|v| v + 1.0)]);
    cases.retain(|c| !c.label.contains("2500"));
    let zeros =
        |places: &[usize]| vec![planted(Input::random(&[3, 6], 1.0, 2).map(|v| v + 1.5), places, 0.0)];
    cases.push(Case::new("one zero, two zeros", zeros(&[2, 7, 9])));
    cases
}

/// With ties, infinities, NaN.
fn ties_too() -> Vec<Case> {
    let mut cases = rows();
    cases.iter_mut().filter(|c| c.label == "empty").for_each(|c| *c = c.clone().alone());
    cases.push(Case::new("ties", vec![Input::floats(&[4, 70], |i| (i * i % 5) as f64)]).kink());
    cases.push(Case::new("equal", vec![Input::floats(&[2, 33], |_| -1.5)]).kink());
    let infinite = planted(Input::random(&[3, 40], 1.0, 3), &[5, 50], f64::INFINITY);
    let infinite = planted(infinite, &[30, 60], f64::NEG_INFINITY);
    cases.push(Case::new("infinities", vec![infinite.clone()]).forward_only());
    cases.push(Case::new("NaN", vec![planted(infinite, &[33, 90], f64::NAN)]).forward_only());
    cases
}

fn spreads() -> Vec<Case> {
    let mut cases = rows();
    cases.iter_mut().filter(|c| c.label == "[1, 1]").for_each(|c| *c = c.clone().forward_only());
    let far = Input::random(&[2, 300], 0.017, 7).map(|v| v + 1000.0).f32();
    cases.push(Case::new("mean 1000, deviation 0.01", vec![far]).forward_only());
    cases.push(Case::new("equal", vec![Input::floats(&[2, 9], |_| 0.1)]).forward_only());
    cases
}

macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// Over the last axis, which is dropped. Computed in `f32` and given in `x`'s float dtype; positions are `u32`.
        ///
        /// # Errors
        /// For dtypes that kernels do not take.
        pub fn $name(x: &Array) -> Result<Array> {
            kernel(stringify!($name))?.call1(&[x])
        }
    )*};
}

functions! {
    /// Sum of the row; 0 for an empty one.
    sum;
    /// Sum of the row as if in double precision, the same on every backend: elements are cut into pieces whose sums
    /// are exact. Costs two passes.
    sum_compensated;
    /// Mean of the row; NaN for an empty one.
    mean;
    /// Mean of the row from [`sum_compensated`].
    mean_compensated;
    /// Product of the row; 1 for an empty one. The gradient is right with zeros in the row.
    prod;
    /// Largest of the row, NaN if any is; `-inf` for an empty one. Equal extremes share the gradient.
    max;
    /// Smallest of the row, NaN if any is; `inf` for an empty one. Equal extremes share the gradient.
    min;
    /// Population variance of the row, right for rows far from 0.
    var;
    /// Position of the row's largest; the first of equals, the first NaN.
    argmax;
    /// Position of the row's smallest; the first of equals, the first NaN.
    argmin;
}

/// `sqrt(var(x) + eps)` of the row, with the population variance. A positive `eps` keeps the gradient of rows of equal
/// values finite.
///
/// # Errors
/// For dtypes that kernels do not take.
pub fn std(x: &Array, eps: f32) -> Result<Array> {
    kernel("std")?.bind(&[x]).scalar("eps", eps).run1()
}
