//! The gated delta net against its formulas in double precision.

mod support;

use support::{Device, close, compile, floats, nvrtc, rms_norm, wide};
use zmlx_cuda::kernels::{ConvSilu, ConvSiluOperands, Delta, DeltaOperands, Norm, Type};

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

#[test]
fn convolution_of_scattered_channels() {
    let mut rng = fastrand::Rng::with_seed(20);
    let mut device = Device::default();
    for (channels, taps, sequences, length, bias) in [(70, 4, 1, 1, false), (33, 3, 2, 5, true)] {
        let (x_width, keep) = (channels + 7, taps - 1);
        let x = floats(&mut rng, sequences * length * x_width);
        let mut columns: Vec<i32> = (0..x_width as i32).collect();
        rng.shuffle(&mut columns);
        columns.truncate(channels);
        let kernel = floats(&mut rng, taps * channels);
        let [b, state] = [channels, sequences * keep * channels].map(|n| floats(&mut rng, n));
        let m = &mut device.memory;
        let conv = ConvSilu { channels, taps, x_width, sequences, length, bias };
        let operands = ConvSiluOperands {
            x: m.f32(&x),
            columns: m.i32(&columns),
            kernel: m.f32(&kernel),
            bias: bias.then(|| m.f32(&b)),
            state: m.f32(&state),
            out: m.fresh(Type::F32, sequences * length * channels),
        };
        device.run(&conv.source().unwrap(), &conv.launch(&operands).unwrap());
        let (mut want, mut kept) = (vec![0.0; sequences * length * channels], vec![0.0; state.len()]);
        for s in 0..sequences {
            for c in 0..channels {
                let old = (0..keep).map(|k| f64::from(state[(s * keep + k) * channels + c]));
                let new =
                    (s * length..(s + 1) * length).map(|t| f64::from(x[t * x_width + columns[c] as usize]));
                let inputs: Vec<f64> = old.chain(new).collect();
                for t in 0..length {
                    let sum: f64 =
                        (0..taps).map(|k| f64::from(kernel[k * channels + c]) * inputs[t + k]).sum();
                    want[(s * length + t) * channels + c] =
                        silu(sum + if bias { f64::from(b[c]) } else { 0.0 });
                }
                (0..keep).for_each(|k| kept[(s * keep + k) * channels + c] = inputs[length + k]);
            }
        }
        close("convolution", &device.memory.read(operands.out), &want, 1e-5);
        close("its state", &device.memory.read(operands.state), &kept, 0.0);
    }
}

#[test]
fn states_of_two_sequences_go_on() {
    let mut rng = fastrand::Rng::with_seed(21);
    let mut device = Device::default();
    let shape = Delta {
        key_heads: 2,
        heads: 4,
        key: 40,
        value: 36,
        units: [[0.2, 1e-6], [1.1, 1e-5]],
        widths: [9, 11, 4 * 36 + 5],
        norm: Norm { eps: 1e-6, weight: true },
        sequences: 2,
        length: 3,
    };
    let Delta { key_heads, heads, key, value, .. } = shape;
    let (tokens, width) = (6, 2 * key_heads * key + heads * value);
    let mixed = floats(&mut rng, tokens * width);
    let rows = shape.widths.map(|w| floats(&mut rng, tokens * w));
    let places: Vec<i32> =
        [3, 1, 7, 5, 0, 9, 2, 4].into_iter().chain((0..4).map(|h| 36 * (3 - h) + 2)).collect();
    let small = |v: Vec<f32>| v.iter().map(|v| 0.3 * v).collect::<Vec<f32>>();
    let [a_log, dt_bias, weight] = [heads, heads, value].map(|n| small(floats(&mut rng, n)));
    let state = floats(&mut rng, 2 * heads * value * key);
    let m = &mut device.memory;
    let operands = DeltaOperands {
        mixed: m.f32(&mixed),
        a: m.f32(&rows[0]),
        b: m.f32(&rows[1]),
        z: m.f32(&rows[2]),
        places: m.i32(&places),
        a_log: m.f32(&a_log),
        dt_bias: m.f32(&dt_bias),
        norm: Some(m.f32(&weight)),
        state: m.f32(&state),
        out: m.fresh(Type::F32, tokens * heads * value),
    };
    for (source, launch) in shape.sources().unwrap().iter().zip(shape.launches(&operands).unwrap()) {
        device.run(source, &launch);
    }
    let mut s = wide(&state);
    let mut want = Vec::new();
    for t in 0..tokens {
        let row = &mixed[t * width..][..width];
        for h in 0..heads {
            let at = h / (heads / key_heads) * key;
            let unit = |part: usize| {
                let [scale, eps] = shape.units[part];
                let x = rms_norm(&row[part * key_heads * key + at..][..key], None, eps);
                x.iter().map(|v| v * f64::from(scale)).collect::<Vec<f64>>()
            };
            let (q, k) = (unit(0), unit(1));
            let place = |i: usize| t * shape.widths[i] + places[i * heads + h] as usize;
            let x = f64::from(rows[0][place(0)]) + f64::from(dt_bias[h]);
            let beta = 1.0 / (1.0 + (-f64::from(rows[1][place(1)])).exp());
            let g = (-f64::from(a_log[h]).exp() * x.exp().ln_1p()).exp();
            let mut y = Vec::new();
            for r in 0..value {
                let v = f64::from(row[2 * key_heads * key + h * value + r]);
                let base = ((t / shape.length * heads + h) * value + r) * key;
                let held = &mut s[base..base + key];
                let product: f64 = held.iter().zip(&k).map(|(s, k)| s * k).sum();
                let change = (v - g * product) * beta;
                held.iter_mut().zip(&k).for_each(|(s, k)| *s = g * *s + change * k);
                y.push(held.iter().zip(&q).map(|(s, q)| s * q).sum::<f64>());
            }
            let inverse = 1.0 / (y.iter().map(|v| v * v).sum::<f64>() / value as f64 + 1e-6).sqrt();
            let z = &rows[2][place(2)..][..value];
            want.extend((0..value).map(|i| y[i] * inverse * f64::from(weight[i]) * silu(f64::from(z[i]))));
        }
    }
    close("result", &device.memory.read(operands.out), &want, 1e-5);
    close("states", &device.memory.read(operands.state), &s, 1e-5);
}

#[test]
fn real_shapes_compile_for_sm_90_without_spills() {
    let Some(nvrtc) = nvrtc() else { return };
    let conv = ConvSilu { channels: 8192, taps: 4, x_width: 12288, sequences: 1, length: 1, bias: false };
    compile(&nvrtc, "convolution", &conv.source().unwrap());
    let shape = Delta {
        key_heads: 16,
        heads: 32,
        key: 128,
        value: 128,
        units: [[0.0078125, 1e-6], [0.088388346, 1e-6]],
        widths: [32, 32, 12288],
        norm: Norm { eps: 1e-6, weight: true },
        sequences: 1,
        length: 1,
    };
    for source in shape.sources().unwrap() {
        compile(&nvrtc, source.name, &source);
    }
}
