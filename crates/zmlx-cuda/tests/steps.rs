//! Routers, the short convolution, embedding, norms, and the head with what follows a token.

mod support;

use support::attention::softmax;
use support::{Device, close, compile, dot, floats, matrix, nvrtc, rms_norm, wide};
use zmlx_cuda::kernels::{
    Argmax, Embed, Float, Format, Groups, Next, NextOperands, Norm, Plain, PlainOp, PlainOperands, Qmv,
    QmvOperands, Route, Router, RouterOperands, Scores, Select, SelectOperands, ShortConv, ShortConvOperands,
    Type,
};

const AFFINE: Format = Format::Affine { bits: 4, group: 64, scales: Float::Bf16 };

fn select(experts: usize, k: usize, scores: Scores) -> Select {
    Select { experts, k, scores, bias: false, ties_higher: true, groups: None, renormalise: None, scale: 1.0 }
}

/// What a choice must be, by sorting; smallest rank first.
fn chosen(s: &Select, logits: &[f64], bias: &[f32]) -> (Vec<i32>, Vec<f64>) {
    let scores = match s.scores {
        Scores::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        Scores::Softmax => softmax(logits),
        Scores::SoftmaxOfChosen => logits.to_vec(),
    };
    let mut ranks: Vec<f64> =
        scores.iter().zip(bias).map(|(v, b)| if s.bias { v + f64::from(*b) } else { *v }).collect();
    if let Some(Groups { count, keep }) = s.groups {
        let size = s.experts / count;
        let score = |g: usize| {
            let mut r = ranks[g * size..(g + 1) * size].to_vec();
            r.sort_by(|a, b| b.total_cmp(a));
            r[0] + r[1]
        };
        let mut order: Vec<usize> = (0..count).collect();
        order.sort_by(|a, b| score(*a).total_cmp(&score(*b)).then(a.cmp(b)));
        for g in order.iter().take(count - keep) {
            ranks[g * size..(g + 1) * size].fill(0.0);
        }
    }
    let mut order: Vec<usize> = (0..s.experts).collect();
    let key = |i: usize| if ranks[i].is_nan() { f64::INFINITY } else { ranks[i] };
    order.sort_by(|&a, &b| key(a).total_cmp(&key(b)).then(if s.ties_higher { a.cmp(&b) } else { b.cmp(&a) }));
    let top = &order[s.experts - s.k..];
    let mut weights: Vec<f64> = top.iter().map(|&i| scores[i]).collect();
    if s.scores == Scores::SoftmaxOfChosen {
        weights = softmax(&weights);
    }
    if let Some(eps) = s.renormalise {
        let total = weights.iter().sum::<f64>() + f64::from(eps);
        weights.iter_mut().for_each(|w| *w /= total);
    }
    weights.iter_mut().for_each(|w| *w *= f64::from(s.scale));
    (top.iter().map(|i| *i as i32).collect(), weights)
}

#[test]
fn choices_with_ties_groups_and_biases() {
    let mut rng = fastrand::Rng::with_seed(6);
    let mut device = Device::default();
    let cases = [
        Select { renormalise: Some(0.0), ..select(128, 8, Scores::Softmax) },
        Select { bias: true, scale: 2.5, renormalise: Some(1e-20), ..select(32, 4, Scores::Sigmoid) },
        Select { ties_higher: false, ..select(32, 4, Scores::SoftmaxOfChosen) },
        Select { groups: Some(Groups { count: 8, keep: 3 }), bias: true, ..select(64, 6, Scores::Sigmoid) },
        Select { ties_higher: false, ..select(500, 10, Scores::Softmax) },
        select(5, 5, Scores::Sigmoid),
    ];
    for (i, s) in cases.into_iter().enumerate() {
        for tied in [false, true] {
            let tokens = 3;
            // With ties many logits are the same, zeros of both signs among them.
            let logits: Vec<f32> = (0..tokens * s.experts)
                .map(|_| if tied { [0.0, -0.0, 0.5, -0.5][rng.usize(0..4)] } else { 4.0 * rng.f32() - 2.0 })
                .collect();
            let bias: Vec<f32> = (0..s.experts).map(|_| if tied { 0.0 } else { rng.f32() - 0.5 }).collect();
            let m = &mut device.memory;
            let operands = SelectOperands {
                bias: s.bias.then(|| m.f32(&bias)),
                indices: m.fresh(Type::I32, tokens * s.k),
                weights: m.fresh(Type::F32, tokens * s.k),
            };
            let kernel = Route { select: s, tokens };
            let launch = kernel.launch(m.f32(&logits), &operands).unwrap();
            device.run(&kernel.source().unwrap(), &launch);
            let (mut want, mut weights) = (Vec::new(), Vec::new());
            for row in logits.chunks(s.experts) {
                let (c, w) = chosen(&s, &wide(row), &bias);
                want.extend(c.iter().map(|i| i64::from(*i)));
                weights.extend(w);
            }
            assert_eq!(device.memory.get(operands.indices).to_i64(), want, "case {i}, tied {tied}");
            close(&format!("case {i}, tied {tied}"), &device.memory.read(operands.weights), &weights, 1e-6);
        }
    }
}

