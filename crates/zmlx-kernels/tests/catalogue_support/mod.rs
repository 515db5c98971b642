//! From the catalogue's cases to arrays and tensors, and comparisons.
#![allow(dead_code)] // each test file uses a part

use half::{bf16, f16};
use zmlx_kernels::Array;
use zmlx_kernels::catalogue::{Case, Input, Setting, Values};
use zmlx_kernels::lang::Dtype;
use zmlx_kernels::lang::eval::{Data, Shapes, Tensor};

pub const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// A value rounded to a float dtype.
pub fn rounded(v: f64, dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F16 => f16::from_f64(v).to_f64(),
        Dtype::Bf16 => bf16::from_f64(v).to_f64(),
        _ => f64::from(v as f32),
    }
}

pub fn shape_of(shape: &[i32]) -> Vec<usize> {
    shape.iter().map(|d| *d as usize).collect()
}

/// The input for the evaluator, with floats of `dtype`.
pub fn tensor(input: &Input, dtype: Dtype) -> Tensor {
    let shape = shape_of(&input.shape);
    match &input.values {
        Values::Float(v) => Tensor::float(&shape, dtype, v.iter().map(|v| rounded(*v, dtype)).collect()),
        Values::F32(v) => {
            Tensor::float(&shape, Dtype::F32, v.iter().map(|v| rounded(*v, Dtype::F32)).collect())
        }
        Values::Int(dtype, v) => Tensor::int(&shape, *dtype, v.iter().map(|v| i128::from(*v)).collect()),
    }
}

pub fn tensors(case: &Case, dtype: Dtype) -> Vec<Tensor> {
    case.inputs.iter().map(|i| tensor(i, dtype)).collect()
}

pub fn shapes(setting: &Setting) -> Shapes {
    let outputs = setting.outputs.iter().map(|o| o.as_deref().map(shape_of)).collect();
    Shapes { domain: setting.domain.as_deref().map(shape_of), outputs }
}

pub fn to_mlx(dtype: Dtype) -> zmlx_mlx::Dtype {
    use zmlx_mlx::Dtype as Mlx;
    match dtype {
        Dtype::Bool => Mlx::Bool,
        Dtype::U8 => Mlx::Uint8,
        Dtype::U16 => Mlx::Uint16,
        Dtype::U32 => Mlx::Uint32,
        Dtype::U64 => Mlx::Uint64,
        Dtype::I8 => Mlx::Int8,
        Dtype::I16 => Mlx::Int16,
        Dtype::I32 => Mlx::Int32,
        Dtype::I64 => Mlx::Int64,
        Dtype::F16 => Mlx::Float16,
        Dtype::Bf16 => Mlx::Bfloat16,
        Dtype::F32 => Mlx::Float32,
    }
}

/// A tensor as an array of its dtype.
pub fn array(t: &Tensor) -> zmlx_mlx::Result<Array> {
    let shape: Vec<i32> = t.shape.iter().map(|d| *d as i32).collect();
    match &t.data {
        Data::Float(v) => {
            let floats: Vec<f32> = v.iter().map(|v| *v as f32).collect();
            Array::from_vec(floats, &shape)?.astype(to_mlx(t.dtype))
        }
        Data::Int(v) => {
            let wide: Vec<i64> = v.iter().map(|v| *v as i64).collect();
            Array::from_vec(wide, &shape)?.astype(to_mlx(t.dtype))
        }
    }
}

/// An array's elements as doubles.
pub fn values(a: &Array) -> zmlx_mlx::Result<Vec<f64>> {
    use zmlx_mlx::Dtype as Mlx;
    Ok(match a.dtype() {
        Mlx::Float32 | Mlx::Float16 | Mlx::Bfloat16 => {
            a.astype(Mlx::Float32)?.to_vec::<f32>()?.into_iter().map(f64::from).collect()
        }
        _ => a.astype(Mlx::Int64)?.to_vec::<i64>()?.into_iter().map(|v| v as f64).collect(),
    })
}

/// The relative error that storing in a dtype makes, rounded up.
pub fn unit(dtype: zmlx_mlx::Dtype) -> f64 {
    match dtype {
        zmlx_mlx::Dtype::Float16 => 6e-4,
        zmlx_mlx::Dtype::Bfloat16 => 4.4e-3,
        _ => 0.0,
    }
}

/// Expected values with those beyond the dtype's range as infinities.
pub fn in_range(expected: Vec<f64>, dtype: zmlx_mlx::Dtype) -> Vec<f64> {
    let largest = match dtype {
        zmlx_mlx::Dtype::Float16 => 65519.99,
        zmlx_mlx::Dtype::Float32 | zmlx_mlx::Dtype::Bfloat16 => 3.4e38,
        _ => return expected,
    };
    let one = |v: f64| if v.abs() > largest { f64::INFINITY.copysign(v) } else { v };
    expected.into_iter().map(one).collect()
}

/// The worst difference, if there is one: `|f - e| > absolute + relative |e|`. NaN equals NaN.
pub fn difference(found: &[f64], expected: &[f64], relative: f64, absolute: f64) -> Option<String> {
    if found.len() != expected.len() {
        return Some(format!("{} elements, expected {}", found.len(), expected.len()));
    }
    let close =
        |f: f64, e: f64| f == e || f.is_nan() && e.is_nan() || (f - e).abs() <= absolute + relative * e.abs();
    let wrong: Vec<usize> = (0..found.len()).filter(|i| !close(found[*i], expected[*i])).collect();
    let worst = wrong
        .iter()
        .copied()
        .max_by(|a, b| (found[*a] - expected[*a]).abs().total_cmp(&(found[*b] - expected[*b]).abs()))?;
    let (f, e, n) = (found[worst], expected[worst], wrong.len());
    Some(format!(
        "{n} of {} differ; element {worst} is {f:e}, expected {e:e} (off by {:e})",
        found.len(),
        f - e
    ))
}

/// Numbers in -1..1 that look random.
pub fn noise(count: usize, seed: u64) -> Vec<f64> {
    let input = Input::random(&[count as i32], 1.0, seed);
    match input.values {
        Values::Float(v) | Values::F32(v) => v,
        Values::Int(..) => Vec::new(),
    }
}
