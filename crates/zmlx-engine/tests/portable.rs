//! The portable path's results beside those of this machine's own.

mod support;

use half::bf16;
use zmlx_engine::matrix::{Coding, Data, Float, Matrix, ScaleFormat};
use zmlx_engine::program::{Buffer, Call, Program, Runner, Slot, Wanted};
use zmlx_engine::stages::{
    Add, Attend, LayerNorm, Linear, Norm, RmsNorm, Route, Scores, ShortConv, Softmax, Source, Ties,
};

fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 29 ^ state) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// A matrix `[rows, columns]` in one of the ways in which matrices are stored.
fn matrix(kind: usize, rows: usize, columns: usize) -> Matrix {
    let seed = kind as u64 + 1;
    let bytes = |floats: Vec<f32>| -> Vec<u8> {
        floats.into_iter().flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect()
    };
    if kind == 0 {
        let elements = bytes(noise(seed, rows * columns));
        let data = Data::Dense { elements: elements.as_slice(), float: Float::Bf16 };
        return Matrix::copied(&data, 1, rows, columns, false).unwrap();
    }
    let (coding, scale, group) = [
        (Coding::Affine(4), ScaleFormat::Bf16, 64),
        (Coding::Affine(8), ScaleFormat::Bf16, 32),
        (Coding::Affine(3), ScaleFormat::Bf16, 128),
        (Coding::E2m1, ScaleFormat::E8m0, 32),
        (Coding::E4m3, ScaleFormat::E8m0, 32),
    ][kind - 1];
    let codes: Vec<u8> = noise(seed + 50, rows * columns * coding.bits() as usize / 8)
        .into_iter()
        .map(|v| (v.abs() * 119.0) as u8)
        .collect();
    let groups = rows * columns / group;
    let scales = match scale {
        ScaleFormat::E8m0 => vec![122; groups],
        _ => bytes(noise(seed + 60, groups).into_iter().map(|v| 0.02 + 0.01 * v).collect()),
    };
    let biases = bytes(noise(seed + 70, groups).into_iter().map(|v| 0.3 * v).collect());
    let biases = matches!(coding, Coding::Affine(_)).then_some(biases.as_slice());
    let data =
        Data::Quantized { codes: codes.as_slice(), scales: scales.as_slice(), biases, coding, scale, group };
    Matrix::copied(&data, 1, rows, columns, false).unwrap()
}

/// Runs a program that reads a buffer of `width` for each token of calls of these lengths; gives all that it wrote.
fn run(
    width: usize,
    out_width: usize,
    slots: &mut [Slot],
    lengths: &[usize],
    write: impl FnOnce(&mut Program, Buffer, Buffer),
) -> Vec<f32> {
    let mut program = Program::new();
    let (x, out) = (program.buffer(width), program.buffer(out_width));
    write(&mut program, x, out);
    let mut runner = Runner::new(2, program.stages().len());
    let (mut all, mut position) = (Vec::new(), 0);
    for &length in lengths {
        let tokens = vec![0; length];
        runner.fill(&program, x, length, &noise(7 + position as u64, length * width));
        let call = Call { tokens: &tokens, batch: 1, position, wanted: Wanted::All };
        runner.run(&program, slots, &call);
        all.extend_from_slice(&runner.buffer(out)[..length * out_width]);
        position += length;
    }
    all
}

/// A product with everything that a product can have.
fn product(kind: usize) -> Vec<f32> {
    let (rows, columns) = (40, 384);
    let matrix = matrix(kind, rows, columns);
    run(columns, rows, &mut [], &[1, 2, 5, 33], |program, x, out| {
        let norm = Norm { weight: Some(noise(21, columns)), eps: 1e-5 };
        let source = Source::new(x, Some(norm), &matrix);
        program.push(0, source.pack());
        let bias = Some(noise(22, rows));
        program.push(0, Linear { source, matrix, bias, gate: None, residual: None, out, wanted_only: false });
    })
}

/// Attention over a long cache, whole and cut into parts.
fn attention(half: bool, d: usize) -> Vec<f32> {
    let (heads, kv_heads, seen) = (6, 2, 600);
    let slot = Slot::kv(kv_heads, d, d);
    let mut slot = if half { slot.half() } else { slot };
    slot.reserve(1, 0, seen + 40);
    if let Slot::Kv { keys, values, .. } = &slot {
        // SAFETY: nobody else has the slot.
        unsafe {
            keys.write(0, &noise(31, keys.len()));
            values.write(0, &noise(32, values.len()));
        }
    }
    run(heads * d, heads * d, &mut [slot], &[seen, 1, 3, 20], |program, queries, out| {
        let attend = Attend { queries, heads, slot: 0, scale: 0.3, window: None, sinks: None, out };
        let merge = attend.merge(d);
        program.push(0, attend);
        program.push(0, merge);
    })
}

