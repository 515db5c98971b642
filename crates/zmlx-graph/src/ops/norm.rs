use zmlx_mlx::{Array, Result, fast};

use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs, promoted};
use crate::op::{Attribute, Context, Op};
use crate::shape::Type;
use crate::weights::WeightId;

/// `x / sqrt(mean(x^2) + eps) * w` over the last axis.
#[derive(Debug)]
pub struct RmsNorm {
    /// The vector.
    pub weight: WeightId,
    /// Added under the root.
    pub eps: f32,
}

impl Op for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("eps", Attribute::Float(self.eps.into()))]
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
        let &[width] = weight.shape.as_slice() else {
            return Err(ShapeError::weight(weight, "a vector [width]"));
        };
        if !x.dtype.is_float() || !x.shape.last().is_some_and(|d| d.is(width.into())) {
            return Err(ShapeError::input(
                0,
                x,
                format_args!("[..., {width}] of floats for {}", weight.path),
            ));
        }
        Ok(vec![Type { dtype: promoted(0, x, weight.dtype())?, ..x.clone() }])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        node.plain(&self.weights(), 1, 4)
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let weight = context.weight(self.weight).dense()?;
        Ok(vec![fast::rms_norm(inputs[0], Some(&weight), self.eps)?])
    }
}

/// `(x - mean(x)) / sqrt(var(x) + eps) * w + b` over the last axis; without `w` it is 1, without `b` 0.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    /// The factors `[width]`.
    pub weight: Option<WeightId>,
    /// What is added, `[width]`.
    pub bias: Option<WeightId>,
    /// Added under the root.
    pub eps: f32,
}

impl Op for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("eps", Attribute::Float(self.eps.into()))]
    }

    fn weights(&self) -> Vec<WeightId> {
        [self.weight, self.bias].into_iter().flatten().collect()
    }

    fn infer(
        &self,
        context: &InferContext<'_>,
        given: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let Some(width) = x.shape.last().filter(|_| x.dtype.is_float()) else {
            return Err(ShapeError::input(0, x, "[..., width] of floats"));
        };
        let mut dtype = x.dtype;
        for id in self.weights() {
            let weight = context.weight(id)?;
            if !matches!(weight.shape.as_slice(), &[n] if width.is(n.into())) {
                return Err(ShapeError::weight(weight, format_args!("a vector [{width}]")));
            }
            dtype = promoted(0, &Type { dtype, ..x.clone() }, weight.dtype())?;
        }
        Ok(vec![Type { dtype, ..x.clone() }])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        node.plain(&self.weights(), 1, 8)
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let weight = self.weight.map(|id| context.weight(id).dense()).transpose()?;
        let bias = self.bias.map(|id| context.weight(id).dense()).transpose()?;
        Ok(vec![fast::layer_norm(inputs[0], weight.as_ref(), bias.as_ref(), self.eps)?])
    }
}

/// `e^x / sum(e^x)` over the last axis.
#[derive(Debug)]
pub struct Softmax {
    /// Whether half-precision inputs are summed in float32.
    pub precise: bool,
}

impl Op for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        if !x.dtype.is_float() {
            return Err(ShapeError::input(0, x, "floats"));
        }
        Ok(vec![x.clone()])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        node.plain(&[], 1, 5)
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![inputs[0].softmax(&[-1], self.precise)?])
    }
}