#[test]
fn nan_is_chosen_rather_than_lost() {
    let mut device = Device::default();
    let m = &mut device.memory;
    let logits = m.f32(&[0.1, f32::NAN, 0.3, 0.2, -0.5]);
    let operands =
        SelectOperands { bias: None, indices: m.fresh(Type::I32, 2), weights: m.fresh(Type::F32, 2) };
    let kernel = Route { select: select(5, 2, Scores::Sigmoid), tokens: 1 };
    device.run(&kernel.source().unwrap(), &kernel.launch(logits, &operands).unwrap());
    assert_eq!(device.memory.get(operands.indices).to_i64(), [2, 1]);
    assert!(device.memory.read(operands.weights)[1].is_nan());
}

#[test]
fn router_in_one_launch() {
    let mut rng = fastrand::Rng::with_seed(7);
    let mut device = Device::default();
    let eight = Format::Affine { bits: 8, group: 64, scales: Float::Bf16 };
    let grouped =
        Select { groups: Some(Groups { count: 4, keep: 2 }), bias: true, ..select(40, 6, Scores::Sigmoid) };
    for (s, columns, format, tokens, normed, biased) in [
        (Select { renormalise: Some(0.0), ..select(128, 8, Scores::Softmax) }, 2048, AFFINE, 1, true, false),
        (Select { bias: true, ..select(32, 4, Scores::Sigmoid) }, 512, eight, 2, true, false),
        (select(32, 4, Scores::SoftmaxOfChosen), 320, Format::Dense(Float::Bf16), 1, false, true),
        (grouped, 256, Format::Dense(Float::F32), 3, true, false),
    ] {
        let what = format!("{s:?} {format:?}");
        let m = &mut device.memory;
        // Small logits: a softmax that float32 cuts off at zero would have ties that are none in double precision.
        let small = |v: Vec<f32>| v.iter().map(|v| v * 0.01).collect::<Vec<f32>>();
        let x = small(floats(&mut rng, tokens * columns));
        let weight = small(floats(&mut rng, columns));
        let w = matrix(m, &mut rng, format, s.experts, columns);
        let [bias, choice] = [0, 1].map(|_| floats(&mut rng, s.experts));
        let norm = normed.then_some(Norm { eps: 1e-5, weight: true });
        let kernel = Router { norm, bias: biased, ..Router::new(s, columns, format, tokens) };
        let operands = RouterOperands {
            x: m.f32(&x),
            norm: norm.map(|_| m.f32(&weight)),
            matrix: w.weights,
            bias: biased.then(|| m.f32(&bias)),
            logits: m.fresh(Type::F32, tokens * s.experts),
            arrived: m.bytes(Type::U32, vec![0; 4]),
            select: SelectOperands {
                bias: s.bias.then(|| m.f32(&choice)),
                indices: m.fresh(Type::I32, tokens * s.k),
                weights: m.fresh(Type::F32, tokens * s.k),
            },
        };
        let (source, launch) = (kernel.source().unwrap(), kernel.launch(&operands).unwrap());
        // Twice: the counter must be ready again.
        for _ in 0..2 {
            device.run(&source, &launch);
            let logits = device.memory.read(operands.logits);
            let want: Vec<f64> = (0..tokens * s.experts)
                .map(|i| {
                    let (t, e) = (i / s.experts, i % s.experts);
                    let row = &x[t * columns..][..columns];
                    let row = norm.map_or_else(|| wide(row), |n| rms_norm(row, Some(&weight), n.eps));
                    dot(&w.values, e, &row) + if biased { f64::from(bias[e]) } else { 0.0 }
                })
                .collect();
            close(&what, &logits, &want, 5e-6);
            let (mut indices, mut weights) = (Vec::new(), Vec::new());
            for row in logits.chunks(s.experts) {
                let (c, w) = chosen(&s, &wide(row), &choice);
                indices.extend(c.iter().map(|i| i64::from(*i)));
                weights.extend(w);
            }
            assert_eq!(device.memory.get(operands.select.indices).to_i64(), indices, "{what}");
            close(&what, &device.memory.read(operands.select.weights), &weights, 2e-6);
        }
    }
}

