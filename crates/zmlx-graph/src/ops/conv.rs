use zmlx_mlx::{Array, Error, Result, ops};

use crate::op::{Attribute, Context, Op};
use crate::state::{SlotId, SlotValue};
use crate::weights::WeightId;

/// Puts the last `keep` inputs of a causal convolution before `[batch, length, channels]`, and keeps the new last ones.
#[derive(Debug)]
pub struct ConvStep {
    /// The state.
    pub slot: SlotId,
    /// Positions kept: kernel size - 1.
    pub keep: i32,
}

impl Op for ConvStep {
    fn name(&self) -> &'static str {
        "conv_step"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("keep", Attribute::Int(self.keep.into()))]
    }

    fn slot(&self) -> Option<SlotId> {
        Some(self.slot)
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let x = inputs[0];
        let SlotValue::Conv(state) = context.slot(self.slot) else {
            return Err(Error::Argument("conv_step needs a convolution slot".to_owned()));
        };
        let before = match state.take() {
            Some(before) => before,
            None => ops::zeros(&[x.dim(0)?, self.keep, x.dim(2)?], x.dtype())?,
        };
        let joined = ops::concatenate(&[&before, x], 1)?;
        let length = joined.dim(1)?;
        *state = Some(joined.slice_axis(1, length - self.keep, length)?);
        Ok(vec![joined])
    }
}

/// Depthwise convolution along the length: `[batch, length, channels]` with weight `[channels, kernel, 1]`, no padding.
#[derive(Debug)]
pub struct DepthwiseConv1d {
    /// The kernels.
    pub weight: WeightId,
    /// Added a channel.
    pub bias: Option<WeightId>,
}

impl Op for DepthwiseConv1d {
    fn name(&self) -> &'static str {
        "depthwise_conv1d"
    }

    fn weights(&self) -> Vec<WeightId> {
        [Some(self.weight), self.bias].into_iter().flatten().collect()
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let weight = context.weight(self.weight).dense()?;
        let y = ops::conv1d(inputs[0], &weight, 1, 0, 1, weight.dim(0)?)?;
        Ok(vec![match self.bias {
            Some(bias) => y.add(&context.weight(bias).dense()?)?,
            None => y,
        }])
    }
}
