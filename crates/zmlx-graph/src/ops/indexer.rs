use zmlx_mlx::{Array, Dtype, Error, Result, ops};

use super::mla::causal;
use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs};
use crate::op::{Attribute, Context, Op};
use crate::shape::{Dim, DtypeSpec, Type};

/// The positions that sparse attention looks at (the "lightning indexer" of DeepSeek-V3.2): inputs (queries
/// `[B, H, L, D]`, keys `[B, 1, S, D]`, weights `[B, L, H]`), output indices `[B, 1, L, min(k, S)]`.
///
/// The score of a position for a query is `sum over heads of weight * max(0, query . key)`; the `k` largest are chosen,
/// among positions up to the query's own first. If no more than `k` were seen, all are, in order. Otherwise they come in
/// the order in which MLX's argpartition leaves them. The inferred type is that of a call with few positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopPositions {
    /// How many.
    pub k: i32,
}

impl Op for TopPositions {
    fn name(&self) -> &'static str {
        "top_positions"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("k", Attribute::Int(self.k.into()))]
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [q, keys, weights] = inputs(given)?;
        if self.k < 1 {
            return Err(ShapeError::Parameter(format!("k={}: at least one position is looked at", self.k)));
        }
        let [batch, heads, length, width] = q.shape.0.as_slice() else {
            return Err(ShapeError::input(0, q, "[batch, heads, L, width]"));
        };
        match keys.shape.0.as_slice() {
            [b, one, _, w] if (b, w) == (batch, width) && one.is(1) => {}
            _ => return Err(ShapeError::input(1, keys, format_args!("[{batch}, 1, S, {width}]"))),
        }
        if weights.shape.0 != [batch.clone(), length.clone(), heads.clone()] {
            return Err(ShapeError::input(2, weights, format_args!("[{batch}, {length}, {heads}]")));
        }
        let dims = [batch.clone(), Dim::from(1), length.clone(), keys.shape.0[2].clone()];
        Ok(vec![Type::new(dims, DtypeSpec::INDEX)])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        let [q, keys, _] = node.inputs() else { return Work::default() };
        let seen = node.dim(keys, 2);
        if i64::try_from(seen).is_ok_and(|seen| seen <= self.k.into()) {
            return Work { launches: 1, ..Work::default() };
        }
        let pairs = node.dim(q, 0) * node.dim(q, 1) * node.dim(q, 2).saturating_mul(seen);
        Work {
            flops: pairs.saturating_mul(2 * node.dim(q, 3) + 3),
            state_read: node.bytes(keys),
            ..node.plain(&[], 6, 0)
        }
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let &[q, keys, weights] = inputs else {
            return Err(Error::Argument("top_positions takes queries, keys and weights".to_owned()));
        };
        let (batch, heads, length, seen) = (q.dim(0)?, q.dim(1)?, q.dim(2)?, keys.dim(2)?);
        if seen <= self.k {
            let all = ops::arange(0.0, seen.into(), 1.0, Dtype::Uint32)?;
            return Ok(vec![all.broadcast_to(&[batch, 1, length, seen])?]);
        }
        let scores = q.matmul(&keys.swapaxes(-1, -2)?)?;
        let scores = scores.maximum(&Array::scalar_as(0.0, scores.dtype())?)?;
        let scores = scores.multiply(&weights.swapaxes(-1, -2)?.expand_dims(&[-1])?)?;
        let mut total = scores.slice_axis(1, 0, 1)?;
        if length == 1 {
            total = scores.sum(&[1], true)?;
        } else {
            // One after another, as mlx-lm does it: a sum over the axis may go in another order.
            for head in 1..heads {
                total = total.add(&scores.slice_axis(1, head, head + 1)?)?;
            }
            let lowest = Array::scalar_as(f64::NEG_INFINITY, total.dtype())?;
            total = causal(length, seen)?.where_(&total, &lowest)?;
        }
        let order = total.argpartition(-self.k, -1)?;
        Ok(vec![order.slice_axis(-1, seen - self.k, seen)?])
    }
}
