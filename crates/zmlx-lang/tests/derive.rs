//! Derivatives against finite differences, kinks, second derivatives.

mod derive_support;

use derive_support::{Numbers, Point, check, check_twice, close, values};
use zmlx_lang::derive::{VjpOptions, custom_vjp, jvp, vjp};
use zmlx_lang::eval::Tensor;
use zmlx_lang::text::{parse_expr, parse_kernel};
use zmlx_lang::{Dtype, Kernel, LangError, Op, Role, Signature};

fn parse(text: &str) -> Kernel {
    parse_kernel(text).unwrap_or_else(|e| panic!("{e}"))
}

/// Inputs for a kernel over `[3, 5]`: by role full, one a row, scalar, or `[4, 6]`; values from `from` to `to`.
fn point(text: &str, from: f64, to: f64) -> Point {
    let kernel = parse(text);
    let mut numbers = Numbers(text.len() as u64 + 17);
    let tensor = |decl: &zmlx_lang::InputDecl| {
        let shape: &[usize] = match decl.role {
            Role::Element => &[3, 5],
            Role::Row => &[3, 1],
            Role::Scalar(_) => &[],
            Role::Indexed(1) => &[4],
            Role::Indexed(_) => &[4, 6],
        };
        match decl.dtype {
            Some(d) if !d.is_float() => {
                let n: usize = shape.iter().product();
                Tensor::int(shape, d, (0..n as i128).map(|i| (i * 7 + 2) % 4).collect())
            }
            _ => {
                let t = numbers.tensor(shape);
                let scaled: Vec<f64> =
                    values(&t).iter().map(|v| from + (to - from) * (v + 1.0) / 2.0).collect();
                Tensor::f32(shape, &scaled)
            }
        }
    };
    let inputs = kernel.inputs.iter().map(tensor).collect();
    Point::new(kernel, inputs)
}

#[test]
fn every_operation() {
    for &op in Op::ALL {
        let (from, to) = match op {
            Op::Log | Op::Log2 | Op::Log10 | Op::Sqrt | Op::Rsqrt | Op::Pow => (0.3, 2.5),
            Op::Asin | Op::Acos | Op::Log1p => (-0.8, 0.8),
            _ => (-2.0, 2.0),
        };
        let text = match (op, op.signature()) {
            (_, Signature::Integer) => continue,
            (_, Signature::FloatTest) => format!("k(a) = {}(a) ? a : 2 * a", op.name()),
            (Op::Not, _) => "k(a, b) = !(a < b) ? a : b".to_owned(),
            (_, Signature::Compare | Signature::Logic) => {
                format!("k(a, b) = {}(a > 0, b > 0) ? a * b : a", op.name())
            }
            (Op::Select, _) => "k(a, b, c) = select(a > 0, b * a, c)".to_owned(),
            _ if op.arity() == 1 => format!("k(a) = {}(a)", op.name()),
            _ if op.arity() == 2 => format!("k(a, b) = {}(a, b)", op.name()),
            _ => format!("k(a, b, c) = {}(a, b, c)", op.name()),
        };
        check_twice(&point(&text, from, to), op as u64);
    }
}

#[test]
fn rows() {
    let texts = [
        "k(x) = row_sum(x * x)",
        "k(x) = row_prod(x)",
        "k(x) = x * row_prod(x)",
        "k(x) = row_max(x), row_min(x) * x",
        "k(x) = row_argmax(x), exp(row_max(x)), x",
        "k(x) = row_sum(x) ** 2",
        "k(x) -> (out keep) = row_mean(x) * row_sum(x * x)",
        "k(x, b: row) = row_sum(x) * b, b * 2",
        "k(x, b: row) = x * b + row_sum(x), row_sum(b)",
        "k(b: row, x) = row_max(b) + x * row_prod(b) * row_min(b)",
        "k(x, s: scalar) = x * s + row_sum(s * x)",
        "k(x, s: scalar) = x * s * s",
        "k(s: scalar, x) = s, x",
        "k(x, b: row) = cumsum(b) * x + cumsum(x * b)",
    ];
    for (i, text) in texts.iter().enumerate() {
        check_twice(&point(text, 0.4, 1.9), i as u64);
        check_twice(&point(text, -1.3, 1.7), 40 + i as u64);
    }
}

#[test]
fn scans() {
    for scan in ["cumsum", "cumprod", "cummax", "cummin"] {
        for kind in ["", "_exclusive", "_reverse", "_exclusive_reverse"] {
            // An exclusive maximum begins with -inf: no differences there.
            let value = if scan.starts_with("cumm") && kind.starts_with("_ex") {
                format!(
                    "select(index(0) == {}, 0, {scan}{kind}(x))",
                    if kind == "_exclusive" { 0 } else { 4 }
                )
            } else {
                format!("{scan}{kind}(x)")
            };
            check_twice(&point(&format!("k(x, y) = y * {value}"), -1.5, 1.8), scan.len() as u64);
            check(&point(&format!("k(x) = exp({value})"), 0.3, 1.8), 5);
        }
    }
}

