//! Elementwise texts in the emulator against the evaluator, both dialects.
//!
//! Tolerances are relative to the result, with an absolute part for results near 0: f32 arithmetic rounds each step,
//! functions are within a few units in the last place, outputs of 16 bits within one unit of theirs.

mod emit_support;

use std::slice::from_ref;

use emit_support::{Input, case, check, input, params, random};
use zmlx_lang::eval::{Shapes, Tensor, evaluate};
use zmlx_lang::{Dtype, Op, Signature};

const SIZES: [usize; 7] = [1, 3, 31, 32, 33, 1000, 4097];

/// The operation's call on inputs x, y, z.
fn call(op: Op) -> String {
    format!("{}({})", op.name(), ["x", "y", "z"][..op.arity()].join(", "))
}

fn floats(values: &[f64]) -> Input {
    input(Dtype::F32, &[values.len()], values)
}

/// Inputs where an operation is defined and interesting.
fn domain_of(op: Op) -> Vec<Input> {
    let spread: Vec<f64> = (0..257).map(|i| (f64::from(i) - 128.0) * 0.07 + 0.003).collect();
    let positive: Vec<f64> = spread.iter().map(|v| v.exp()).collect();
    let unit: Vec<f64> = spread.iter().map(|v| v / 9.1).collect();
    let y: Vec<f64> = (0..257).map(|i| (f64::from(i * 37 % 257) - 128.0) * 0.031 + 0.001).collect();
    let z: Vec<f64> = (0..257).map(|i| f64::from(i * 91 % 257) * 0.01 - 1.0).collect();
    let x = match op {
        Op::Log | Op::Log2 | Op::Log10 | Op::Sqrt | Op::Rsqrt | Op::Pow => positive,
        Op::Log1p => positive.iter().map(|v| v - 0.9).filter(|v| *v > -0.99).cycle().take(257).collect(),
        Op::Asin | Op::Acos => unit,
        Op::Select => spread.iter().map(|v| f64::from(u8::from(*v > 1.0))).collect(),
        Op::Rem | Op::FloorDiv => (0..257).map(|i| f64::from(i) - 128.25).collect(),
        _ => spread,
    };
    // Quotients away from integers, where floor is continuous.
    let y = match op {
        Op::Rem | Op::FloorDiv => (0..257).map(|i| if i % 2 == 0 { 7.5 } else { -3.5 }).collect(),
        _ => y,
    };
    [x, y, z][..op.arity()].iter().map(|v| floats(v)).collect()
}

#[test]
fn every_operation_on_floats() {
    let mut cases = Vec::new();
    for &op in Op::ALL.iter().filter(|op| op.signature() != Signature::Integer) {
        // Near a root the formulas with one subtraction are exact in absolute terms only.
        let (relative, absolute) = match op {
            Op::GeluErf | Op::GeluTanh | Op::Tan => (4e-6, 4e-7),
            Op::Sin | Op::Cos | Op::Rem => (1e-6, 2e-6),
            Op::Pow => (2e-5, 0.0),
            _ => (1e-6, 1e-37),
        };
        cases.push(case(&call(op), &domain_of(op), params(64, 1, 1, 1)).tolerance(relative, absolute));
    }
    check(&cases);
}

/// Distance from an exact value in units of the last place of the nearest f32.
fn units(found: f32, exact: f64) -> f64 {
    let near = (exact as f32).abs().max(f32::MIN_POSITIVE);
    let unit = f64::from(f32::from_bits(near.to_bits() + 1)) - f64::from(near);
    if f64::from(found) == exact { 0.0 } else { (f64::from(found) - exact).abs() / unit }
}