#[test]
fn short_convolution_keeps_its_last_inputs() {
    let mut rng = fastrand::Rng::with_seed(8);
    let mut device = Device::default();
    for (channels, columns, format, sequences, length, taps, extras) in [
        (50, 2048, AFFINE, 1, 1, 3, false),
        (20, 256, AFFINE, 2, 3, 3, true),
        (9, 64, Format::Dense(Float::Bf16), 1, 4, 2, true),
    ] {
        let what = format!("{channels} {format:?}");
        let (tokens, keep) = (sequences * length, taps - 1);
        let m = &mut device.memory;
        let x = floats(&mut rng, tokens * columns);
        let weight = floats(&mut rng, columns);
        let w = matrix(m, &mut rng, format, 3 * channels, columns);
        let bias = floats(&mut rng, 3 * channels);
        let [taps_of, conv_bias] = [channels * taps, channels].map(|n| floats(&mut rng, n));
        let state = floats(&mut rng, sequences * keep * channels);
        let norm = Norm { eps: 1e-5, weight: true };
        let kernel = ShortConv {
            norm: Some(norm),
            bias: extras,
            conv_bias: extras,
            ..ShortConv::new(channels, columns, format, [sequences, length], taps)
        };
        let operands = ShortConvOperands {
            x: m.f32(&x),
            norm: Some(m.f32(&weight)),
            matrix: w.weights,
            bias: extras.then(|| m.f32(&bias)),
            kernel: m.f32(&taps_of),
            conv_bias: extras.then(|| m.f32(&conv_bias)),
            state: m.f32(&state),
            out: m.fresh(Type::F32, tokens * channels),
        };
        device.run(&kernel.source().unwrap(), &kernel.launch(&operands).unwrap());
        let part = |t: usize, p: usize, c: usize| {
            let row = rms_norm(&x[t * columns..][..columns], Some(&weight), norm.eps);
            dot(&w.values, p * channels + c, &row)
                + if extras { f64::from(bias[p * channels + c]) } else { 0.0 }
        };
        let (mut want, mut kept) = (vec![0.0; tokens * channels], vec![0.0; state.len()]);
        for s in 0..sequences {
            for c in 0..channels {
                let mut inputs: Vec<f64> =
                    (0..keep).map(|k| f64::from(state[(s * keep + k) * channels + c])).collect();
                inputs.extend((s * length..(s + 1) * length).map(|t| part(t, 0, c) * part(t, 2, c)));
                for t in 0..length {
                    let y: f64 =
                        (0..taps).map(|k| f64::from(taps_of[c * taps + k]) * inputs[t + k]).sum::<f64>()
                            + if extras { f64::from(conv_bias[c]) } else { 0.0 };
                    want[(s * length + t) * channels + c] = part(s * length + t, 1, c) * y;
                }
                for k in 0..keep {
                    kept[(s * keep + k) * channels + c] = inputs[length + k];
                }
            }
        }
        close(&what, &device.memory.read(operands.out), &want, 1e-5);
        close(&format!("{what}, state"), &device.memory.read(operands.state), &kept, 1e-5);
    }
}

#[test]
fn embeddings_of_every_format() {
    let mut rng = fastrand::Rng::with_seed(9);
    let mut device = Device::default();
    for (format, scale, rounded) in [
        (AFFINE, 1.0, true),
        (Format::Affine { bits: 8, group: 32, scales: Float::F32 }, 3.5, false),
        (Format::Mxfp4, 5.3, true),
        (Format::Dense(Float::Bf16), 1.0, false),
        (Format::Dense(Float::F16), 0.3, false),
        (Format::Dense(Float::F32), 1.0, false),
    ] {
        let (rows, columns, ids) = (17, 192, [3u32, 16, 3, 99]);
        let m = &mut device.memory;
        let w = matrix(m, &mut rng, format, rows, columns);
        let tokens = m.bytes(Type::U32, ids.iter().flat_map(|i| i.to_ne_bytes()).collect());
        // Words of 16 bits are read as such here.
        let out = m.fresh(Type::F32, ids.len() * columns);
        let kernel = Embed { rows, columns, format, tokens: ids.len(), scale, rounded };
        device.run(&kernel.source().unwrap(), &kernel.launch(tokens, &w.weights, out).unwrap());
        let round = |v: f64| half::bf16::from_f32(v as f32).to_f64();
        let want: Vec<f64> = ids
            .iter()
            .flat_map(|id| (0..columns).map(|c| w.values[(*id as usize).min(rows - 1) * columns + c]))
            .map(|v| match (scale != 1.0, rounded) {
                (true, true) => round(v * round(f64::from(scale))),
                _ => v * f64::from(scale),
            })
            .collect();
        close(&format!("{format:?}"), &device.memory.read(out), &want, 1e-6);
    }
}

