//! The same body compiled by rustc and by the macro gives the same numbers.

mod standin;

use standin::{Element, array, elements};

/// Bodies twice: as Rust (`plain`) and as a kernel (`compiled`).
macro_rules! both {
    ($($name:ident: fn($($p:ident: $t:ty),*) -> $r:ty { $($body:tt)* })*) => {$(
        mod $name {
            // Bodies are written to cover the language, not to please the linter.
            #![allow(clippy::all, dead_code, unused_assignments, unused_parens)]
            pub fn plain($($p: $t),*) -> $r { $($body)* }

            #[zmlx_macros::kernel(crate = crate::standin, strict)]
            pub fn compiled($($p: $t),*) -> $r { $($body)* }
        }
    )*};
}

both! {
    mish: fn(x: f32) -> f32 { x * (1.0 + x.exp()).ln().tanh() }
    functions: fn(x: f32) -> f32 {
        x.sin() + x.cos() * x.atan() - x.exp2().ln_1p() + x.exp_m1().abs().sqrt() + x.abs().log2() - x.abs().log10()
    }
    rounding: fn(x: f32) -> f32 { x.floor() + 10.0 * x.ceil() + 100.0 * x.trunc() + 1000.0 * x.round_ties_even() }
    loops: fn(x: f32) -> f32 {
        const N: usize = 4;
        const C: [f32; N] = [0.5, -1.25, 3.0, 0.1];
        let mut p = 0.0f32;
        for i in (0..N).rev() { p = p * x + C[i]; }
        for c in C { p += c; }
        for i in 1..=3 { p -= x / i as f32; }
        for i in 0..3 { for j in 0..i { p += (i * j) as f32; } }
        p
    }
    branches: fn(x: f32, y: f32) -> f32 {
        let mut a = x;
        let b;
        if x > y { a += 1.0; b = y; } else if x == y { b = -1.0; } else { a = y * 2.0; b = x - y; }
        let c = if a > 0.0 && !(b < 0.5) || a == b { a / 3.0 } else { let t = b * b; t + a };
        if c < -2.0 { a = c; }
        a + b * c
    }
    helpers: fn(x: f32, y: f32) -> f32 {
        fn square(v: f32) -> f32 { v * v }
        fn norm(a: f32, b: f32) -> f32 { return (square(a) + square(b) + EPS).sqrt(); }
        const EPS: f32 = 1e-3;
        let scale = 0.5;
        let half = |v: f32| v * scale;
        let swap = |a: f32, b: f32| (b, a);
        let (p, q) = swap(x, y);
        let x = half(p) - q;
        { let x = 100.0; let _ = x; }
        norm(x, half(y)) + swap(p, q).0
    }
    arrays: fn(x: f32, y: f32) -> f32 {
        let mut a = [0.0; 4];
        a[0] = x;
        for i in 1..4 { a[i] = a[i - 1] * y + i as f32; }
        if x < y { a[2] = 7.0; }
        let [first, _, third, last] = a;
        return first + third * last;
    }
    powers: fn(x: f32, y: f32) -> f32 { x.powi(3) - x.powi(-2) + x.powi(0) + (x.powi(7) / (1.0 + y.abs())) }
    power: fn(x: f32, y: f32) -> f32 { x.abs().powf(y) + f32::powf(2.0, y) }
    fused: fn(x: f32, y: f32) -> f32 { x.mul_add(y, -1.5) + f32::mul_add(y, y, x) }
    limits: fn(x: f32, y: f32) -> f32 { x.clamp(-1.5, 2.0) + y.min(0.25).max(x.signum()) * x.recip() }
    signs: fn(x: f32) -> f32 { x.signum() }
    tests: fn(x: f32) -> bool { (x.is_nan() || x.is_infinite()) ^ (x.is_finite() & (x > 1.0)) }
    constants: fn(x: f32) -> f32 {
        x * std::f32::consts::PI + core::f32::consts::LN_2 * f32::EPSILON + (x / f32::MAX - f32::MIN_POSITIVE)
    }
    bits: fn(x: f32) -> f32 {
        let i = 0x5f37_59dfu32 - (x.abs().to_bits() >> 1);
        let y = f32::from_bits(i);
        y * (1.5 - 0.5 * x.abs() * y * y)
    }
    to_i8: fn(x: f32) -> i8 { x as i8 }
    to_u8: fn(x: f32) -> u8 { (x * 100.0) as u8 }
    to_u16: fn(x: f32) -> u16 { (x * 30000.0) as u16 }
    to_i32: fn(x: f32) -> i32 { (x * 1e9) as i32 }
    to_u64: fn(x: f32) -> u64 { (x * 1e19) as u64 }
    narrow: fn(x: i32) -> i16 { (x as u8 as i8 as i32 - x as i16 as i32 / 3) as i16 }
    widen: fn(x: i8) -> u64 { (x as u64) ^ (x as u32 as u64) ^ 0xffff_ffff_0000_0001 }
    from_int: fn(x: i32) -> f32 { x as f32 / 7.0 + (x > 3) as i32 as f32 + x as u8 as f32 }
    divide: fn(a: i32, b: i32) -> i32 { a / b + 1000 * (a % b) }
    divide_known: fn(a: i32, b: i32) -> i32 { a / 7 - a % 7 + b / -3 + b % -3 + a / 1 }
    divide_i8: fn(a: i8, b: i8) -> i8 { (a / b).wrapping_sub(a % b) }
    divide_u32: fn(a: u32, b: u32) -> u32 { a / b + a % b * 3 }
    divide_i64: fn(a: i64, b: i64) -> i64 { a / b - a % b * 1_000_000_007 }
    euclid: fn(a: i32, b: i32) -> i32 { a.rem_euclid(b) - a.rem_euclid(5) + b.rem_euclid(-4) }
    wrapping: fn(a: i8, b: i8) -> i8 { a.wrapping_mul(b).wrapping_add(b.wrapping_neg()) ^ a.wrapping_sub(3) }
    hash: fn(x: u32) -> u32 {
        let mut h = x ^ 0x9e37_79b9;
        for _ in 0..2 {
            h ^= h >> 16;
            h = h.wrapping_mul(0x85eb_ca6b);
            h ^= h << 3i8;
        }
        !h | 1
    }
    shifts: fn(a: i32, b: i32) -> i32 { (a << (b & 7)) - (a >> (b & 15) as u8) + (1 << (b & 3)) }
    shifts_u8: fn(a: u8, b: u8) -> u8 { (a << 3) | (a >> (b & 7)) }
    count: fn(a: i8, b: i8) -> u32 { a.count_ones() + (b as i64).count_ones() * 100 }
    choose: fn(x: i32) -> u32 { if x > 0 { 0xffff_fff0 } else { 5 } }
    choose_u64: fn(x: i32) -> u64 {
        let top = if x < 3 { u64::MAX } else { 0x8000_0000_0000_0001 };
        top - u64::MAX / 2
    }
    choose_bool: fn(x: i32) -> bool { if x < 0 { x == -3 } else { x != 2 } }
    integers: fn(a: i32, b: i32) -> i32 { a.max(b).min(9).abs() * b.signum() + a.clamp(-2, 2) - (-b) }
    unary_u16: fn(a: u16, b: u16) -> u16 { (!a >> 2) + b.max(3) % 5 }
    known: fn(x: f32) -> f32 {
        let mut s = x;
        for i in 0..4u32 {
            if i == 0 { s += 1.0 } else { s *= (i - 1) as f32 + 0.5 }
            if i % 2 == 1 && i != 3 { s -= 2.0; }
        }
        s
    }
}

