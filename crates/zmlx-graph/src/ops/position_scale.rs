use zmlx_mlx::{Array, Dtype, Result, ops};

use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs};
use crate::op::{Attribute, Context, Op};
use crate::shape::{Dim, Type};

/// `x * (1 + beta * ln(1 + floor(position / original_context)))` of `[batch, heads, length, head_dim]`: queries grow with
/// the stretch of the context that they stand in (Llama 4, Ministral 3).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PositionScale {
    /// How fast.
    pub beta: f64,
    /// Positions that the model was first trained with; below, nothing changes.
    pub original_context: f64,
}

impl PositionScale {
    /// The factors of `count` positions from `first` on, in float32, by the ops that mlx-lm makes them with.
    ///
    /// # Errors
    /// Those of MLX.
    pub fn factors(&self, first: i32, count: i32) -> Result<Array> {
        let scalar = |v: f64| Array::scalar_as(v, Dtype::Float32);
        let (first, last) = (f64::from(first), f64::from(first) + f64::from(count));
        let positions = ops::arange(first, last, 1.0, Dtype::Float32)?;
        let stretch = positions.divide(&scalar(self.original_context)?)?.floor()?;
        let logarithm = scalar(1.0)?.add(&stretch)?.log()?;
        scalar(1.0)?.add(&scalar(self.beta)?.multiply(&logarithm)?)
    }
}

impl Op for PositionScale {
    fn name(&self) -> &'static str {
        "position_scale"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![
            ("beta", Attribute::Float(self.beta)),
            ("original_context", Attribute::Float(self.original_context)),
        ]
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        if x.shape.rank() != 4 || x.shape.0[2] != Dim::length() || !x.dtype.is_float() {
            return Err(ShapeError::input(0, x, "[batch, heads, L, head_dim] of floats"));
        }
        Ok(vec![x.clone()])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        // The factors take five small ops.
        node.plain(&[], 6, 1)
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let x = inputs[0];
        let factors = self.factors(context.position(), x.dim(2)?)?.astype(x.dtype())?;
        Ok(vec![x.multiply(&factors.expand_dims(&[-1])?)?])
    }
}
