//! Nanoseconds and cycles an element of every function over a block that stays in the first-level cache, beside the
//! standard library's scalar loop. `cargo bench -p zmlx-simd [-- NAME...]`.
//!
//! Cycles are counted against a chain of dependent integer additions (one cycle each), measured around every row, so
//! they follow the clock the core really ran at.

use std::hint::black_box;
use std::time::Instant;
use zmlx_simd::{MathFn, convert, isa_name, map, map_pow_with, try_arch};

const BLOCK: usize = 1024;
const REPEATS: usize = 2000;

/// Least nanoseconds of one call over several rounds.
fn best(rounds: usize, repeats: usize, mut f: impl FnMut()) -> f64 {
    (0..rounds)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..repeats {
                f();
            }
            start.elapsed().as_nanos() as f64 / repeats as f64
        })
        .fold(f64::INFINITY, f64::min)
}

/// Nanoseconds of one cycle.
fn cycle() -> f64 {
    const STEPS: usize = 100_000;
    best(5, 1, || {
        let mut x = 1u64;
        for _ in 0..STEPS {
            // black_box of a register keeps the chain; an addition takes one cycle.
            x = chain(x);
        }
        black_box(x);
    }) / (STEPS as f64 * CHAIN as f64)
}

const CHAIN: usize = 16;

#[inline(always)]
fn chain(mut x: u64) -> u64 {
    for i in 0..CHAIN as u64 {
        // A rotate and an xor by a loop value cannot be folded together; each is one cycle.
        x = if i % 2 == 0 { x.rotate_left(7) } else { x ^ 0x9e37 };
    }
    x
}

/// The standard library's function, where it has one (or the obvious formula of them).
fn scalar(f: MathFn) -> Option<fn(f32) -> f32> {
    use MathFn::*;
    Some(match f {
        Exp => f32::exp,
        Exp2 => f32::exp2,
        Expm1 => f32::exp_m1,
        Log => f32::ln,
        Log2 => f32::log2,
        Log10 => f32::log10,
        Log1p => f32::ln_1p,
        Tanh => f32::tanh,
        Sigmoid => |x| 1.0 / (1.0 + (-x).exp()),
        Silu => |x| x / (1.0 + (-x).exp()),
        Softplus => |x| x.max(0.0) + (-x.abs()).exp().ln_1p(),
        Mish => |x| x * (x.max(0.0) + (-x.abs()).exp().ln_1p()).tanh(),
        GeluTanh => |x| 0.5 * x * (1.0 + (0.797_884_6 * (x + 0.044715 * x * x * x)).tanh()),
        Sin => f32::sin,
        Cos => f32::cos,
        Sqrt => f32::sqrt,
        Rsqrt => |x| 1.0 / x.sqrt(),
        Recip => |x| 1.0 / x,
        Floor => f32::floor,
        Ceil => f32::ceil,
        Trunc => f32::trunc,
        Round => f32::round_ties_even,
        Abs => f32::abs,
        _ => return None,
    })
}

fn row(name: &str, vector: f64, std: Option<f64>, cycle: f64) {
    let n = BLOCK as f64;
    let cycles = vector / n / cycle;
    match std {
        Some(s) => {
            println!(
                "{name:13} {:8.3} ns {cycles:7.2} cycles   std {:8.3} ns   x{:.1}",
                vector / n,
                s / n,
                s / vector
            );
        }
        None => println!("{name:13} {:8.3} ns {cycles:7.2} cycles", vector / n),
    }
}

fn main() {
    let arch = match try_arch() {
        Ok(arch) => arch,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(2);
        }
    };
    let names: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| names.is_empty() || names.iter().any(|n| n == name);
    println!("{}: per element, blocks of {BLOCK}", isa_name());
    let cycle = cycle();
    // Half the domain's typical range; logarithms and roots get the positive half.
    let signed: Vec<f32> = (0..BLOCK).map(|i| (i as f32 * 0.618_034).fract() * 16.0 - 8.0).collect();
    let positive: Vec<f32> = signed.iter().map(|x| x.abs() + 0.01).collect();
    let mut dst = vec![0.0f32; BLOCK];
    for &f in MathFn::ALL.iter().filter(|f| wanted(f.name())) {
        use MathFn::*;
        let src = if matches!(f, Log | Log2 | Log10 | Log1p | Sqrt | Rsqrt) { &positive } else { &signed };
        let vector = best(5, REPEATS, || map(f, black_box(src), black_box(&mut dst)).expect("equal lengths"));
        let std = scalar(f).map(|g| {
            best(5, REPEATS / 10, || {
                for (d, &x) in black_box(&mut dst).iter_mut().zip(black_box(src)) {
                    *d = g(x);
                }
            })
        });
        row(f.name(), vector, std, cycle);
    }
    if wanted("pow") {
        let vector = best(5, REPEATS, || {
            map_pow_with(arch, black_box(&positive), black_box(&signed), black_box(&mut dst))
                .expect("equal lengths");
        });
        let std = best(5, REPEATS / 10, || {
            for ((d, &x), &y) in
                black_box(&mut dst).iter_mut().zip(black_box(&positive)).zip(black_box(&signed))
            {
                *d = x.powf(y);
            }
        });
        row("pow", vector, Some(std), cycle);
    }
    conversions(&signed, cycle, wanted);
}

/// A few conversions, to see that their loops are vector code.
fn conversions(src: &[f32], cycle: f64, wanted: impl Fn(&str) -> bool) {
    let (mut h, mut b) = (vec![half::f16::ZERO; BLOCK], vec![half::bf16::ZERO; BLOCK]);
    let (mut i, mut f) = (vec![0i32; BLOCK], vec![0f32; BLOCK]);
    let bench = |name: &str, g: &mut dyn FnMut() -> Result<(), zmlx_simd::SimdError>| {
        if wanted(name) {
            row(name, best(5, REPEATS, || g().expect("equal lengths")), None, cycle);
        }
    };
    bench("f32_to_f16", &mut || convert::f32_to_f16(black_box(src), black_box(&mut h)));
    bench("f16_to_f32", &mut || convert::f16_to_f32(black_box(&h), black_box(&mut f)));
    bench("f32_to_bf16", &mut || convert::f32_to_bf16(black_box(src), black_box(&mut b)));
    bench("bf16_to_f32", &mut || convert::bf16_to_f32(black_box(&b), black_box(&mut f)));
    bench("f32_to_i32", &mut || convert::f32_to_i32(black_box(src), black_box(&mut i)));
    bench("i32_to_f32", &mut || convert::i32_to_f32(black_box(&i), black_box(&mut f)));
}