#[test]
fn functions_that_metal_lacks_are_accurate() {
    let mut near: Vec<f64> = (-1200..1200).map(|i| f64::from(i) * 0.004 + 1e-4).collect();
    near.extend((1..40).map(|i| 2f64.powi(-i)));
    near.extend((1..40).map(|i| -(2f64.powi(-i)) * 0.99));
    near.extend((0..80).map(f64::from));
    near.extend((0..80).map(|i| f64::from(-i)));
    let limits = [("erf", 1.5), ("expm1", 2.0), ("log1p", 2.5), ("softplus", 3.0), ("mish", 4.0)];
    let text = limits.map(|(name, _)| format!("{name}(x)")).join(", ");
    let x = floats(&near);
    let case = case(&text, from_ref(&x), params(64, 1, 1, 1));
    let tensor =
        Tensor::f32(&x.buffer.shape, &x.buffer.to_f32().iter().map(|v| f64::from(*v)).collect::<Vec<_>>());
    let exact = evaluate(&case.kernel, &[tensor], &Shapes::default()).unwrap();
    for (dialect, found) in emit_support::DIALECTS.iter().zip(emit_support::outputs(&case)) {
        for ((name, limit), (found, exact)) in limits.iter().zip(found.iter().zip(&exact)) {
            let all = found.to_f32().into_iter().zip(exact.to_f64()).zip(&near);
            let all = all.filter(|((f, e), _)| !(f.is_nan() && e.is_nan()));
            let ((_, _), at, worst) =
                all.map(|((f, e), x)| ((f, e), *x, units(f, e))).max_by(|a, b| a.2.total_cmp(&b.2)).unwrap();
            assert!(worst <= *limit, "{dialect:?} {name}: {worst} units at {at}");
        }
    }
}

#[test]
fn special_values() {
    let special = floats(&[
        0.0,
        -0.0,
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        1e30,
        -1e30,
        1e-30,
        88.0,
        100.0,
        -100.0,
        1000.0,
        -1000.0,
        0.5,
        1.5,
        2.5,
        -2.5,
        16_777_217.0,
    ]);
    let n = special.buffer.shape[0];
    let pairs: Vec<f64> = special.buffer.to_f32().iter().map(|v| f64::from(*v)).collect();
    let x = floats(&pairs.iter().flat_map(|v| vec![*v; n]).collect::<Vec<_>>());
    let y = floats(&pairs.iter().cycle().take(n * n).copied().collect::<Vec<_>>());
    let mut cases = Vec::new();
    for &op in Op::ALL {
        // Trigonometry of huge arguments and tiny differences of them are the library's own affair.
        let skipped = matches!(op, Op::Sin | Op::Cos | Op::Tan | Op::Rem | Op::FloorDiv | Op::GeluTanh);
        let narrow = matches!(op.signature(), Signature::Integer | Signature::Select | Signature::Logic);
        if skipped || narrow || op.arity() == 3 {
            continue;
        }
        let inputs = if op.arity() == 1 { vec![special.clone()] } else { vec![x.clone(), y.clone()] };
        cases.push(case(&call(op), &inputs, params(64, 1, 1, 1)).tolerance(2e-5, 1e-30));
    }
    for to in ["i32", "u32", "i64", "u64", "i8", "u8", "i16", "u16", "bool"] {
        cases.push(case(&format!("{to}(x)"), from_ref(&special), params(64, 1, 1, 1)));
    }
    check(&cases);
}

fn integers(dtype: Dtype) -> [Input; 2] {
    let (least, most): (f64, f64) = match dtype {
        Dtype::I8 => (-128.0, 127.0),
        Dtype::U8 => (0.0, 255.0),
        Dtype::I16 => (-32768.0, 32767.0),
        Dtype::U16 => (0.0, 65535.0),
        Dtype::I32 => (-2147483648.0, 2147483647.0),
        Dtype::U32 => (0.0, 4294967295.0),
        // What doubles hold exactly.
        Dtype::I64 => (-9223372036854775808.0, 9007199254740991.0),
        _ => (0.0, 9007199254740991.0),
    };
    let mut values = vec![least, most, 0.0, 1.0, 2.0, 3.0, 7.0, 31.0, 32.0, 63.0, 64.0, 100.0];
    if least < 0.0 {
        values.extend([-1.0, -2.0, -3.0, -7.0, -32.0]);
    }
    let n = values.len();
    let x: Vec<f64> = values.iter().flat_map(|v| vec![*v; n]).collect();
    let y: Vec<f64> = values.iter().cycle().take(n * n).copied().collect();
    [input(dtype, &[n * n], &x), input(dtype, &[n * n], &y)]
}