#[test]
fn models() {
    let texts = [
        "softmax(x) = let m = row_max(x); let e = exp(x - m); e / row_sum(e)",
        "log_softmax(x) = x - row_logsumexp(x)",
        "logsumexp(x) = row_logsumexp(x)",
        "rms(x, w, eps: scalar = 1e-5) = x * rsqrt(row_mean(x * x) + eps) * w",
        "layer(x, w, b, eps: scalar = 1e-5) = (x - row_mean(x)) * rsqrt(row_var(x) + eps) * w + b",
        "mish(x) = x * tanh(log(1 + exp(x)))",
        "swiglu(a, b) = silu(a) * b",
        "cs(x) = cumsum(x * x)",
        "loss(x, t: row i32) = row_logsumexp(x) - row_sum(index(0) == t ? x : 0)",
        "gather(t: array[2], x, r: i32) = x * t[r, index(0)]",
        "gather1(t: array[1], x, r: row i32) = x * t[r] + row_sum(x) * t[r; clamp]",
    ];
    for (i, text) in texts.iter().enumerate() {
        check_twice(&point(text, -1.2, 1.6), i as u64);
    }
}

/// Gradients of `k(x)` (or of its first input) for cotangents of 1.
fn slopes(text: &str, x: &[f64]) -> Vec<f64> {
    let point = Point::new(parse(text), vec![Tensor::f32(&[1, x.len()], x)]);
    let ones: Vec<Tensor> = point.run().iter().map(|t| Tensor::f32(&t.shape, &vec![1.0; t.len()])).collect();
    let reverse = point.gradients(&point.vjp(&[0]), &[0], &ones).remove(0);
    // Forward mode takes the same side.
    let j = point.jvp(&[0]);
    for i in 0..x.len() {
        let mut t = vec![0.0; x.len()];
        t[i] = 1.0;
        let changes = point.changes(&j, &[0], &[Tensor::f32(&[1, x.len()], &t)]);
        close(&[changes.iter().flatten().sum()], &[reverse[i]], 1e-12, &format!("{text} forward at {i}"));
    }
    reverse
}

/// Where there is no derivative, what MLX's operations of the same name give (mlx/primitives.cpp, 0.32).
#[test]
fn kinks() {
    let cases: &[(&str, &[f64], &[f64])] = &[
        // Maximum: the first where it is larger, else the second.
        ("k(x) = max(x, 0)", &[-1.0, 0.0, 1.0], &[0.0, 0.0, 1.0]),
        ("k(x) = max(0, x)", &[-1.0, 0.0, 1.0], &[0.0, 1.0, 1.0]),
        ("k(x) = min(x, 0)", &[-1.0, 0.0, 1.0], &[1.0, 0.0, 0.0]),
        ("k(x) = min(0, x)", &[-1.0, 0.0, 1.0], &[1.0, 1.0, 0.0]),
        ("k(x) = max(x, x)", &[0.5], &[1.0]),
        // Clip: minimum(maximum(x, low), high).
        ("k(x) = clamp(x, -1, 1)", &[-2.0, -1.0, 0.0, 1.0, 2.0], &[0.0, 0.0, 1.0, 0.0, 0.0]),
        ("k(x) = abs(x)", &[-2.0, 0.0, 2.0], &[-1.0, 0.0, 1.0]),
        ("k(x) = sign(x) + floor(x) + round(x)", &[-2.0, 0.0, 2.5], &[0.0, 0.0, 0.0]),
        ("k(x) = x > 0 ? 2 * x : x", &[-1.0, 0.0, 1.0], &[1.0, 1.0, 2.0]),
        // Ties share.
        ("k(x) = row_max(x)", &[2.0, 1.0, 2.0, 0.0], &[0.5, 0.0, 0.5, 0.0]),
        ("k(x) = row_min(x)", &[2.0, 1.0, 1.0, 1.0], &[0.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0]),
        // The latest of equals.
        ("k(x) = cummax(x)", &[2.0, 1.0, 2.0, 0.0], &[2.0, 0.0, 2.0, 0.0]),
        ("k(x) = cummin(x)", &[2.0, 3.0, 2.0, 1.0], &[2.0, 0.0, 1.0, 1.0]),
        ("k(x) = cummax_reverse(x)", &[2.0, 1.0, 2.0, 0.0], &[1.0, 0.0, 2.0, 1.0]),
        // Zeros in products.
        ("k(x) = row_prod(x)", &[2.0, 0.0, 3.0], &[0.0, 6.0, 0.0]),
        ("k(x) = row_prod(x)", &[2.0, 0.0, 0.0], &[0.0, 0.0, 0.0]),
        ("k(x) = cumprod(x)", &[2.0, 0.0, 3.0, 4.0], &[1.0, 2.0 + 6.0 + 24.0, 0.0, 0.0]),
        ("k(x) = cumprod(x)", &[2.0, 3.0, 0.0, 0.0], &[4.0, 2.0, 6.0, 0.0]),
        ("k(x) = cumprod_exclusive(x)", &[2.0, 0.0, 3.0, 4.0], &[1.0, 2.0 + 6.0, 0.0, 0.0]),
        ("k(x) = cumprod_reverse(x)", &[3.0, 0.0, 2.0], &[0.0, 2.0 + 6.0, 1.0]),
        ("k(x) = cumprod_exclusive_reverse(x)", &[3.0, 0.0, 2.0], &[0.0, 2.0, 1.0]),
        // Powers: 0 * log 0 is 0; x^2 has no log.
        ("k(x) = x ** 2", &[-3.0, 0.0], &[-6.0, 0.0]),
        ("k(x) = x ** 3", &[-2.0, 0.0], &[12.0, 0.0]),
        ("k(x) = 0 ** x", &[1.0, 2.0], &[0.0, 0.0]),
        ("k(x) = x % 3", &[4.0, -1.0, 3.0], &[1.0, 1.0, 1.0]),
    ];
    for (text, x, expected) in cases {
        close(&slopes(text, x), expected, 1e-12, text);
    }
    assert_eq!(slopes("k(x) = sqrt(x)", &[0.0]), [f64::INFINITY]);
    assert_eq!(slopes("k(x) = x > 0 ? log(x) : 0 * x", &[2.0, -1.0]), [0.5, 0.0]);
}

