//! Inputs that an entry is tested with.

use zmlx_lang::Dtype;

/// What a call decides besides its inputs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Setting {
    /// The shape that expressions run over, where inputs do not decide it.
    pub domain: Option<Vec<i32>>,
    /// For each output, its shape if it is scattered to.
    pub outputs: Vec<Option<Vec<i32>>>,
    /// Numbers that decide shapes or code, for kernels written by hand.
    pub parameters: Vec<i64>,
}

/// Elements of a test input.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Of the float dtype under test, rounded to it.
    Float(Vec<f64>),
    /// `f32`, whatever dtype is under test.
    F32(Vec<f64>),
    /// Integers or booleans of this dtype.
    Int(Dtype, Vec<i64>),
}

/// A test input.
#[derive(Debug, Clone, PartialEq)]
pub struct Input {
    /// Its shape.
    pub shape: Vec<i32>,
    /// Its elements, row-major.
    pub values: Values,
}

/// One call to test an entry with.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// What is special about it.
    pub label: String,
    /// One for each of the kernel's inputs, scalars included.
    pub inputs: Vec<Input>,
    /// Shapes and parameters.
    pub setting: Setting,
    /// Whether the gradient is compared with that of the reference.
    pub autograd: bool,
    /// Whether it is compared with finite differences: not where values are at a kink, infinite or NaN.
    pub differences: bool,
    /// Whether the reference takes this call: MLX refuses some reductions of nothing.
    pub reference: bool,
    /// What tolerances are multiplied with.
    pub slack: f64,
}

impl Input {
    /// Number of elements of a shape.
    fn count(shape: &[i32]) -> usize {
        shape.iter().map(|d| usize::try_from(*d).unwrap_or(0)).product()
    }

    /// Floats that look random, in `-size..size`, the same in every run.
    pub fn random(shape: &[i32], size: f64, seed: u64) -> Self {
        let unit = (0..Self::count(shape)).map(|i| size * (2.0 * unit(seed, i as u64) - 1.0));
        Self { shape: shape.to_vec(), values: Values::Float(unit.collect()) }
    }

    /// Floats by their number.
    pub fn floats(shape: &[i32], f: impl Fn(usize) -> f64) -> Self {
        Self { shape: shape.to_vec(), values: Values::Float((0..Self::count(shape)).map(f).collect()) }
    }

    /// Integers or booleans by their number.
    pub fn ints(dtype: Dtype, shape: &[i32], f: impl Fn(usize) -> i64) -> Self {
        Self { shape: shape.to_vec(), values: Values::Int(dtype, (0..Self::count(shape)).map(f).collect()) }
    }

    /// Integers in `0..below` that look random.
    pub fn places(shape: &[i32], below: i64, seed: u64) -> Self {
        Self::ints(Dtype::I32, shape, |i| (unit(seed, i as u64) * below as f64) as i64)
    }

    /// Booleans, true for about this part.
    pub fn mask(shape: &[i32], part: f64, seed: u64) -> Self {
        Self::ints(Dtype::Bool, shape, |i| i64::from(unit(seed, i as u64) < part))
    }

    /// A scalar of `f32`.
    pub fn scalar(value: f64) -> Self {
        Self { shape: vec![1], values: Values::F32(vec![value]) }
    }

    /// The same with values of `f32` whatever is under test.
    pub fn f32(mut self) -> Self {
        if let Values::Float(v) = self.values {
            self.values = Values::F32(v);
        }
        self
    }

    /// A scalar integer.
    pub fn int(dtype: Dtype, value: i64) -> Self {
        Self::ints(dtype, &[1], |_| value)
    }

    /// The same with each float changed.
    pub fn map(mut self, f: impl Fn(f64) -> f64) -> Self {
        if let Values::Float(v) | Values::F32(v) = &mut self.values {
            v.iter_mut().for_each(|v| *v = f(*v));
        }
        self
    }
}

/// In `0..1`, by a seed and a number: the finaliser of the SplitMix64 generator.
fn unit(seed: u64, i: u64) -> f64 {
    let mut z = ((seed << 32) ^ i).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

impl Case {
    /// A case with everything checked.
    pub fn new(label: impl Into<String>, inputs: Vec<Input>) -> Self {
        Self {
            label: label.into(),
            inputs,
            setting: Setting::default(),
            autograd: true,
            differences: true,
            reference: true,
            slack: 1.0,
        }
    }

    pub(super) fn domain(mut self, shape: &[i32]) -> Self {
        self.setting.domain = Some(shape.to_vec());
        self
    }

    pub(super) fn output(mut self, shape: &[i32]) -> Self {
        self.setting.outputs.push(Some(shape.to_vec()));
        self
    }

    pub(super) fn slack(mut self, slack: f64) -> Self {
        self.slack = slack;
        self
    }

    /// At a kink: no finite differences.
    pub(super) fn kink(mut self) -> Self {
        self.differences = false;
        self
    }

    /// Values only, no gradients.
    pub(super) fn forward_only(mut self) -> Self {
        self.differences = false;
        self.autograd = false;
        self
    }

    /// Without the reference, which refuses the call.
    pub(super) fn alone(mut self) -> Self {
        self.reference = false;
        self.forward_only()
    }

    /// The case of a gradient with respect to input `n`: one more input, of its shape.
    pub(super) fn with_cotangent(mut self, n: usize) -> Self {
        if let Some(input) = self.inputs.get(n) {
            self.inputs.push(Input::random(&input.shape, 1.0, 77));
        }
        // The reference's gradient has 0 * inf at special values, and none of its own at kinks.
        self.reference &= self.autograd;
        self.autograd &= self.differences;
        self
    }
}

/// Shapes that row and element kernels are tested with: one element, one row, odd sizes, more axes, long rows.
const SHAPES: [&[i32]; 5] = [&[1, 1], &[1, 7], &[5, 33], &[2, 3, 17], &[3, 2500]];

/// A case for each of the usual shapes, and an empty one.
pub(super) fn shapes(inputs: impl Fn(&[i32]) -> Vec<Input>) -> Vec<Case> {
    let mut cases: Vec<Case> = SHAPES.iter().map(|s| Case::new(format!("{s:?}"), inputs(s))).collect();
    cases.push(Case::new("empty", inputs(&[0, 5])));
    cases
}

/// One row that is long enough for several threads. References add it up in f32.
pub(super) fn long_row(inputs: impl Fn(&[i32]) -> Vec<Input>) -> Case {
    let mut case = Case::new("a long row", inputs(&[1, 150_001])).slack(20.0);
    case.differences = false;
    case
}

/// One element input of the usual shapes and of values up to `size`, and special values.
pub(super) fn unary(size: f64) -> Vec<Case> {
    let mut cases = shapes(|s| vec![Input::random(s, size, 1)]);
    cases.push(Case::new("0-d", vec![Input::random(&[], size, 2)]));
    cases.push(special(f64::NEG_INFINITY));
    cases
}

/// Zeros, large values, infinities, NaN; the lowest is given.
pub(super) fn special(lowest: f64) -> Case {
    let values = [0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, 80.0, -80.0, 1000.0, -1000.0, f64::INFINITY];
    let at = move |i: usize| match i {
        12 => lowest,
        13 => f64::NAN,
        _ => values[i % values.len()],
    };
    Case::new("special values", vec![Input::floats(&[14], at)]).forward_only()
}

/// `value` at these places, otherwise as before.
pub(super) fn planted(mut input: Input, places: &[usize], value: f64) -> Input {
    if let Values::Float(v) | Values::F32(v) = &mut input.values {
        places.iter().for_each(|p| v[*p] = value);
    }
    input
}
