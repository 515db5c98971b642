//! Derivatives of random kernels against finite differences.

mod derive_support;

use derive_support::{Numbers, Point, check, check_twice, dot, values};
use proptest::prelude::*;
use zmlx_lang::{Graph, Id, InputDecl, Kernel, Node, Op, OutputDecl, ReduceOp, Role, ScanOp};

/// Smooth and bounded, so that compositions stay where differences are good.
const OPS: [Op; 14] = [
    Op::Add,
    Op::Sub,
    Op::Mul,
    Op::Tanh,
    Op::Sin,
    Op::Sigmoid,
    Op::Erf,
    Op::Atan,
    Op::Neg,
    Op::Softplus,
    Op::Silu,
    Op::GeluErf,
    Op::Mish,
    Op::Fma,
];

fn kernel(steps: &[(u8, u8, u8, u8)], rows: bool) -> Kernel {
    let mut g = Graph::default();
    let mut values: Vec<Id> = (0..3).map(|n| g.input(n)).collect();
    values.push(g.float(0.5));
    for &(op, a, b, c) in steps {
        let pick = |i: u8| values[i as usize % values.len()];
        let id = match op as usize % (OPS.len() + 6) {
            k if k < OPS.len() => {
                let args: Vec<Id> = [a, b, c][..OPS[k].arity()].iter().map(|i| pick(*i)).collect();
                g.op(OPS[k], &args)
            }
            k if !rows => {
                let one = g.float(1.5);
                let bounded = g.op(Op::Tanh, &[pick(a)]);
                let base = g.op(Op::Add, &[bounded, one]);
                let op = [Op::Div, Op::Pow, Op::Log, Op::Rsqrt, Op::Sqrt, Op::Log1p][k - OPS.len()];
                if op.arity() == 2 {
                    let args = if op == Op::Div { [pick(b), base] } else { [base, pick(b)] };
                    g.op(op, &args)
                } else {
                    g.op(op, &[base])
                }
            }
            k => match k - OPS.len() {
                0 => g.row_mean(pick(a)),
                1 => {
                    let small = g.op(Op::Tanh, &[pick(a)]);
                    g.reduce(ReduceOp::Prod, small)
                }
                2 | 3 => {
                    let small = g.op(Op::Sigmoid, &[pick(a)]);
                    let op = if k % 2 == 0 { ScanOp::Sum } else { ScanOp::Prod };
                    g.add(Node::Scan { op, reverse: b % 2 == 0, exclusive: c % 2 == 0, arg: small })
                }
                4 => g.reduce(ReduceOp::Sum, pick(a)),
                _ => {
                    let most = g.reduce(ReduceOp::Max, pick(a));
                    let less = g.op(Op::Sub, &[pick(a), most]);
                    let e = g.op(Op::Exp, &[less]);
                    let sum = g.reduce(ReduceOp::Sum, e);
                    g.op(Op::Div, &[e, sum])
                }
            },
        };
        values.push(id);
    }
    let output = |(i, value): (usize, Id)| {
        let (name, scatter) = (format!("y{i}"), None);
        OutputDecl { name, value, dtype: None, keep_dims: i == 0, scatter }
    };
    let outputs =
        [values[values.len() - 1], values[values.len() / 2]].into_iter().enumerate().map(output).collect();
    let roles = [Role::Element, Role::Row, Role::Scalar(None)];
    let input = |(i, role)| InputDecl { name: format!("x{i}"), role, dtype: None };
    Kernel {
        name: "k".into(),
        inputs: roles.into_iter().enumerate().map(input).collect(),
        outputs,
        graph: g,
        strict: steps.len().is_multiple_of(4),
    }
}

fn point(steps: &[(u8, u8, u8, u8)], rows: bool, seed: u64) -> Point {
    let mut numbers = Numbers(seed);
    let inputs = vec![numbers.tensor(&[2, 3]), numbers.tensor(&[2, 1]), numbers.tensor(&[])];
    Point::new(kernel(steps, rows), inputs)
}

/// Values so large that differences lose their digits, or extremes so near to each other that a step changes them.
fn wild(p: &Point) -> bool {
    let y = p.run();
    let large = y.iter().flat_map(values).any(|v| v.is_nan() || v.abs() > 50.0);
    let cotangents = p.cotangents(&mut Numbers(5));
    let differ = |n: usize| {
        let (a, b) = (p.numeric_gradient(n, &cotangents, 1e-4), p.numeric_gradient(n, &cotangents, 2e-4));
        let scale = dot(&a, &a).sqrt().max(1.0);
        a.iter().zip(&b).any(|(a, b)| (a - b).is_nan() || (a - b).abs() > 1e-8 * scale) || scale > 1e4
    };
    large || (0..3).any(differ)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn elementwise(steps in prop::collection::vec(any::<(u8, u8, u8, u8)>(), 1..14), seed in any::<u64>()) {
        let p = point(&steps, false, seed);
        prop_assume!(!wild(&p));
        check(&p, seed);
    }

    #[test]
    fn rows(steps in prop::collection::vec(any::<(u8, u8, u8, u8)>(), 1..10), seed in any::<u64>()) {
        let p = point(&steps, true, seed);
        prop_assume!(!wild(&p));
        check(&p, seed);
    }

    #[test]
    fn second(steps in prop::collection::vec(any::<(u8, u8, u8, u8)>(), 1..5), rows in any::<bool>(), seed in any::<u64>()) {
        let p = point(&steps, rows, seed);
        prop_assume!(!wild(&p));
        check_twice(&p, seed);
    }
}
