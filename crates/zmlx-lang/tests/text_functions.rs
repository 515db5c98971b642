//! The short names of the language against plain formulas in f64, and at their edges.

use zmlx_lang::Dtype;
use zmlx_lang::eval::{Shapes, Tensor, evaluate};
use zmlx_lang::text;

/// The outputs of a text over one row, flattened.
fn run(text: &str, rows: &[(&[usize], &[f64])]) -> Vec<f64> {
    let kernel = text::elementwise(None, text).unwrap_or_else(|e| panic!("{e}"));
    let inputs: Vec<Tensor> = rows.iter().map(|(shape, data)| Tensor::f32(shape, data)).collect();
    evaluate(&kernel, &inputs, &Shapes::default()).unwrap().iter().flat_map(Tensor::to_f64).collect()
}

fn close(found: f64, expected: f64) -> bool {
    found == expected
        || found.is_nan() && expected.is_nan()
        || (found - expected).abs() <= 1e-12 * expected.abs().max(1.0)
}

#[test]
fn functions_of_one_value() {
    type Case = (&'static str, fn(f64) -> f64);
    let cases: [Case; 16] = [
        ("recip(x)", |x| 1.0 / x),
        ("square(x)", |x| x * x),
        ("isfinite(x)", |x| f64::from(u8::from(x.is_finite()))),
        ("relu(x)", |x| if x.is_nan() { x } else { x.max(0.0) }),
        ("relu2(x)", |x| if x.is_nan() { x } else { x.max(0.0).powi(2) }),
        ("relu6(x)", |x| if x.is_nan() { x } else { x.clamp(0.0, 6.0) }),
        ("leaky_relu(x, 0.25)", |x| if x > 0.0 { x } else { 0.25 * x }),
        ("elu(x, 2)", |x| if x > 0.0 { x } else { 2.0 * x.exp_m1() }),
        ("selu(x)", |x| 1.0507009873554805 * if x > 0.0 { x } else { 1.6732632423543772 * x.exp_m1() }),
        ("celu(x, 2)", |x| if x > 0.0 { x } else { 2.0 * (x / 2.0).exp_m1() }),
        ("hard_sigmoid(x)", |x| if x.is_nan() { x } else { (x + 3.0).clamp(0.0, 6.0) / 6.0 }),
        ("hard_tanh(x)", |x| if x.is_nan() { x } else { x.clamp(-1.0, 1.0) }),
        ("hard_shrink(x, 0.5)", |x| if x.abs() > 0.5 { x } else { 0.0 }),
        ("softsign(x)", |x| x / (1.0 + x.abs())),
        ("log_sigmoid(x)", |x| if x < -700.0 { x } else { -((-x).exp().ln_1p()) }),
        ("lerp(x, 3, 0.25)", |x| x + (3.0 - x) * 0.25),
    ];
    let points = [-1000.0, -7.5, -3.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 3.0, 6.5, 900.0, f64::NAN];
    for (text, formula) in cases {
        let found = run(text, &[(&[points.len()], &points)]);
        for (x, found) in points.into_iter().zip(found) {
            assert!(close(found, formula(x)), "{text} at {x}: {found}, expected {}", formula(x));
        }
    }
}

#[test]
fn activations_with_a_sigmoid() {
    let points = [-30.0, -4.0, -1.0, 0.0, 0.5, 2.0, 5.0];
    for (x, found) in points.into_iter().zip(run("gelu_quick(x)", &[(&[7], &points)])) {
        assert!(close(found, x / (1.0 + (-1.702 * x).exp())), "{x}: {found}");
    }
    for (x, found) in points.into_iter().zip(run("hard_swish(x)", &[(&[7], &points)])) {
        assert!(close(found, x * (x + 3.0).clamp(0.0, 6.0) / 6.0), "{x}: {found}");
    }
    for (x, found) in points.into_iter().zip(run("soft_shrink(x, 1)", &[(&[7], &points)])) {
        let expected = if x.abs() > 1.0 { x - x.signum() } else { 0.0 };
        assert!(close(found, expected), "{x}: {found}");
    }
}

#[test]
fn row_functions() {
    let x = [1.0, 2.0, 4.0, 9.0];
    let found = run("row_mean(x), row_var(x), row_std(x), row_logsumexp(x)", &[(&[1, 4], &x)]);
    let logsumexp = x.iter().map(|v: &f64| v.exp()).sum::<f64>().ln();
    for (found, expected) in found.into_iter().zip([4.0, 9.5, 9.5_f64.sqrt(), logsumexp]) {
        assert!(close(found, expected), "{found}, expected {expected}");
    }
    assert_eq!(
        run("row_any(x), row_all(x)", &[(&[3, 2], &[0.0, 0.0, 0.0, 1.0, 2.0, -1.0])]),
        [0., 1., 1., 0., 0., 1.]
    );
}

#[test]
fn logsumexp_of_infinities() {
    let inf = f64::INFINITY;
    let rows = [-inf, -inf, inf, 1.0, -inf, 3.0, 1000.0, 1000.0, f64::NAN, 1.0];
    let found = run("row_logsumexp(x)", &[(&[5, 2], &rows)]);
    for (found, expected) in found.iter().zip([-inf, inf, 3.0, 1000.0 + 2.0_f64.ln(), f64::NAN]) {
        assert!(close(*found, expected), "{found:?}");
    }
    let pairs =
        [(inf, inf, inf), (-inf, -inf, -inf), (inf, -inf, inf), (-inf, 2.0, 2.0), (0.0, 0.0, 2.0_f64.ln())];
    for (a, b, expected) in pairs {
        let found = run("logaddexp(a, b)", &[(&[1], &[a]), (&[1], &[b])])[0];
        assert!(close(found, expected), "{a} {b}: {found}");
    }
}

#[test]
fn random_numbers_are_uniform_and_drop_as_often_as_asked() {
    let n = 20_000;
    let kernel =
        text::parse_kernel("f(x, seed: scalar u32) = uniform(seed), dropout(x, 0.25, seed)").unwrap();
    let inputs = [Tensor::f32(&[n], &vec![3.0; n]), Tensor::int(&[], Dtype::U32, vec![7])];
    let outputs = evaluate(&kernel, &inputs, &Shapes::default()).unwrap();
    let (uniform, dropped) = (outputs[0].to_f64(), outputs[1].to_f64());
    assert!(uniform.iter().all(|u| (0.0..1.0).contains(u) && (u * 16_777_216.0).fract() == 0.0));
    let mean = uniform.iter().sum::<f64>() / n as f64;
    assert!((mean - 0.5).abs() < 0.01, "{mean}");
    for (u, d) in uniform.iter().zip(&dropped) {
        assert!(close(*d, if *u < 0.25 { 0.0 } else { 4.0 }), "{u} {d}");
    }
}
