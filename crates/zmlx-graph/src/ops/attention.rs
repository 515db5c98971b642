use zmlx_mlx::{Array, Error, Result, fast};

use crate::op::{Attribute, Context, Op};
use crate::state::{SlotId, SlotValue};

/// Rotary position embedding of `[batch, heads, length, head_dim]` from the current position on, halves rotated.
#[derive(Debug)]
pub struct Rope {
    /// Leading part of `head_dim` that is rotated.
    pub dims: i32,
    /// Base of the frequencies.
    pub base: f32,
    /// Neighbours instead of halves.
    pub traditional: bool,
    /// Scale of the positions.
    pub scale: f32,
}

impl Op for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("dims", Attribute::Int(self.dims.into())), ("base", Attribute::Float(self.base.into()))]
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let (base, offset) = (Some(self.base), context.position());
        Ok(vec![fast::rope(inputs[0], self.dims, self.traditional, base, self.scale, offset, None)?])
    }
}

/// Appends keys and values `[batch, kv_heads, length, head_dim]` to a cache; gives those of all positions.
#[derive(Debug)]
pub struct KvAppend {
    /// The cache.
    pub slot: SlotId,
}

impl Op for KvAppend {
    fn name(&self) -> &'static str {
        "kv_append"
    }

    fn slot(&self) -> Option<SlotId> {
        Some(self.slot)
    }

    fn outputs(&self) -> usize {
        2
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let SlotValue::Kv(cache) = context.slot(self.slot) else {
            return Err(Error::Argument("kv_append needs a key/value slot".to_owned()));
        };
        let (keys, values) = cache.append(inputs[0], inputs[1])?;
        Ok(vec![keys, values])
    }
}

/// `softmax(scale * q @ k.T) @ v`, causal; query heads in groups that share a key/value head.
#[derive(Debug)]
pub struct Attention {
    /// Scale of the scores.
    pub scale: f32,
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("scale", Attribute::Float(self.scale.into()))]
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let [q, k, v] = inputs else {
            return Err(Error::Argument("attention takes queries, keys and values".to_owned()));
        };
        // One query sees every key, so it needs no mask.
        let mode = if q.dim(2)? == 1 { "" } else { "causal" };
        Ok(vec![fast::scaled_dot_product_attention(q, k, v, self.scale, mode, None, None)?])
    }
}
