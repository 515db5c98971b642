//! vmap by slices: one launch for each, stacked.

use zmlx_mlx::{Array, ops};

use crate::Result;

/// Element `i` along each mapped axis.
fn slice(arrays: &[Array], axes: &[Option<usize>], i: i32) -> Result<Vec<Array>> {
    let one = |(array, axis): (&Array, &Option<usize>)| match axis {
        None => Ok(array.clone()),
        Some(axis) => Ok(array.slice_axis(*axis as i32, i, i + 1)?.squeeze(&[*axis as i32])?),
    };
    arrays.iter().zip(axes).map(one).collect()
}

/// Length of the mapped axis; `None` when nothing is mapped.
pub(crate) fn mapped_length(arrays: &[Array], axes: &[Option<usize>]) -> Option<i32> {
    arrays.iter().zip(axes).find_map(|(a, axis)| axis.map(|axis| a.shape()[axis]))
}

/// `call` on each slice, its outputs stacked along a new first axis. `None` for an empty axis: there is nothing to stack.
pub(crate) fn each(
    arrays: &[Array],
    axes: &[Option<usize>],
    outputs: usize,
    call: impl Fn(Vec<Array>) -> Result<Vec<Array>>,
) -> Result<Option<Vec<Array>>> {
    let length = mapped_length(arrays, axes).unwrap_or(1);
    let mut all: Vec<Vec<Array>> = vec![Vec::new(); outputs];
    for i in 0..length {
        let one = call(slice(arrays, axes, i)?)?;
        all.iter_mut().zip(one).for_each(|(all, one)| all.push(one));
    }
    if length == 0 {
        return Ok(None);
    }
    let stack = |s: &Vec<Array>| Ok(ops::stack(&s.iter().collect::<Vec<_>>(), 0)?);
    all.iter().map(stack).collect::<Result<Vec<_>>>().map(Some)
}
