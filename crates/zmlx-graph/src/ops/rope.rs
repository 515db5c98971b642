//! Rotary position embeddings.

use std::sync::OnceLock;

use zmlx_mlx::{Array, Dtype, Result, fast, ops};

use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs};
use crate::op::{Attribute, Context, Op};
use crate::shape::{Dim, Type};

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
        let mut known =
            vec![("dims", Attribute::Int(self.dims.into())), ("base", Attribute::Float(self.base.into()))];
        if self.scale != 1.0 {
            known.push(("scale", Attribute::Float(self.scale.into())));
        }
        known.extend(pairs(self.traditional));
        known
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

/// Which dimensions are rotated together, where it is not the halves.
fn pairs(traditional: bool) -> Option<(&'static str, Attribute)> {
    traditional.then(|| ("pairs", Attribute::Text("neighbours".to_owned())))
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
    /// YaRN: dimensions that turn less than `beta_slow` times in the original context are stretched by `factor`, those
    /// that turn more than `beta_fast` times are not, and those between go over linearly by their number.
    ///
    /// With `d(n) = dims * ln(original_context / (2 pi n)) / (2 ln base)`, the ramp goes from `floor d(beta_fast)` to
    /// `ceil d(beta_slow)`: whole numbers always, as mlx-lm takes them.
    Yarn {
        /// Base of the frequencies, not 1.
        base: f64,
        /// How much longer the context has become.
        factor: f64,
        /// Positions that the model was first trained with.
        original_context: f64,
        /// From so many turns on a dimension is left alone.
        beta_fast: f64,
        /// Up to so many turns a dimension is stretched whole.
        beta_slow: f64,
    },
    /// A factor for each: `base^(2 i / dims) * factors[i]`.
    Factors {
        /// Base of the frequencies.
        base: f64,
        /// `dims / 2` of them.
        factors: Vec<f32>,
    },
}

/// A number as mlx-lm's arithmetic of frequencies sees it.
fn scalar(value: f64) -> Result<Array> {
    Array::scalar_as(value, Dtype::Float32)
}

/// `base^(2 i / dims)`.
fn powers(base: f64, dims: i32) -> Result<Array> {
    let exponents = ops::arange(0.0, dims.into(), 2.0, Dtype::Float32)?.divide(&scalar(dims.into())?)?;
    scalar(base)?.power(&exponents)
}

impl Frequencies {
    /// The kind in a word, and the base.
    fn kind(&self) -> (&'static str, f64) {
        match self {
            Self::Llama3 { base, .. } => ("llama3", *base),
            Self::Yarn { base, .. } => ("yarn", *base),
            Self::Factors { base, .. } => ("factors", *base),
        }
    }

    /// `dims / 2` numbers in float32, made by the ops that mlx-lm makes them with.
    pub fn array(&self, dims: i32) -> Result<Array> {
        match self {
            Self::Factors { base, factors } => {
                powers(*base, dims)?.multiply(&Array::from_slice(factors, &[factors.len() as i32])?)
            }
            Self::Llama3 { base, factor, low_freq_factor: low, high_freq_factor: high, original_context } => {
                let freqs = powers(*base, dims)?;
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
            Self::Yarn { base, factor, original_context, beta_fast, beta_slow } => {
                let turns = |n: f64| {
                    let ratio = original_context / (n * 2.0 * std::f64::consts::PI);
                    f64::from(dims) * ratio.ln() / (2.0 * base.ln())
                };
                let low = turns(*beta_fast).floor().max(0.0);
                let high = turns(*beta_slow).ceil().min(f64::from(dims - 1));
                // A ramp of no width is a step.
                let high = if low == high { high + 0.001 } else { high };
                let extra = powers(*base, dims)?;
                let inter = extra.multiply_scalar(*factor)?;
                let ramp = ops::arange(0.0, f64::from(dims / 2), 1.0, Dtype::Float32)?;
                let ramp = ramp.subtract(&scalar(low)?)?.divide(&scalar(high - low)?)?;
                let ramp = ramp.maximum(&scalar(0.0)?)?.minimum(&scalar(1.0)?)?;
                let mask = scalar(1.0)?.subtract(&ramp)?;
                let rest = scalar(1.0)?.subtract(&mask)?;
                let mixed = inter.multiply(&mask)?.add(&extra.multiply(&rest)?)?;
                inter.multiply(&extra)?.divide(&mixed)
            }
        }
    }
}

/// [`Rope`] with frequencies of its own; what is rotated is multiplied by `magnitude` first.
#[derive(Debug)]
pub struct RopeFrequencies {
    /// Leading part of `head_dim` that is rotated.
    pub dims: i32,
    /// Neighbours instead of halves.
    pub traditional: bool,
    /// The frequencies.
    pub frequencies: Frequencies,
    /// Multiplies the rotated part, rounded to the dtype of the input; 1 for most.
    pub magnitude: f64,
    /// Their array, once it was needed.
    made: OnceLock<Array>,
}

impl RopeFrequencies {
    /// Of the leading `dims` dimensions, neighbours together if `traditional`.
    pub fn new(dims: i32, traditional: bool, frequencies: Frequencies, magnitude: f64) -> Self {
        Self { dims, traditional, frequencies, magnitude, made: OnceLock::new() }
    }

    /// The input with its leading part made larger.
    fn magnified(&self, x: &Array) -> Result<Array> {
        let width = x.dim(-1)?;
        let part = x.slice_axis(-1, 0, self.dims)?.multiply_scalar(self.magnitude)?;
        if self.dims == width {
            return Ok(part);
        }
        ops::concatenate(&[&part, &x.slice_axis(-1, self.dims, width)?], -1)
    }
}

impl Op for RopeFrequencies {
    fn name(&self) -> &'static str {
        "rope_frequencies"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        let (kind, base) = self.frequencies.kind();
        let mut known = vec![
            ("dims", Attribute::Int(self.dims.into())),
            ("base", Attribute::Float(base)),
            ("kind", Attribute::Text(kind.to_owned())),
        ];
        if self.magnitude != 1.0 {
            known.push(("magnitude", Attribute::Float(self.magnitude)));
        }
        known.extend(pairs(self.traditional));
        known
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        if let Frequencies::Factors { factors, .. } = &self.frequencies
            && factors.len() as i64 * 2 != i64::from(self.dims)
        {
            let message = format!("{} factors for {} rotated dimensions", factors.len(), self.dims);
            return Err(ShapeError::Parameter(message));
        }
        rotated(self.dims, given)
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        node.plain(&[], if self.magnitude == 1.0 { 1 } else { 2 }, 3)
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
        let x = if self.magnitude == 1.0 { inputs[0].clone() } else { self.magnified(inputs[0])? };
        Ok(vec![fast::rope(&x, self.dims, self.traditional, None, 1.0, offset, Some(&freqs))?])
    }
}
