//! The references, the stated limits and the samples.

use half::{bf16, f16};
use std::f64::consts::{FRAC_1_SQRT_2, LN_2, PI};
use zmlx_simd::MathFn;

/// One function, its f64 reference and its limit in ulps of the correctly rounded f32.
pub struct Case {
    pub f: MathFn,
    pub reference: fn(f64) -> f64,
    pub limit: u32,
    /// Below this input another limit holds, because the error of the exponent is amplified.
    pub tail: Option<f32>,
    pub tail_limit: u32,
}

pub fn pow_limit() -> u32 {
    2
}

/// f32 as integers in the order of their values, neighbours one apart; both zeros are 0.
pub fn ordered(x: f32) -> i64 {
    let bits = i64::from(x.to_bits() & 0x7fff_ffff);
    if x.is_sign_negative() { -bits } else { bits }
}

/// Distance in ulps; two NaN are equal, one NaN is as far as can be.
pub fn ulps(got: f32, want: f32) -> u32 {
    match (got.is_nan(), want.is_nan()) {
        (true, true) => 0,
        (false, false) => ordered(got).abs_diff(ordered(want)).min(u64::from(u32::MAX)) as u32,
        _ => u32::MAX,
    }
}

/// log(1 + e^x) without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + libm::log1p(libm::exp(-x.abs()))
}

fn gelu_tanh(x: f64) -> f64 {
    let u = (2.0 / PI).sqrt() * (x + 0.044715 * x * x * x);
    if x == f64::NEG_INFINITY { -0.0 } else { x / (1.0 + (-2.0 * u).exp()) }
}

/// x f(x) with the limit 0 at -inf.
fn times(x: f64, f: f64) -> f64 {
    if x == f64::NEG_INFINITY { -0.0 } else { x * f }
}

pub fn cases() -> Vec<Case> {
    use MathFn::*;
    let case = |f, limit, reference| Case { f, reference, limit, tail: None, tail_limit: 0 };
    vec![
        case(Exp, 2, f64::exp),
        case(Exp2, 2, f64::exp2),
        case(Expm1, 2, f64::exp_m1),
        case(Log, 2, f64::ln),
        case(Log2, 2, f64::log2),
        case(Log10, 2, f64::log10),
        case(Log1p, 2, f64::ln_1p),
        case(Tanh, 2, f64::tanh),
        case(Sigmoid, 2, |x| 1.0 / (1.0 + (-x).exp())),
        case(Silu, 3, |x| times(x, 1.0 / (1.0 + (-x).exp()))),
        case(Softplus, 2, softplus),
        case(Mish, 6, |x| times(x, softplus(x).tanh())),
        Case { tail: Some(-1.0), tail_limit: 256, ..case(GeluTanh, 3, gelu_tanh) },
        case(GeluErf, 6, |x| times(0.5 * x, libm::erfc(-x * FRAC_1_SQRT_2))),
        case(Erf, 2, libm::erf),
        case(Erfc, 6, libm::erfc),
        case(Sin, 2, f64::sin),
        case(Cos, 2, f64::cos),
        case(Sqrt, 0, f64::sqrt),
        case(Rsqrt, 2, |x| 1.0 / x.sqrt()),
        case(Recip, 0, |x| 1.0 / x),
        case(Floor, 0, f64::floor),
        case(Ceil, 0, f64::ceil),
        case(Trunc, 0, f64::trunc),
        case(Round, 0, f64::round_ties_even),
        case(Sign, 0, |x| if x == 0.0 || x.is_nan() { x } else { x.signum() }),
        case(Abs, 0, f64::abs),
        case(RoundToF16, 0, |x| f64::from(f16::from_f32(x as f32))),
        case(RoundToBf16, 0, |x| f64::from(bf16::from_f32(x as f32))),
    ]
}

/// Every `stride`-th bit pattern of all 2^32, and 65 neighbours around points where something changes.
pub fn samples(stride: u32) -> impl Iterator<Item = f32> {
    let mut points: Vec<f32> = vec![
        0.0,
        f32::MIN_POSITIVE,
        f32::MAX,
        1e-45,
        0.5,
        1.0,
        2.0,
        3.0,
        0.92,
        std::f32::consts::FRAC_1_SQRT_2,
        std::f32::consts::SQRT_2,
        0.414_213_57,
        8.0,
        9.02,
        9.1,
        11.2,
        14.9,
        17.4,
        20.0,
        87.3,
        88.72,
        89.0,
        103.97,
        105.0,
        110.0,
        126.0,
        128.0,
        149.0,
        150.0,
        1e5,
        8_388_608.0,
        16_777_216.0,
        6.103_515_6e-5,
        65_504.0,
        65_520.0,
        3e-8,
        2.5e-8,
        -0.292_893_2,
    ];
    points.extend((1..=200).map(|k| (f64::from(k) * 0.5 * LN_2) as f32));
    points.extend((1..=2000).map(|k| (f64::from(k) * PI * 0.25) as f32));
    points.extend((1..=500).map(|k| (f64::from(k * 127) * PI * 0.5) as f32));
    let near = points.into_iter().flat_map(|p| {
        (-32i32..=32).flat_map(move |d| {
            let v = f32::from_bits(p.to_bits().wrapping_add_signed(d));
            [v, -v]
        })
    });
    let count = u32::MAX / stride;
    (0..=count).map(move |i| f32::from_bits(i * stride)).chain(near)
}

/// Pairs whose power is mostly a finite normal number, by a fixed multiplicative generator.
pub fn pow_samples(count: usize) -> Vec<(f32, f32)> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    (0..count)
        .map(|i| {
            let unit = f64::from(next()) / f64::from(1u32 << 31);
            let x = match i % 4 {
                // Any positive number, also denormal.
                0 | 1 => f32::from_bits(next() % 0x7f80_0000),
                // Near 1, where the logarithm is small and the exponent may be large.
                2 => (1.0 + (unit - 0.5) * 2f64.powi(-((next() % 22) as i32))) as f32,
                _ => -((next() % 1000) as f32) / 8.0,
            };
            let y = match i % 4 {
                3 => (next() % 41) as f32 - 20.0,
                // An exponent that puts the result anywhere from underflow to overflow.
                _ => {
                    ((f64::from(next()) / f64::from(1u32 << 31) * 280.0 - 151.0) / f64::from(x).log2()) as f32
                }
            };
            (x, y)
        })
        .collect()
}
