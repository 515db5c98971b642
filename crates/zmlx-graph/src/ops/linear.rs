use zmlx_mlx::{Array, Result};

use crate::op::{Context, Op};
use crate::weights::WeightId;

/// The token ids of the call, `[batch, length]`.
#[derive(Debug)]
pub struct Tokens;

impl Op for Tokens {
    fn name(&self) -> &'static str {
        "tokens"
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

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![context.weight(self.weight).rows(inputs[0])?])
    }
}

/// `x @ w.T + b`: `[..., in]` to `[..., out]`, dense or quantised.
#[derive(Debug)]
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

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let y = context.weight(self.weight).linear(inputs[0])?;
        Ok(vec![match self.bias {
            Some(bias) => y.add(&context.weight(bias).dense()?)?,
            None => y,
        }])
    }
}
