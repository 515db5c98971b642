//! Vector maths of stated accuracy, type conversions, streaming stores and Philox, on the CPU's best instruction set.
//!
//! * [`math`]: functions of K registers, `fn f<S: pulp::Simd, const K: usize>(simd: S, x: [S::f32s; K]) -> [S::f32s; K]`,
//!   for use inside a caller's own `pulp::WithSimd` body; [`lockstep`]: the loop around them.
//! * [`convert`], [`stream`], [`philox`]: storage conversions, cache-bypassing copies, counter-based random numbers.
//! * [`arch`], [`try_arch`], [`available`]: run-time dispatch; `ZMLX_SIMD=scalar|avx2|avx512|neon` overrides it.
//! * [`map`]: whole slices, one dispatch a call.
//!
//! # Accuracy
//!
//! Largest distance from the correctly rounded f32, in units in the last place, denormal results counted as the evenly
//! spaced values they are (so 1 there is one smallest denormal; nothing is flushed to zero). Measured on every 307th of
//! the 2^32 bit patterns (14 million inputs) and 65 neighbours of 2,700 critical points, with AVX2 and FMA / with
//! plain scalar code without FMA. The tests assert the last column on every 4099th pattern and the same points.
//!
//! | function | AVX2 | scalar | asserted |
//! |---|---|---|---|
//! | exp, exp2, expm1, log, log1p, erf, rsqrt | 1 | 1 | 2 |
//! | log2, log10 | 1 | 2 | 2 |
//! | tanh, sigmoid, softplus, sin, cos | 2 | 2 | 2 |
//! | pow (4 million pairs) | 1 | 1 | 2 |
//! | sqrt, recip, floor, ceil, trunc, round, sign, abs, roundings to f16 and bf16 | 0 | 0 | 0 |
//! | silu | 3 | 2 | 3 |
//! | mish, gelu_erf, erfc | 5 | 5 | 6 |
//! | gelu_tanh, x >= -1 | 2 | 2 | 3 |
//! | gelu_tanh, x < -1 (relative error 2.3e-5: the exponent's rounding is amplified) | 189 | 189 | 256 |
//!
//! Results differ in the last places between instruction sets with and without FMA; they do not depend on a value's
//! position in a slice. AVX-512 and NEON run the same code and are tested wherever the tests run on such a machine.
#![deny(unsafe_code)]

mod arch;
pub mod convert;
mod error;
mod lanes;
#[allow(unsafe_code)]
pub mod lockstep;
mod map;
pub mod math;
pub mod philox;
#[allow(unsafe_code)]
pub mod stream;
#[allow(unsafe_code)]
mod together;

pub use arch::{ISA_VARIABLE, arch, arch_named, available, isa_name, try_arch};
pub use error::SimdError;
pub use map::{MathFn, map, map_pow_with, map_with};
