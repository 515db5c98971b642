use std::sync::OnceLock;

use zmlx_mlx::{Array, Dtype, Error, Result, fast, ops};

use crate::cost::{NodeCost, Work};
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
        rotated(self.dims, given)
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        node.plain(&[], 1, 3)
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let (base, offset) = (Some(self.base), context.position());
        Ok(vec![fast::rope(inputs[0], self.dims, self.traditional, base, self.scale, offset, None)?])
    }
}

/// What a rotary embedding of `dims` dimensions takes and gives.
fn rotated(dims: i32, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
    let [x] = inputs(given)?;
    let room = x.shape.last().and_then(Dim::constant).unwrap_or(0);
    let heads_first = x.shape.rank() == 4 && x.shape.0[2] == Dim::length();
    if !heads_first || !x.dtype.is_float() || room < dims.into() {
        let expected = format!("[batch, heads, L, {} or more] of floats", dims);
        return Err(ShapeError::input(0, x, expected));
    }
    if dims < 2 || dims % 2 != 0 {
        return Err(ShapeError::Parameter(format!("dims={}: pairs are rotated, so it must be even", dims)));
    }
    Ok(vec![x.clone()])
}

/// Frequencies of a rotary embedding that is not a plain power of its base, as wavelengths over 2 pi.
#[derive(Debug, Clone, PartialEq)]
pub enum Frequencies {
    /// Llama 3.1: long wavelengths are stretched by `factor`, those between the two limits by less.
    Llama3 {
        /// Base of the frequencies.
        base: f64,
        /// How much longer the context has become.
        factor: f64,
        /// `original_context` over this is the wavelength from which on all are stretched.
        low_freq_factor: f64,
        /// `original_context` over this is the wavelength up to which none is.
        high_freq_factor: f64,
        /// Positions that the model was first trained with.
        original_context: f64,
    },
    /// A factor for each: `base^(2 i / dims) * factors[i]`.
    Factors {
        /// Base of the frequencies.
        base: f64,
        /// `dims / 2` of them.
        factors: Vec<f32>,
    },
}

impl Frequencies {
    /// `dims / 2` numbers in float32, made by the ops that mlx-lm makes them with.
    pub fn array(&self, dims: i32) -> Result<Array> {
        let scalar = |v: f64| Array::scalar_as(v, Dtype::Float32);
        let plain = |base: f64| {
            let exponents =
                ops::arange(0.0, dims.into(), 2.0, Dtype::Float32)?.divide(&scalar(dims.into())?)?;
            scalar(base)?.power(&exponents)
        };
        match self {
            Self::Factors { base, factors } => {
                plain(*base)?.multiply(&Array::from_slice(factors, &[factors.len() as i32])?)
            }
            Self::Llama3 { base, factor, low_freq_factor: low, high_freq_factor: high, original_context } => {
                let freqs = plain(*base)?;
                let waves = freqs.multiply_scalar(2.0 * std::f64::consts::PI)?;
                let long = waves.greater(&scalar(original_context / low)?)?;
                let short_of_long = waves.less(&scalar(original_context / low)?)?;
                let medium = waves.greater(&scalar(original_context / high)?)?.logical_and(&short_of_long)?;
                let stretched = long.where_(&freqs.multiply_scalar(*factor)?, &freqs)?;
                let smooth = scalar(*original_context)?.divide(&waves)?.subtract(&scalar(*low)?)?;
                let smooth = smooth.divide(&scalar(high - low)?)?;
                let rest = scalar(1.0)?.subtract(&smooth)?.divide(&scalar(*factor)?)?;
                let smoothed = stretched.divide(&rest.add(&smooth)?)?;
                medium.where_(&smoothed, &stretched)
            }
        }
    }
}

/// [`Rope`] with frequencies of its own.
#[derive(Debug)]
pub struct RopeFrequencies {
    /// Leading part of `head_dim` that is rotated.
    pub dims: i32,
    /// Neighbours instead of halves.
    pub traditional: bool,
    /// The frequencies.
    pub frequencies: Frequencies,
    /// Their array, once it was needed.
    pub made: OnceLock<Array>,
}

impl Op for RopeFrequencies {
    fn name(&self) -> &'static str {
        "rope_frequencies"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        let (kind, base) = match &self.frequencies {
            Frequencies::Llama3 { base, .. } => ("llama3", *base),
            Frequencies::Factors { base, .. } => ("factors", *base),
        };
        vec![
            ("dims", Attribute::Int(self.dims.into())),
            ("base", Attribute::Float(base)),
            ("kind", Attribute::Text(kind.to_owned())),
        ]
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        rotated(self.dims, given)
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        node.plain(&[], 1, 3)
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let freqs = match self.made.get() {
            Some(freqs) => freqs.clone(),
            None => {
                let freqs = self.frequencies.array(self.dims)?;
                freqs.eval()?;
                self.made.get_or_init(|| freqs).clone()
            }
        };
        let offset = context.position();
        Ok(vec![fast::rope(inputs[0], self.dims, self.traditional, None, 1.0, offset, Some(&freqs))?])
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
