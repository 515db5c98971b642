//! The kernels that the macros build: their IR, roles, outputs, and the functions around them.

mod standin;

use standin::{Array, array, elements};
use zmlx_lang::eval::Tensor;
use zmlx_lang::text::parse_kernel;
use zmlx_lang::{Bounds, Const, Dtype, Graph, InputDecl, Kernel, Node, Op, OutputDecl, ReduceOp, Role};
use zmlx_macros::{elementwise, kernel};

/// Smooth.
#[kernel(crate = crate::standin)]
pub fn mish(x: f32) -> f32 {
    x * (1.0 + x.exp()).ln().tanh()
}

#[kernel(crate = crate::standin)]
fn softmax(x: f32) -> f32 {
    let e = (x - row_max(x)).exp();
    e / row_sum(e)
}

#[kernel(crate = crate::standin, name = "rms_norm", strict)]
fn rms(x: f32, #[row] scale: bf16, #[scalar = 1e-5] eps: f32, #[scalar = 2] power: i8) -> f32 {
    x * rsqrt(row_mean(x * x) + eps) * scale + power as f32
}

#[kernel(crate = crate::standin, keep_dims)]
fn moments(x: f32) -> (f32, f32, u32) {
    (row_mean(x), row_var(x), row_argmax(x))
}

#[kernel(crate = crate::standin)]
fn lookup(at: i32, #[array(2)] table: f32) -> f32 {
    let column = index(0);
    table[[at, column]] + table.clamp_at([at + 1, column]) - table.zero_at([at - 1, column])
}

#[kernel(crate = crate::standin)]
fn split(x: f32, n: u8) -> (f16, u8) {
    (x * n as f32, n / 2)
}

#[kernel(crate = crate::standin)]
fn noise(x: f32, #[scalar] seed: u32) -> f32 {
    dropout(x, 0.5, seed) + uniform(seed)
}

#[kernel(crate = crate::standin)]
fn double(x: f32) -> f32 {
    x + x
}

/// Parameters with the names that the expansion could use itself.
#[kernel(crate = crate::standin)]
fn gated(call: f32, #[scalar] value: bool, #[scalar] runtime: i16) -> (f32, bool) {
    (call + if value { runtime as f32 } else { 0.0 }, value || call > 3.0)
}

fn input(name: &str, role: Role, dtype: Option<Dtype>) -> InputDecl {
    InputDecl { name: name.to_owned(), role, dtype }
}

fn output(name: &str, value: zmlx_lang::Id, dtype: Option<Dtype>) -> OutputDecl {
    OutputDecl { name: name.to_owned(), value, dtype, keep_dims: false, scatter: None }
}

#[test]
fn json_equals_that_of_hand_built_kernels() {
    let mut g = Graph::default();
    let x = g.input(0);
    let x = g.cast(Dtype::F32, x);
    let e = g.op(Op::Exp, &[x]);
    let one = g.float(1.0);
    let sum = g.op(Op::Add, &[one, e]);
    let log = g.op(Op::Log, &[sum]);
    let tanh = g.op(Op::Tanh, &[log]);
    let value = g.op(Op::Mul, &[x, tanh]);
    let inputs = vec![input("x", Role::Element, None)];
    let outputs = vec![output("out", value, None)];
    let expected = Kernel { name: "mish".to_owned(), inputs, outputs, graph: g, strict: false };
    assert_eq!(mish::kernel().ir.to_json(), expected.to_json());

    let mut g = Graph::default();
    let (x, n) = (g.input(0), g.input(1));
    let x = g.cast(Dtype::F32, x);
    let wide = g.cast(Dtype::F32, n);
    let product = g.op(Op::Mul, &[x, wide]);
    let two = g.int(2);
    let half = g.op(Op::FloorDiv, &[n, two]);
    let half = g.cast(Dtype::U8, half);
    let inputs = vec![input("x", Role::Element, None), input("n", Role::Element, Some(Dtype::U8))];
    let outputs = vec![output("out0", product, Some(Dtype::F16)), output("out1", half, Some(Dtype::U8))];
    let expected = Kernel { name: "split".to_owned(), inputs, outputs, graph: g, strict: false };
    // Constants and inputs stand elsewhere in the list; the text does not show that.
    assert_eq!(split::kernel().ir.to_text(), expected.to_text());

    let mut g = Graph::default();
    let at = g.input(0);
    let column = g.add(Node::Index(0));
    let load = |g: &mut Graph, row, bounds| {
        let id = g.add(Node::Load { input: 1, at: vec![row, column], bounds });
        g.cast(Dtype::F32, id)
    };
    let here = load(&mut g, at, Bounds::Checked);
    let one = g.int(1);
    let next = g.op(Op::Add, &[at, one]);
    let next = load(&mut g, next, Bounds::Clamp);
    let sum = g.op(Op::Add, &[here, next]);
    let before = g.op(Op::Sub, &[at, one]);
    let before = load(&mut g, before, Bounds::Zero);
    let value = g.op(Op::Sub, &[sum, before]);
    let inputs = vec![input("at", Role::Element, Some(Dtype::I32)), input("table", Role::Indexed(2), None)];
    let outputs = vec![output("out", value, None)];
    let expected = Kernel { name: "lookup".to_owned(), inputs, outputs, graph: g, strict: false };
    assert_eq!(lookup::kernel().ir.to_json(), expected.to_json());
}

