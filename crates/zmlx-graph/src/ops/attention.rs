use zmlx_mlx::{Array, Error, Result, fast};

use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs, promoted, wrong_slot};
use crate::op::{Attribute, Context, Op};
use crate::shape::{Dim, Type};
use crate::state::{SlotId, SlotKind, SlotValue};

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

    fn work(&self, node: &NodeCost<'_>) -> Work {
        // Both buffers are written in place; the outputs are views of them.
        let bytes = node.inputs().iter().map(|t| node.bytes(t)).sum();
        Work { launches: 2, state_written: bytes, activation_bytes: bytes, ..Work::default() }
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

    fn work(&self, node: &NodeCost<'_>) -> Work {
        let [q, k, v] = node.inputs() else { return Work::default() };
        let (length, seen) = (node.dim(q, 2), node.dim(k, 2));
        // Each query sees the keys up to its own position.
        let hidden = length.saturating_mul(length.saturating_sub(1)) / 2;
        let pairs = node
            .dim(q, 0)
            .saturating_mul(node.dim(q, 1))
            .saturating_mul(length.saturating_mul(seen).saturating_sub(hidden));
        let softmax = 5;
        Work {
            launches: 1,
            flops: pairs.saturating_mul(2 * node.dim(q, 3) + softmax + 2 * node.dim(v, 3)),
            state_read: node.bytes(k).saturating_add(node.bytes(v)),
            activation_bytes: [q].into_iter().chain(node.outputs()).map(|t| node.bytes(t)).sum(),
            ..Work::default()
        }
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
