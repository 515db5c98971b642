//! Products give what their formulas give in double precision, in every format and at shapes that fill no tile.

mod support;

use support::{Device, close, compile, dot, floats, matrix, nvrtc, rms_norm, wide};
use zmlx_cuda::kernels::{
    Activation, ExpertsDown, ExpertsDownOperands, ExpertsUp, ExpertsUpOperands, Float, Format, Groups,
    KernelError, Norm, Plan, Qmv, QmvOperands, Route, Scores, Select, SelectOperands, Type, Weights,
};

const AFFINE: Format = Format::Affine { bits: 4, group: 64, scales: Float::Bf16 };

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// `2 / sqrt(pi) * exp(-x^2) * sum(2^n x^(2n + 1) / (2n + 1)!!)`: all summands have one sign.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, 0.0, 1.0);
    while sum + term != sum {
        sum += term;
        n += 2.0;
        term *= 2.0 * x * x / n;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

fn act(activation: Activation, g: f64, u: f64) -> f64 {
    match activation {
        Activation::Silu => silu(g) * u,
        Activation::GeluTanh => {
            0.5 * g * (1.0 + (0.7978845608028654 * (g + 0.044715 * g.powi(3))).tanh()) * u
        }
        Activation::GeluErf => 0.5 * g * (1.0 + erf(g / 2f64.sqrt())) * u,
        Activation::ClampedSwiGlu { alpha, limit } => {
            let (alpha, limit) = (f64::from(alpha), f64::from(limit));
            let (g, u) = (g.min(limit), u.clamp(-limit, limit));
            g / (1.0 + (-alpha * g).exp()) * (1.0 + u)
        }
    }
}

#[test]
fn gelu_with_erf_from_end_to_end_of_its_bend() {
    assert!((erf(0.5) - 0.520_499_877_813_046_5).abs() < 1e-15);
    assert!((erf(-3.0) + 0.999_977_909_503_001_4).abs() < 1e-15);
    let mut device = Device::default();
    let rows = 1201;
    // Row r of the gate times x is its first element; that of the other matrix is 1.5.
    let gates: Vec<f32> = (0..rows).map(|r| (r as f32 - 600.0) / 60.0).collect();
    let mut matrix = |first: &dyn Fn(usize) -> f32| {
        let words: Vec<u8> =
            (0..rows).flat_map(|r| [first(r), 0.0, 0.0, 0.0].map(f32::to_ne_bytes).concat()).collect();
        Weights { codes: device.memory.bytes(Type::U32, words), ..Weights::default() }
    };
    let (weights, second) = (matrix(&|r| gates[r]), Some(matrix(&|_| 1.5)));
    let kernel = Qmv::new(rows, 4, Format::Dense(Float::F32), 1).gated(Activation::GeluErf);
    let out = device.memory.fresh(Type::F32, rows);
    let x = device.memory.f32(&[1.0, 2.0, 3.0, 4.0]);
    let operands = QmvOperands { x, weights, second, out, ..QmvOperands::default() };
    device.run(&kernel.source().unwrap(), &kernel.launch(&operands).unwrap());
    for (got, g) in device.memory.read(out).into_iter().zip(gates) {
        let want = act(Activation::GeluErf, f64::from(g), 1.5);
        // Below zero two numbers near one cancel: the error is that of `g`, not of the result.
        assert!((f64::from(got) - want).abs() <= 3e-7 * f64::from(g.abs()), "{g}: {got} and not {want}");
    }
}

#[test]
fn rows_of_every_format() {
    let mut rng = fastrand::Rng::with_seed(1);
    let mut device = Device::default();
    let affine = |bits, group, scales| Format::Affine { bits, group, scales };
    for (format, rows, columns, tokens) in [
        (AFFINE, 37, 2048, 1),
        (AFFINE, 21, 768, 3),
        (affine(4, 32, Float::F16), 19, 1792, 1),
        (affine(4, 128, Float::F32), 9, 11264, 2),
        (affine(4, 32, Float::F32), 21, 512, 2),
        (affine(4, 128, Float::Bf16), 40, 256, 8),
        (affine(4, 64, Float::F32), 17, 768, 1),
        (affine(4, 64, Float::Bf16), 19, 192, 1),
        (affine(8, 64, Float::Bf16), 23, 1088, 2),
        (affine(8, 32, Float::F32), 5, 32, 8),
        (Format::Mxfp4, 18, 2880, 1),
        (Format::Mxfp4, 7, 96, 4),
        (Format::Dense(Float::Bf16), 33, 520, 1),
        (Format::Dense(Float::F16), 11, 264, 5),
        (Format::Dense(Float::F32), 13, 132, 1),
    ] {
        let what = format!("{format:?} {rows}x{columns}, {tokens} rows");
        let x = floats(&mut rng, tokens * columns);
        let w = matrix(&mut device.memory, &mut rng, format, rows, columns);
        let kernel = Qmv::new(rows, columns, format, tokens);
        let operands = QmvOperands {
            x: device.memory.f32(&x),
            weights: w.weights,
            out: device.memory.fresh(Type::F32, tokens * rows),
            ..Default::default()
        };
        let launch = kernel.launch(&operands).unwrap();
        device.run(&kernel.source().unwrap(), &launch);
        let want: Vec<f64> = (0..tokens * rows)
            .map(|i| dot(&w.values, i % rows, &wide(&x[i / rows * columns..][..columns])))
            .collect();
        close(&what, &device.memory.read(operands.out), &want, 3e-6);
    }
}

/// However the work is cut: sums of other warps, tiles and rounds never mix.
#[test]
fn plans_of_every_kind() {
    let mut rng = fastrand::Rng::with_seed(21);
    let mut device = Device::default();
    let (rows, columns) = (75, 1792);
    let w = matrix(&mut device.memory, &mut rng, AFFINE, rows, columns);
    let weight = floats(&mut rng, columns);
    let norm = device.memory.f32(&weight);
    for (lanes, lane_rows, split, warps, depth, blocks, tokens) in [
        (32, 1, 1, 1, 1, 2, 1),
        (8, 2, 7, 7, 3, 2, 1),
        (16, 4, 2, 4, 4, 1, 1),
        (32, 2, 2, 4, 2, 1, 3),
        (8, 8, 3, 3, 2, 3, 2),
    ] {
        let x = floats(&mut rng, tokens * columns);
        let mut kernel =
            Qmv { norm: Some(Norm { eps: 1e-5, weight: true }), ..Qmv::new(rows, columns, AFFINE, tokens) };
        let rehearsed = lanes != 16;
        kernel.plan = Plan { lanes, rows: lane_rows, split, warps, depth, resident: 1, rehearsed };
        let operands = QmvOperands {
            x: device.memory.f32(&x),
            norm: Some(norm),
            weights: w.weights,
            out: device.memory.fresh(Type::F32, tokens * rows),
            ..Default::default()
        };
        let mut launch = kernel.launch(&operands).unwrap();
        launch.grid[0] = blocks;
        device.run(&kernel.source().unwrap(), &launch);
        let row = |t: usize| rms_norm(&x[t * columns..][..columns], Some(&weight), 1e-5);
        let want: Vec<f64> = (0..tokens)
            .flat_map(|t| {
                let x = row(t);
                (0..rows).map(|r| dot(&w.values, r, &x)).collect::<Vec<_>>()
            })
            .collect();
        close(&format!("{:?}", kernel.plan), &device.memory.read(operands.out), &want, 3e-6);
    }
}

/// Codes are subnormal numbers and x is scaled to match: neither end of what activations may be is lost.
#[test]
fn very_large_and_very_small_activations() {
    let mut rng = fastrand::Rng::with_seed(22);
    let mut device = Device::default();
    let (rows, columns) = (19, 256);
    for (bits, size) in [(4, 4e13), (4, 1e-15), (8, 4e13), (8, 1e-15)] {
        let format = Format::Affine { bits, group: 64, scales: Float::F32 };
        let w = matrix(&mut device.memory, &mut rng, format, rows, columns);
        let x: Vec<f32> = floats(&mut rng, columns).iter().map(|v| v * size).collect();
        let kernel = Qmv::new(rows, columns, format, 1);
        let operands = QmvOperands {
            x: device.memory.f32(&x),
            weights: w.weights,
            out: device.memory.fresh(Type::F32, rows),
            ..Default::default()
        };
        device.run(&kernel.source().unwrap(), &kernel.launch(&operands).unwrap());
        let want: Vec<f64> = (0..rows).map(|r| dot(&w.values, r, &wide(&x))).collect();
        close(&format!("{bits} bits, {size:e}"), &device.memory.read(operands.out), &want, 3e-6);
    }
}

#[test]
fn norms_biases_gates_residuals_and_pairs() {
    let mut rng = fastrand::Rng::with_seed(2);
    let mut device = Device::default();
    let clamped = Activation::ClampedSwiGlu { alpha: 1.702, limit: 1.5 };
    let weighted = Some(Norm { eps: 1e-5, weight: true });
    for (tokens, norm, activation, extras) in [
        (1, weighted, None, [true, false, true, true]),
        (3, weighted, None, [false, false, false, true]),
        (2, Some(Norm { eps: 1e-6, weight: false }), Some(Activation::Silu), [false; 4]),
        (1, None, Some(clamped), [true, true, false, false]),
        (1, weighted, Some(Activation::GeluTanh), [false, true, false, true]),
        (2, weighted, Some(Activation::GeluErf), [true, false, false, true]),
    ] {
        let what = format!("{tokens} {norm:?} {activation:?} {extras:?}");
        let (rows, columns) = (45, 2048);
        let x = floats(&mut rng, tokens * columns);
        let weight = floats(&mut rng, columns);
        let m = &mut device.memory;
        let w = [0, 1].map(|_| matrix(m, &mut rng, AFFINE, rows, columns));
        let [bias, bias2] = [0, 1].map(|_| floats(&mut rng, rows));
        let (gate, residual) = (floats(&mut rng, tokens), floats(&mut rng, tokens * rows));
        let mut kernel = Qmv::new(rows, columns, AFFINE, tokens);
        if let Some(activation) = activation {
            kernel = kernel.gated(activation);
        }
        kernel = Qmv { norm, bias: [extras[0], extras[1]], gate: extras[2], residual: extras[3], ..kernel };
        // Two tiles a block, so that the second round is seen.
        kernel.plan.resident = 1;
        let operands = QmvOperands {
            x: m.f32(&x),
            norm: norm.filter(|n| n.weight).map(|_| m.f32(&weight)),
            weights: w[0].weights,
            second: activation.map(|_| w[1].weights),
            bias: [extras[0].then(|| m.f32(&bias)), extras[1].then(|| m.f32(&bias2))],
            gate: extras[2].then(|| m.f32(&gate)),
            residual: extras[3].then(|| m.f32(&residual)),
            out: m.fresh(Type::F32, tokens * rows),
            ..Default::default()
        };
        let mut launch = kernel.launch(&operands).unwrap();
        launch.grid[0] = 2;
        device.run(&kernel.source().unwrap(), &launch);
        let mut want = Vec::new();
        for t in 0..tokens {
            let row = &x[t * columns..][..columns];
            let x = norm.map_or_else(|| wide(row), |n| rms_norm(row, n.weight.then_some(&weight), n.eps));
            for r in 0..rows {
                let value = |m: usize, on: bool, b: &[f32]| {
                    dot(&w[m].values, r, &x) + if on { f64::from(b[r]) } else { 0.0 }
                };
                let mut y = value(0, extras[0], &bias);
                if let Some(activation) = activation {
                    y = act(activation, y, value(1, extras[1], &bias2));
                }
                if extras[2] {
                    y /= 1.0 + (-f64::from(gate[t])).exp();
                }
                want.push(y + if extras[3] { f64::from(residual[t * rows + r]) } else { 0.0 });
            }
        }
        close(&what, &device.memory.read(operands.out), &want, 5e-6);
    }
}

#[test]
fn matrices_that_follow_one_another() {
    let mut rng = fastrand::Rng::with_seed(12);
    let mut device = Device::default();
    for (rows, tokens, format) in [
        ([64, 32, 32], 1, AFFINE),
        ([19, 5, 7], 2, Format::Mxfp4),
        ([9, 10, 0], 1, AFFINE),
        ([37, 20, 11], 2, AFFINE),
    ] {
        let columns = if rows[0] == 37 { 512 } else { 128 };
        let m = &mut device.memory;
        let x = floats(&mut rng, tokens * columns);
        let w = rows.map(|r| matrix(m, &mut rng, format, r.max(1), columns));
        let all: usize = rows.iter().sum();
        let bias = floats(&mut rng, all);
        let plain = Qmv::new(all, columns, format, tokens);
        let kernel = Qmv { stacked: [rows[1], rows[2]], bias: [true, false], ..plain };
        let operands = QmvOperands {
            x: m.f32(&x),
            weights: w[0].weights,
            second: Some(w[1].weights),
            third: (rows[2] > 0).then_some(w[2].weights),
            bias: [Some(m.f32(&bias)), None],
            out: m.fresh(Type::F32, tokens * all),
            ..Default::default()
        };
        device.run(&kernel.source().unwrap(), &kernel.launch(&operands).unwrap());
        let mut want = Vec::new();
        for t in 0..tokens {
            let row = wide(&x[t * columns..][..columns]);
            let products = (0..3).flat_map(|i| (0..rows[i]).map(move |r| (i, r)));
            want.extend(products.zip(&bias).map(|((i, r), b)| dot(&w[i].values, r, &row) + f64::from(*b)));
        }
        close(&format!("{rows:?}"), &device.memory.read(operands.out), &want, 3e-6);
    }
}

#[test]
fn experts_of_two_tokens() {
    let mut rng = fastrand::Rng::with_seed(3);
    let mut device = Device::default();
    let clamped = Activation::ClampedSwiGlu { alpha: 1.702, limit: 1.5 };
    let f8 = Format::Affine { bits: 8, group: 32, scales: Float::F32 };
    for (format, experts, k, width, hidden, activation, biased) in [
        (AFFINE, 6, 4, 256, 192, Activation::Silu, false),
        (AFFINE, 9, 8, 64, 768, Activation::Silu, false),
        (Format::Mxfp4, 4, 2, 96, 160, clamped, true),
        (f8, 3, 3, 64, 96, Activation::GeluTanh, true),
        (Format::Dense(Float::Bf16), 3, 1, 40, 24, Activation::Silu, false),
    ] {
        let what = format!("{format:?} {k} of {experts}");
        let tokens = 2;
        let x = floats(&mut rng, tokens * width);
        let weight = floats(&mut rng, width);
        let m = &mut device.memory;
        let [gate, up] = [0, 1].map(|_| matrix(m, &mut rng, format, experts * hidden, width));
        let down = matrix(m, &mut rng, format, experts * width, hidden);
        let [bg, bu] = [0, 1].map(|_| floats(&mut rng, experts * hidden));
        let bd = floats(&mut rng, experts * width);
        let mut order: Vec<i32> = (0..experts as i32).collect();
        let mut indices = Vec::new();
        for _ in 0..tokens {
            rng.shuffle(&mut order);
            indices.extend(&order[..k]);
        }
        let scores = floats(&mut rng, tokens * k);
        let residuals = [0, 1].map(|_| floats(&mut rng, tokens * width));
        let norm = Norm { eps: 1e-5, weight: true };
        let plain = ExpertsUp::new([experts, k], [hidden, width], format, tokens, activation);
        let up_kernel = ExpertsUp { norm: Some(norm), bias: [biased; 2], ..plain };
        let up_operands = ExpertsUpOperands {
            x: m.f32(&x),
            norm: Some(m.f32(&weight)),
            indices: m.i32(&indices),
            gate: gate.weights,
            up: up.weights,
            bias: [biased.then(|| m.f32(&bg)), biased.then(|| m.f32(&bu))],
            out: m.fresh(Type::F32, tokens * k * hidden),
            ..ExpertsUpOperands::default()
        };
        let down_kernel = ExpertsDown {
            bias: biased,
            residuals: 2,
            ..ExpertsDown::new([experts, k], [width, hidden], format, tokens)
        };
        let down_operands = ExpertsDownOperands {
            x: up_operands.out,
            indices: up_operands.indices,
            scores: m.f32(&scores),
            down: down.weights,
            bias: biased.then(|| m.f32(&bd)),
            residuals: residuals.iter().map(|r| m.f32(r)).collect(),
            out: m.fresh(Type::F32, tokens * width),
        };
        let mut launch = up_kernel.launch(&up_operands).unwrap();
        launch.grid[0] = launch.grid[0].min(5);
        device.run(&up_kernel.source().unwrap(), &launch);
        device.run(&down_kernel.source().unwrap(), &down_kernel.launch(&down_operands).unwrap());
        let bias = |b: &[f32], i: usize| if biased { f64::from(b[i]) } else { 0.0 };
        let (mut want_up, mut want) = (Vec::new(), Vec::new());
        for t in 0..tokens {
            let row = rms_norm(&x[t * width..][..width], Some(&weight), norm.eps);
            let mut y: Vec<f64> =
                (0..width).map(|i| residuals.iter().map(|r| f64::from(r[t * width + i])).sum()).collect();
            for s in 0..k {
                let e = indices[t * k + s] as usize;
                let h: Vec<f64> = (e * hidden..(e + 1) * hidden)
                    .map(|r| {
                        let g = dot(&gate.values, r, &row) + bias(&bg, r);
                        act(activation, g, dot(&up.values, r, &row) + bias(&bu, r))
                    })
                    .collect();
                for (i, y) in y.iter_mut().enumerate() {
                    let r = e * width + i;
                    *y += f64::from(scores[t * k + s]) * (dot(&down.values, r, &h) + bias(&bd, r));
                }
                want_up.extend(h);
            }
            want.extend(y);
        }
        close(&format!("{what} up"), &device.memory.read(up_operands.out), &want_up, 5e-6);
        close(&what, &device.memory.read(down_operands.out), &want, 1e-5);
    }
}

#[test]
fn shapes_that_cannot_be_are_refused() {
    let size = |e: Result<_, KernelError>| matches!(e, Err(KernelError::Size { .. }));
    assert!(size(Qmv::new(8, 100, AFFINE, 1).source()));
    assert!(size(Qmv::new(8, 128, AFFINE, 9).source()));
    assert!(size(Qmv::new(8, 128, Format::Affine { bits: 6, group: 64, scales: Float::F32 }, 1).source()));
    assert!(size(ExpertsDown::new([4, 5], [64, 64], AFFINE, 1).source()));
    let kernel = Qmv { norm: Some(Norm { eps: f32::NAN, weight: false }), ..Qmv::new(8, 128, AFFINE, 1) };
    assert!(matches!(kernel.source(), Err(KernelError::NotFinite { .. })));
    let kernel = Qmv::new(8, 128, AFFINE, 1);
    let without = QmvOperands { residual: Some(64), ..Default::default() };
    assert!(matches!(kernel.launch(&without), Err(KernelError::Operand { .. })));
    let odd = QmvOperands { x: 8, ..Default::default() };
    assert!(matches!(kernel.launch(&odd), Err(KernelError::Misaligned { to: 16, .. })));
    let large = Qmv::new(8, 16384, AFFINE, 8);
    assert!(matches!(large.launch(&QmvOperands::default()), Err(KernelError::Shared { .. })));
}

/// The shapes of LFM2-8B-A1B and Qwen3-30B-A3B, and others' formats.
#[test]
fn real_shapes_compile_for_sm_90_without_spills() {
    let Some(nvrtc) = nvrtc() else { return };
    let norm = Some(Norm { eps: 1e-5, weight: true });
    for (rows, columns, format, tokens) in [
        (2048, 2048, AFFINE, 1),
        (2048, 4096, AFFINE, 1),
        (65536, 2048, AFFINE, 1),
        (151936, 2048, AFFINE, 1),
        (151936, 2048, AFFINE, 4),
        (151936, 2048, AFFINE, 8),
        (2048, 7168, AFFINE, 1),
        (2048, 2048, Format::Affine { bits: 8, group: 64, scales: Float::Bf16 }, 1),
        (128, 2048, Format::Dense(Float::Bf16), 1),
        (2880, 2880, Format::Mxfp4, 1),
    ] {
        let kernel = Qmv { norm, residual: true, ..Qmv::new(rows, columns, format, tokens) };
        let launch =
            kernel.launch(&QmvOperands { norm: Some(64), residual: Some(64), ..Default::default() }).unwrap();
        let what = format!(
            "qmv {rows}x{columns} {format:?} {tokens}: grid {:?} block {} shared {} {:?}",
            launch.grid, launch.block[0], launch.shared, kernel.plan
        );
        compile(&nvrtc, &what, &kernel.source().unwrap());
    }
    let pair = Qmv { norm, ..Qmv::new(7168, 2048, AFFINE, 1).gated(Activation::Silu) };
    compile(&nvrtc, "gated 7168x2048", &pair.source().unwrap());
    for (experts, k, hidden, width) in [(32, 4, 1792, 2048), (128, 8, 768, 2048), (256, 8, 512, 2048)] {
        let up =
            ExpertsUp { norm, ..ExpertsUp::new([experts, k], [hidden, width], AFFINE, 1, Activation::Silu) };
        compile(
            &nvrtc,
            &format!("up {k} of {experts} {hidden}x{width} {:?}", up.plan),
            &up.source().unwrap(),
        );
        let down = ExpertsDown { residuals: 1, ..ExpertsDown::new([experts, k], [width, hidden], AFFINE, 1) };
        compile(
            &nvrtc,
            &format!("down {k} of {experts} {width}x{hidden} {:?}", down.plan),
            &down.source().unwrap(),
        );
    }
}

/// The same experts, whoever chooses them, and the choice is told.
#[test]
fn experts_choose_for_themselves() {
    let mut rng = fastrand::Rng::with_seed(31);
    let (tokens, rows, columns) = (2, 40, 192);
    let choice = |experts, k, scores| Select {
        experts,
        k,
        scores,
        bias: false,
        ties_higher: true,
        groups: None,
        renormalise: Some(0.0),
        scale: 1.0,
    };
    let cases = [
        choice(40, 4, Scores::Softmax),
        Select { bias: true, ties_higher: false, ..choice(9, 3, Scores::Sigmoid) },
        Select { bias: true, groups: Some(Groups { count: 4, keep: 2 }), ..choice(16, 5, Scores::Sigmoid) },
        choice(33, 16, Scores::SoftmaxOfChosen),
        choice(130, 8, Scores::Softmax),
    ];
    for (case, select) in cases.into_iter().enumerate() {
        let (experts, k) = (select.experts, select.k);
        let mut device = Device::default();
        let m = &mut device.memory;
        let [gate, up] = [0, 1].map(|_| matrix(m, &mut rng, AFFINE, experts * rows, columns));
        let biased = case == 1;
        let biases = [0, 1].map(|_| biased.then(|| m.f32(&floats(&mut rng, experts * rows))));
        let choice = |m: &mut support::Memory, bias: &[f32]| SelectOperands {
            bias: select.bias.then(|| m.f32(bias)),
            indices: m.fresh(Type::I32, tokens * k),
            weights: m.fresh(Type::F32, tokens * k),
        };
        let bias = floats(&mut rng, experts);
        let [told, own] = [0, 1].map(|_| choice(m, &bias));
        let logits = m.f32(&floats(&mut rng, tokens * experts));
        let route = Route { select, tokens };
        device.run(&route.source().unwrap(), &route.launch(logits, &told).unwrap());
        let m = &mut device.memory;
        let first = ExpertsUpOperands {
            x: m.f32(&floats(&mut rng, tokens * columns)),
            indices: told.indices,
            gate: gate.weights,
            up: up.weights,
            bias: biases,
            out: m.fresh(Type::F32, tokens * k * rows),
            ..ExpertsUpOperands::default()
        };
        let out = m.fresh(Type::F32, tokens * k * rows);
        let second = ExpertsUpOperands { indices: 0, logits, choice: own, out, ..first };
        let plain = ExpertsUp::new([experts, k], [rows, columns], AFFINE, tokens, Activation::Silu);
        let plain = ExpertsUp { bias: [biased; 2], ..plain };
        let mut chooses = ExpertsUp { select: Some(select), ..plain };
        chooses.plan.rehearsed = case % 2 == 0;
        device.run(&plain.source().unwrap(), &plain.launch(&first).unwrap());
        device.run(&chooses.source().unwrap(), &chooses.launch(&second).unwrap());
        let read = |a: u64| device.memory.read(a);
        assert_eq!(read(second.out), read(first.out), "case {case}");
        assert_eq!(read(own.weights), read(told.weights), "case {case}");
        let indices = |a: u64| device.memory.get(a).to_i64();
        assert_eq!(indices(own.indices), indices(told.indices), "case {case}");
    }
    let other = ExpertsUp {
        select: Some(choice(8, 2, Scores::Softmax)),
        ..ExpertsUp::new([8, 3], [rows, columns], AFFINE, 1, Activation::Silu)
    };
    assert!(matches!(other.source(), Err(KernelError::Size { .. })));
}
