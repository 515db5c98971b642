use zmlx_mlx::{Array, Error, Result};

use super::elementwise::gated;
use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError};
use crate::op::{Context, Op};
use crate::shape::Type;

/// `gelu(gate) * up` of inputs (gate, up), in the arithmetic of `mlx.nn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GeGlu {
    /// `0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) * up`, `nn.gelu_approx`.
    Tanh,
    /// `g (1 + erf(g / sqrt(2))) / 2 * up`, `nn.gelu`.
    Erf,
}

impl Op for GeGlu {
    fn name(&self) -> &'static str {
        match self {
            Self::Tanh => "geglu_tanh",
            Self::Erf => "geglu_erf",
        }
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        gated(given)
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        // Kernels of the formula as it stands, and the product with `up`.
        match self {
            Self::Tanh => node.plain(&[], 9, 14),
            Self::Erf => node.plain(&[], 6, 12),
        }
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let [gate, up] = inputs else {
            return Err(Error::Argument(format!("{} takes gate and up", self.name())));
        };
        let gelu = match self {
            Self::Tanh => {
                let cube = gate.power(&Array::scalar_as(3.0, gate.dtype())?)?;
                let inner = gate.add(&cube.multiply_scalar(0.044715)?)?;
                let root = (2.0 / std::f64::consts::PI).sqrt();
                let tanh = inner.multiply_scalar(root)?.tanh()?;
                gate.multiply_scalar(0.5)?.multiply(&tanh.add_scalar(1.0)?)?
            }
            Self::Erf => {
                let root = Array::scalar_as(std::f64::consts::SQRT_2, gate.dtype())?;
                let erf = gate.divide(&root)?.erf()?;
                let two = Array::scalar_as(2.0, gate.dtype())?;
                gate.multiply(&erf.add_scalar(1.0)?)?.divide(&two)?
            }
        };
        Ok(vec![gelu.multiply(up)?])
    }
}
