use zmlx_mlx::{Array, Dtype, Error, Result};

use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs, promoted};
use crate::op::{Attribute, Context, Op};
use crate::shape::{Dim, DtypeSpec, Shape, Type};
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

    fn infer(
        &self,
        context: &InferContext<'_>,
        given: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let weight = context.weight(self.weight)?;
        let error = || ShapeError::weight(weight, format_args!("a shape that broadcasts with {}", x.shape));
        let shape = x.shape.broadcast(&weight.shape.as_slice().into()).ok_or_else(error)?;
        Ok(vec![Type { shape, dtype: promoted(0, x, weight.dtype())? }])
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

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let n = x.shape.last().and_then(Dim::constant);
        if self.k < 1 || n.is_none_or(|n| n < self.k.into()) {
            return Err(ShapeError::input(0, x, format_args!("[..., {} or more], to choose {0} of", self.k)));
        }
        Ok(vec![Type { shape: x.shape.with_last(self.k), dtype: DtypeSpec::INDEX }])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        let ranked = node.inputs().first().map_or(0, |x| node.elements(x));
        Work { flops: ranked, ..node.plain(&[], 1, 0) }
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

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [values, indices] = inputs(given)?;
        let (rank, same) = (values.shape.rank(), indices.shape.rank());
        if rank == 0 || rank != same || values.shape.0[..rank - 1] != indices.shape.0[..rank - 1] {
            return Err(ShapeError::input(
                1,
                indices,
                format_args!("{}", values.shape.with_last(Dim::from(1))),
            ));
        }
        if !indices.dtype.is_index() {
            return Err(ShapeError::input(1, indices, "integers"));
        }
        Ok(vec![Type { shape: indices.shape.clone(), dtype: values.dtype }])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        node.plain(&[], 1, 0)
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let [values, indices] = inputs else {
            return Err(Error::Argument("take_along_last takes values and indices".to_owned()));
        };
        Ok(vec![values.take_along_axis(indices, -1)?])
    }
}

/// From this many expert rows on, rows are sorted by expert, so that each expert's weights are read once.
pub(crate) const SORT_FROM: usize = 64;

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

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x, indices] = inputs(given)?;
        let [batch, length, width] = x.shape.0.as_slice() else {
            return Err(ShapeError::input(0, x, "[batch, length, width]"));
        };
        if indices.shape.rank() != 3 || indices.shape.0[..2] != x.shape.0[..2] || !indices.dtype.is_index() {
            return Err(ShapeError::input(1, indices, format_args!("[{batch}, {length}, k] of integers")));
        }
        let one = || Dim::from(1);
        let rows = Type::new([batch.clone(), length.clone(), one(), one(), width.clone()], x.dtype);
        Ok(vec![rows, indices.clone(), indices.clone()])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        // Two sorts, the token of each row, its row and its expert; a view where nothing is sorted.
        let rows = node.inputs().get(1).map_or(0, |indices| node.elements(indices));
        if rows < SORT_FROM as u64 { Work::default() } else { node.plain(&[], 5, 0) }
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

/// `x @ w[expert].T + b[expert]` for each row: inputs (rows, experts).
#[derive(Debug, Clone)]
pub struct ExpertLinear {
    /// The matrices `[experts, out, in]`.
    pub weight: WeightId,
    /// The vectors `[experts, out]`, if any.
    pub bias: Option<WeightId>,
}

impl Op for ExpertLinear {
    fn name(&self) -> &'static str {
        "expert_linear"
    }

    fn weights(&self) -> Vec<WeightId> {
        [Some(self.weight), self.bias].into_iter().flatten().collect()
    }

    fn infer(
        &self,
        context: &InferContext<'_>,
        given: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x, experts] = inputs(given)?;
        let weight = context.weight(self.weight)?;
        let &[count, out, input] = weight.shape.as_slice() else {
            return Err(ShapeError::weight(weight, "matrices [experts, out, in]"));
        };
        if let Some(bias) = self.bias {
            let bias = context.weight(bias)?;
            if bias.shape != [count, out] {
                return Err(ShapeError::weight(bias, format_args!("[{count}, {out}], one an expert")));
            }
        }
        let (rank, expected) = (x.shape.rank(), format!("rows [..., 1, {input}] for {}", weight.path));
        if rank < 2 || !x.shape.0[rank - 1].is(input.into()) {
            return Err(ShapeError::input(0, x, expected));
        }
        let batch = Shape(x.shape.0[..rank - 2].to_vec());
        let error = || ShapeError::input(1, experts, format_args!("integers that broadcast with {batch}"));
        let mut shape =
            batch.broadcast(&experts.shape).filter(|_| experts.dtype.is_index()).ok_or_else(error)?;
        shape.0.extend([x.shape.0[rank - 2].clone(), out.into()]);
        Ok(vec![Type { shape, dtype: promoted(0, x, weight.dtype())? }])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        let [x, experts] = node.inputs() else { return Work::default() };
        let inner = x.shape.last().and_then(Dim::constant).unwrap_or(0).unsigned_abs();
        let rows = node.elements(experts);
        let weight_bytes = node.parts(self.weight, rows);
        let Some(bias) = self.bias else { return Work { weight_bytes, ..node.plain(&[], 1, 2 * inner) } };
        // The vectors of the rows are gathered, then added.
        let weight_bytes = weight_bytes.saturating_add(node.parts(bias, rows));
        Work { weight_bytes, ..node.plain(&[], 3, 2 * inner + 1) }
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let [x, experts] = inputs else {
            return Err(Error::Argument("expert_linear takes rows and experts".to_owned()));
        };
        let sorted = experts.ndim() == 1;
        let weight = context.weight(self.weight);
        let y = if sorted && context.unpacks() {
            weight.gather_linear_of_many(x, experts)?
        } else {
            weight.gather_linear(x, experts, sorted)?
        };
        let Some(bias) = self.bias else { return Ok(vec![y]) };
        let bias = context.weight(bias).dense()?.take(experts, 0)?;
        Ok(vec![y.add(&bias.expand_dims(&[-2])?)?])
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

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [rows, _, indices] = inputs(given)?;
        let k = indices.shape.rank();
        let [.., row, width] = rows.shape.0.as_slice() else {
            return Err(ShapeError::input(0, rows, "rows [..., 1, width]"));
        };
        if rows.shape.rank() != k + 2 || !row.is(1) || rows.shape.0[..k] != indices.shape.0[..] {
            let expected = format!("rows [..., 1, width], one for each index of {}", indices.shape);
            return Err(ShapeError::input(0, rows, expected));
        }
        let mut shape = indices.shape.clone();
        shape.0.push(width.clone());
        Ok(vec![Type { shape, dtype: rows.dtype }])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        let rows = node.inputs().get(2).map_or(0, |indices| node.elements(indices));
        if rows < SORT_FROM as u64 { Work::default() } else { node.plain(&[], 1, 0) }
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