const POINTS: [f32; 17] =
    [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.5, 2.5, -2.5, 3.7, -3.7, 0.1, 1e-3, 20.0, -20.0, 127.5, -300.25];
const SPECIAL: [f32; 5] = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE];
const INTS: [i32; 12] = [0, 1, -1, 2, -2, 3, -3, 7, -7, 100, -128, 127];

fn close(a: f32, b: f32, tolerance: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()) || (a - b).abs() <= tolerance * (1.0 + a.abs())
}

fn unary<A: Element, R: Element>(
    name: &str,
    plain: fn(A) -> R,
    kernel: &standin::Kernel,
    points: &[A],
    same: impl Fn(R, R) -> bool,
) {
    let found = elements::<R>(&kernel.call1(&[&array(points.iter().copied())]).unwrap());
    for (x, found) in points.iter().zip(found) {
        let expected = plain(*x);
        assert!(same(expected, found), "{name}({x:?}): Rust gives {expected:?}, the kernel {found:?}");
    }
}

fn binary<A: Element, R: Element>(
    name: &str,
    plain: fn(A, A) -> R,
    kernel: &standin::Kernel,
    points: &[(A, A)],
    same: impl Fn(R, R) -> bool,
) {
    let (a, b) = (array(points.iter().map(|p| p.0)), array(points.iter().map(|p| p.1)));
    let found = elements::<R>(&kernel.call1(&[&a, &b]).unwrap());
    for ((x, y), found) in points.iter().zip(found) {
        let expected = plain(*x, *y);
        assert!(same(expected, found), "{name}({x:?}, {y:?}): Rust gives {expected:?}, the kernel {found:?}");
    }
}