#[test]
fn stages_without_a_product() {
    let mut rng = fastrand::Rng::with_seed(10);
    let mut device = Device::default();
    let (rows, width) = (3, 301);
    let [x, other] = [0, 1].map(|_| floats(&mut rng, rows * width));
    let [weight, bias] = [0, 1].map(|_| floats(&mut rng, width));
    let each = |f: &dyn Fn(&[f32]) -> Vec<f64>| x.chunks(width).flat_map(f).collect::<Vec<f64>>();
    let layer_norm = |x: &[f32]| {
        let mean = wide(x).iter().sum::<f64>() / width as f64;
        let variance = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / width as f64;
        let normed = |(i, v): (usize, &f32)| {
            (f64::from(*v) - mean) / (variance + 1e-5).sqrt() * f64::from(weight[i]) + f64::from(bias[i])
        };
        x.iter().enumerate().map(normed).collect()
    };
    let pairs = |f: fn(f64, f64) -> f64| {
        x.iter().zip(&other).map(|(a, b)| f(f64::from(*a), f64::from(*b))).collect::<Vec<f64>>()
    };
    for (op, want) in [
        (PlainOp::RmsNorm(Norm { eps: 1e-5, weight: true }), each(&|x| rms_norm(x, Some(&weight), 1e-5))),
        (PlainOp::RmsNorm(Norm { eps: 1e-3, weight: false }), each(&|x| rms_norm(x, None, 1e-3))),
        (PlainOp::LayerNorm { eps: 1e-5, weight: true, bias: true }, each(&layer_norm)),
        (PlainOp::Softmax, each(&|x| softmax(&wide(x)))),
        (PlainOp::Add, pairs(|a, b| a + b)),
        (PlainOp::SigmoidGate, pairs(|gate, x| x / (1.0 + (-gate).exp()))),
    ] {
        let m = &mut device.memory;
        let (norm, layer) =
            (matches!(op, PlainOp::RmsNorm(n) if n.weight), matches!(op, PlainOp::LayerNorm { .. }));
        let in_place = op == PlainOp::SigmoidGate;
        let operands = PlainOperands {
            x: m.f32(&x),
            other: (op == PlainOp::Add).then(|| m.f32(&other)),
            weight: (norm || layer).then(|| m.f32(&weight)),
            bias: layer.then(|| m.f32(&bias)),
            out: if in_place { m.f32(&other) } else { m.fresh(Type::F32, rows * width) },
        };
        let kernel = Plain { op, rows, width };
        device.run(&kernel.source().unwrap(), &kernel.launch(&operands).unwrap());
        close(&format!("{op:?}"), &device.memory.read(operands.out), &want, 1e-6);
    }
}

/// Memory for what follows a token.
fn next_operands(device: &mut Device, tokens: usize, ring: usize, position: i32) -> NextOperands {
    let m = &mut device.memory;
    NextOperands {
        best: m.bytes(Type::U64, vec![0; 8 * tokens]),
        arrived: m.bytes(Type::U32, vec![0; 4]),
        tokens: m.bytes(Type::U32, vec![0xff; 4 * tokens]),
        position: m.i32(&[position]),
        ring: m.bytes(Type::U32, vec![0xff; 4 * tokens * ring]),
        count: m.bytes(Type::U32, vec![0; 4]),
        published: m.bytes(Type::U32, vec![0; 4]),
    }
}

#[test]
fn the_lowest_index_of_the_largest_logit_follows() {
    let mut device = Device::default();
    let (width, tokens, ring) = (3000, 3, 2);
    let next = next_operands(&mut device, tokens, ring, 7);
    let kernel = Argmax { width, tokens, next: Next { ring } };
    let mut logits = vec![-3.0f32; tokens * width];
    // Equal ones, a NaN and infinities.
    (logits[1200], logits[2999], logits[5]) = (2.0, 2.0, f32::NAN);
    (logits[width + 40], logits[width + 41]) = (f32::INFINITY, f32::NEG_INFINITY);
    logits[2 * width + 2048] = -1.0;
    let best = [1200, 40, 2048];
    let address = device.memory.f32(&logits);
    let (source, launch) = (kernel.source().unwrap(), kernel.launch(address, &next).unwrap());
    for step in 1..=3u32 {
        device.run(&source, &launch);
        let read = |a| device.memory.get(a).to_u32();
        assert_eq!(read(next.tokens), best);
        assert_eq!(device.memory.get(next.position).to_i64(), [7 + i64::from(step)]);
        assert_eq!((read(next.count), read(next.published)), (vec![step], vec![step]));
        let second = if step == 1 { [u32::MAX; 3] } else { best };
        assert_eq!(read(next.ring), [best, second].concat());
    }
    // Nothing but NaN: the first index, as if all were equal.
    let address = device.memory.f32(&vec![f32::NAN; tokens * width]);
    device.run(&source, &kernel.launch(address, &next).unwrap());
    assert_eq!(device.memory.get(next.tokens).to_u32(), [0, 0, 0]);
}