#[test]
fn every_operation_on_integers() {
    let mut cases = Vec::new();
    for dtype in [Dtype::I32, Dtype::U32, Dtype::I64, Dtype::U64, Dtype::I8, Dtype::U16] {
        let inputs = integers(dtype);
        for &op in Op::ALL {
            let integral =
                matches!(op.signature(), Signature::Integer | Signature::Number | Signature::Compare);
            if !(integral || op.signature() == Signature::Logic) || op.arity() == 3 {
                continue;
            }
            cases.push(case(&call(op), &inputs[..op.arity()], params(64, 1, 1, 1)));
        }
        cases.push(case("select(x > y, x, y)", &inputs, params(64, 1, 1, 1)));
        for to in ["i32", "u32", "i64", "u64", "i8", "u8", "i16", "u16", "bool", "f32", "f16", "bf16"] {
            cases.push(case(&format!("{to}(x)"), &inputs[..1], params(64, 1, 1, 1)));
        }
    }
    let x = random(Dtype::Bool, &[70], 1);
    let y = random(Dtype::Bool, &[70], 2);
    for text in ["x & y", "x | y", "x ^ y", "bitnot(x)", "!x", "x && y", "x + y", "x < y", "x == y", "f32(x)"]
    {
        let inputs = [x.clone(), y.clone()];
        let used = if text.contains('y') { 2 } else { 1 };
        cases.push(case(text, &inputs[..used], params(64, 1, 1, 1)));
    }
    check(&cases);
}

#[test]
fn sizes_widths_and_dtypes() {
    let mut cases = Vec::new();
    for (dtype, vecs) in [
        (Dtype::F32, &[1, 2, 4, 8][..]),
        (Dtype::F16, &[8, 2]),
        (Dtype::Bf16, &[8, 1]),
        (Dtype::I8, &[8]),
        (Dtype::Bool, &[4]),
        (Dtype::U16, &[8]),
        (Dtype::I64, &[2]),
    ] {
        for &vec in vecs {
            for items in [1, 2] {
                let p = params(64, vec, 1, items);
                for n in SIZES {
                    let inputs = [random(dtype, &[n], 1), random(dtype, &[n], 2)];
                    cases.push(case("f(x, y) = x * 2 + y", &inputs, p));
                    if n == 1000 {
                        cases.push(case("f(x, y) = x * 2 + y", &inputs, p).misaligned());
                        cases.push(case("f(x, y) = x * 2 + y", &inputs, p).wide());
                    }
                }
            }
        }
    }
    check(&cases);
}

#[test]
fn stored_dtypes() {
    let x = random(Dtype::F32, &[100], 3);
    let mut cases = Vec::new();
    for to in ["f16", "bf16", "i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64", "bool"] {
        for vec in [1, 4] {
            cases.push(case(&format!("f(x) -> (y: {to}) = x * 10"), from_ref(&x), params(32, vec, 1, 1)));
        }
    }
    check(&cases);
}

#[test]
fn broadcasts() {
    let d = Dtype::F32;
    let f = |shape: &[usize], seed| random(d, shape, seed);
    let mut cases = Vec::new();
    for vec in [1, 2, 4, 8] {
        for items in [1, 2] {
            let p = params(32, vec, 1, items);
            let (a, b) = (f(&[9, 12], 1), f(&[12], 2));
            cases.push(case("x + y", &[a.clone(), b.clone()], p));
            cases.push(case("x + y", &[a.clone(), b.clone()], p).misaligned());
            cases.push(case("x + y", &[a.clone(), b.clone()], p).strided());
            cases.push(case("x + y", &[a.clone(), b], p).wide());
            cases.push(case("x + y", &[a.clone(), f(&[9, 1], 2)], p));
            cases.push(case("x + y", &[a.clone(), f(&[], 2)], p));
            cases.push(case(
                "f(x, y: row, s: scalar) = x * y + s",
                &[a.clone(), f(&[9, 1], 2), f(&[], 3)],
                p,
            ));
            cases.push(case("x + y + z", &[f(&[3, 5, 7], 1), f(&[5, 1], 2), f(&[3, 1, 7], 3)], p));
            cases.push(case("x + y", &[f(&[3, 1, 2, 1], 1), f(&[4, 1, 5], 2)], p).wide());
            cases.push(case(
                "x * 0 + index(0) + 10 * index(1) + 100 * index(2) + len(1)",
                &[f(&[3, 5, 7], 1)],
                p,
            ));
            cases.push(case("index(0) * 3", &[], p).domain(&[10]));
        }
    }
    check(&cases);
}

