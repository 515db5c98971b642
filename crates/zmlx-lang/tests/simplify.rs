//! Simplified kernels: what becomes of expressions, and that they mean the same.

use proptest::prelude::*;
use zmlx_lang::eval::{Rounding, Shapes, Tensor, evaluate, evaluate_with};
use zmlx_lang::simplify::simplify;
use zmlx_lang::text::parse_kernel;
use zmlx_lang::{Const, Dtype, Graph, Id, InputDecl, Kernel, Node, Op, OutputDecl, ReduceOp, Role};

fn simplified(expr: &str) -> String {
    let kernel = parse_kernel(&format!("k(x: f32, y: f32, n: i32, c: bool) = {expr}"))
        .unwrap_or_else(|e| panic!("{e}"));
    let once = simplify(&kernel);
    assert_eq!(simplify(&once), once, "not settled: {}", once.to_text());
    once.to_text().split_once(") =").unwrap().1.to_owned()
}

#[test]
fn recognised() {
    let cases = [
        ("log(1 + x)", "log1p(x)"),
        ("log(x + 1.0)", "log1p(x)"),
        ("log(1 + exp(x))", "softplus(x)"),
        ("log1p(exp(x))", "softplus(x)"),
        ("exp(x) - 1", "expm1(x)"),
        ("-1 + exp(x)", "expm1(x)"),
        ("1 / (1 + exp(-x))", "sigmoid(x)"),
        ("1 / (exp(x) + 1)", "sigmoid(-x)"),
        ("exp(x) / (1 + exp(x))", "sigmoid(x)"),
        ("x / (1 + exp(-x))", "silu(x)"),
        ("x * (1 / (1 + exp(-x)))", "silu(x)"),
        ("y * sigmoid(x) * x", "y * silu(x)"),
        ("x * tanh(log(1 + exp(x)))", "mish(x)"),
        ("x * tanh(softplus(x)) * 2", "mish(x) * 2"),
        ("0.5 * x * (1 + tanh(0.7978845608 * (x + 0.044715 * x ** 3)))", "gelu_tanh(x)"),
        ("0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x)))", "gelu_tanh(x)"),
        ("x * (0.5 + 0.5 * tanh(0.79788456 * x * (1 + 0.044715 * x * x)))", "gelu_tanh(x)"),
        ("0.5 * x * (1 + erf(x / sqrt(2)))", "gelu(x)"),
        ("x * 0.5 * (1 + erf(x * 0.70710678))", "gelu(x)"),
        ("y * x * (1 + erf(x / 1.4142135623730951)) / 2", "y * gelu(x)"),
        ("1 / sqrt(x)", "rsqrt(x)"),
        ("x ** 0.5 + x ** -0.5", "sqrt(x) + rsqrt(x)"),
        ("max(x, -x)", "abs(x)"),
        ("x ** 3", "x * (x * x)"),
        ("0 - x + 0", "-x"),
        ("2 * (3 * x)", "x * 6.0"),
        ("-(x * 2)", "x * -2.0"),
        ("log(exp(x))", "x"),
        ("exp(2 - 2) * x", "x"),
        // Near, but not those.
        ("log(2 + x)", "log(x + 2)"),
        (
            "0.5 * x * (1 + tanh(0.8 * (x + 0.044715 * x * x * x)))",
            "x * 0.5 * (tanh((x + x * (x * (x * 0.044715))) * 0.8) + 1)",
        ),
        ("exp(x) / (2 + exp(x))", "let t0 = exp(x);\n  t0 / (t0 + 2)"),
        ("0.5 * x * (1 + erf(y / sqrt(2)))", "x * 0.5 * (erf(y / 1.4142135623730951) + 1)"),
        // Without a change of type.
        ("n * 1", "n"),
        ("n * 1.0", "f32(n)"),
        ("n + 0", "n"),
        ("c * 1", "c * 1"),
        ("n ** 2", "let t0 = f32(n);\n  t0 * t0"),
        ("true ? n : x", "f32(n)"),
        ("!(n == 2) ? x : y", "n != 2 ? x : y"),
        ("c && true ? x : x", "x"),
        ("x + 1 < x + 1 || true", "true"),
    ];
    let wrong = |(expr, expected): (&str, &str)| {
        let found = simplified(expr);
        (found.trim() != expected).then(|| format!("{expr} became {found} instead of {expected}"))
    };
    let wrong: Vec<String> = cases.into_iter().filter_map(wrong).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn strict_keeps_its_operations() {
    let keeps = [
        "log(1 + x)",
        "exp(x) - 1",
        "x / (1 + exp(-x))",
        "x + 0",
        "x * 2 * 3",
        "x ** 0.5",
        "exp(0.5)",
        "x - x",
    ];
    for expr in keeps {
        let kernel = parse_kernel(&format!("strict k(x: f32) = {expr}")).unwrap();
        let before = simplify(&Kernel { strict: true, ..kernel.clone() });
        assert_eq!(before.graph.nodes().len(), kernel.graph.nodes().len(), "{}", before.to_text());
    }
    let k = simplify(&parse_kernel("strict k(x: f32) = x * (1 / 3) / 4 + -0.0").unwrap());
    assert_eq!(k.to_text(), "strict k(x: f32) = x * 0.3333333432674408 * 0.25");
}

#[test]
fn shapes_stay() {
    // The row's sum is not needed, but it is why `b` is one value a row.
    let kernel = parse_kernel("k(x: f32, b: row f32) = true ? b : row_sum(x)").unwrap();
    assert_eq!(simplify(&kernel).has_rows(), kernel.has_rows());
    // An element output stays one though its value became a constant.
    let kernel = parse_kernel("k(x: f32) = x ** 0, row_sum(x)").unwrap();
    assert!(!simplify(&kernel).row_uniform()[simplify(&kernel).outputs[0].value.index()]);
}

/// Random expressions of two floats.
fn kernel(steps: &[(u8, u8, u8, u8)], strict: bool) -> Kernel {
    let mut graph = Graph::default();
    let mut values: Vec<Id> = vec![graph.input(0), graph.input(1)];
    for c in [0.0, -0.0, 1.0, -1.0, 2.0, 0.5, f64::INFINITY, 4.0] {
        values.push(graph.float(c));
    }
    values.push(graph.add(Node::Const(Const::Int(1))));
    values.push(graph.add(Node::Const(Const::Bool(true))));
    const OPS: [Op; 22] = [
        Op::Add,
        Op::Sub,
        Op::Mul,
        Op::Div,
        Op::Neg,
        Op::Abs,
        Op::Min,
        Op::Max,
        Op::Select,
        Op::Lt,
        Op::Eq,
        Op::Not,
        Op::And,
        Op::Or,
        Op::Sqrt,
        Op::Floor,
        Op::Exp,
        Op::Log,
        Op::Pow,
        Op::Sigmoid,
        Op::Tanh,
        Op::Fma,
    ];
    for &(op, a, b, c) in steps {
        let op = OPS[op as usize % OPS.len()];
        let args: Vec<Id> =
            [a, b, c][..op.arity()].iter().map(|i| values[*i as usize % values.len()]).collect();
        values.push(graph.op(op, &args));
    }
    let value = graph.cast(Dtype::F32, values[values.len() - 1]);
    let input = |name: &str| InputDecl { name: name.into(), role: Role::Element, dtype: Some(Dtype::F32) };
    let output = OutputDecl { name: "out".into(), value, dtype: None, keep_dims: false, scatter: None };
    Kernel { name: "k".into(), inputs: vec![input("x"), input("y")], outputs: vec![output], graph, strict }
}

fn steps() -> impl Strategy<Value = Vec<(u8, u8, u8, u8)>> {
    prop::collection::vec(any::<(u8, u8, u8, u8)>(), 1..12)
}

const SPECIAL: [f64; 8] = [0.0, -0.0, 1.0, -1.5, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 3.0];

/// Every pair of the special values.
fn pairs() -> [Tensor; 2] {
    let x: Vec<f64> = SPECIAL.iter().flat_map(|v| [*v; 8]).collect();
    let y: Vec<f64> = SPECIAL.repeat(8);
    [Tensor::f32(&[64], &x), Tensor::f32(&[64], &y)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// A strict kernel gives the same bits for every value.
    #[test]
    fn strict_is_exact(steps in steps()) {
        let kernel = kernel(&steps, true);
        let simple = simplify(&kernel);
        prop_assert_eq!(simplify(&simple), simple.clone());
        let run = |k: &Kernel| {
            evaluate_with(k, &pairs(), &Shapes::default(), Rounding::EachOperation).unwrap()[0].to_f64()
        };
        for (i, (a, b)) in run(&kernel).iter().zip(run(&simple)).enumerate() {
            let same = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            prop_assert!(same, "at {}: {} became {}\n{}\n{}", i, a, b, kernel.to_text(), simple.to_text());
        }
    }

    /// The others mean the same for real numbers, wherever all steps on the way are moderate.
    #[test]
    fn relaxed_means_the_same(steps in steps(), x in -3.0..3.0f64, y in -3.0..3.0f64) {
        let kernel = kernel(&steps, false);
        let simple = simplify(&kernel);
        prop_assert_eq!(simplify(&simple), simple.clone());
        let inputs = [Tensor::f32(&[1], &[x]), Tensor::f32(&[1], &[y])];
        let steps_on_the_way: Vec<OutputDecl> = (0..kernel.graph.nodes().len()).map(|i| OutputDecl {
            name: format!("o{i}"), value: Id(i as u32), ..kernel.outputs[0].clone()
        }).collect();
        let all = Kernel { outputs: steps_on_the_way, ..kernel.clone() };
        let needed = kernel.graph.reachable(&kernel.roots());
        let results = evaluate(&all, &inputs, &Shapes::default()).unwrap();
        let constant = |i: usize| matches!(kernel.graph.nodes()[i], Node::Const(_));
        let moderate = |v: f64| v.abs() < 1e6 && (v == 0.0 || v.abs() > 1e-6);
        let tame = results.iter().enumerate().all(|(i, t)| !needed[i] || constant(i) && t.to_f64()[0].is_finite() || moderate(t.to_f64()[0]));
        prop_assume!(tame);
        let run = |k: &Kernel| evaluate(k, &inputs, &Shapes::default()).unwrap()[0].to_f64()[0];
        let (a, b) = (run(&kernel), run(&simple));
        prop_assert!((a - b).abs() <= 1e-6 * a.abs().max(1.0), "{} became {}\n{}\n{}", a, b, kernel.to_text(), simple.to_text());
    }
}

#[test]
fn rows_are_rewritten_inside() {
    let kernel = parse_kernel("k(x: f32) = row_sum(log(1 + exp(x)) * 1)").unwrap();
    let simple = simplify(&kernel);
    assert!(matches!(simple.graph.node(simple.outputs[0].value), Node::Reduce(ReduceOp::Sum, _)));
    assert_eq!(simple.to_text(), "k(x: f32) = row_sum(softplus(x))");
}
