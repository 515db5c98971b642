//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864) by tables of cosines and sines.
//!
//! One text serves four kernels: pairs are the halves of the rotated part or neighbours, and heads come before or after
//! the positions. The part of the row behind the tables' width is left as it is.

use zmlx_lang::Dtype;
use zmlx_mlx::{Array, ops};

use super::case::{Case, Input};
use super::entry::{Domain, Entry};
use super::{argument, kernel};
use crate::Result;

/// The text for pairs of neighbours or of halves, and for `[B, S, H, D]` or `[B, H, S, D]`.
fn text(name: &str, neighbours: bool, heads_last: bool) -> String {
    let position = if heads_last { "index(2)" } else { "index(1)" };
    let (pair, first, partner) = if neighbours {
        ("j >> 1", "(j & 1) == 0", "j ^ 1")
    } else {
        ("j < dims >> 1 ? j : j - (dims >> 1)", "j < dims >> 1", "first ? j + (dims >> 1) : j - (dims >> 1)")
    };
    format!(
        "{name}(x: array[4], cos: array[2], sin: array[2], offset: array[1] i32, dims: scalar i32) =
  let j = index(0);
  let rotated = j < dims;
  let first = {first};
  let pair = rotated ? {pair} : 0;
  let partner = rotated ? {partner} : j;
  let position = {position} + offset[index(3)];
  let c = cos[position, pair];
  let s = sin[position, pair];
  let own = x[index(3), index(2), index(1), j];
  let other = x[index(3), index(2), index(1), partner];
  rotated ? own * c + (first ? -other : other) * s : own"
    )
}

/// Names with whether pairs are neighbours and heads are last.
const KERNELS: [(&str, bool, bool); 4] = [
    ("rope", false, false),
    ("rope_interleaved", true, false),
    ("rope_gqa", false, true),
    ("rope_gqa_interleaved", true, true),
];

pub(super) fn entries() -> Vec<Entry> {
    let entry = |(name, neighbours, heads_last): (&str, bool, bool)| {
        let formula = match (neighbours, heads_last) {
            (false, false) => {
                "y1 = x1 c - x2 s, y2 = x1 s + x2 c; x1, x2 the halves of the first dims; [B, H, S, D]"
            }
            (true, false) => "the same with pairs of neighbours; [B, H, S, D]",
            (false, true) => "rope with heads behind positions; [B, S, H, D]",
            (true, true) => "rope_interleaved with heads behind positions; [B, S, H, D]",
        };
        let cases = move || cases(heads_last);
        let reference =
            move |a: &[Array], _: &super::Setting| Ok(vec![reference(a, neighbours, heads_last)?]);
        Entry::text(Domain::Rope, text(name, neighbours, heads_last), formula, cases, reference)
            .notes("Tables [positions, dims / 2], positions from offset[b] on. One outside: an error on the CPU, NaN on a GPU.")
    };
    KERNELS.into_iter().map(entry).collect()
}

fn cases(heads_last: bool) -> Vec<Case> {
    let one = |label: &str, batch: i32, heads: i32, length: i32, width: i32, dims: i32| {
        let shape = if heads_last { [batch, length, heads, width] } else { [batch, heads, length, width] };
        let angle = |i: usize| {
            let (position, pair) = (i / (dims as usize / 2), i % (dims as usize / 2));
            position as f64 * 100f64.powf(-2.0 * pair as f64 / f64::from(dims))
        };
        let table = [length + 7, dims / 2];
        let inputs = vec![
            Input::random(&shape, 2.0, 1),
            Input::floats(&table, |i| angle(i).cos()).f32(),
            Input::floats(&table, |i| angle(i).sin()).f32(),
            Input::ints(Dtype::I32, &[batch], |b| (5 * b as i64) % 8),
            Input::int(Dtype::I32, i64::from(dims)),
        ];
        Case::new(label, inputs).domain(&shape)
    };
    vec![
        one("one pair", 1, 1, 1, 2, 2),
        one("offsets a row", 3, 2, 5, 8, 8),
        one("partial", 2, 3, 4, 10, 6),
        one("long", 1, 2, 33, 64, 64),
        one("no positions", 1, 2, 0, 4, 4).alone(),
    ]
}

