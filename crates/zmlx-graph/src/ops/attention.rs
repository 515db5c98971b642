use zmlx_mlx::{Array, Error, Result, fast};

use crate::infer::{InferContext, ShapeError, inputs, promoted, wrong_slot};
use crate::op::{Attribute, Context, Op};
use crate::shape::{Dim, Type};
use crate::state::{SlotId, SlotKind, SlotValue};

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

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        let room = x.shape.last().and_then(Dim::constant).unwrap_or(0);
        let heads_first = x.shape.rank() == 4 && x.shape.0[2] == Dim::length();
        if !heads_first || !x.dtype.is_float() || room < self.dims.into() {
            let expected = format!("[batch, heads, L, {} or more] of floats", self.dims);
            return Err(ShapeError::input(0, x, expected));
        }
        if self.dims < 2 || self.dims % 2 != 0 {
            return Err(ShapeError::Parameter(format!(
                "dims={}: pairs are rotated, so it must be even",
                self.dims
            )));
        }
        Ok(vec![x.clone()])
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

    fn infer(
        &self,
        context: &InferContext<'_>,
        given: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        let [keys, values] = inputs(given)?;
        let slot = context.slot(self.slot)?;
        if slot.kind != SlotKind::KvCache {
            return Err(wrong_slot(slot, "keys and values"));
        }
        let heads_first = |t: &Type| t.shape.rank() == 4 && t.shape.0[2] == Dim::length();
        if !heads_first(keys) {
            return Err(ShapeError::input(0, keys, "[batch, kv_heads, L, head_dim]"));
        }
        if !heads_first(values) || keys.shape.0[..2] != values.shape.0[..2] {
            let [batch, heads, length] = [0, 1, 2].map(|i| &keys.shape.0[i]);
            let expected = format!("[{batch}, {heads}, {length}, head_dim], as the keys are {keys}");
            return Err(ShapeError::input(1, values, expected));
        }
        let all = [keys, values].map(|t| {
            let mut t = t.clone();
            t.shape.0[2] = Dim::seen();
            t
        });
        context.holds(self.slot, all.to_vec())?;
        Ok(all.to_vec())
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

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [q, k, v] = inputs(given)?;
        let [batch, heads, _, width] = q.shape.0.as_slice() else {
            return Err(ShapeError::input(0, q, "[batch, heads, L, head_dim]"));
        };
        let groups = |of: &Dim| Some((heads.constant()?, of.constant()?));
        let fits = match k.shape.0.as_slice() {
            [b, kv_heads, _, w] if (b, w) == (batch, width) => {
                heads == kv_heads || groups(kv_heads).is_some_and(|(h, g)| g > 0 && h % g == 0)
            }
            _ => false,
        };
        if !fits {
            let expected = format!(
                "[{batch}, kv_heads, S, {width}] with kv_heads a divisor of {heads}, for queries {q}"
            );
            return Err(ShapeError::input(1, k, expected));
        }
        if v.shape.rank() != 4 || v.shape.0[..3] != k.shape.0[..3] {
            return Err(ShapeError::input(2, v, format_args!("values for keys {k}")));
        }
        let dtype = promoted(0, q, k.dtype)?;
        let dtype = promoted(2, v, dtype)?;
        Ok(vec![Type { shape: q.shape.with_last(v.shape.0[3].clone()), dtype }])
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
