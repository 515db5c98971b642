use zmlx_mlx::{Array, Result, fast};

use crate::op::{Attribute, Context, Op};
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

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let weight = context.weight(self.weight).dense()?;
        Ok(vec![fast::rms_norm(inputs[0], Some(&weight), self.eps)?])
    }
}
