//! What texts look like, what is refused, which plans are proposed, and what CUDA's compiler makes of the texts.

mod emit_support;

use std::slice::from_ref;

use emit_support::{Case, DIALECTS, case, check, input, kernel_text, params, random};
use zmlx_emulator::nvrtc::Nvrtc;
use zmlx_lang::emit::{self, Dialect, Layout, Plan, candidates, emit};
use zmlx_lang::{Dtype, LangError, text};

fn emitted(case: &Case, dialect: Dialect) -> emit::Source {
    let program = case.program();
    emit(&program, dialect, &case.plan(&program)).unwrap_or_else(|e| panic!("{e}"))
}

/// A text as it is kept in `tests/emit_text`: header, parameters, body.
fn page(source: &emit::Source) -> String {
    let (inputs, outputs) = (source.inputs.join(", "), source.outputs.join(", "));
    format!("{}// {}: {inputs} -> {outputs}\n{{\n{}}}\n", source.header, source.name, source.body)
}

/// Run with `ZMLX_BLESS=1` to write the kept texts anew.
fn snapshot(name: &str, found: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emit_text").join(name);
    if std::env::var_os("ZMLX_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, found).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap();
    assert!(kept == found, "{name} has changed; expected:\n{kept}\nfound:\n{found}");
}

fn softmax(cols: usize) -> Case {
    let x = random(Dtype::F32, &[3, cols], 1);
    case("softmax(x) = let e = exp(x - row_max(x)); e / row_sum(e)", &[x], params(64, 4, 1, 2))
}

#[test]
fn kept_texts() {
    snapshot("softmax.metal", &page(&emitted(&softmax(500), Dialect::Metal)));
    let inputs = [random(Dtype::Bf16, &[40, 64], 1), random(Dtype::Bf16, &[64], 2)];
    let silu = case("silu_bias(x, b) = silu(x + b)", &inputs, params(128, 8, 1, 1));
    snapshot("silu_bias.cu", &page(&emitted(&silu, Dialect::Cuda)));
}

#[test]
fn names_follow_the_text() {
    let (a, b) = (emitted(&softmax(500), Dialect::Metal), emitted(&softmax(100), Dialect::Metal));
    assert_eq!(a, b, "lengths are not part of a text");
    assert!(a.name.starts_with("softmax_") && a.name.len() == "softmax_".len() + 16);
    let mut wide = softmax(500);
    wide.params.items = 4;
    assert_ne!(a.name, emitted(&wide, Dialect::Metal).name);
    assert_ne!(a.name, emitted(&softmax(500), Dialect::Cuda).name);
}

#[test]
fn unsupported_kernels() {
    let refused = |c: &Case, dialect| {
        let program = c.program();
        match emit(&program, dialect, &c.plan(&program)) {
            Err(LangError::Unsupported { why, .. }) => why,
            other => panic!("{other:?}"),
        }
    };
    let x = random(Dtype::F32, &[3, 40], 1);
    let both = case("cumsum(x) + cumsum_reverse(x)", from_ref(&x), params(64, 1, 1, 0));
    assert!(refused(&both, Dialect::Cuda).contains("split the kernel in two"));
    let passes = "let m = row_max(cumsum(x)); cumsum_reverse(x) - m";
    let held = case(passes, from_ref(&x), params(64, 1, 1, 1));
    assert!(refused(&held, Dialect::Metal).contains("a plan of 0 items"));
    let i = input(Dtype::I32, &[3], &[0.0, 1.0, 2.0]);
    let half = random(Dtype::F16, &[3], 1);
    let scatter =
        case("f(i: i32, v) -> (y: f16) = y[i] += v", &[i.clone(), half.clone()], params(32, 1, 1, 1));
    assert!(refused(&scatter, Dialect::Cuda).contains("scatter into one and cast"));
    // Metal declares all outputs atomic.
    let beside = case("f(i: i32, v) -> (y: f32, z: f16) = y[i] += v, v", &[i, half], params(32, 1, 1, 1));
    assert!(refused(&beside, Dialect::Metal).contains("output z"));
    let program = beside.program();
    emit(&program, Dialect::Cuda, &beside.plan(&program)).unwrap();
    let many: Vec<String> = (0..300).map(|i| format!("row_sum(x * {i}.5)")).collect();
    let many = case(&many.join(" + "), &[x], params(1024, 1, 1, 0));
    assert!(refused(&many, Dialect::Metal).contains("shared memory"));
}

#[test]
fn plans_that_do_not_fit() {
    let c = softmax(40);
    let program = c.program();
    let good = c.plan(&program);
    let change = |f: &dyn Fn(&mut Plan)| {
        let mut plan = good.clone();
        f(&mut plan);
        assert!(matches!(emit(&program, Dialect::Cuda, &plan), Err(LangError::Kernel { .. })), "{plan:?}");
    };
    change(&|p| p.layouts.clear());
    change(&|p| p.layouts[0] = Layout::Indexed);
    change(&|p| p.threads = 48);
    change(&|p| p.threads = 2048);
    change(&|p| p.vec = 3);
    change(&|p| p.items = 33);
    change(&|p| p.rows_per_group = 3);
    change(&|p| p.rows_per_group = 128);
    let shape = |cols: usize| vec![vec![2, cols]];
    let sizes = |cols| emit::meta(&program, &good, &[2, cols], &shape(cols), &shape(cols));
    assert_eq!(sizes(512).unwrap(), [2, 512, 2, 512]);
    assert!(sizes(513).unwrap_err().to_string().contains("rows of at most 512"));
    let large = [1 << 20, 1 << 12];
    let looped = Plan { items: 0, ..good.clone() };
    let error = emit::meta(&program, &looped, &large, &[large.to_vec()], &[large.to_vec()]).unwrap_err();
    assert!(error.to_string().contains("64-bit"), "{error}");
    let wide = Plan { index64: true, ..looped };
    assert_eq!(emit::meta(&program, &wide, &large, &[large.to_vec()], &[large.to_vec()]).unwrap()[1], 4096);
}

#[test]
fn sizes_are_in_the_documented_order() {
    let text = "f(x, a, t: array[2], i: row i32) -> (y: f32) = y[i, index(0)] += x * a + t[i, 0]";
    let inputs = [
        random(Dtype::F32, &[2, 3, 4], 1),
        random(Dtype::F32, &[2, 1, 4], 2),
        random(Dtype::F32, &[9, 8], 3),
        random(Dtype::I32, &[3, 1], 4),
    ];
    let c = case(text, &inputs, params(32, 1, 1, 1));
    let program = c.program();
    let plan = c.plan(&program);
    use Layout::{Full, Indexed, Strided};
    assert_eq!(plan.layouts, [Full, Strided, Indexed, Strided]);
    let shapes: Vec<Vec<usize>> = inputs.iter().map(|i| i.buffer.shape.clone()).collect();
    let sizes = emit::meta(&program, &plan, &[2, 3, 4], &shapes, &[vec![5, 6]]).unwrap();
    assert_eq!(sizes, [6, 4, 2, 3, 4, 4, 0, 1, 9, 8, 0, 1, 0, 5, 6]);
}

#[test]
fn grids() {
    let program = softmax(500).program();
    let source = emitted(&softmax(500), Dialect::Cuda);
    assert_eq!(source.grid.grid(3, 500), Some([192, 1, 1]));
    assert_eq!(source.grid.threadgroup(), [64, 1, 1]);
    assert_eq!(source.grid.grid(0, 500), None);
    // More groups than one axis of threads can count.
    let [x, y, _] = source.grid.grid(1 << 26, 500).unwrap();
    assert!(u64::from(x) / 64 * u64::from(y) >= 1 << 26);
    let plan = Plan::new(vec![Layout::Full], 2, false, params(64, 4, 8, 2));
    assert_eq!(emit(&program, Dialect::Cuda, &plan).unwrap().grid.groups(17, 10), 3);
}

fn tuned() -> Vec<Case> {
    let mut cases = Vec::new();
    let kernels = [
        "f(x: bf16) = let e = exp(x - row_max(x)); e / row_sum(e)",
        "f(x: f32) = cumsum(x)",
        "f(x: f16) = row_argmax(x)",
        "f(x: f16) = x * 2",
        "f(x: i8) = row_sum(i32(x))",
    ];
    for kernel in kernels {
        let dtype = text::parse_kernel(kernel).unwrap().inputs[0].dtype.unwrap();
        for shape in [[1, 1], [70, 3], [5, 64], [3, 1000], [1, 5000], [2, 20_000]] {
            cases.push(case(kernel, &[random(dtype, &shape, 1)], params(32, 1, 1, 1)).tolerance(1e-4, 5e-2));
        }
    }
    cases
}

#[test]
fn proposed_plans_cover_their_rows() {
    for case in tuned() {
        let program = case.program();
        let shape = &case.inputs[0].buffer.shape;
        for dialect in DIALECTS {
            let all = candidates(&program, dialect, shape[0] as u64, shape[1] as u64);
            assert!(all.len() >= 4, "{shape:?} {all:?}");
            for (i, p) in all.iter().enumerate() {
                let plan = Plan::new(vec![Layout::Full], 2, false, *p);
                emit(&program, dialect, &plan).unwrap_or_else(|e| panic!("{e}"));
                let covered = plan.row_capacity().is_none_or(|most| most as usize >= shape[1]);
                assert!(covered || !program.has_rows, "{shape:?} {p:?}");
                assert!(!all[..i].contains(p), "twice: {p:?}");
            }
        }
    }
}

#[test]
fn default_plans_run() {
    let mut cases = tuned();
    for case in &mut cases {
        let shape = case.inputs[0].buffer.shape.clone();
        case.params = candidates(&case.program(), Dialect::Cuda, shape[0] as u64, shape[1] as u64)[0];
    }
    check(&cases);
}

/// What PTX a case becomes.
fn ptx(nvrtc: &Nvrtc, case: &Case) -> String {
    let program = case.program();
    let plan = case.plan(&program);
    let text = kernel_text(&emitted(case, Dialect::Cuda), &program, &plan);
    let code = nvrtc.compile(&text, "compute_90").unwrap_or_else(|e| panic!("{e}"));
    String::from_utf8_lossy(&code).into_owned()
}

#[test]
fn cuda_compiles_to_vector_accesses_and_registers() {
    let nvrtc = match Nvrtc::find() {
        Ok(nvrtc) => nvrtc,
        Err(e) if std::env::var_os("CI").is_none() => {
            eprintln!("skipped: {e}");
            return;
        }
        Err(e) => panic!("{e}"),
    };
    let x = random(Dtype::Bf16, &[4, 4096], 1);
    let w = random(Dtype::Bf16, &[4096], 2);
    let norm = "f(x, w) = x * rsqrt(row_mean(x * x) + 1e-6) * w";
    let cases = [
        case(norm, &[x.clone(), w.clone()], params(256, 8, 1, 2)),
        case("f(x, w) = silu(x) * w", &[x.clone(), x.clone()], params(256, 8, 1, 2)),
        case("f(x, w) = x + w", &[x.clone(), w], params(256, 8, 1, 1)),
        case("f(x) = let e = exp(x - row_max(x)); e / row_sum(e)", from_ref(&x), params(256, 8, 1, 2)),
        case("f(x) = cumsum(x)", &[x], params(256, 8, 1, 2)),
    ];
    for case in &cases {
        let ptx = ptx(&nvrtc, case);
        let kernel = case.kernel.to_text();
        assert!(!ptx.contains(".local"), "{kernel} keeps arrays in memory:\n{ptx}");
        let vectors = |what: &str| ptx.matches(what).count();
        assert!(
            vectors("ld.global.v4.u32") + vectors("ld.global.v4.b32") + vectors("ld.global.nc.v4") > 0,
            "{kernel}:\n{ptx}"
        );
        assert!(vectors("st.global.v4") > 0, "{kernel}:\n{ptx}");
    }
}

#[test]
fn cuda_compiles_every_family() {
    let nvrtc = match Nvrtc::find() {
        Ok(nvrtc) => nvrtc,
        Err(e) if std::env::var_os("CI").is_none() => {
            eprintln!("skipped: {e}");
            return;
        }
        Err(e) => panic!("{e}"),
    };
    let f = |d| random(d, &[3, 40], 1);
    let i = |d| random(d, &[3, 40], 2);
    let mut cases = Vec::new();
    for (n, &op) in zmlx_lang::Op::ALL.iter().enumerate() {
        let integral = op.signature() == zmlx_lang::Signature::Integer;
        let call = format!("{}({})", op.name(), ["x", "y", "z"][..op.arity()].join(", "));
        let dtypes = if integral { [Dtype::I32, Dtype::U64] } else { [Dtype::F32, Dtype::F16] };
        for d in dtypes {
            let vec = [1, 4][n % 2];
            cases.push(case(&call, &vec![f(d); op.arity()], params(64, vec, 1, 1)));
        }
    }
    for p in [params(128, 4, 1, 1), params(128, 2, 8, 0), params(256, 1, 1, 0), params(64, 1, 2, 2)] {
        for d in [Dtype::F32, Dtype::Bf16, Dtype::I8, Dtype::I64, Dtype::U64, Dtype::Bool] {
            cases.push(case("row_sum(x), row_max(x), row_argmin(x), row_prod(x)", &[i(d)], p));
            cases.push(case("cumsum_exclusive_reverse(x), cummax_reverse(x)", &[i(d)], p));
        }
        cases.push(
            case(
                "f(x, seed: scalar u64) = dropout(x, 0.5, seed) - row_mean(x)",
                &[f(Dtype::F32), input(Dtype::U64, &[], &[5.0])],
                p,
            )
            .wide(),
        );
    }
    let ids = input(Dtype::I32, &[3, 40], &[1.0; 120]);
    let p = params(64, 4, 1, 1);
    for d in [Dtype::F32, Dtype::I32, Dtype::U32] {
        cases.push(case("f(i: i32, v) = out[i; clamp] += v", &[ids.clone(), f(d)], p).output(&[7]));
    }
    cases.push(case("f(t: array[2], i: i32) = t[i, 1], t[i, i; clamp]", &[f(Dtype::Bf16), ids], p).wide());
    let mut texts: Vec<zmlx_emulator::KernelText> = Vec::new();
    for case in &cases {
        let program = case.program();
        let text = kernel_text(&emitted(case, Dialect::Cuda), &program, &case.plan(&program));
        if texts.iter().all(|t| t.name != text.name) {
            texts.push(text);
        }
    }
    assert!(texts.len() > 120);
    nvrtc.compile_all(&texts, "compute_90").unwrap_or_else(|e| panic!("{e}"));
}
