//! Conversions against independent definitions, on every instruction set (each in a process of its own, because the
//! choice is made once a process).

use half::{bf16, f16};
use std::process::Command;
use zmlx_simd::{ISA_VARIABLE, SimdError, available, convert, isa_name, try_arch};

/// 0.. with an odd length, so that whole registers and a remainder both occur.
const LEN: usize = 1021;

/// Values where conversions change behaviour, then a sweep of bit patterns.
fn floats() -> Vec<f32> {
    let mut v = vec![0.0, -0.0, 0.5, -0.5, 0.99999994, 1.5, -1.5, 2147483520.0, 2147483648.0, -2147483648.0];
    v.extend([-2147483904.0, 4294967040.0, 4294967296.0, 1e20, -1e20, f32::INFINITY, f32::NEG_INFINITY]);
    v.extend([
        f32::NAN,
        -f32::NAN,
        f32::from_bits(0x7f80_0001),
        f32::from_bits(0xffff_ffff),
        f32::MAX,
        1e-45,
    ]);
    v.extend([
        65504.0,
        65519.996,
        65520.0,
        5.9604645e-8,
        2.9802322e-8,
        2.9802326e-8,
        6.1035156e-5,
        6.097555e-5,
    ]);
    v.extend((0..200_003u32).map(|i| f32::from_bits(i.wrapping_mul(21_473))));
    v
}

/// To bf16 by comparing the two neighbours in f64; ties to the even pattern.
fn nearest_bf16(x: f32) -> u16 {
    let down = (x.to_bits() >> 16) as u16;
    if x.is_nan() {
        return down | 0x40;
    }
    if x.is_infinite() {
        return down;
    }
    // The step above the largest finite value stands at 2^128 for the comparison.
    let value = |b: u16| {
        let v = f32::from_bits(u32::from(b) << 16);
        if v.is_infinite() { 2f64.powi(128).copysign(f64::from(v)) } else { f64::from(v) }
    };
    let up = down + 1;
    let (to_down, to_up) = ((f64::from(x) - value(down)).abs(), (value(up) - f64::from(x)).abs());
    if to_up < to_down || (to_up == to_down && up & 1 == 0) { up } else { down }
}

fn check_floats() {
    let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let mut wide = vec![0.0; all.len()];
    convert::f16_to_f32(&all, &mut wide).unwrap();
    for (h, &x) in all.iter().zip(&wide) {
        let want = h.to_f64();
        assert!(f64::from(x) == want || (x.is_nan() && want.is_nan()), "{h:?} {x}");
    }
    let src = floats();
    let mut narrow = vec![f16::ZERO; src.len()];
    convert::f32_to_f16(&src, &mut narrow).unwrap();
    for (&x, h) in src.iter().zip(&narrow) {
        let want = f16::from_f32_const(x);
        assert!(h.to_bits() == want.to_bits() || (h.is_nan() && want.is_nan()), "{x:e} {h:?} {want:?}");
    }
    let mut narrow = vec![bf16::ZERO; src.len()];
    convert::f32_to_bf16(&src, &mut narrow).unwrap();
    for (&x, b) in src.iter().zip(&narrow) {
        assert_eq!(b.to_bits(), nearest_bf16(x), "{x:e} {:x}", x.to_bits());
    }
    let mut wide = vec![0.0; src.len()];
    convert::bf16_to_f32(&narrow, &mut wide).unwrap();
    for (b, x) in narrow.iter().zip(&wide) {
        assert_eq!(x.to_bits(), u32::from(b.to_bits()) << 16);
    }
}

fn check_float_integer() {
    let src = floats();
    let (mut signed, mut unsigned) = (vec![7i32; src.len()], vec![7u32; src.len()]);
    convert::f32_to_i32(&src, &mut signed).unwrap();
    convert::f32_to_u32(&src, &mut unsigned).unwrap();
    for ((&x, &i), &u) in src.iter().zip(&signed).zip(&unsigned) {
        let whole = if x.is_nan() { 0.0 } else { f64::from(x).trunc() };
        assert_eq!(f64::from(i), whole.clamp(-2147483648.0, 2147483647.0) + 0.0, "{x:e}");
        assert_eq!(f64::from(u), whole.clamp(0.0, 4294967295.0) + 0.0, "{x:e}");
    }
    let mut ints: Vec<u32> = (0..LEN as u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
    ints.extend([0, 1, u32::MAX, 0x8000_0000, 0x7fff_ffff, 16_777_217, 16_777_219, 0xffff_ff7f, 0xffff_ff80]);
    let as_signed: Vec<i32> = ints.iter().map(|&u| u as i32).collect();
    let (mut from_u, mut from_i) = (vec![0.0; ints.len()], vec![0.0; ints.len()]);
    convert::u32_to_f32(&ints, &mut from_u).unwrap();
    convert::i32_to_f32(&as_signed, &mut from_i).unwrap();
    for k in 0..ints.len() {
        // Both are exact in f64, whose narrowing rounds once.
        assert_eq!(from_u[k], f64::from(ints[k]) as f32, "{}", ints[k]);
        assert_eq!(from_i[k], f64::from(as_signed[k]) as f32, "{}", as_signed[k]);
    }
}

/// The lane forms of integer to float.
struct FromInteger<'a>(&'a [u32], &'a mut [[f32; 2]]);

impl pulp::WithSimd for FromInteger<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        for (chunk, out) in self.0.chunks(S::U32_LANES).zip(self.1.chunks_mut(S::U32_LANES)) {
            let x = simd.partial_load_u32s(chunk);
            let both = [convert::from_u32(simd, x), convert::from_i32(simd, pulp::cast(x))];
            for (j, v) in both.into_iter().enumerate() {
                let mut lanes = vec![0.0; chunk.len()];
                simd.partial_store_f32s(&mut lanes, v);
                for (o, y) in out.iter_mut().zip(lanes) {
                    o[j] = y;
                }
            }
        }
    }
}

