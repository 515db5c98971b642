//! Kernels written as Rust functions, compiled to kernel IR while the crate is built.
//!
//! [`macro@kernel`] turns a function over one element into a function over arrays; [`elementwise!`] does the same for
//! a closure. The body is read as Rust and means what it means in Rust, with the exceptions named below; types and
//! shapes are checked while compiling, and anything that is not accepted is an error at its place.
//!
//! # Types
//! * A parameter `x: f32` takes arrays of any dtype and converts them to `f32`, in which all floats are computed. A
//!   result `f32` is stored in the promoted dtype of the float inputs (`f16` in, `f16` out; without float inputs
//!   `f32`).
//! * `f16` and `bf16` as the type of a parameter or result fix its dtype; its value is an `f32`. `x as f16` rounds to
//!   that precision.
//! * `i8` ... `u64` and `bool` fix the dtype. Arithmetic wraps, as in a release build. Division by 0 gives 0.
//! * Types never mix without `as`. Literals take the type of what they meet.
//! * A tuple as result: several outputs.
//!
//! # Parameters
//! `#[row]`: one value a row (the last axis is 1). `#[scalar]`: one value in all, a plain number for the function's
//! callers; `#[scalar = 1e-5]` with a default, and then the function takes an `Option`. `#[array(2)]`: an input of two axes that is read at computed places,
//! `t[[i, j]]`; outside it is an error on the CPU and NaN or 0 on a GPU, `t.clamp_at([i, j])` moves to the nearest
//! element and `t.zero_at([i, j])` gives 0.
//!
//! # Bodies
//! `let`, `let mut` and assignment, blocks, `if`/`else` (both ways are computed, values selected), `for` over constant
//! ranges and arrays (unrolled; 4,096 operations in all), tuples, arrays indexed by constants, inner `const` and `fn`
//! items and closures (inlined; no recursion), `return` as the last statement, `as`, and the operators of Rust except
//! `%` on floats.
//!
//! Methods of `f32`: `exp`, `exp2`, `exp_m1`, `ln`, `ln_1p`, `log2`, `log10`, `sqrt`, `sin`, `cos`, `tan`, `asin`,
//! `acos`, `atan`, `tanh`, `floor`, `ceil`, `trunc`, `round_ties_even`, `abs`, `signum`, `recip`, `powi`, `powf`,
//! `mul_add`, `min`, `max`, `clamp`, `is_nan`, `is_infinite`, `is_finite`, `to_bits`, `f32::from_bits`. Unlike Rust's,
//! `min` and `max` give NaN if either side is NaN. Methods of integers: `abs`, `signum`, `min`, `max`, `clamp`,
//! `rem_euclid`, `count_ones`, `wrapping_add`, `wrapping_sub`, `wrapping_mul`, `wrapping_neg`.
//!
//! Functions of the language: all that its text form has and that Rust does not write as an operator or a cast
//! (`zmlx_lang::text::functions` lists them): activations and others that `f32` lacks (`sigmoid`, `silu`, `gelu`,
//! `softplus`, `erf`, `rsqrt`, `relu`, `sign`, `floordiv`, `rem`, `select(c, a, b)`, ...), along the row `row_sum`,
//! `row_max`, `row_argmax`, `row_mean`, `row_var`, `row_logsumexp`, `cumsum`, ..., places `index(k)` and `len(k)` (`k`
//! counts axes from the last, 0), `random(seed)`, `uniform(seed)`, `dropout(x, p, seed)`. Sums of narrow integers and
//! booleans are 32 bits wide. A function declared in the body comes before one of the language of the same name.
//!
//! Without `strict`, backends may contract `a * b + c` into one rounding.

#![forbid(unsafe_code)]

mod binary;
mod body;
mod compile;
mod emit;
mod env;
mod expand;
mod expr;
mod fold;
mod functions;
mod methods;
mod paths;
mod signature;
mod types;
mod value;

use proc_macro::TokenStream;
use syn::parse_macro_input;

/// Makes a function over elements a function over arrays.
///
/// `fn f(x: f32, ...) -> f32` becomes `fn f(x: &Array, ...) -> Result<Array>`, with a tuple of arrays for a tuple, and
/// a module `f` whose `kernel()` is the kernel itself. Attributes and visibility stay. Scalar parameters stay numbers
/// (`f32` for `f16` and `bf16`); those with a default become `Option`s.
///
/// Options: `name = "..."` (the kernel's name; else the function's), `strict` (every operation rounds on its own),
/// `keep_dims` (values of a row keep the last axis, as 1), `crate = path` (where `Kernel`, `Array`, `Result` and `Error` are;
/// else `::zmlx::kernels`).
///
/// What the body may contain is described at the [crate's root](crate). Anything else does not compile.
///
/// ```ignore
/// #[zmlx::kernel]
/// pub fn mish(x: f32) -> f32 {
///     x * (1.0 + x.exp()).ln().tanh()
/// }
///
/// #[zmlx::kernel]
/// pub fn rms_norm(x: f32, #[scalar = 1e-5] eps: f32) -> f32 {
///     x * rsqrt(row_mean(x * x) + eps)
/// }
/// ```
#[proc_macro_attribute]
pub fn kernel(options: TokenStream, item: TokenStream) -> TokenStream {
    let options = parse_macro_input!(options as compile::Options);
    let function = parse_macro_input!(item as syn::ItemFn);
    expand::kernel(&options, &function).unwrap_or_else(|e| e.to_compile_error()).into()
}

/// A kernel from a closure over elements, as an expression of type `&'static Kernel`.
///
/// Parameters are `f32` where no type is written, results have the types of the body's values. The options of
/// [`macro@kernel`] may come first: `elementwise!(strict, |x| ...)`. Reductions and scans are not accepted.
///
/// ```ignore
/// let shifted_relu = zmlx::elementwise!(|x, b| (x + b).max(0.0));
/// let parts = zmlx::elementwise!(|x: f32, n: i32| -> (f32, f32) { (x.powi(2), x * n as f32) });
/// ```
#[proc_macro]
pub fn elementwise(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as expand::Elementwise);
    expand::elementwise(&input).unwrap_or_else(|e| e.to_compile_error()).into()
}
