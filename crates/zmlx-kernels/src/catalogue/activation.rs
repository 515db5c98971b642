//! Activations: one value in, one out. Gradients at kinks are those of MLX.

use zmlx_mlx::{Array, ops};

use super::case::{Case, Input, special, unary};
use super::entry::{Domain, Entry};
use super::kernel;
use crate::Result;

type Mlx<T> = zmlx_mlx::Result<T>;

fn entry(text: &'static str, formula: &'static str, reference: fn(&Array) -> Mlx<Array>) -> Entry {
    Entry::text(Domain::Activation, text, formula, || unary(4.0), move |a, _| Ok(vec![reference(&a[0])?]))
}

/// `x` times something that is 0 at -inf. Whether that is 0 or NaN there is left open.
fn gate(text: &'static str, formula: &'static str, reference: fn(&Array) -> Mlx<Array>) -> Entry {
    let cases = || {
        let mut cases = unary(4.0);
        cases.pop();
        cases.push(special(-60_000.0));
        cases
    };
    Entry::text(Domain::Activation, text, formula, cases, move |a, _| Ok(vec![reference(&a[0])?]))
        .notes("At -inf 0 on the CPU, 0 or NaN elsewhere.")
}

/// With a parameter.
fn shaped(
    text: &'static str,
    formula: &'static str,
    parameter: f64,
    reference: fn(&Array, &Array) -> Mlx<Array>,
) -> Entry {
    let cases = move || {
        let with = |mut c: Case| {
            c.inputs.push(Input::scalar(parameter));
            c
        };
        unary(4.0).into_iter().map(with).collect()
    };
    // As 0-d, so that it does not give a 0-d input an axis.
    let of = move |a: &[Array], _: &super::Setting| Ok(vec![reference(&a[0], &a[1].reshape(&[])?)?]);
    Entry::text(Domain::Activation, text, formula, cases, of)
}

fn constant(value: f64) -> Mlx<Array> {
    Array::scalar(value as f32)
}

fn relu_mlx(x: &Array) -> Mlx<Array> {
    x.maximum(&constant(0.0)?)
}

fn gelu_tanh_mlx(x: &Array) -> Mlx<Array> {
    let cube = x.square()?.multiply(x)?.multiply_scalar(0.044715)?;
    let u = x.add(&cube)?.multiply_scalar((2.0 / std::f64::consts::PI).sqrt())?;
    x.multiply_scalar(0.5)?.multiply(&u.tanh()?.add_scalar(1.0)?)
}

fn gelu_mlx(x: &Array) -> Mlx<Array> {
    let erf = x.multiply_scalar(std::f64::consts::FRAC_1_SQRT_2)?.erf()?;
    x.multiply_scalar(0.5)?.multiply(&erf.add_scalar(1.0)?)
}

fn softplus_mlx(x: &Array) -> Mlx<Array> {
    x.logaddexp(&constant(0.0)?)
}

/// MLX's `where` takes both sides, so the exponent is kept below 0.
fn elu_mlx(x: &Array, alpha: &Array) -> Mlx<Array> {
    let zero = constant(0.0)?;
    let below = ops::where_(&x.greater(&zero)?, &zero, x)?.expm1()?.multiply(alpha)?;
    ops::where_(&x.greater(&zero)?, x, &below)
}

fn hard_sigmoid_mlx(x: &Array) -> Mlx<Array> {
    x.add_scalar(3.0)?.maximum(&constant(0.0)?)?.minimum(&constant(6.0)?)?.multiply_scalar(1.0 / 6.0)
}

pub(super) fn entries() -> Vec<Entry> {
    let mut all = forward();
    let twins = [
        ("exp", "exp_grad", "g e^x"),
        ("log", "log_grad", "g / x"),
        ("tanh", "tanh_grad", "g (1 - tanh(x)^2)"),
        ("sigmoid", "sigmoid_grad", "g s (1 - s), s = sigmoid(x)"),
        ("relu", "relu_grad", "x > 0 ? g : 0"),
        ("relu2", "relu2_grad", "x > 0 ? 2 x g : 0"),
        ("silu", "silu_grad", "g (s + x s (1 - s)), s = sigmoid(x)"),
        ("gelu_tanh", "gelu_tanh_grad", "g times the slope of gelu_tanh"),
        ("softplus", "softplus_grad", "g sigmoid(x)"),
        ("mish", "mish_grad", "g (t + x sigmoid(x) (1 - t^2)), t = tanh(softplus(x))"),
        ("elu", "elu_grad", "x > 0 ? g : g alpha e^x"),
    ];
    for (of, name, formula) in twins {
        let twin = all.iter().find(|e| e.name == of).map(|e| e.gradient_entry(name, "x", formula));
        all.extend(
            twin.map(|t| t.notes("For use outside of automatic differentiation, which reads saved outputs.")),
        );
    }
    all
}

