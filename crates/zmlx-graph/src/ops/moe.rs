use zmlx_mlx::{Array, Dtype, Error, Result};

use crate::op::{Attribute, Context, Op};
use crate::weights::WeightId;

/// Adds a weight to an array.
#[derive(Debug)]
pub struct AddWeight {
    /// The weight.
    pub weight: WeightId,
}

impl Op for AddWeight {
    fn name(&self) -> &'static str {
        "add_weight"
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![self.weight]
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![inputs[0].add(&context.weight(self.weight).dense()?)?])
    }
}

/// Indices of the `k` largest along the last axis, in the order that MLX's argpartition leaves them.
#[derive(Debug)]
pub struct TopKIndices {
    /// How many.
    pub k: i32,
}

impl Op for TopKIndices {
    fn name(&self) -> &'static str {
        "top_k_indices"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("k", Attribute::Int(self.k.into()))]
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let order = inputs[0].argpartition(-self.k, -1)?;
        let n = order.dim(-1)?;
        Ok(vec![order.slice_axis(-1, n - self.k, n)?])
    }
}

/// One element of the last axis for each index: inputs (values, indices).
#[derive(Debug)]
pub struct TakeAlongLast;

impl Op for TakeAlongLast {
    fn name(&self) -> &'static str {
        "take_along_last"
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let [values, indices] = inputs else {
            return Err(Error::Argument("take_along_last takes values and indices".to_owned()));
        };
        Ok(vec![values.take_along_axis(indices, -1)?])
    }
}

/// From this many expert rows on, rows are sorted by expert, so that each expert's weights are read once.
const SORT_FROM: usize = 64;

/// Brings tokens to their experts. Inputs: x `[batch, length, width]` and indices `[batch, length, k]`. Outputs: rows,
/// the expert of each row, and the order that undoes the sorting.
///
/// Few rows stay `[batch, length, 1, 1, width]` with the indices as they are (the third output is then unused); from 64
/// rows on they are sorted by expert, and the indices become one-dimensional, which is how later ops tell.
#[derive(Debug)]
pub struct ExpertSort;

impl Op for ExpertSort {
    fn name(&self) -> &'static str {
        "expert_sort"
    }

    fn outputs(&self) -> usize {
        3
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let [x, indices] = inputs else {
            return Err(Error::Argument("expert_sort takes tokens and indices".to_owned()));
        };
        let x = x.expand_dims(&[-2, -3])?;
        if indices.size() < SORT_FROM {
            return Ok(vec![x, (*indices).clone(), (*indices).clone()]);
        }
        let k = indices.dim(-1)?;
        let flat = indices.flatten(0, -1)?;
        let order = flat.argsort(0)?;
        let inverse = order.argsort(0)?;
        let token = order.floor_divide(&Array::scalar_as(k.into(), Dtype::Uint32)?)?;
        let rows = x.flatten(0, -3)?.take(&token, 0)?;
        Ok(vec![rows, flat.take(&order, 0)?, inverse])
    }
}

/// `x @ w[expert].T` for each row: inputs (rows, experts).
#[derive(Debug)]
pub struct ExpertLinear {
    /// The matrices `[experts, out, in]`.
    pub weight: WeightId,
}

impl Op for ExpertLinear {
    fn name(&self) -> &'static str {
        "expert_linear"
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![self.weight]
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let [x, experts] = inputs else {
            return Err(Error::Argument("expert_linear takes rows and experts".to_owned()));
        };
        let sorted = experts.ndim() == 1;
        Ok(vec![context.weight(self.weight).gather_linear(x, experts, sorted)?])
    }
}

/// Undoes [`ExpertSort`]: inputs (rows, undoing order, indices `[batch, length, k]`), output
/// `[batch, length, k, width]`.
#[derive(Debug)]
pub struct ExpertUnsort;

impl Op for ExpertUnsort {
    fn name(&self) -> &'static str {
        "expert_unsort"
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let [rows, inverse, indices] = inputs else {
            return Err(Error::Argument("expert_unsort takes rows, order and indices".to_owned()));
        };
        if indices.size() < SORT_FROM {
            return Ok(vec![rows.squeeze(&[-2])?]);
        }
        let restored = rows.take(inverse, 0)?.unflatten(0, indices.shape())?;
        Ok(vec![restored.squeeze(&[-2])?])
    }
}