#[test]
fn a_head_that_decides() {
    let mut rng = fastrand::Rng::with_seed(11);
    let mut device = Device::default();
    for tokens in [1, 2, 4, 8] {
        let (rows, columns) = (301, 256);
        let next = next_operands(&mut device, tokens, 4, 0);
        let x = floats(&mut rng, tokens * columns);
        let m = &mut device.memory;
        let w = matrix(m, &mut rng, AFFINE, rows, columns);
        let kernel = Qmv { next: Some(Next { ring: 4 }), ..Qmv::new(rows, columns, AFFINE, tokens) };
        let operands = QmvOperands {
            x: m.f32(&x),
            weights: w.weights,
            out: m.fresh(Type::F32, tokens * rows),
            next: Some(next),
            ..Default::default()
        };
        let mut launch = kernel.launch(&operands).unwrap();
        launch.grid[0] = launch.grid[0].min(3);
        device.run(&kernel.source().unwrap(), &launch);
        let logits = device.memory.read(operands.out);
        let best = logits
            .chunks(rows)
            .map(|row| (0..rows).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32);
        assert_eq!(device.memory.get(next.tokens).to_u32(), best.collect::<Vec<u32>>());
        assert_eq!(device.memory.get(next.position).to_i64(), [1]);
    }
    // A thread would meet several rows: they are for a launch of their own.
    let odd = Qmv { next: Some(Next { ring: 4 }), ..Qmv::new(301, 256, AFFINE, 3) };
    let error = odd.source().unwrap_err().to_string();
    assert!(error.contains("rows of a head is 3"), "{error}");
}

#[test]
fn real_shapes_compile_for_sm_90_without_spills() {
    let Some(nvrtc) = nvrtc() else { return };
    let norm = Some(Norm { eps: 1e-5, weight: true });
    let eight = Format::Affine { bits: 8, group: 64, scales: Float::Bf16 };
    for (s, format) in [
        (Select { bias: true, renormalise: Some(1e-20), ..select(32, 4, Scores::Sigmoid) }, eight),
        (Select { bias: true, ..select(32, 4, Scores::Sigmoid) }, AFFINE),
        (Select { renormalise: Some(0.0), ..select(128, 8, Scores::Softmax) }, eight),
        (select(512, 10, Scores::Softmax), Format::Dense(Float::Bf16)),
        (
            Select {
                groups: Some(Groups { count: 8, keep: 4 }),
                bias: true,
                ..select(256, 8, Scores::Sigmoid)
            },
            Format::Dense(Float::F32),
        ),
    ] {
        let kernel = Router { norm, ..Router::new(s, 2048, format, 1) };
        let what = format!("router {} of {} {format:?} {:?}", s.k, s.experts, kernel.plan);
        compile(&nvrtc, &what, &kernel.source().unwrap());
    }
    let conv = ShortConv { norm, ..ShortConv::new(2048, 2048, AFFINE, [1, 1], 3) };
    compile(&nvrtc, &format!("short_conv {:?}", conv.plan), &conv.source().unwrap());
    let head = Qmv { norm, next: Some(Next { ring: 64 }), ..Qmv::new(65536, 2048, AFFINE, 1) };
    compile(&nvrtc, "head", &head.source().unwrap());
    let argmax = Argmax { width: 151936, tokens: 1, next: Next { ring: 64 } };
    compile(&nvrtc, "argmax", &argmax.source().unwrap());
    let embed = Embed { rows: 65536, columns: 2048, format: AFFINE, tokens: 1, scale: 1.0, rounded: false };
    compile(&nvrtc, "embed", &embed.source().unwrap());
    for op in [PlainOp::RmsNorm(Norm { eps: 1e-5, weight: true }), PlainOp::Softmax, PlainOp::Add] {
        compile(&nvrtc, &format!("{op:?}"), &Plain { op, rows: 1, width: 2048 }.source().unwrap());
    }
}
