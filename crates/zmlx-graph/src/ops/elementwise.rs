use zmlx_mlx::{Array, Dtype, Error, Result};

use crate::cost::{NodeCost, Work};
use crate::infer::{InferContext, ShapeError, inputs, promoted};
use crate::op::{Attribute, Context, Op};
use crate::shape::{DtypeSpec, Type};

/// Arithmetic of two arrays, with broadcasting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binary {
    /// `a + b`
    Add,
    /// `a + b`, of two float16 arrays the nearest number that is finite.
    AddFinite,
    /// `a * b`
    Multiply,
    /// `a / b`
    Divide,
}

impl Op for Binary {
    fn name(&self) -> &'static str {
        match self {
            Self::Add | Self::AddFinite => "add",
            Self::Multiply => "multiply",
            Self::Divide => "divide",
        }
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        let finite = *self == Self::AddFinite;
        finite.then(|| ("float16", Attribute::Text("finite".to_owned()))).into_iter().collect()
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [a, b] = inputs(given)?;
        Ok(vec![broadcast(a, 1, b)?])
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let [a, b] = inputs else {
            return Err(Error::Argument(format!("{} takes two arrays", self.name())));
        };
        Ok(vec![match self {
            Self::AddFinite if a.dtype() == Dtype::Float16 && b.dtype() == Dtype::Float16 => {
                let most = Array::scalar_as(65504.0, Dtype::Float32)?;
                let least = Array::scalar_as(-65504.0, Dtype::Float32)?;
                let sum = a.astype(Dtype::Float32)?.add(&b.astype(Dtype::Float32)?)?;
                sum.maximum(&least)?.minimum(&most)?.astype(Dtype::Float16)?
            }
            Self::Add | Self::AddFinite => a.add(b)?,
            Self::Multiply => a.multiply(b)?,
            Self::Divide => a.divide(b)?,
        }])
    }
}

/// `x + value`, in the dtype of `x`.
#[derive(Debug)]
pub struct AddScalar(pub f64);

impl Op for AddScalar {
    fn name(&self) -> &'static str {
        "add_scalar"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("value", Attribute::Float(self.0))]
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        Ok(vec![x.clone()])
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![inputs[0].add_scalar(self.0)?])
    }
}

/// `x * value`, in the dtype of `x`.
#[derive(Debug)]
pub struct MultiplyScalar(pub f64);

impl Op for MultiplyScalar {
    fn name(&self) -> &'static str {
        "multiply_scalar"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("value", Attribute::Float(self.0))]
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        Ok(vec![x.clone()])
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![inputs[0].multiply_scalar(self.0)?])
    }
}

/// `1 / (1 + e^-x)`.
#[derive(Debug)]
pub struct Sigmoid;

impl Op for Sigmoid {
    fn name(&self) -> &'static str {
        "sigmoid"
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let [x] = inputs(given)?;
        if !x.dtype.is_float() {
            return Err(ShapeError::input(0, x, "floats"));
        }
        Ok(vec![x.clone()])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        node.plain(&[], 1, 4)
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        Ok(vec![inputs[0].sigmoid()?])
    }
}

/// `silu(gate) * up` of inputs (gate, up), where `silu(x) = x * sigmoid(x)`.
#[derive(Debug)]
pub struct SwiGlu;

impl Op for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        gated(given)
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        // Sigmoid, and two products.
        node.plain(&[], 3, 6)
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let [gate, up] = inputs else {
            return Err(Error::Argument("swiglu takes gate and up".to_owned()));
        };
        Ok(vec![gate.multiply(&gate.sigmoid()?)?.multiply(up)?])
    }
}

/// `(1 + u) * (g * sigmoid(alpha * g))` of inputs (gate, up), where `g` is the gate, at most `limit`, and `u` is `up` within
/// `-limit..limit` (GPT-OSS).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClampedSwiGlu {
    /// Steepness of the sigmoid.
    pub alpha: f64,
    /// Where gate and up are cut off.
    pub limit: f64,
}

impl Op for ClampedSwiGlu {
    fn name(&self) -> &'static str {
        "clamped_swiglu"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![("alpha", Attribute::Float(self.alpha)), ("limit", Attribute::Float(self.limit))]
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        gated(given)
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        // The cuts, three; product, sigmoid, product; sum, product.
        node.plain(&[], 8, 11)
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let [gate, up] = inputs else {
            return Err(Error::Argument("clamped_swiglu takes gate and up".to_owned()));
        };
        let scalar = |value: f64| Array::scalar_as(value, gate.dtype());
        let limit = scalar(self.limit)?;
        let gate = gate.minimum(&limit)?;
        let up = up.maximum(&scalar(-self.limit)?)?.minimum(&limit)?;
        let sigmoid = gate.multiply_scalar(self.alpha)?.sigmoid()?;
        Ok(vec![up.add_scalar(1.0)?.multiply(&gate.multiply(&sigmoid)?)?])
    }
}

/// Converts to a fixed dtype, or to that of a second input.
#[derive(Debug)]
pub struct Cast(pub Option<Dtype>);

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        self.0.iter().map(|d| ("dtype", Attribute::Text(d.to_string()))).collect()
    }

    fn infer(&self, _: &InferContext<'_>, given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
        let dtype = match (self.0, given) {
            (Some(dtype), [_]) => DtypeSpec::Fixed(dtype),
            (None, [_, like]) => like.dtype,
            (dtype, _) => {
                let expected = if dtype.is_some() { 1 } else { 2 };
                return Err(ShapeError::Count { expected, found: given.len() });
            }
        };
        Ok(vec![Type { dtype, ..given[0].clone() }])
    }

    fn work(&self, node: &NodeCost<'_>) -> Work {
        let dtype = |t: &Type| t.dtype.resolve(node.context().activation);
        match (node.inputs().first(), node.outputs().first()) {
            (Some(from), Some(to)) if dtype(from) == dtype(to) => Work::default(),
            _ => node.plain(&[], 1, 1),
        }
    }

    fn run(&self, _: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let dtype = match (self.0, inputs) {
            (Some(dtype), _) => dtype,
            (None, [_, like]) => like.dtype(),
            _ => return Err(Error::Argument("cast needs a dtype or an array to take it from".to_owned())),
        };
        Ok(vec![inputs[0].astype(dtype)?])
    }
}

/// What a gated activation of (gate, up) gives.
pub(super) fn gated(given: &[Type]) -> std::result::Result<Vec<Type>, ShapeError> {
    let [gate, up] = inputs(given)?;
    if !gate.dtype.is_float() {
        return Err(ShapeError::input(0, gate, "floats"));
    }
    Ok(vec![broadcast(gate, 1, up)?])
}

/// The type of arithmetic between the two, `b` being input number `number`.
pub(super) fn broadcast(a: &Type, number: usize, b: &Type) -> std::result::Result<Type, ShapeError> {
    let error = || ShapeError::input(number, b, format_args!("a shape that broadcasts with {a}"));
    let shape = a.shape.broadcast(&b.shape).ok_or_else(error)?;
    Ok(Type { shape, dtype: promoted(number, b, a.dtype)? })
}
