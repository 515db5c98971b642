//! What a kernel means: an evaluator in double precision, the reference that backends are tested against.

pub(crate) mod number;
mod philox;
mod run;

use crate::error::{LangError, Result};
use crate::kernel::Kernel;
use crate::program::Program;
use crate::{Dtype, shape};

/// Elements, row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum Data {
    /// Values of a float dtype. They may be finer than the dtype: the evaluator takes them as they are.
    Float(Vec<f64>),
    /// Values of an integer dtype, or booleans as 0 and 1; exact.
    Int(Vec<i128>),
}

/// An array for the evaluator.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Axes, outermost first.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: Dtype,
    /// As many elements as the shape has.
    pub data: Data,
}

impl Tensor {
    /// An array of a float dtype.
    pub fn float(shape: &[usize], dtype: Dtype, data: Vec<f64>) -> Self {
        Self { shape: shape.to_vec(), dtype, data: Data::Float(data) }
    }

    /// An array of an integer dtype or of booleans.
    pub fn int(shape: &[usize], dtype: Dtype, data: Vec<i128>) -> Self {
        Self { shape: shape.to_vec(), dtype, data: Data::Int(data) }
    }

    /// An `f32` array.
    pub fn f32(shape: &[usize], data: &[f64]) -> Self {
        Self::float(shape, Dtype::F32, data.to_vec())
    }

    /// The elements as doubles.
    pub fn to_f64(&self) -> Vec<f64> {
        match &self.data {
            Data::Float(v) => v.clone(),
            Data::Int(v) => v.iter().map(|v| *v as f64).collect(),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match &self.data {
            Data::Float(v) => v.len(),
            Data::Int(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Shapes that inputs do not decide.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shapes {
    /// The domain; the inputs' broadcast when `None`.
    pub domain: Option<Vec<usize>>,
    /// For each output, its shape if it is scattered to and has no like-input. May be shorter than the outputs.
    pub outputs: Vec<Option<Vec<usize>>>,
}

/// Where floats are rounded. Integers are exact and wrap in their type always; explicit casts (and conversions of
/// integers to floats) round always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rounding {
    /// Nowhere else: double precision throughout, literals included.
    #[default]
    Exact,
    /// Outputs, to their dtype.
    Storage,
    /// Inputs, literals and each operation to `f32`, outputs to their dtype: the meaning of a strict kernel. Sums and
    /// products along the row are accumulated in double precision and rounded once; functions such as `exp` are
    /// correctly rounded up to the double-precision library's error.
    EachOperation,
}

/// Evaluates a kernel in double precision: [`evaluate_with`] and [`Rounding::Exact`].
pub fn evaluate(kernel: &Kernel, inputs: &[Tensor], call: &Shapes) -> Result<Vec<Tensor>> {
    evaluate_with(kernel, inputs, call, Rounding::Exact)
}

/// Evaluates a kernel for inputs given in its order; scalars with defaults must be given too.
///
/// # Errors
/// Those of [`Kernel::program`], [`shape::domain`] and [`shape::output_shapes`]; [`LangError::Shape`] for an input
/// whose elements are not as many as its shape says or not of its dtype's kind or range; [`LangError::OutOfBounds`]
/// for a checked coordinate outside its array.
pub fn evaluate_with(
    kernel: &Kernel,
    inputs: &[Tensor],
    call: &Shapes,
    rounding: Rounding,
) -> Result<Vec<Tensor>> {
    let dtypes: Vec<Dtype> = inputs.iter().map(|i| i.dtype).collect();
    evaluate_program(&kernel.program(&dtypes)?, inputs, call, rounding)
}

/// Evaluates a typed kernel, with the errors of [`evaluate_with`].
pub fn evaluate_program(
    program: &Program,
    inputs: &[Tensor],
    call: &Shapes,
    rounding: Rounding,
) -> Result<Vec<Tensor>> {
    let shapes: Vec<Vec<usize>> = inputs.iter().map(|i| i.shape.clone()).collect();
    let domain = shape::domain(program, &shapes, call.domain.as_deref())?;
    for (decl, input) in program.inputs.iter().zip(inputs) {
        if decl.dtype != input.dtype {
            let (kernel, name) = (program.name.clone(), decl.name.clone());
            return Err(LangError::InputDtype {
                kernel,
                input: name,
                expected: decl.dtype,
                found: input.dtype,
            });
        }
        check(input).map_err(|what| LangError::Shape {
            kernel: program.name.clone(),
            what: format!("input {}: {what}", decl.name),
        })?;
    }
    let out_shapes = shape::output_shapes(program, &domain, &shapes, &call.outputs)?;
    run::Run::new(program, inputs, &domain, rounding).all(&out_shapes)
}

fn check(input: &Tensor) -> std::result::Result<(), String> {
    let count = input.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    if count != Some(input.len()) {
        return Err(format!("{} elements for shape {:?}", input.len(), input.shape));
    }
    match &input.data {
        Data::Float(_) if !input.dtype.is_float() => Err(format!("float elements for dtype {}", input.dtype)),
        Data::Int(_) if input.dtype.is_float() => Err(format!("integer elements for dtype {}", input.dtype)),
        Data::Int(v) => {
            let (least, largest) = number::int_range(input.dtype);
            match v.iter().find(|v| **v < least || **v > largest) {
                Some(v) => Err(format!("{v} is not a value of dtype {}", input.dtype)),
                None => Ok(()),
            }
        }
        Data::Float(_) => Ok(()),
    }
}