fn tensors(shapes: &[&[usize]]) -> Vec<Tensor> {
    let mut numbers = Numbers(99);
    shapes.iter().map(|s| numbers.tensor(s)).collect()
}

#[test]
fn broadcasting() {
    let texts_and_shapes: &[(&str, &[&[usize]])] = &[
        ("k(x, w) = x * w + exp(w)", &[&[3, 5], &[5]]),
        ("k(x, w) = exp(x * w)", &[&[3, 1], &[5]]),
        ("k(x, w) = exp(x * w)", &[&[2, 1, 4], &[3, 1]]),
        ("k(x, w) = row_sum(x * w) * w", &[&[2, 1, 4], &[3, 1]]),
        ("k(x, b: row) = row_max(x) * b + x", &[&[2, 3, 4], &[3, 1]]),
        ("k(x, b: row) = x * b", &[&[4], &[]]),
        ("k(x, w) = x * w", &[&[], &[]]),
        ("k(x) = row_sum(x) * x", &[&[]]),
        ("k(x, y) = x * x, y", &[&[3, 5], &[1, 5]]),
    ];
    for (i, (text, shapes)) in texts_and_shapes.iter().enumerate() {
        check_twice(&Point::new(parse(text), tensors(shapes)), i as u64);
    }
}

#[test]
fn loads_and_scatters() {
    let ints = |shape: &[usize], v: &[i128]| Tensor::int(shape, Dtype::I32, v.to_vec());
    let mut numbers = Numbers(3);
    // Two loads of one array: two outputs to add.
    let two = parse("two(t: array[2], x) = x * t[index(1), index(0)] + exp(t[index(0), index(1); zero])");
    let point = Point::new(two, vec![numbers.tensor(&[3, 4]), numbers.tensor(&[3, 4])]);
    assert_eq!(point.vjp(&[0]).gradients, vec![vec![0, 1]]);
    check_twice(&point, 1);
    for bounds in ["clamp", "zero"] {
        let kernel = parse(&format!("k(t: array[1], x, r: i32) = x * t[r; {bounds}] ** 2"));
        let r = ints(&[2, 3], &[0, 1, 7, -2, 3, 3]);
        check_twice(&Point::new(kernel, vec![numbers.tensor(&[4]), numbers.tensor(&[2, 3]), r]), 2);
        let kernel = parse(&format!("k(t: array[1], x, r: row i32) = row_sum(x) * exp(t[r; {bounds}])"));
        let r = ints(&[3, 1], &[5, 1, 1]);
        check_twice(&Point::new(kernel, vec![numbers.tensor(&[4]), numbers.tensor(&[3, 3]), r]), 3);
    }
    // A scattered output has an indexed cotangent.
    let kernel = parse("k(x, r: i32, t: array[1]) = out[r; zero] += exp(x) like t");
    let r = ints(&[2, 3], &[0, 1, 7, -2, 3, 3]);
    let point = Point::new(kernel, vec![numbers.tensor(&[2, 3]), r, numbers.tensor(&[4])]);
    check_twice(&point, 4);
    let v = point.vjp(&[0]);
    assert_eq!(v.kernel.inputs[2].role, Role::Indexed(1));
}