#[test]
fn integer_lanes_to_float() {
    let mut ints: Vec<u32> = (0..400_009u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
    for p in 0..32 {
        ints.extend((-3i32..=3).map(|d| (1u32 << p).wrapping_add_signed(d)));
        ints.extend((-3i32..=3).map(|d| (u32::MAX << p).wrapping_add_signed(d)));
    }
    for (isa, arch) in available() {
        let mut out = vec![[7.0; 2]; ints.len()];
        arch.dispatch(FromInteger(&ints, &mut out));
        for (&u, got) in ints.iter().zip(&out) {
            let want = [f64::from(u) as f32, f64::from(u as i32) as f32];
            assert_eq!(got.map(f32::to_bits), want.map(f32::to_bits), "{isa} {u}");
        }
    }
}

/// One integer conversion against arithmetic modulo 2^bits in i64.
macro_rules! check_integer {
    ($name:ident: $from:ty => $to:ty) => {{
        let src: Vec<$from> =
            (0..LEN as u32).map(|i| i.wrapping_mul(0x9e37_79b9).rotate_left(9) as $from).collect();
        let mut dst = vec![0 as $to; LEN];
        convert::$name(&src, &mut dst).unwrap();
        let modulus = 1i64 << <$to>::BITS;
        for (&x, &y) in src.iter().zip(&dst) {
            assert_eq!((i64::from(x) - i64::from(y)).rem_euclid(modulus), 0, "{} {x}", stringify!($name));
        }
        let short = convert::$name(&src, &mut dst[1..]);
        assert_eq!(short, Err(SimdError::Length { what: stringify!($name), dst: LEN - 1, src: LEN }));
    }};
}

fn check_integers() {
    check_integer!(i8_to_i32: i8 => i32);
    check_integer!(u8_to_u32: u8 => u32);
    check_integer!(u8_to_i32: u8 => i32);
    check_integer!(i16_to_i32: i16 => i32);
    check_integer!(u16_to_u32: u16 => u32);
    check_integer!(u16_to_i32: u16 => i32);
    check_integer!(i32_to_i8: i32 => i8);
    check_integer!(i32_to_i16: i32 => i16);
    check_integer!(u32_to_u8: u32 => u8);
    check_integer!(u32_to_u16: u32 => u16);
    let bytes: Vec<u8> = (0..LEN).map(|i| (i % 7) as u8 * ((i % 3) as u8)).collect();
    let (mut masks, mut back) = (vec![1u32; LEN], vec![9u8; LEN]);
    convert::bool_to_mask(&bytes, &mut masks).unwrap();
    convert::mask_to_bool(&masks, &mut back).unwrap();
    for ((&b, &m), &r) in bytes.iter().zip(&masks).zip(&back) {
        assert_eq!((m, r), if b == 0 { (0, 0) } else { (u32::MAX, 1) });
    }
}

#[test]
fn conversions() {
    check_floats();
    check_float_integer();
    check_integers();
}

/// Run by the tests below in a child process: prints which instruction set was chosen.
#[test]
#[ignore = "helper of the tests that set the variable"]
fn report_choice() {
    match try_arch() {
        Ok(_) => println!("chosen={}", isa_name()),
        Err(error) => println!("refused={error}; then {}", isa_name()),
    }
}

/// This test program with one test and one value of the variable: (success, standard output).
fn child(test: &str, isa: &str, ignored: bool) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(ISA_VARIABLE, isa);
    if ignored {
        command.arg("--ignored");
    }
    let out = command.output().unwrap();
    (out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned())
}

#[test]
fn every_isa_converts_alike() {
    for (isa, _) in available() {
        let (ok, text) = child("conversions", isa, false);
        assert!(ok && text.contains("1 passed"), "{isa}:\n{text}");
    }
}

#[test]
fn variable_chooses_and_refuses() {
    for (isa, _) in available() {
        let (ok, text) = child("report_choice", isa, true);
        assert!(ok && text.contains(&format!("chosen={isa}\n")), "{isa}:\n{text}");
    }
    let (ok, text) = child("report_choice", "mmx", true);
    assert!(ok && text.contains("refused=instruction set \"mmx\"") && text.contains("scalar"), "{text}");
}