fn forward() -> Vec<Entry> {
    let positive = || {
        let cases = unary(4.0).into_iter().map(|mut c| {
            c.inputs = c.inputs.into_iter().map(|i| i.map(|v| v.abs() + 0.1)).collect();
            c
        });
        cases.chain([special(f64::NEG_INFINITY)]).collect()
    };
    let log = |a: &[Array], _: &super::Setting| Ok(vec![a[0].log()?]);
    vec![
        entry("exp(x) = exp(x)", "e^x", |x| x.exp()),
        Entry::text(Domain::Activation, "log(x) = log(x)", "ln x", positive, log)
            .notes("-inf at 0, NaN below."),
        entry("tanh(x) = tanh(x)", "tanh x", |x| x.tanh()),
        entry("sigmoid(x) = sigmoid(x)", "1 / (1 + e^-x)", |x| x.sigmoid()),
        entry("relu(x) = relu(x)", "max(x, 0)", relu_mlx).notes("The gradient at 0 is 0."),
        entry("relu2(x) = relu2(x)", "max(x, 0)^2", |x| relu_mlx(x)?.square()),
        entry("relu6(x) = relu6(x)", "min(max(x, 0), 6)", |x| relu_mlx(x)?.minimum(&constant(6.0)?)),
        gate("silu(x) = silu(x)", "x sigmoid(x)", |x| x.multiply(&x.sigmoid()?)),
        gate("gelu_tanh(x) = gelu_tanh(x)", "0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))", gelu_tanh_mlx),
        gate("gelu(x) = gelu(x)", "0.5 x (1 + erf(x / sqrt(2)))", gelu_mlx),
        entry("gelu_quick(x) = gelu_quick(x)", "x sigmoid(1.702 x)", |x| {
            x.multiply(&x.multiply_scalar(1.702)?.sigmoid()?)
        }),
        entry("softplus(x) = softplus(x)", "ln(1 + e^x)", softplus_mlx).notes("Does not overflow."),
        gate("mish(x) = mish(x)", "x tanh(ln(1 + e^x))", |x| x.multiply(&softplus_mlx(x)?.tanh()?)).notes(
            "Does not overflow. At -inf 0 on the CPU, 0 or NaN elsewhere. Misra 2019, arXiv:1908.08681.",
        ),
        shaped("elu(x, alpha: scalar = 1.0) = elu(x, alpha)", "x > 0 ? x : alpha (e^x - 1)", 0.7, elu_mlx),
        shaped(
            "leaky_relu(x, slope: scalar = 0.01) = leaky_relu(x, slope)",
            "max(slope x, x)",
            0.01,
            |x, slope| x.multiply(slope)?.maximum(x),
        ),
        shaped(
            "celu(x, alpha: scalar = 1.0) = celu(x, alpha)",
            "max(x, 0) + alpha (e^(min(x, 0) / alpha) - 1)",
            1.3,
            |x, alpha| {
                let below = x.minimum(&constant(0.0)?)?.divide(alpha)?.expm1()?.multiply(alpha)?;
                relu_mlx(x)?.add(&below)
            },
        ),
        entry("selu(x) = selu(x)", "1.0507 elu(x, 1.6733)", |x| {
            elu_mlx(x, &constant(1.673_263_242_354_377_2)?)?.multiply_scalar(1.050_700_987_355_480_5)
        })
        .notes("Klambauer et al. 2017, arXiv:1706.02515."),
        entry("softsign(x) = softsign(x)", "x / (1 + |x|)", |x| x.divide(&x.abs()?.add_scalar(1.0)?)),
        entry("log_sigmoid(x) = log_sigmoid(x)", "-ln(1 + e^-x)", |x| {
            softplus_mlx(&x.negative()?)?.negative()
        }),
        entry("hard_sigmoid(x) = hard_sigmoid(x)", "clamp(x + 3, 0, 6) / 6", hard_sigmoid_mlx),
        entry("hard_swish(x) = hard_swish(x)", "x clamp(x + 3, 0, 6) / 6", |x| {
            x.multiply(&hard_sigmoid_mlx(x)?)
        }),
        entry("hard_tanh(x) = hard_tanh(x)", "clamp(x, -1, 1)", |x| {
            x.maximum(&constant(-1.0)?)?.minimum(&constant(1.0)?)
        }),
        shaped(
            "hard_shrink(x, limit: scalar = 0.5) = hard_shrink(x, limit)",
            "|x| > limit ? x : 0",
            0.5,
            |x, l| ops::where_(&x.abs()?.greater(l)?, x, &x.zeros_like()?),
        ),
        shaped(
            "soft_shrink(x, limit: scalar = 0.5) = soft_shrink(x, limit)",
            "sign(x) max(|x| - limit, 0)",
            0.5,
            |x, l| x.sign()?.multiply(&relu_mlx(&x.abs()?.subtract(l)?)?),
        ),
    ]
}

macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// Any shape; the result has `x`'s shape and float dtype (integers give `f32`), computed in `f32`.
        ///
        /// # Errors
        /// For dtypes that kernels do not take (`float64`, `complex64`).
        pub fn $name(x: &Array) -> Result<Array> {
            kernel(stringify!($name))?.call1(&[x])
        }
    )*};
}

functions! {
    /// `e^x`.
    exp;
    /// `ln x`.
    log;
    /// `tanh x`.
    tanh;
    /// `1 / (1 + e^-x)`.
    sigmoid;
    /// `max(x, 0)`; the gradient at 0 is 0.
    relu;
    /// `max(x, 0)^2`.
    relu2;
    /// `min(max(x, 0), 6)`.
    relu6;
    /// `x sigmoid(x)`.
    silu;
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    gelu_tanh;
    /// `0.5 x (1 + erf(x / sqrt(2)))`.
    gelu;
    /// `x sigmoid(1.702 x)`.
    gelu_quick;
    /// `ln(1 + e^x)`, without overflow.
    softplus;
    /// `x tanh(ln(1 + e^x))`, without overflow.
    mish;
    /// `1.0507 elu(x, 1.6733)`.
    selu;
    /// `x / (1 + |x|)`.
    softsign;
    /// `-ln(1 + e^-x)`.
    log_sigmoid;
    /// `clamp(x + 3, 0, 6) / 6`.
    hard_sigmoid;
    /// `x clamp(x + 3, 0, 6) / 6`.
    hard_swish;
    /// `clamp(x, -1, 1)`.
    hard_tanh;
}

macro_rules! shaped_functions {
    ($($(#[$doc:meta])* $name:ident($parameter:ident);)*) => {$(
        $(#[$doc])*
        ///
        /// Any shape; the result has `x`'s shape and float dtype, computed in `f32`.
        ///
        /// # Errors
        /// For dtypes that kernels do not take.
        pub fn $name(x: &Array, $parameter: f32) -> Result<Array> {
            kernel(stringify!($name))?.bind(&[x]).scalar(stringify!($parameter), $parameter).run1()
        }
    )*};
}

shaped_functions! {
    /// `x > 0 ? x : alpha (e^x - 1)`.
    elu(alpha);
    /// `max(slope x, x)`.
    leaky_relu(slope);
    /// `max(x, 0) + alpha (e^(min(x, 0) / alpha) - 1)`.
    celu(alpha);
    /// `|x| > limit ? x : 0`.
    hard_shrink(limit);
    /// `sign(x) max(|x| - limit, 0)`.
    soft_shrink(limit);
}

macro_rules! gradients {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// `x` and the cotangent `g` broadcast; computed in `f32`.
        ///
        /// # Errors
        /// When shapes do not broadcast; for dtypes that kernels do not take.
        pub fn $name(x: &Array, g: &Array) -> Result<Array> {
            kernel(stringify!($name))?.call1(&[x, g])
        }
    )*};
}

gradients! {
    /// `g e^x`.
    exp_grad;
    /// `g / x`.
    log_grad;
    /// `g (1 - tanh(x)^2)`.
    tanh_grad;
    /// `g s (1 - s)` with `s = sigmoid(x)`.
    sigmoid_grad;
    /// `x > 0 ? g : 0`.
    relu_grad;
    /// `x > 0 ? 2 x g : 0`.
    relu2_grad;
    /// `g (s + x s (1 - s))` with `s = sigmoid(x)`.
    silu_grad;
    /// `g` times the slope of `gelu_tanh` at `x`.
    gelu_tanh_grad;
    /// `g sigmoid(x)`.
    softplus_grad;
    /// `g` times the slope of `mish` at `x`.
    mish_grad;
}

/// `x > 0 ? g : g alpha e^x`, with `x` and `g` broadcast.
///
/// # Errors
/// When shapes do not broadcast; for dtypes that kernels do not take.
pub fn elu_grad(x: &Array, g: &Array, alpha: f32) -> Result<Array> {
    kernel("elu_grad")?.bind(&[x, g]).scalar("alpha", alpha).run1()
}
