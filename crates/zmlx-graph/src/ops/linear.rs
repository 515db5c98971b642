use zmlx_mlx::{Array, Result};

use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs, promoted};
use crate::op::{Context, Op};
use crate::shape::{Dim, DtypeSpec, Type};
use crate::weights::WeightId;

/// The token ids of the call, `[batch, length]`.
#[derive(Debug)]
pub struct Tokens;

impl Op for Tokens {
    fn name(&self) -> &'static str {
        "tokens"
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [] = inputs::<0>(given)?;
        Ok(vec![Type::new([Dim::batch(), Dim::length()], DtypeSpec::INDEX)])
    }

    fn work(&self, _: &NodeCost<'_>) -> Work {
        Work::default()
    }

    fn run(&self, context: &mut Context<'_>, _: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![context.tokens().clone()])
    }
}

/// Rows of a matrix `[vocabulary, width]`: ids `[...]` to `[..., width]`.
#[derive(Debug)]
pub struct Embedding {
    /// The matrix.
    pub weight: WeightId,
}

impl Op for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![self.weight]
    }

    fn infer(
        &self,
        context: &InferContext<'_>,
        given: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        let [ids] = inputs(given)?;
        let weight = context.weight(self.weight)?;
        let &[_, width] = weight.shape.as_slice() else {
            return Err(ShapeError::weight(weight, "[vocabulary, width]"));
        };
        if !ids.dtype.is_index() {
            return Err(ShapeError::input(0, ids, "integers"));
        }
        let mut shape = ids.shape.clone();
        shape.0.push(width.into());
        Ok(vec![Type { shape, dtype: weight.dtype() }])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        let rows = node.inputs().first().map_or(0, |ids| node.elements(ids));
        // A quantised matrix gives packed words, scales and biases one by one, which are then unpacked.
        let tensors = node.weights().get(self.weight.0).map_or(1, |w| w.tensors().len() as u64);
        let launches = if tensors > 1 { tensors + 1 } else { 1 };
        Work { weight_bytes: node.rows(self.weight, rows), ..node.plain(&[], launches, 1) }
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![context.weight(self.weight).rows(inputs[0])?])
    }
}

/// `x @ w.T + b`: `[..., in]` to `[..., out]`, dense or quantised.
#[derive(Debug, Clone)]
pub struct Linear {
    /// The matrix `[out, in]`.
    pub weight: WeightId,
    /// The vector `[out]`.
    pub bias: Option<WeightId>,
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn weights(&self) -> Vec<WeightId> {
        [Some(self.weight), self.bias].into_iter().flatten().collect()
    }

    fn infer(
        &self,
        context: &InferContext<'_>,
        given: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let weight = context.weight(self.weight)?;
        let &[out, input] = weight.shape.as_slice() else {
            return Err(ShapeError::weight(weight, "a matrix [out, in]"));
        };
        if !x.shape.last().is_some_and(|d| d.is(input.into())) {
            return Err(ShapeError::input(
                0,
                x,
                format_args!("[..., {input}] for {} {:?}", weight.path, weight.shape),
            ));
        }
        let mut dtype = promoted(0, x, weight.dtype())?;
        if let Some(bias) = self.bias {
            let bias = context.weight(bias)?;
            if bias.shape != [out] {
                return Err(ShapeError::weight(bias, format_args!("[{out}]")));
            }
            dtype = promoted(0, &Type { shape: x.shape.clone(), dtype }, bias.dtype())?;
        }
        Ok(vec![Type { shape: x.shape.with_last(out), dtype }])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        let inner = node.inputs().first().and_then(|x| x.shape.last()?.constant()).unwrap_or(0);
        let launches = 1 + u64::from(self.bias.is_some());
        node.plain(&self.weights(), launches, 2 * inner.unsigned_abs())
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let weight = context.weight(self.weight);
        let y =
            if context.unpacks() { weight.linear_of_many(inputs[0])? } else { weight.linear(inputs[0])? };
        Ok(vec![match self.bias {
            Some(bias) => y.add(&context.weight(bias).dense()?)?,
            None => y,
        }])
    }
}
