//! The evaluator: operations against known values, rounding, shapes, errors.

use zmlx_lang::eval::{Data, Rounding, Shapes, Tensor, evaluate, evaluate_with};
use zmlx_lang::text::parse_kernel;
use zmlx_lang::{Dtype, LangError, Result, shape};

fn run(text: &str, inputs: &[Tensor], call: &Shapes) -> Result<Vec<Tensor>> {
    evaluate(&parse_kernel(text).unwrap_or_else(|e| panic!("{e}")), inputs, call)
}

fn floats(text: &str, x: &[f64]) -> Vec<f64> {
    run(text, &[Tensor::f32(&[x.len()], x)], &Shapes::default()).unwrap()[0].to_f64()
}

fn ints(text: &str, dtype: Dtype, x: &[i128]) -> Vec<i128> {
    let out = run(text, &[Tensor::int(&[x.len()], dtype, x.to_vec())], &Shapes::default()).unwrap().remove(0);
    match out.data {
        Data::Int(v) => v,
        Data::Float(v) => panic!("floats {v:?}"),
    }
}

const NAN: f64 = f64::NAN;
const INF: f64 = f64::INFINITY;

#[test]
fn float_operations() {
    let cases: &[(&str, &[f64], &[f64])] = &[
        ("sign(x)", &[-2.0, 0.0, 3.0, NAN], &[-1.0, 0.0, 1.0, NAN]),
        ("round(x)", &[0.5, 1.5, -2.5, 2.4], &[0.0, 2.0, -2.0, 2.0]),
        ("x % 3", &[4.0, -4.0, 3.0], &[1.0, 2.0, 0.0]),
        ("x // 2", &[5.0, -5.0], &[2.0, -3.0]),
        ("max(x, 1)", &[0.0, 2.0, NAN], &[1.0, 2.0, NAN]),
        ("min(1, x)", &[0.0, 2.0, NAN], &[0.0, 1.0, NAN]),
        ("sigmoid(x)", &[0.0, 800.0, -800.0], &[0.5, 1.0, 0.0]),
        ("softplus(x)", &[0.0, 1000.0, -1000.0], &[std::f64::consts::LN_2, 1000.0, 0.0]),
        ("erf(x)", &[0.5], &[0.520_499_877_813_046_5]),
        ("gelu(x)", &[1.0], &[0.841_344_746_068_542_9]),
        ("gelu_tanh(x)", &[1.0], &[0.841_191_990_608_276_8]),
        ("mish(x)", &[1.0], &[0.865_098_388_267_310_3]),
        ("0 ** x", &[0.0, 2.0, -1.0], &[1.0, 0.0, INF]),
        ("isnan(x) ? 1 : isinf(x) ? 2 : 3", &[NAN, -INF, 1.0], &[1.0, 2.0, 3.0]),
        ("f32(i32(x))", &[-2.7, 3e9, NAN], &[-2.0, 2_147_483_648.0, 0.0]),
        ("f32(i8(x))", &[200.0, -1.5], &[-56.0, -1.0]),
        ("f32(f16(x))", &[1.0 + 1.0 / 2048.0, 1e6], &[1.0, INF]),
        ("bitcast_f32(bitcast_u32(x) ^ 0x80000000)", &[1.5], &[-1.5]),
        ("cumsum_exclusive(x)", &[1.0, 2.0, 3.0], &[0.0, 1.0, 3.0]),
        ("cumprod_reverse(x)", &[1.0, 2.0, 3.0], &[6.0, 6.0, 3.0]),
        ("cummax(x)", &[1.0, 0.0, NAN, 5.0], &[1.0, 1.0, NAN, NAN]),
        ("cummin_exclusive_reverse(x)", &[1.0, 0.0, 5.0], &[0.0, 5.0, INF]),
        ("row_max(x) * 1", &[1.0, NAN, 2.0], &[NAN]),
        ("row_min(x) * 1", &[], &[INF]),
        ("row_argmax(x) * 1.0", &[1.0, 3.0, 3.0], &[1.0]),
        ("row_argmin(x) * 1.0", &[1.0, NAN, 0.0, NAN], &[1.0]),
        ("row_sum(x > 0) * 1.0", &[1.0, -3.0, 3.0], &[2.0]),
        ("fma(x, x, -1)", &[1.0 + 1e-9], &[libm::fma(1.0 + 1e-9, 1.0 + 1e-9, -1.0)]),
    ];
    let mut wrong = Vec::new();
    for (expr, x, expected) in cases {
        let found = floats(&format!("k(x: f32) = {expr}"), x);
        let same =
            |(a, b): (&f64, &f64)| a == b || a.is_nan() && b.is_nan() || (a - b).abs() < 1e-14 * b.abs();
        if found.len() != expected.len() || !found.iter().zip(*expected).all(same) {
            wrong.push(format!("{expr} of {x:?} gave {found:?} instead of {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn integer_operations() {
    let (i32_min, u64_max) = (i128::from(i32::MIN), i128::from(u64::MAX));
    let cases: &[(&str, Dtype, &[i128], &[i128])] = &[
        ("x + 1", Dtype::I32, &[i128::from(i32::MAX)], &[i32_min]),
        ("x * x", Dtype::U64, &[u64_max, 3], &[1, 9]),
        ("x * x", Dtype::U32, &[65_537], &[131_073]),
        ("u8(x + 250)", Dtype::U8, &[10], &[4]),
        ("-x", Dtype::I32, &[i32_min], &[i32_min]),
        ("x // 2", Dtype::I32, &[-5, 5], &[-3, 2]),
        ("x % -3", Dtype::I32, &[4, -4], &[-2, -1]),
        ("x // 0 + x % 0", Dtype::I32, &[4], &[0]),
        ("x << 31", Dtype::I32, &[1], &[i32_min]),
        ("x << 32", Dtype::U32, &[1], &[0]),
        ("x >> 40", Dtype::I32, &[-1, 1], &[-1, 0]),
        ("x >> 1", Dtype::I32, &[-3], &[-2]),
        ("~x", Dtype::U8, &[1], &[4_294_967_294]),
        ("popcount(x)", Dtype::I32, &[-1, 5], &[32, 2]),
        ("row_sum(x)", Dtype::U64, &[u64_max, 2], &[1]),
        ("row_max(x)", Dtype::I64, &[], &[i128::from(i64::MIN)]),
        ("x > 0 && x < 5", Dtype::I64, &[0, 3, 9], &[0, 1, 0]),
        ("!x", Dtype::Bool, &[0, 1], &[1, 0]),
        ("x + x", Dtype::Bool, &[1, 0], &[2, 0]),
    ];
    for (expr, dtype, x, expected) in cases {
        assert_eq!(ints(&format!("k(x: {dtype}) = {expr}"), *dtype, x), *expected, "{expr}");
    }
}

#[test]
fn roundings() {
    let kernel = parse_kernel("k(x: f16) = x / 3").unwrap();
    let x = [Tensor::float(&[1], Dtype::F16, vec![1.0])];
    let with = |r| evaluate_with(&kernel, &x, &Shapes::default(), r).unwrap()[0].to_f64()[0];
    assert_eq!(with(Rounding::Exact), 1.0 / 3.0);
    assert_eq!(with(Rounding::Storage), 0.333_251_953_125);
    let kernel = parse_kernel("strict k(x: f32) = (x + 1e-8) * 3 - 3").unwrap();
    let one = [Tensor::f32(&[1], &[1.0])];
    let each = evaluate_with(&kernel, &one, &Shapes::default(), Rounding::EachOperation).unwrap();
    assert_eq!(each[0].to_f64(), [0.0]);
}

#[test]
fn places() {
    let x = Tensor::f32(&[2, 1, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let w = Tensor::f32(&[2, 1], &[10.0, 20.0]);
    let inputs = [x, w];
    let out = run(
        "k(x, w) = x + w, index(2) * 100 + index(1) * 10 + index(0), len(1)",
        &inputs,
        &Shapes::default(),
    );
    let out = out.unwrap();
    assert_eq!(out[0].shape, [2, 2, 3]);
    assert_eq!(out[0].to_f64(), [11., 12., 13., 21., 22., 23., 14., 15., 16., 24., 25., 26.]);
    assert_eq!(out[1].to_f64(), [0., 1., 2., 10., 11., 12., 100., 101., 102., 110., 111., 112.]);
    assert_eq!(out[2].to_f64(), [2.0; 12]);
    let out = run("k(x, b: row) -> (s, m keep, e) = row_sum(x), b * 2, x * b", &inputs, &Shapes::default())
        .unwrap();
    let shapes: Vec<_> = out.iter().map(|o| o.shape.clone()).collect();
    assert_eq!(shapes, [vec![2, 2], vec![2, 2, 1], vec![2, 2, 3]]);
    assert_eq!(out[0].to_f64(), [6., 6., 15., 15.]);
    assert_eq!(
        run("k(x) = row_sum(x)", &[Tensor::f32(&[], &[4.0])], &Shapes::default()).unwrap()[0].shape,
        [0usize; 0]
    );
    let empty = run("k(x) = row_sum(x), x + 1", &[Tensor::f32(&[2, 0], &[])], &Shapes::default()).unwrap();
    assert_eq!((empty[0].to_f64(), empty[1].to_f64()), (vec![0.0, 0.0], vec![]));
}

#[test]
fn random_bits() {
    let call = Shapes { domain: Some(vec![6]), outputs: vec![] };
    let seed = |v| [Tensor::int(&[], Dtype::U32, vec![v])];
    let bits = run("k(seed: scalar u32) = random(seed)", &seed(0), &call).unwrap()[0].to_f64();
    // Random123's known answers for a counter and key of 0.
    assert_eq!(
        bits[..4],
        [
            f64::from(0x6627_e8d5u32),
            f64::from(0xe169_c58du32),
            f64::from(0xbc57_ac4cu32),
            f64::from(0x9b00_dbd8u32)
        ]
    );
    // The same element in another shape has the same bits.
    let call = Shapes { domain: Some(vec![2, 3]), outputs: vec![] };
    assert_eq!(run("k(seed: scalar u32) = random(seed)", &seed(0), &call).unwrap()[0].to_f64(), bits);
    assert_ne!(run("k(seed: scalar u32) = random(seed)", &seed(1), &call).unwrap()[0].to_f64(), bits);
}

#[test]
fn loads_and_scatters() {
    let t = Tensor::f32(&[3], &[1.0, 2.0, 3.0]);
    let at = Tensor::int(&[4], Dtype::I32, vec![2, -1, 0, 5]);
    let load = |b: &str| {
        run(&format!("k(t: array[1], i: i32) = t[i{b}]"), &[t.clone(), at.clone()], &Shapes::default())
    };
    assert_eq!(load("; clamp").unwrap()[0].to_f64(), [3.0, 1.0, 1.0, 3.0]);
    assert_eq!(load("; zero").unwrap()[0].to_f64(), [3.0, 0.0, 1.0, 0.0]);
    assert!(matches!(load(""), Err(LangError::OutOfBounds { array, at, .. }) if array == "t" && at == [-1]));
    let x = Tensor::f32(&[4], &[1.0, 10.0, 100.0, 1000.0]);
    let scatter = |b: &str, shape| {
        let call = Shapes { domain: None, outputs: vec![shape] };
        run(&format!("k(x, i: i32) = out[i{b}] += x"), &[x.clone(), at.clone()], &call)
    };
    assert_eq!(scatter("; clamp", Some(vec![3])).unwrap()[0].to_f64(), [110.0, 0.0, 1001.0]);
    assert_eq!(scatter("; zero", Some(vec![3])).unwrap()[0].to_f64(), [100.0, 0.0, 1.0]);
    assert!(matches!(scatter("", Some(vec![3])), Err(LangError::OutOfBounds { .. })));
    assert!(matches!(scatter("; zero", None), Err(LangError::Shape { .. })));
    assert!(matches!(scatter("; zero", Some(vec![3, 1])), Err(LangError::Shape { .. })));
}

#[test]
fn shape_errors() {
    let f = |shape: &[usize]| Tensor::f32(shape, &vec![0.5; shape.iter().product()]);
    let given = |d: &[usize]| Shapes { domain: Some(d.to_vec()), outputs: vec![] };
    let none = Shapes::default();
    let cases: Vec<(&str, Vec<Tensor>, &Shapes, &str)> = vec![
        (
            "k(x, w) = x + w",
            vec![f(&[2, 3]), f(&[4])],
            &none,
            "input w of shape [4] does not broadcast with x [2, 3]",
        ),
        (
            "k(x, b: row) = x + b",
            vec![f(&[2, 3]), f(&[3])],
            &none,
            "input b holds one value a row: its last axis must be 1, got shape [3]",
        ),
        (
            "k(x, s: scalar) = x + s",
            vec![f(&[2]), f(&[2])],
            &none,
            "input s is a scalar: it must have one element, got shape [2]",
        ),
        (
            "k(x, t: array[2]) = x + t[0, 0]",
            vec![f(&[2]), f(&[2])],
            &none,
            "input t must have 2 axes, got shape [2]",
        ),
        ("k(s: scalar) = s", vec![f(&[])], &none, "no element or row input decides its domain; give a shape"),
    ];
    for (text, inputs, call, expected) in cases {
        match run(text, &inputs, call) {
            Err(LangError::Shape { what, .. }) => assert_eq!(what, expected),
            other => panic!("{text}: {other:?}"),
        }
    }
    let narrow = given(&[3]);
    assert!(matches!(run("k(x) = x", &[f(&[2, 3])], &narrow), Err(LangError::Shape { .. })));
    let wide = Tensor { shape: vec![3], ..f(&[2]) };
    assert!(matches!(run("k(x) = x", &[wide], &none), Err(LangError::Shape { .. })));
    assert!(matches!(
        run("k(x: u8) = x", &[Tensor::int(&[1], Dtype::U8, vec![256])], &none),
        Err(LangError::Shape { .. })
    ));
    assert!(matches!(run("k(x: u8) = x", &[f(&[1])], &none), Err(LangError::InputDtype { .. })));
    assert!(shape::Domain::new(&[usize::MAX, 2, 2]).is_none());
    assert_eq!(shape::broadcast(&[2, 1], &[0, 2, 3]), Some(vec![0, 2, 3]));
    assert_eq!(shape::broadcast_strides(&[3, 1], &[2, 3, 4]), [0, 1, 0]);
}