#[test]
fn equals_the_text_form() {
    let same = |k: &Kernel, text: &str| {
        let expected = parse_kernel(text).unwrap();
        assert_eq!(k.to_text(), expected.to_text());
    };
    same(&softmax::kernel().ir, "softmax(x) = let v = f32(x); let e = exp(v - row_max(v)); e / row_sum(e)");
    same(&noise::kernel().ir, "noise(x, seed: scalar u32) = dropout(f32(x), 0.5, seed) + uniform(seed)");
    same(
        &moments::kernel().ir,
        "moments(x) -> (out0 keep, out1 keep, out2: u32 keep) = row_mean(f32(x)), row_var(f32(x)), row_argmax(f32(x))",
    );
}

#[test]
fn declarations_become_roles_dtypes_and_options() {
    let k = &rms::kernel().ir;
    assert_eq!((k.name.as_str(), k.strict), ("rms_norm", true));
    let expected = vec![
        input("x", Role::Element, None),
        input("scale", Role::Row, Some(Dtype::Bf16)),
        input("eps", Role::Scalar(Some(Const::float(1e-5))), None),
        input("power", Role::Scalar(Some(Const::Int(2))), Some(Dtype::I8)),
    ];
    assert_eq!(k.inputs, expected);
    assert!(!mish::kernel().ir.strict);
    assert!(moments::kernel().ir.outputs.iter().all(|o| o.keep_dims));
}

#[test]
fn functions_call_their_kernels() {
    let x = array([1.0f32, 2.0, 4.0]);
    assert_eq!(elements::<f32>(&double(&x).unwrap()), [2.0, 4.0, 8.0]);
    let total: f32 = elements::<f32>(&softmax(&x).unwrap()).iter().sum();
    assert!((total - 1.0).abs() < 1e-6);
    assert!((elements::<f32>(&mish(&x).unwrap())[0] - 0.865_098_4).abs() < 1e-6);

    let (mean, var, largest) = moments(&x).unwrap();
    assert_eq!((elements::<f32>(&mean)[0], elements::<u32>(&largest)[0]), (7.0 / 3.0, 2));
    assert!((elements::<f32>(&var)[0] - 14.0 / 9.0).abs() < 1e-5);
    assert_eq!(mean.shape, [1]);

    let row = Tensor::float(&[1], Dtype::Bf16, vec![1.0]);
    let plain = |eps: f32, power: f32| [1.0f32, 2.0, 4.0].map(|x| x / (7.0 + eps).sqrt() + power);
    let close = |found: Array, expected: [f32; 3]| {
        let found = elements::<f32>(&Tensor { dtype: Dtype::F32, ..found });
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 4e-2), "{found:?} {expected:?}");
    };
    close(rms(&x, &row, None, None).unwrap(), plain(1e-5, 2.0));
    close(rms(&x, &row, Some(2.0), None).unwrap(), plain(2.0, 2.0));
    close(rms(&x, &row, None, Some(5)).unwrap(), plain(1e-5, 5.0));

    let (half, quarter) = split(&x, &array([8u8, 9, 255])).unwrap();
    assert_eq!((half.dtype, half.to_f64()), (Dtype::F16, vec![8.0, 18.0, 1020.0]));
    assert_eq!(elements::<u8>(&quarter), [4, 4, 127]);

    let table = Tensor::f32(&[2, 3], &[0.0, 1.0, 2.0, 10.0, 11.0, 12.0]);
    assert_eq!(elements::<f32>(&lookup(&array([0, 1, 1]), &table).unwrap()), [10.0, 21.0, 22.0]);
    assert!(lookup(&array([0, 2, 1]), &table).is_err());

    let noisy = elements::<f32>(&noise(&x, 7).unwrap());
    let other = elements::<f32>(&noise(&x, 8).unwrap());
    assert!(noisy.len() == 3 && noisy != other);
    let (sum, kept) = gated(&x, true, -3).unwrap();
    assert_eq!((elements::<f32>(&sum), elements::<bool>(&kept)), (vec![-2.0, -1.0, 1.0], vec![true; 3]));
}

