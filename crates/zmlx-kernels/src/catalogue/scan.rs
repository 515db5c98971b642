//! Running reductions along the row.

use zmlx_mlx::Array;

use super::case::{Case, Input, long_row, shapes};
use super::entry::{Domain, Entry};
use super::kernel;
use crate::Result;

type Run = fn(&Array, bool, bool) -> zmlx_mlx::Result<Array>;

/// The endings of the names, with whether they run from the end and leave out the element itself.
const VARIANTS: [(&str, bool, bool); 4] = [
    ("", false, false),
    ("_exclusive", false, true),
    ("_reverse", true, false),
    ("_exclusive_reverse", true, true),
];

pub(super) fn entries() -> Vec<Entry> {
    let mut all = Vec::new();
    for (suffix, reverse, exclusive) in VARIANTS {
        let scan = |op: &str, what: &str, cases: fn() -> Vec<Case>, run: Run| {
            let name = format!("{op}{suffix}");
            let from = if reverse { " from the end" } else { "" };
            let without = if exclusive { ", without the element itself" } else { "" };
            let formula = format!("running {what} along the row{from}{without}");
            let text = format!("{name}(x) = {name}(x)");
            Entry::text(Domain::Scan, text, formula, cases, move |a, _| {
                Ok(vec![run(&a[0], reverse, !exclusive)?])
            })
        };
        all.push(
            scan("cumsum", "sum", sums, |x, r, i| x.cumsum(-1, r, i))
                .notes("Sums in f32 or better, rounded once."),
        );
        all.push(
            scan("cumprod", "product", products, |x, r, i| x.cumprod(-1, r, i))
                .notes("The gradient is right with zeros in the row; it runs on the CPU only."),
        );
        // MLX's own gradient of these divides cotangents among equals differently, or is missing.
        all.push(
            scan("cummax", "maximum", extremes, |x, r, i| x.cummax(-1, r, i))
                .notes("NaN from the first NaN on. The gradient runs on the CPU only."),
        );
        all.push(
            scan("cummin", "minimum", extremes, |x, r, i| x.cummin(-1, r, i))
                .notes("NaN from the first NaN on. The gradient runs on the CPU only."),
        );
    }
    all
}

fn sums() -> Vec<Case> {
    let mut cases: Vec<Case> =
        shapes(|s| vec![Input::random(s, 1.0, 1)]).into_iter().map(|c| c.slack(4.0)).collect();
    // Sums of a long row grow, and with them what MLX's sums in f32 are off by.
    cases.push(long_row(|s| vec![Input::random(s, 1.0, 1)]));
    cases
}

fn products() -> Vec<Case> {
    let mut cases = shapes(|s| vec![Input::random(s, 0.1, 1).map(|v| v + 1.0)]);
    cases.retain(|c| !c.label.contains("2500"));
    let zero = super::case::planted(Input::random(&[3, 6], 0.5, 2).map(|v| v + 1.5), &[2, 7], 0.0);
    // MLX's gradient divides by the element.
    let mut zero = Case::new("zeros", vec![zero]);
    zero.autograd = false;
    cases.push(zero);
    cases.into_iter().map(|c| c.slack(4.0)).collect()
}

fn extremes() -> Vec<Case> {
    let mut cases = shapes(|s| vec![Input::random(s, 2.0, 1)]);
    cases.iter_mut().for_each(|c| c.autograd = false);
    cases
}

fn name(op: &str, reverse: bool, exclusive: bool) -> String {
    let found = VARIANTS.iter().find(|v| (v.1, v.2) == (reverse, exclusive));
    format!("{op}{}", found.map_or("", |v| v.0))
}

macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// Along the last axis; `reverse` runs from its end, `exclusive` leaves out the element itself (then the first
        /// is the operation's neutral value). Same shape and dtype as `x`.
        ///
        /// # Errors
        /// For dtypes that kernels do not take.
        pub fn $name(x: &Array, reverse: bool, exclusive: bool) -> Result<Array> {
            kernel(&name(stringify!($name), reverse, exclusive))?.call1(&[x])
        }
    )*};
}

functions! {
    /// Running sum.
    cumsum;
    /// Running product; the gradient is right with zeros in the row.
    cumprod;
    /// Running maximum.
    cummax;
    /// Running minimum.
    cummin;
}