fn pairs<T: Copy>(points: &[T], keep: impl Fn(T, T) -> bool) -> Vec<(T, T)> {
    let all = points.iter().flat_map(|a| points.iter().map(|b| (*a, *b)));
    all.filter(|(a, b)| keep(*a, *b)).collect()
}

/// Runs cases: `unary name points tolerance` and so on.
macro_rules! check {
    ($($how:ident $name:ident $points:expr, $same:expr;)*) => {
        $($how(stringify!($name), $name::plain, $name::compiled::kernel(), $points, $same);)*
    };
}

#[test]
fn floats() {
    let all: Vec<f32> = POINTS.iter().chain(&SPECIAL).copied().collect();
    let two = pairs(&POINTS, |_, _| true);
    // Rust's min and max pass over NaN, the language's do not: no NaN there.
    let special = pairs(&all, |a, b| !a.is_nan() && !b.is_nan());
    check! {
        unary mish &all, |a, b| close(a, b, 2e-6);
        unary functions &POINTS[2..], |a, b| close(a, b, 4e-6);
        unary rounding &all, |a, b| close(a, b, 0.0);
        unary loops &all, |a, b| close(a, b, 0.0);
        binary branches &special, |a, b| close(a, b, 0.0);
        binary helpers &special, |a, b| close(a, b, 0.0);
        binary arrays &special, |a, b| close(a, b, 0.0);
        binary powers &two, |a, b| close(a, b, 2e-6);
        binary power &two, |a, b| close(a, b, 2e-6);
        binary fused &special, |a, b| close(a, b, 0.0);
        binary limits &special, |a, b| close(a, b, 0.0);
        unary signs &all, |a, b| close(a, b, 0.0);
        unary constants &all, |a, b| close(a, b, 0.0);
        unary known &all, |a, b| close(a, b, 0.0);
        unary bits &POINTS[2..], |a, b| close(a, b, 0.0);
        unary tests &all, |a, b| a == b;
    }
}

#[test]
fn casts() {
    let all: Vec<f32> = POINTS.iter().chain(&SPECIAL).copied().collect();
    check! {
        unary to_i8 &all, |a, b| a == b;
        unary to_u8 &all, |a, b| a == b;
        unary to_u16 &all, |a, b| a == b;
        unary to_i32 &all, |a, b| a == b;
        unary to_u64 &all, |a, b| a == b;
        unary narrow &[0, 5, -7, 200, -200, 70_000, i32::MAX, i32::MIN], |a, b| a == b;
        unary widen &[0i8, 1, -1, 127, -128], |a, b| a == b;
        unary from_int &INTS, |a, b| close(a, b, 0.0);
    }
}

#[test]
fn integers_divide_shift_and_wrap_as_in_rust() {
    let two = pairs(&INTS, |_, _| true);
    let divisible = pairs(&INTS, |_, b| b != 0);
    let narrow: Vec<i8> = INTS.iter().map(|v| *v as i8).collect();
    let small = pairs(&narrow, |a, b| b != 0 && !(a == -128 && b == -1));
    let unsigned: Vec<u32> = vec![0, 1, 2, 3, 10, 1000];
    let words: Vec<u32> = vec![0, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX];
    let long: Vec<i64> = vec![-5_000_000_000, -7, -1, 0, 3, 4_000_000_001];
    check! {
        binary divide &divisible, |a, b| a == b;
        binary divide_known &two, |a, b| a == b;
        binary divide_i8 &small, |a, b| a == b;
        binary divide_u32 &pairs(&unsigned, |_, b| b != 0), |a, b| a == b;
        binary divide_i64 &pairs(&long, |_, b| b != 0), |a, b| a == b;
        binary euclid &divisible, |a, b| a == b;
        binary wrapping &pairs(&narrow, |_, _| true), |a, b| a == b;
        unary hash &words, |a, b| a == b;
        binary shifts &two, |a, b| a == b;
        binary shifts_u8 &pairs(&[0u8, 1, 7, 200, 255], |_, _| true), |a, b| a == b;
        binary count &pairs(&narrow, |_, _| true), |a, b| a == b;
        unary choose &INTS, |a, b| a == b;
        unary choose_u64 &INTS, |a, b| a == b;
        unary choose_bool &INTS, |a, b| a == b;
        binary integers &two, |a, b| a == b;
        binary unary_u16 &pairs(&[0u16, 1, 7, 65535, 300], |_, _| true), |a, b| a == b;
    }
}
