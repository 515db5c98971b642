//! Gated linear units, biases and the element-wise steps of a block.

use zmlx_mlx::{Array, ops};

use super::case::{Case, Input, shapes};
use super::entry::{Domain, Entry};
use super::{argument, kernel};
use crate::Result;

type Mlx<T> = zmlx_mlx::Result<T>;

fn silu_mlx(x: &Array) -> Mlx<Array> {
    x.multiply(&x.sigmoid()?)
}

fn gelu_mlx(x: &Array) -> Mlx<Array> {
    let cube = x.square()?.multiply(x)?.multiply_scalar(0.044715)?;
    let u = x.add(&cube)?.multiply_scalar((2.0 / std::f64::consts::PI).sqrt())?;
    x.multiply_scalar(0.5)?.multiply(&u.tanh()?.add_scalar(1.0)?)
}

type Gate = fn(&Array) -> Mlx<Array>;

/// `gate(first half of the row) * second half`.
fn halves(name: &str, gate: &str, formula: &'static str, of: Gate, bias: bool) -> Entry {
    let (inputs, first, second) = if bias {
        (", bias: array[1]", " + bias[index(0)]", " + bias[index(0) + len(0)]")
    } else {
        ("", "", "")
    };
    let text = format!(
        "{name}(x: array[2]{inputs}) =
  let a = x[index(1), index(0)]{first};
  let b = x[index(1), index(0) + len(0)]{second};
  {gate}(a) * b"
    );
    let cases = move || {
        let one = |rows: i32, half: i32| {
            let mut inputs = vec![Input::random(&[rows, 2 * half], 2.0, 1)];
            if bias {
                inputs.push(Input::random(&[2 * half], 1.0, 2));
            }
            Case::new(format!("{rows} rows of 2 x {half}"), inputs).domain(&[rows, half])
        };
        vec![one(1, 1), one(1, 7), one(5, 33), one(3, 600), one(0, 4)]
    };
    Entry::text(Domain::Glu, text, formula, cases, move |a, _| {
        let z = if bias { a[0].add(&a[1])? } else { a[0].clone() };
        let half = z.dim(-1)? / 2;
        Ok(vec![of(&z.slice_axis(-1, 0, half)?)?.multiply(&z.slice_axis(-1, half, 2 * half)?)?])
    })
    .notes("Reads both halves of the row in place. The gradient is added up in f32.")
}

fn two(text: &'static str, formula: &'static str, of: fn(&Array, &Array) -> Mlx<Array>) -> Entry {
    let cases = || shapes(|s| vec![Input::random(s, 2.0, 1), Input::random(s, 2.0, 2)]);
    Entry::text(Domain::Glu, text, formula, cases, move |a, _| Ok(vec![of(&a[0], &a[1])?]))
}

/// `x` with a bias along the row.
fn biased(text: &'static str, formula: &'static str, of: Gate) -> Entry {
    let cases = || shapes(|s| vec![Input::random(s, 2.0, 1), Input::random(&s[s.len() - 1..], 1.0, 2)]);
    Entry::text(Domain::Glu, text, formula, cases, move |a, _| Ok(vec![of(&a[0].add(&a[1])?)?]))
}

const RECURRENT: &str = "fused_recurrent_step(h, weight, gate, alpha: scalar = 1.0, eps: scalar = 1e-6) =
  let n = f32(h) * rsqrt(row_mean(square(f32(h))) + eps) * weight;
  h + alpha * silu(n) * gate";

pub(super) fn entries() -> Vec<Entry> {
    let three = || shapes(|s| (1..4).map(|n| Input::random(s, 2.0, n)).collect());
    vec![
        two("swiglu2(gate, up) = silu(gate) * up", "silu(gate) up", |g, u| silu_mlx(g)?.multiply(u))
            .aliases(&["silu_mul"]),
        two("geglu2(gate, up) = gelu_tanh(gate) * up", "gelu_tanh(gate) up", |g, u| gelu_mlx(g)?.multiply(u)),
        halves("swiglu", "silu", "silu(a) b, a and b the halves of the row", silu_mlx, false),
        halves("geglu", "gelu_tanh", "gelu_tanh(a) b, a and b the halves of the row", gelu_mlx, false),
        halves("bias_swiglu", "silu", "swiglu(x + bias)", silu_mlx, true),
        halves("bias_geglu", "gelu_tanh", "geglu(x + bias)", gelu_mlx, true),
        biased("add_bias(x, bias) = x + bias", "x + bias", |z| Ok(z.clone())),
        biased("bias_gelu_tanh(x, bias) = gelu_tanh(x + bias)", "gelu_tanh(x + bias)", gelu_mlx),
        biased("bias_silu(x, bias) = silu(x + bias)", "silu(x + bias)", silu_mlx),
        Entry::text(
            Domain::Glu,
            "silu_mul_residual(gate, up, residual) = silu(gate) * up + residual",
            "silu(gate) up + residual",
            three,
            |a, _| Ok(vec![silu_mlx(&a[0])?.multiply(&a[1])?.add(&a[2])?]),
        ),
        Entry::text(
            Domain::Glu,
            "depth_gate_sigmoid(x, k_max: scalar = 8.0) = k_max * sigmoid(x)",
            "k_max sigmoid(x)",
            || shapes(|s| vec![Input::random(s, 3.0, 1), Input::scalar(8.0)]),
            |a, _| Ok(vec![a[0].sigmoid()?.multiply(&a[1])?]),
        )
        .notes("Rounding to a depth is the caller's."),
        Entry::text(
            Domain::Glu,
            RECURRENT,
            "h + alpha silu(rms_norm(h)) gate",
            || {
                shapes(|s| {
                    let weight = Input::random(&s[s.len() - 1..], 1.0, 2).map(|v| v + 1.5);
                    let arrays = [Input::random(s, 2.0, 1), weight, Input::random(s, 1.0, 3)];
                    [arrays.to_vec(), vec![Input::scalar(0.6), Input::scalar(1e-5)]].concat()
                })
            },
            |a, _| {
                let inverse = a[0].square()?.mean(&[-1], true)?.add(&a[4])?.rsqrt()?;
                let n = a[0].multiply(&inverse)?.multiply(&a[1])?;
                Ok(vec![a[0].add(&silu_mlx(&n)?.multiply(&a[2])?.multiply(&a[3])?)?])
            },
        ),
    ]
}