fn reference(a: &[Array], neighbours: bool, heads_last: bool) -> zmlx_mlx::Result<Array> {
    let x = if heads_last { a[0].swapaxes(1, 2)? } else { a[0].clone() };
    let (batch, heads, length, width) = (x.dim(0)?, x.dim(1)?, x.dim(2)?, x.dim(3)?);
    let half = a[1].dim(1)?;
    let steps = ops::arange(0.0, f64::from(length), 1.0, zmlx_mlx::Dtype::Int32)?;
    let positions = a[3].reshape(&[batch, 1])?.add(&steps)?;
    let table = |t: &Array| t.take(&positions, 0)?.reshape(&[batch, 1, length, half]);
    let (c, s) = (table(&a[1])?, table(&a[2])?);
    let part = x.slice_axis(-1, 0, 2 * half)?;
    let (x1, x2) = if neighbours {
        let pairs = part.reshape(&[batch, heads, length, half, 2])?;
        let one = |k: i32| pairs.slice_axis(-1, k, k + 1)?.squeeze(&[-1]);
        (one(0)?, one(1)?)
    } else {
        (part.slice_axis(-1, 0, half)?, part.slice_axis(-1, half, 2 * half)?)
    };
    let y1 = x1.multiply(&c)?.subtract(&x2.multiply(&s)?)?;
    let y2 = x1.multiply(&s)?.add(&x2.multiply(&c)?)?;
    let rotated = if neighbours {
        ops::stack(&[&y1, &y2], -1)?.reshape(&[batch, heads, length, 2 * half])?
    } else {
        ops::concatenate(&[&y1, &y2], -1)?
    };
    let y = ops::concatenate(&[&rotated, &x.slice_axis(-1, 2 * half, width)?], -1)?;
    if heads_last { y.swapaxes(1, 2) } else { Ok(y) }
}

/// How [`apply_rope`] reads its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rope {
    /// Pairs are neighbours `(2 i, 2 i + 1)` instead of the halves `(i, i + dims / 2)`.
    pub interleaved: bool,
    /// `x` is `[B, S, H, D]` (heads behind positions) instead of `[B, H, S, D]`.
    pub heads_last: bool,
}

/// Rotates pairs of `x` by the angles of their position: `y1 = x1 c - x2 s`, `y2 = x1 s + x2 c`.
///
/// `x` is `[B, H, S, D]` (or as `choices` say) with any number of heads; `cos` and `sin` are `[positions, dims / 2]`,
/// and the first `dims` of `D` are rotated. Row `b` of the batch starts at position `offset[b]` (`[B]`, `i32`), or at 0.
/// The result has the promoted float dtype of `x` and the tables.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when shapes do not fit each other. A position outside of the tables is
/// an error when the result is computed on the CPU; on a GPU it gives NaN.
pub fn apply_rope(
    x: &Array,
    cos: &Array,
    sin: &Array,
    offset: Option<&Array>,
    choices: Rope,
) -> Result<Array> {
    let name =
        KERNELS.iter().find(|k| (k.1, k.2) == (choices.interleaved, choices.heads_last)).map_or("", |k| k.0);
    let (shape, table) = (x.shape(), cos.shape());
    if shape.len() != 4 || table.len() != 2 || sin.shape() != table || 2 * table[1] > shape[3] {
        let what = format!(
            "x has shape {shape:?} and the tables {table:?}, {:?}; expected four axes, and two equal tables of at \
             most half the last axis' width",
            sin.shape()
        );
        return Err(argument(name, what));
    }
    let offset = match offset {
        Some(o) if o.shape() == [shape[0]] => o.astype(zmlx_mlx::Dtype::Int32)?,
        Some(o) => {
            let what = format!("offset has shape {:?}, not one for each of {} rows", o.shape(), shape[0]);
            return Err(argument(name, what));
        }
        None => ops::zeros(&shape[..1], zmlx_mlx::Dtype::Int32)?,
    };
    let call = kernel(name)?.bind(&[x, cos, sin, &offset]);
    call.scalar("dims", 2 * table[1]).domain(shape).run1()
}