#[test]
fn softmax_needs_no_derivative_of_its_maximum() {
    let kernel = parse("softmax(x) = let m = row_max(x); let e = exp(x - m); e / row_sum(e)");
    let v = vjp(&kernel, &[0], &VjpOptions { allow_saved: vec![true] }).unwrap();
    assert_eq!((v.primals, v.saved), (vec![], vec![0]));
    assert_eq!(
        v.kernel.to_text(),
        "softmax_vjp(g_out, out) -> (d_x keep) = out * (g_out - row_sum(out * g_out))"
    );
    let forward = jvp(&kernel, &[0]).unwrap().kernel.to_text();
    assert_eq!(forward.matches("row_max").count(), 1, "{forward}");
    // Cheap values are computed again.
    let relu = vjp(&parse("relu(x) = max(x, 0)"), &[0], &VjpOptions { allow_saved: vec![true] }).unwrap();
    assert_eq!(relu.kernel.to_text(), "relu_vjp(x, g_out) -> (d_x keep) = x > 0 ? g_out : 0.0");
}

#[test]
fn without_derivative() {
    let zero = vjp(&parse("k(x, n: i32) = floor(x) + n"), &[0, 1], &VjpOptions::default()).unwrap();
    assert_eq!(zero.gradients, vec![Vec::<usize>::new(), vec![]]);
    assert_eq!(jvp(&parse("k(x) = row_argmax(x)"), &[0]).unwrap().outputs, [None]);
    let bits = parse("k(x) = bitcast_f32(bitcast_u32(x) + 1)");
    for e in [vjp(&bits, &[0], &VjpOptions::default()).unwrap_err(), jvp(&bits, &[0]).unwrap_err()] {
        assert!(matches!(&e, LangError::NoDerivative { input, .. } if input == "x"), "{e}");
    }
    assert!(matches!(jvp(&bits, &[1]), Err(LangError::Kernel { .. })));
}

#[test]
fn given_gradients() {
    // A straight-through rounding, and a gradient from the output and the cotangent.
    let kernel = parse("k(x, b: row) = round(x) * b");
    let names = ["x", "b", "y", "g"].map(|n| zmlx_lang::InputDecl {
        name: n.into(),
        role: Role::Element,
        dtype: None,
    });
    let (graph, exprs) = parse_expr("g * b, g * y", &names).unwrap();
    let custom = custom_vjp(&kernel, &graph, &[(0, exprs[0]), (1, exprs[1])]).unwrap();
    assert_eq!((&custom.primals, &custom.cotangents, &custom.saved), (&vec![1], &vec![0], &vec![0]));
    let point = Point::new(kernel.clone(), tensors(&[&[2, 3], &[2, 1]]));
    let g = tensors(&[&[2, 3]]);
    let found = point.gradients(&custom, &[0, 1], &g);
    let (g, y, b) = (values(&g[0]), values(&point.run()[0]), values(&point.inputs[1]));
    close(&found[0], &(0..6).map(|i| g[i] * b[i / 3]).collect::<Vec<_>>(), 1e-12, "x");
    let sums: Vec<f64> = (0..2).map(|r| (0..3).map(|c| g[r * 3 + c] * y[r * 3 + c]).sum()).collect();
    close(&found[1], &sums, 1e-12, "b");
    let (bad, exprs) = parse_expr(
        "q",
        &[
            names[0].clone(),
            names[1].clone(),
            names[2].clone(),
            names[3].clone(),
            zmlx_lang::InputDecl { name: "q".into(), role: Role::Element, dtype: None },
        ],
    )
    .unwrap();
    assert!(matches!(custom_vjp(&kernel, &bad, &[(0, exprs[0])]), Err(LangError::Kernel { .. })));
}

/// Long chains neither exhaust the stack nor take long.
#[test]
fn large_kernels() {
    let sums = "k(x, b: row) = row_sum(".to_owned() + &"b * ".repeat(60) + "x)";
    assert!(vjp(&parse(&sums), &[0, 1], &VjpOptions::default()).is_ok());
    let mut kernel = parse("k(x, b: row) = x");
    let mut value = kernel.outputs[0].value;
    let b = kernel.graph.input(1);
    for i in 0..4000 {
        let c = kernel.graph.float(1.0 + f64::from(i));
        let last = kernel.graph.op(Op::Mul, &[value, if i % 2 == 0 { b } else { c }]);
        value = kernel.graph.op(Op::Add, &[last, value]);
    }
    kernel.outputs[0].value = kernel.graph.reduce(zmlx_lang::ReduceOp::Sum, value);
    assert!(vjp(&kernel, &[0, 1], &VjpOptions::default()).is_ok());
    assert!(jvp(&kernel, &[0, 1]).is_ok());
}