#[test]
fn an_f32_parameter_converts_integers_and_keeps_narrow_floats() {
    let doubled = double(&array([200u8, 1, 2])).unwrap();
    assert_eq!((doubled.dtype, doubled.to_f64()), (Dtype::F32, vec![400.0, 2.0, 4.0]));
    let doubled = double(&Tensor::float(&[1], Dtype::F16, vec![1.5])).unwrap();
    assert_eq!((doubled.dtype, doubled.to_f64()), (Dtype::F16, vec![3.0]));
}

#[test]
fn dtypes_are_checked_at_the_call() {
    let wrong = split(&array([1.0f32]), &array([1i32])).unwrap_err();
    assert_eq!(wrong.to_string(), "kernel split: input n must be u8, got i32");
}

#[test]
fn elementwise_gives_kernels() {
    let k = elementwise!(crate = crate::standin, |x, b| (x + b).max(0.0));
    assert_eq!(
        elements::<f32>(&k.call1(&[&array([1.0f32, -3.0]), &array([0.5f32, 1.0])]).unwrap()),
        [1.5, 0.0]
    );
    assert!(k.ir.name.starts_with("ew_") && k.ir.name.len() == 19, "{}", k.ir.name);
    assert_eq!(k.ir.inputs[1], input("b", Role::Element, None));

    let typed =
        elementwise!(crate = crate::standin, strict, name = "parts", |x: f32, n: i32| -> (f32, f32) {
            (x.powi(2), x * n as f32)
        });
    assert_eq!((typed.ir.name.as_str(), typed.ir.strict, typed.ir.outputs.len()), ("parts", true, 2));
    let outputs = typed.call(&[&array([3.0f32]), &array([-2])]).unwrap();
    assert_eq!((elements::<f32>(&outputs[0]), elements::<f32>(&outputs[1])), (vec![9.0], vec![-6.0]));

    // Without a written result: as the values are.
    let inferred = elementwise!(crate = crate::standin, |n: i8| (n > 3, n, n as f32, 5));
    let dtypes: Vec<_> = inferred.ir.outputs.iter().map(|o| o.dtype).collect();
    assert_eq!(dtypes, [Some(Dtype::Bool), Some(Dtype::I8), None, Some(Dtype::I32)]);
    let same = |_: i32| elementwise!(crate = crate::standin, |x| x + 1.0) as *const standin::Kernel;
    assert_eq!(same(0), same(1), "one kernel a place");
}

#[test]
fn dead_branches_leave_nothing_behind() {
    let k = elementwise!(crate = crate::standin, |x| {
        let unused = x.exp().tanh();
        let _ = unused;
        if 1 > 2 { x.sin() } else { x }
    });
    assert_eq!(k.ir.graph.nodes(), [Node::Input(0), Node::Cast(Dtype::F32, zmlx_lang::Id(0))]);
}

#[test]
fn row_kernels_reduce() {
    let nodes = softmax::kernel().ir.graph.nodes().to_vec();
    let reduced =
        nodes.iter().filter(|n| matches!(n, Node::Reduce(ReduceOp::Max | ReduceOp::Sum, _))).count();
    assert_eq!(reduced, 2);
}

#[test]
fn the_conversion_of_inputs_hides_nothing_from_simplification_and_derivatives() {
    use zmlx_lang::derive::{VjpOptions, vjp};
    use zmlx_lang::eval::{Shapes, evaluate};

    let simple = zmlx_lang::simplify::simplify(&mish::kernel().ir);
    assert!(simple.graph.nodes().iter().any(|n| matches!(n, Node::Op(Op::Mish, _))), "{}", simple.to_text());

    let gradient = vjp(&softmax::kernel().ir, &[0], &VjpOptions::default()).unwrap();
    let x = [0.3, -1.2, 2.0];
    let cotangent = [1.0, -0.5, 0.25];
    let value = |x: &[f64]| {
        let out = evaluate(&softmax::kernel().ir, &[Tensor::f32(&[3], x)], &Shapes::default()).unwrap();
        out[0].to_f64().iter().zip(cotangent).map(|(a, b)| a * b).sum::<f64>()
    };
    let inputs: Vec<Tensor> = gradient
        .kernel
        .inputs
        .iter()
        .enumerate()
        .map(|(n, _)| Tensor::f32(&[3], if n < gradient.primals.len() { &x } else { &cotangent }))
        .collect();
    let found = evaluate(&gradient.kernel, &inputs, &Shapes::default()).unwrap()[0].to_f64();
    for n in 0..3 {
        let (mut up, mut down) = (x, x);
        up[n] += 1e-4;
        down[n] -= 1e-4;
        let expected = (value(&up) - value(&down)) / 2e-4;
        assert!((found[n] - expected).abs() < 1e-6, "{n}: {} {expected}", found[n]);
    }
}
