//! Rows by their numbers.

use zmlx_mlx::{Array, ops};

use super::case::{Case, Input};
use super::entry::{Domain, Entry};
use super::{argument, kernel};
use crate::Result;

const OUTSIDE: &str = "A number outside: an error on the CPU; NaN (gather) or skipped (scatter) on a GPU.";

pub(super) fn entries() -> Vec<Entry> {
    vec![
        Entry::text(
            Domain::Index,
            "gather_add(source: array[2], rows: row i32, other) = source[rows, index(0)] + other",
            "source[rows[i], j] + other[i, j]",
            gather_cases,
            |a, _| {
                let rows = a[1].squeeze(&[-1])?;
                Ok(vec![a[0].take(&rows, 0)?.add(&a[2])?])
            },
        )
        .notes(OUTSIDE),
        Entry::text(
            Domain::Index,
            "scatter_add(rows: row i32, updates) -> (sums: f32) = sums[rows, index(0)] += updates",
            "sums[rows[i], j] += updates[i, j], from zeros",
            scatter_cases,
            |a, setting| {
                let shape = setting.outputs.first().cloned().flatten().unwrap_or_default();
                let zeros = ops::zeros(&shape, zmlx_mlx::Dtype::Float32)?;
                let updates = a[1].expand_dims(&[1])?;
                Ok(vec![zeros.scatter_add(&[&a[0].squeeze(&[-1])?], &updates, &[0])?])
            },
        )
        .notes("Added in f32, in no fixed order. A number outside: an error on the CPU, skipped on a GPU."),
    ]
}

fn gather_cases() -> Vec<Case> {
    let one = |n: i32, m: i32, d: i32| {
        let inputs = vec![
            Input::random(&[n, d], 2.0, 1),
            Input::places(&[m, 1], i64::from(n), 2),
            Input::random(&[m, d], 2.0, 3),
        ];
        Case::new(format!("{m} of {n} rows of {d}"), inputs)
    };
    vec![one(1, 1, 1), one(7, 5, 33), one(3, 40, 6), one(50, 2, 1000), one(4, 0, 3)]
}

fn scatter_cases() -> Vec<Case> {
    let one = |n: i32, m: i32, d: i32| {
        let inputs = vec![Input::places(&[m, 1], i64::from(n), 2), Input::random(&[m, d], 2.0, 3)];
        Case::new(format!("{m} into {n} rows of {d}"), inputs).output(&[n, d])
    };
    vec![one(1, 1, 1), one(7, 5, 33), one(3, 40, 6), one(50, 2, 1000), one(4, 0, 3)]
}

fn two_axes<'a>(name: &str, what: &str, array: &'a Array) -> Result<&'a [i32]> {
    match array.shape() {
        shape if shape.len() == 2 => Ok(shape),
        shape => Err(argument(name, format!("{what} has shape {shape:?}, not two axes"))),
    }
}

fn as_rows(name: &str, rows: &Array, count: i32) -> Result<Array> {
    if rows.shape() != [count] {
        return Err(argument(name, format!("rows has shape {:?}, not [{count}]", rows.shape())));
    }
    Ok(rows.astype(zmlx_mlx::Dtype::Int32)?.reshape(&[count, 1])?)
}

/// `source[rows[i], :] + other[i, :]`, for `source` of `[N, D]`, `rows` of `[M]` (integers) and `other` of `[M, D]`.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when shapes do not fit. A row that is not there is an error when the
/// result is computed on the CPU; on a GPU it gives NaN.
pub fn gather_add(source: &Array, rows: &Array, other: &Array) -> Result<Array> {
    let name = "gather_add";
    let (from, to) = (two_axes(name, "source", source)?, two_axes(name, "other", other)?);
    if from[1] != to[1] {
        return Err(argument(name, format!("rows of source have {} elements, of other {}", from[1], to[1])));
    }
    kernel(name)?.call1(&[source, &as_rows(name, rows, to[0])?, other])
}

/// Zeros of `[count, D]` to which each row of `updates` (`[M, D]`) is added at its place in `rows` (`[M]`, integers),
/// in `f32`.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when shapes do not fit. A row that is not there is an error when the
/// result is computed on the CPU; on a GPU it is skipped.
pub fn scatter_add(rows: &Array, updates: &Array, count: i32) -> Result<Array> {
    let name = "scatter_add";
    let shape = two_axes(name, "updates", updates)?;
    let rows = as_rows(name, rows, shape[0])?;
    kernel(name)?.bind(&[&rows, updates]).output_shape("sums", &[count, shape[1]]).run1()
}