/// Runs a kernel of the halves of the last axis.
fn of_halves(name: &str, x: &Array, bias: Option<&Array>) -> Result<Array> {
    let width = match x.shape().last() {
        Some(width) if width % 2 == 0 => *width,
        _ => return Err(argument(name, format!("the last axis of {:?} has no two halves", x.shape()))),
    };
    if let Some(bias) = bias.filter(|b| b.shape() != [width]) {
        return Err(argument(name, format!("bias has shape {:?}, not [{width}]", bias.shape())));
    }
    let outer = &x.shape()[..x.ndim() - 1];
    let rows: i32 = outer.iter().product();
    let flat = x.reshape(&[rows, width])?;
    let arrays: Vec<&Array> = std::iter::once(&flat).chain(bias).collect();
    let out = kernel(name)?.bind(&arrays).domain(&[rows, width / 2]).run1()?;
    Ok(ops::reshape(&out, &[outer, &[width / 2]].concat())?)
}

/// `silu(a) * b` with the halves `a`, `b` of the last axis: `[..., 2 D]` to `[..., D]`. Shazeer 2020, arXiv:2002.05202.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when the last axis is odd.
pub fn swiglu(x: &Array) -> Result<Array> {
    of_halves("swiglu", x, None)
}

/// `gelu_tanh(a) * b` with the halves `a`, `b` of the last axis: `[..., 2 D]` to `[..., D]`.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when the last axis is odd.
pub fn geglu(x: &Array) -> Result<Array> {
    of_halves("geglu", x, None)
}

/// [`swiglu`] of `x + bias`, with `bias` of `[2 D]`.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when the last axis is odd or `bias` has another length.
pub fn bias_swiglu(x: &Array, bias: &Array) -> Result<Array> {
    of_halves("bias_swiglu", x, Some(bias))
}

/// [`geglu`] of `x + bias`, with `bias` of `[2 D]`.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when the last axis is odd or `bias` has another length.
pub fn bias_geglu(x: &Array, bias: &Array) -> Result<Array> {
    of_halves("bias_geglu", x, Some(bias))
}

macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident($($input:ident),*);)*) => {$(
        $(#[$doc])*
        ///
        /// Inputs broadcast; the result has their promoted float dtype, computed in `f32`.
        ///
        /// # Errors
        /// When shapes do not broadcast.
        pub fn $name($($input: &Array),*) -> Result<Array> {
            kernel(stringify!($name))?.call1(&[$($input),*])
        }
    )*};
}

functions! {
    /// `silu(gate) * up`.
    swiglu2(gate, up);
    /// `gelu_tanh(gate) * up`.
    geglu2(gate, up);
    /// `x + bias`.
    add_bias(x, bias);
    /// `gelu_tanh(x + bias)`.
    bias_gelu_tanh(x, bias);
    /// `silu(x + bias)`.
    bias_silu(x, bias);
    /// `silu(gate) * up + residual`.
    silu_mul_residual(gate, up, residual);
}

/// `k_max * sigmoid(x)`; rounding to a depth is the caller's.
///
/// # Errors
/// For dtypes that kernels do not take.
pub fn depth_gate_sigmoid(x: &Array, k_max: f32) -> Result<Array> {
    kernel("depth_gate_sigmoid")?.bind(&[x]).scalar("k_max", k_max).run1()
}

/// `h + alpha * silu(rms_norm(h, weight, eps)) * gate`, the norm over the last axis.
///
/// # Errors
/// When shapes do not broadcast.
pub fn fused_recurrent_step(h: &Array, weight: &Array, gate: &Array, alpha: f32, eps: f32) -> Result<Array> {
    let call = kernel("fused_recurrent_step")?.bind(&[h, weight, gate]);
    call.scalar("alpha", alpha).scalar("eps", eps).run1()
}