#[test]
fn random_bits() {
    let seed = input(Dtype::U32, &[], &[1234.0]);
    let wide = input(Dtype::U64, &[], &[1_234_567_890_123.0]);
    let x = random(Dtype::F32, &[11, 13], 1);
    let mut cases = Vec::new();
    for vec in [1, 4] {
        let p = params(32, vec, 1, 1);
        cases.push(case("f(seed: scalar u32) = random(seed)", from_ref(&seed), p).domain(&[11, 13]));
        cases.push(case("f(seed: scalar u64) = random(seed)", from_ref(&wide), p).domain(&[700]));
        cases.push(case("f(x, seed: scalar u32) = dropout(x, 0.3, seed)", &[x.clone(), seed.clone()], p));
    }
    check(&cases);
}

#[test]
fn strict_kernels_round_each_step() {
    // Products that a fused multiply-add would round otherwise.
    let n = 999;
    let at = |k: usize| (0..n).map(|i| 1.0 + ((i * k) % 4096) as f64 / 4096.0 / 1024.0).collect::<Vec<_>>();
    let inputs = [input(Dtype::F32, &[n], &at(37)), input(Dtype::F32, &[n], &at(91)), {
        let c: Vec<f64> = at(37).iter().zip(at(91)).map(|(a, b)| -(a * b)).collect();
        input(Dtype::F32, &[n], &c)
    }];
    let mut cases = Vec::new();
    for vec in [1, 4] {
        let p = params(64, vec, 1, 1);
        let f = |text: &str| case(text, &inputs, p).tolerance(0.0, 0.0);
        cases.push(f("strict f(a, b, c) = a * b + c"));
        cases.push(f("strict f(a, b, c) = fma(a, b, c)"));
        cases.push(f("strict f(a, b, c) = (a - b * c) / (a + b) + sqrt(b)"));
        cases.push(f("strict f(a, b, c) = f32(bf16(a * b)) * f32(f16(c))"));
        cases.push(f("strict f(a, b, c) -> (y: f16) = a * b + c"));
    }
    check(&cases);
    // The two differ, or the test above would say nothing.
    let a = inputs[0].buffer.to_f32();
    let (b, c) = (inputs[1].buffer.to_f32(), inputs[2].buffer.to_f32());
    assert!((0..n).any(|i| a[i] * b[i] + c[i] != a[i].mul_add(b[i], c[i])));
}

#[test]
fn loads_at_computed_places() {
    let table = random(Dtype::F32, &[7, 5], 1);
    let half = random(Dtype::F16, &[7], 1);
    let inside = |dtype| input(dtype, &[40], &(0..40).map(|i| f64::from(i * 3 % 7)).collect::<Vec<_>>());
    let outside = input(Dtype::I32, &[6], &[-3.0, -1.0, 0.0, 6.0, 7.0, 2_147_483_647.0]);
    let far = input(Dtype::U64, &[3], &[1e18, 3.0, 4_294_967_298.0]);
    let none = input(Dtype::F32, &[0, 5], &[]);
    let mut cases = Vec::new();
    for vec in [1, 4] {
        let p = params(32, vec, 1, 1);
        for (text, inputs) in [
            ("f(t: array[2], i: i32) = t[i, 2]", vec![table.clone(), inside(Dtype::I32)]),
            ("f(t: array[2], i: u8) = t[i, (i + 1) % 5]", vec![table.clone(), inside(Dtype::U8)]),
            ("f(t: array[1], i: i64) = t[i] * 2", vec![half.clone(), inside(Dtype::I64)]),
            ("f(t: array[2], i: i32) = t[i, 1; clamp]", vec![table.clone(), outside.clone()]),
            ("f(t: array[2], i: i32) = t[i, 1; zero]", vec![table.clone(), outside.clone()]),
            ("f(t: array[2], i: u64) = t[i, 1; zero]", vec![table.clone(), far.clone()]),
            ("f(t: array[2], i: i32) = t[i, 1; clamp]", vec![none.clone(), outside.clone()]),
            (
                "f(t: array[2], s: scalar i32) = t[s, index(0)]",
                vec![table.clone(), input(Dtype::I32, &[], &[4.0])],
            ),
        ] {
            let one = || {
                let c = case(text, &inputs, p);
                if text.contains("scalar") { c.domain(&[5]) } else { c }
            };
            cases.push(one());
            cases.push(one().wide());
        }
    }
    check(&cases);
}

