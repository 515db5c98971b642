use zmlx_mlx::{Array, Result};

use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs};
use crate::op::{Attribute, Context, Op};
use crate::shape::{Dim, DtypeSpec, Type};

/// Keeps the scores `[..., experts]` of some groups of experts and sets the others' to 0.0: groups are ranked by the sum of
/// their two largest scores. Of equal groups MLX's argpartition on the CPU drops that of the lower index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaskGroups {
    /// Groups, of equal size.
    pub groups: i32,
    /// How many are kept.
    pub keep: i32,
}

impl Op for MaskGroups {
    fn name(&self) -> &'static str {
        "mask_groups"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("groups", Attribute::Int(self.groups.into())), ("keep", Attribute::Int(self.keep.into()))]
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let Self { groups, keep } = *self;
        if groups < 1 || !(1..=groups).contains(&keep) {
            return Err(ShapeError::Parameter(format!("keep={keep}: between 1 and the {groups} groups")));
        }
        let experts = x.shape.last().and_then(Dim::constant).unwrap_or(0);
        if experts % i64::from(groups) != 0 || experts / i64::from(groups) < 2 || !x.dtype.is_float() {
            let expected = format!("[..., n * {groups}] of floats with two experts or more in a group");
            return Err(ShapeError::input(0, x, expected));
        }
        Ok(vec![x.clone()])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        // Top two, their sum, the partition of the groups, and the zeros.
        node.plain(&[], if self.keep < self.groups { 4 } else { 0 }, 3)
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let drop = self.groups - self.keep;
        if drop == 0 {
            return Ok(vec![inputs[0].clone()]);
        }
        let scores = inputs[0].unflatten(-1, &[self.groups, -1])?;
        let best = scores.topk(2, -1)?.sum(&[-1], true)?;
        let dropped = best.argpartition(drop - 1, -2)?.slice_axis(-2, 0, drop)?;
        let zero = Array::scalar_as(0.0, scores.dtype())?;
        let masked = scores.put_along_axis(&dropped, &zero, -2)?;
        Ok(vec![masked.flatten(-2, -1)?])
    }
}

/// Indices of the `k` largest along the last axis, as the first `k` of an argpartition of the negated values: of equal ones
/// the lower index on the CPU, where [`TopKIndices`](super::TopKIndices) takes the higher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopKOfNegated {
    /// How many.
    pub k: i32,
}

impl Op for TopKOfNegated {
    fn name(&self) -> &'static str {
        "top_k_of_negated"
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
        Work { flops: 2 * ranked, ..node.plain(&[], 2, 0) }
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let order = inputs[0].negative()?.argpartition(self.k - 1, -1)?;
        Ok(vec![order.slice_axis(-1, 0, self.k)?])
    }
}