fn results() -> Vec<(String, Vec<f32>)> {
    let mut all: Vec<(String, Vec<f32>)> =
        (0..6).map(|kind| (format!("product {kind}"), product(kind))).collect();
    for (half, d) in [(false, 64), (true, 64), (false, 72), (true, 72), (true, 12)] {
        all.push((format!("attention, half {half}, {d}"), attention(half, d)));
    }
    let width = 100;
    let rows = |write: &dyn Fn(&mut Program, Buffer, Buffer)| run(width, width, &mut [], &[1, 19], write);
    let norm = Norm { weight: Some(noise(41, width)), eps: 1e-6 };
    let (weight, bias) = (Some(noise(42, width)), Some(noise(43, width)));
    let mut add = |name: &str, values: Vec<f32>| all.push((name.to_owned(), values));
    add("rms_norm", rows(&|p, x, out| p.push(0, RmsNorm { norm: norm.clone(), x, out, width })));
    let layer_norm =
        |x, out| LayerNorm { weight: weight.clone(), bias: bias.clone(), eps: 1e-5, x, out, width };
    add("layer_norm", rows(&|p, x, out| p.push(0, layer_norm(x, out))));
    add("softmax", rows(&|p, x, out| p.push(0, Softmax { x, out, width })));
    add("add", rows(&|p, x, out| p.push(0, Add { a: x, b: x, out, width })));
    let (channels, taps) = (16, 4);
    let conv = run(64, channels, &mut [Slot::rows(taps - 1, channels)], &[1, 1, 9, 1], |p, x, out| {
        let matrix = matrix(1, 3 * channels, 64);
        let source = Source::new(x, None, &matrix);
        p.push(0, source.pack());
        let kernel = noise(51, channels * taps);
        p.push(0, ShortConv { source, matrix, bias: None, kernel, taps, conv_bias: None, slot: 0, out });
    });
    add("short_conv", conv);
    let k = 4;
    let weights = run(32, k, &mut [], &[1, 20], |p, logits, weights| {
        let indices = p.buffer(k);
        let route = Route {
            logits,
            experts: 32,
            k,
            scores: Scores::Softmax,
            bias: None,
            ties: Ties::Higher,
            groups: None,
            renormalise: Some(0.0),
            scale: 1.0,
            indices,
            weights,
        };
        p.push(0, route);
    });
    add("router", weights);
    all
}

/// Prints the results, for the other process to read; a test only so that it can be started by name.
#[test]
fn print_results() {
    for (name, values) in results() {
        let bits: Vec<String> = values.iter().map(|v| format!("{:08x}", v.to_bits())).collect();
        println!("\nresult {name}: {}", bits.join(" "));
    }
}

#[test]
fn both_paths_agree_within_the_class_of_token_identical_ops() {
    if support::is_portable() {
        return;
    }
    let printed = support::portable(&["--exact", "print_results", "--nocapture"]);
    let mut differ = 0;
    for (name, own) in results() {
        let line = printed.lines().find_map(|l| l.strip_prefix(&format!("result {name}: ")));
        let bits = line.unwrap_or_else(|| panic!("no {name}:\n{printed}")).split(' ');
        let found: Vec<f32> =
            bits.map(|b| f32::from_bits(u32::from_str_radix(b, 16).expect("bits of a float"))).collect();
        assert_eq!(own.len(), found.len(), "{name}");
        let rms = (own.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / own.len() as f64).sqrt();
        assert!(rms.is_finite() && rms > 0.0, "{name}: {rms}");
        let errors = || own.iter().zip(&found).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs() / rms);
        let mean = (errors().map(|e| e * e).sum::<f64>() / own.len() as f64).sqrt();
        let most = errors().fold(0.0, f64::max);
        // Of one op: see the bounds of zmlx-graph's comparison of fused ops.
        assert!(mean <= 2e-4 && most <= 1e-3, "{name}: {mean:e} on average, {most:e} at most");
        differ += usize::from(most > 0.0);
    }
    assert!(differ > 5, "both ran the same code: {differ} results differ");
}