#[test]
fn a_checked_load_outside_gives_nan() {
    let inputs = [random(Dtype::F32, &[7], 1), input(Dtype::I32, &[3], &[-1.0, 3.0, 7.0])];
    let found = emit_support::outputs(&case("f(t: array[1], i: i32) = t[i]", &inputs, params(32, 1, 1, 1)));
    for output in found {
        let y = output[0].to_f32();
        assert!(y[0].is_nan() && y[2].is_nan() && y[1] == inputs[0].buffer.to_f32()[3], "{y:?}");
    }
}

#[test]
fn scatters() {
    let ids = input(Dtype::I32, &[60], &(0..60).map(|i| f64::from(i * i % 7)).collect::<Vec<_>>());
    let outside = input(Dtype::I32, &[6], &[-3.0, -1.0, 0.0, 6.0, 7.0, 90.0]);
    let table = random(Dtype::F32, &[7, 9], 1);
    let rows = input(Dtype::I32, &[20, 1], &(0..20).map(|i| f64::from(i * 3 % 7)).collect::<Vec<_>>());
    let mut cases = Vec::new();
    for vec in [1, 4] {
        let p = params(32, vec, 1, 1);
        let count = |dtype| {
            let inputs = [ids.clone(), random(dtype, &[60], 2)];
            case("f(i: i32, v) = out[i] += v", &inputs, p).output(&[7]).tolerance(1e-5, 1e-4)
        };
        cases.extend([count(Dtype::F32), count(Dtype::I32), count(Dtype::U32), count(Dtype::F32).wide()]);
        let six = random(Dtype::F32, &[6], 2);
        for bounds in ["zero", "clamp"] {
            let text = format!("f(i: i32, v) = out[i; {bounds}] += v");
            cases.push(case(&text, &[outside.clone(), six.clone()], p).output(&[7]).tolerance(1e-5, 1e-4));
        }
        let text = "f(i: row i32, v: f16, t: array[2]) -> (y: f32) = y[i, index(0)] += v like t";
        let inputs = [rows.clone(), random(Dtype::F16, &[20, 9], 4), table.clone()];
        cases.push(case(text, &inputs, p).tolerance(1e-5, 1e-4));
        // Beside a scattered output, an ordinary one.
        let text = "f(i: i32, v) -> (y, z: u32) = y[i] += v, u32(i * i)";
        cases.push(
            case(text, &[ids.clone(), random(Dtype::F32, &[60], 2)], p).output(&[7]).tolerance(1e-5, 1e-4),
        );
    }
    check(&cases);
}

#[test]
fn groups_on_two_axes() {
    let mut elements = case("x * 2", from_ref(&random(Dtype::F32, &[500], 1)), params(32, 1, 1, 1));
    elements.grid = Some([32 * 5, 4, 1]);
    let mut rows = case("row_sum(x)", from_ref(&random(Dtype::F32, &[7, 40], 1)), params(64, 1, 2, 2));
    // More groups than rows: the last ones write nothing.
    rows.grid = Some([64 * 3, 2, 1]);
    check(&[elements, rows]);
}

#[test]
fn names_that_languages_reserve() {
    let names = [
        "float",
        "half",
        "kernel",
        "device",
        "out",
        "sizes",
        "c",
        "n",
        "threadIdx",
        "grid_size",
        "x_shape",
        "x",
    ];
    let x = random(Dtype::F32, &[10], 1);
    let text = format!("int({}) -> (constant, {}) = {}, x", names.join(", "), "x_strides", names.join(" + "));
    check(&[case(&text, &vec![x; names.len()], params(32, 1, 1, 1))]);
}
