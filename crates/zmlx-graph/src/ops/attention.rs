use zmlx_mlx::{Array, Dtype, Error, Result, fast, ops};

use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs, promoted, wrong_slot};
use crate::op::{Attribute, Context, Op};
use crate::shape::{Dim, Type};
use crate::state::{SlotId, SlotValue};
use crate::weights::WeightId;

/// Appends keys and values `[batch, kv_heads, length, head_dim]` to a cache; gives those of all positions, which types
/// call S. A cache for a sliding window gives those that the call's queries see: S is then the most that it can be.
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
        if !slot.kind.holds_keys() {
            return Err(wrong_slot(slot, "keys and values"));
        }
        let all = appended(0, keys, values)?;
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
        attended(given)
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        scored(node, None)
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

/// The types of all keys and values, when those of a call are inputs `first` and the one after it.
pub(super) fn appended(
    first: usize,
    keys: &Type,
    values: &Type,
) -> std::result::Result<[Type; 2], ShapeError> {
    let heads_first = |t: &Type| t.shape.rank() == 4 && t.shape.0[2] == Dim::length();
    if !heads_first(keys) {
        return Err(ShapeError::input(first, keys, "[batch, kv_heads, L, head_dim]"));
    }
    if !heads_first(values) || keys.shape.0[..2] != values.shape.0[..2] {
        let [batch, heads, length] = [0, 1, 2].map(|i| &keys.shape.0[i]);
        let expected = format!("[{batch}, {heads}, {length}, head_dim], as the keys are {keys}");
        return Err(ShapeError::input(first + 1, values, expected));
    }
    Ok([keys, values].map(|t| {
        let mut t = t.clone();
        t.shape.0[2] = Dim::seen();
        t
    }))
}

/// What attention takes and gives.
pub(super) fn attended(given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
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
        let expected =
            format!("[{batch}, kv_heads, S, {width}] with kv_heads a divisor of {heads}, for queries {q}");
        return Err(ShapeError::input(1, k, expected));
    }
    if v.shape.rank() != 4 || v.shape.0[..3] != k.shape.0[..3] {
        return Err(ShapeError::input(2, v, format_args!("values for keys {k}")));
    }
    let dtype = promoted(0, q, k.dtype)?;
    let dtype = promoted(2, v, dtype)?;
    Ok(vec![Type { shape: q.shape.with_last(v.shape.0[3].clone()), dtype }])
}

/// The work of attention whose queries see so many positions.
pub(super) fn scored(node: &NodeCost<'_>, window: Option<i32>) -> Work {
    let [q, k, v] = node.inputs() else { return Work::default() };
    let (length, seen) = (node.dim(q, 2), node.dim(k, 2));
    let before = seen.saturating_sub(length);
    let window = window.map_or(u64::MAX, |w| w.max(1) as u64);
    // Each query sees the keys up to its own position, of which the window leaves some.
    let full = length.saturating_sub(window.saturating_sub(before)).min(length);
    let growing = length - full;
    let keys = growing
        .saturating_mul(before)
        .saturating_add(growing.saturating_mul(growing + 1) / 2)
        .saturating_add(full.saturating_mul(window.min(seen)));
    let pairs = node.dim(q, 0).saturating_mul(node.dim(q, 1)).saturating_mul(keys);
    let softmax = 5;
    let held = |t: &Type| {
        let kept = window.saturating_sub(1).saturating_add(length).min(seen);
        node.bytes(t) / seen.max(1) * kept
    };
    Work {
        launches: 1,
        flops: pairs.saturating_mul(2 * node.dim(q, 3) + softmax + 2 * node.dim(v, 3)),
        state_read: held(k).saturating_add(held(v)),
        activation_bytes: [q].into_iter().chain(node.outputs()).map(|t| node.bytes(t)).sum(),
        ..Work::default()
    }
}

/// [`Attention`] of which a query sees the last `window` positions only, its own included, or to whose scores each head adds
/// one of its own that takes part in the softmax and has no value (a sink): `softmax([sink, scale * q @ k.T])` without its
/// first column, times `v`.
#[derive(Debug)]
pub struct WindowAttention {
    /// Scale of the scores.
    pub scale: f32,
    /// How many positions a query sees; all before it if absent.
    pub window: Option<i32>,
    /// The sinks, `[heads]`.
    pub sinks: Option<WeightId>,
}

impl WindowAttention {
    /// Which of the keys each of the last `length` positions sees, `[length, keys]`; none where their order says it.
    fn mask(window: i32, length: i32, keys: i32) -> Result<Option<Array>> {
        if keys <= window {
            return Ok(None);
        }
        let numbers = |from: i32, shape: &[i32]| {
            ops::arange(from.into(), keys.into(), 1.0, Dtype::Int32)?.reshape(shape)
        };
        let (query, key) = (numbers(keys - length, &[length, 1])?, numbers(0, &[1, keys])?);
        let first = query.subtract(&Array::scalar_as(window.into(), Dtype::Int32)?)?;
        query.greater_equal(&key)?.logical_and(&key.greater(&first)?).map(Some)
    }
}

impl Op for WindowAttention {
    fn name(&self) -> &'static str {
        "window_attention"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        let mut known = vec![("scale", Attribute::Float(self.scale.into()))];
        known.extend(self.window.map(|w| ("window", Attribute::Int(w.into()))));
        known
    }

    fn weights(&self) -> Vec<WeightId> {
        self.sinks.into_iter().collect()
    }

    fn infer(
        &self,
        context: &InferContext<'_>,
        given: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        let made = attended(given)?;
        if self.window.is_some_and(|w| w < 1) {
            return Err(ShapeError::Parameter(format!("window={:?}: must be 1 or more", self.window)));
        }
        if let Some(sinks) = self.sinks {
            let (weight, heads) = (context.weight(sinks)?, &given[0].shape.0[1]);
            if weight.shape.len() != 1 || !heads.is(weight.shape[0].into()) {
                return Err(ShapeError::weight(weight, format_args!("[{heads}], one a head")));
            }
        }
        Ok(made)
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        let mask = if self.window.is_some() && node.inputs().first().is_some_and(|q| node.dim(q, 2) > 1) {
            4
        } else {
            0
        };
        let work = scored(node, self.window);
        let weight_bytes = self.sinks.map_or(0, |s| node.weight(s));
        Work { launches: work.launches + mask, weight_bytes, ..work }
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let [q, k, v] = inputs else {
            return Err(Error::Argument("window_attention takes queries, keys and values".to_owned()));
        };
        let length = q.dim(2)?;
        let mask = match self.window {
            Some(window) => Self::mask(window, length, k.dim(2)?)?,
            None => None,
        };
        let sinks = self.sinks.map(|s| context.weight(s).dense()).transpose()?;
        // One query sees every key, so it needs no mask.
        let mode = if length == 1 || mask.is_some() { "" } else { "causal" };
        let sinks = sinks.as_ref();
        Ok(vec![fast::scaled_dot_product_attention(q, k, v, self.scale, mode, mask.as_ref(), sinks)?])
    }
}
