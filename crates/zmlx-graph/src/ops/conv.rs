use zmlx_mlx::{Array, Error, Result, ops};

use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs, promoted, wrong_slot};
use crate::op::{Attribute, Context, Op};
use crate::shape::{Dim, Type};
use crate::state::{SlotId, SlotKind, SlotValue};
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

    fn infer(
        &self,
        context: &InferContext<'_>,
        given: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let slot = context.slot(self.slot)?;
        if slot.kind != (SlotKind::ConvState { keep: self.keep }) {
            return Err(wrong_slot(slot, format_args!("the last {} inputs of a convolution", self.keep)));
        }
        let [batch, length, channels] = x.shape.0.as_slice() else {
            return Err(ShapeError::input(0, x, "[batch, length, channels]"));
        };
        let of = |n: Dim| Type::new([batch.clone(), n, channels.clone()], x.dtype);
        context.holds(self.slot, vec![of(self.keep.into())])?;
        Ok(vec![of(length.clone() + Dim::from(self.keep))])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        let kept = node.inputs().first().and_then(|x| match x.shape.0.as_slice() {
            [batch, _, channels] => {
                Some(Type::new([batch.clone(), Dim::from(self.keep), channels.clone()], x.dtype))
            }
            _ => None,
        });
        let state = kept.map_or(0, |t| node.bytes(&t));
        Work { state_read: state, state_written: state, ..node.plain(&[], 1, 0) }
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
#[derive(Debug, Clone)]
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

    fn infer(
        &self,
        context: &InferContext<'_>,
        given: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let weight = context.weight(self.weight)?;
        let &[channels, kernel, 1] = weight.shape.as_slice() else {
            return Err(ShapeError::weight(weight, "[channels, kernel, 1]"));
        };
        let [batch, length, width] = x.shape.0.as_slice() else {
            return Err(ShapeError::input(0, x, format_args!("[batch, length, {channels}]")));
        };
        if !width.is(channels.into()) {
            return Err(ShapeError::input(
                0,
                x,
                format_args!("[{batch}, {length}, {channels}] for {}", weight.path),
            ));
        }
        if let Some(bias) = self.bias.map(|b| context.weight(b)).transpose()?
            && bias.shape != [channels]
        {
            return Err(ShapeError::weight(bias, format_args!("[{channels}]")));
        }
        let left = length.clone() - Dim::from(kernel - 1);
        let dtype = promoted(0, x, weight.dtype())?;
        Ok(vec![Type::new([batch.clone(), left, width.clone()], dtype)])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        let kernel =
            node.weights().get(self.weight.0).and_then(|w| w.shape.get(1)).map_or(1, |&k| k.unsigned_abs());
        node.plain(&self.weights(), 1 + u64::from(self.bias.is_some()), 2 * u64::from(kernel))
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
