use zmlx_mlx::{Array, Error, Result, fast, ops};

use super::attention::{appended, attended, scored};
use super::mla::{causal, lowest};
use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs, wrong_slot};
use crate::op::{Attribute, Context, Op};
use crate::quantized_cache::{Fetched, KvQuantization, Packed};
use crate::shape::{Dim, DtypeSpec, Type};
use crate::state::{SlotId, SlotKind, SlotValue};

/// [`KvAppend`](super::KvAppend) and [`Attention`](super::Attention) in one, over a cache in few bits: inputs queries
/// `[B, heads, L, head_dim]`, keys and values `[B, kv_heads, L, head_dim]` of the call; output `[B, heads, L, head_dim]`.
///
/// The products with keys and values are MLX's quantised ones, in mlx-lm's order of ops. Until the cache is quantised it is
/// attention as usual.
#[derive(Debug, Clone, Copy)]
pub struct QuantizedAttention {
    /// The cache.
    pub slot: SlotId,
    /// Scale of the scores.
    pub scale: f32,
    /// How the cache holds keys and values.
    pub quantization: KvQuantization,
}

impl QuantizedAttention {
    /// Codes, scales and biases of all positions of a value `[B, kv_heads, S, head_dim]`.
    fn packed(&self, t: &Type) -> std::result::Result<[Type; 3], ShapeError> {
        let q = self.quantization;
        let width = t.shape.last().and_then(Dim::constant).unwrap_or(0);
        let group = i64::from(q.group_size);
        if width == 0 || group == 0 || width % group != 0 {
            let message = format!("heads of {width} elements cannot be cut into groups of {group}");
            return Err(ShapeError::Parameter(message));
        }
        let of = |last: i64, dtype| Type { shape: t.shape.with_last(last), dtype };
        let scales = of(width / group, t.dtype);
        Ok([of(width / i64::from(q.per_word()), DtypeSpec::INDEX), scales.clone(), scales])
    }

    fn attend(&self, q: &Array, keys: &Packed, values: &Packed) -> Result<Array> {
        let (batch, heads, length, width) = (q.dim(0)?, q.dim(1)?, q.dim(2)?, q.dim(3)?);
        let (kv_heads, seen) = (keys[0].dim(1)?, keys[0].dim(2)?);
        let repeats = heads / kv_heads;
        let product = |x: &Array, [codes, scales, biases]: &Packed, transpose: bool| {
            let KvQuantization { bits, group_size, .. } = self.quantization;
            let (group, bits) = (Some(group_size), Some(bits));
            if repeats == 1 {
                return ops::quantized_matmul(
                    x,
                    codes,
                    scales,
                    Some(biases),
                    transpose,
                    group,
                    bits,
                    "affine",
                );
            }
            let [codes, scales, biases] =
                [codes.expand_dims(&[-3])?, scales.expand_dims(&[-3])?, biases.expand_dims(&[-3])?];
            ops::quantized_matmul(x, &codes, &scales, Some(&biases), transpose, group, bits, "affine")
        };
        let mut q = q.multiply_scalar(self.scale.into())?;
        if repeats > 1 {
            q = q.reshape(&[batch, kv_heads, repeats, length, width])?;
        }
        let mut scores = product(&q, keys, true)?;
        // One query sees every key, so it needs no mask.
        if length > 1 {
            scores = causal(length, seen)?.where_(&scores, &lowest(scores.dtype())?)?;
        }
        let out = product(&scores.softmax(&[-1], true)?, values, false)?;
        if repeats > 1 { out.reshape(&[batch, heads, length, -1]) } else { Ok(out) }
    }
}

impl Op for QuantizedAttention {
    fn name(&self) -> &'static str {
        "quantized_attention"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        let KvQuantization { bits, group_size, start } = self.quantization;
        vec![
            ("scale", Attribute::Float(self.scale.into())),
            ("bits", Attribute::Int(bits.into())),
            ("group_size", Attribute::Int(group_size.into())),
            ("start", Attribute::Int(start.into())),
        ]
    }

    fn slot(&self) -> Option<SlotId> {
        Some(self.slot)
    }

    fn infer(
        &self,
        context: &InferContext<'_>,
        given: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        let [q, keys, values] = inputs(given)?;
        let slot = context.slot(self.slot)?;
        if slot.kind != SlotKind::QuantizedKvCache(self.quantization) {
            return Err(wrong_slot(slot, "keys and values in few bits"));
        }
        let [keys, values] = appended(1, keys, values)?;
        let made = attended(&[q.clone(), keys.clone(), values.clone()])?;
        context.holds(self.slot, [self.packed(&keys)?, self.packed(&values)?].concat())?;
        Ok(made)
    }

    /// As of a cache that is quantised.
    fn work(&self, node: &NodeCost<'_>) -> Work {
        let [q, keys, values] = node.inputs() else { return Work::default() };
        let Ok([all_keys, all_values]) = appended(1, keys, values) else { return Work::default() };
        let bytes = |t: &Type| self.packed(t).map_or(0, |p| p.iter().map(|t| node.bytes(t)).sum());
        let seen = [q.clone(), all_keys.clone(), all_values.clone()];
        let scored = scored(&NodeCost::new(node.context(), node.weights(), &seen, node.outputs()), None);
        Work {
            // Two quantisations, six updates, the scale, two products, the softmax; the mask of several queries is five more.
            launches: if node.dim(q, 2) > 1 { 17 } else { 12 },
            state_read: bytes(&all_keys) + bytes(&all_values),
            state_written: bytes(keys) + bytes(values),
            ..scored
        }
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let &[q, keys, values] = inputs else {
            return Err(Error::Argument("quantized_attention takes queries, keys and values".to_owned()));
        };
        let SlotValue::Quantized(cache) = context.slot(self.slot) else {
            return Err(Error::Argument("quantized_attention needs a slot of few bits".to_owned()));
        };
        Ok(vec![match cache.append(keys, values)? {
            Fetched::Quantized(k, v) => self.attend(q, &k, &v)?,
            Fetched::Plain(k, v) => {
                let mode = if q.dim(2)? == 1 { "" } else { "causal" };
                fast::scaled_dot_product_attention(q, &k, &v, self.scale, mode, None, None)?
            }
        }])
    }
}
