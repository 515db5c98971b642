//! Products of many rows with their experts' matrices give what they give in double precision.

mod support;

use half::{bf16, f16};
use support::{Device, close, compile, dot, floats, matrix, nvrtc};
use zmlx_cuda::kernels::{
    CombineRows, CombineRowsOperands, Float, Format, Grouped, GroupedOperands, KernelError, SortRows,
    SortRowsOperands, Tile, Type,
};
use zmlx_emulator::{Dtype, KernelText};

const fn affine(bits: u32, group: usize, scales: Float) -> Format {
    Format::Affine { bits, group, scales }
}

const TILE: Tile = Tile { out_warps: 1, token_warps: 1, tokens: 32, stages: 3 };

fn rounded(float: Float, v: f64) -> f64 {
    match float {
        Float::F16 => f16::from_f64(v).to_f64(),
        _ => bf16::from_f64(v).to_f64(),
    }
}

/// Floats of 16 bits in memory.
fn narrow_floats(device: &Device, address: u64, float: Float) -> Vec<f32> {
    let bits = device.memory.get(address).data.chunks_exact(2).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    bits.map(|b| if float == Float::F16 { f16::from_bits(b).to_f32() } else { bf16::from_bits(b).to_f32() })
        .collect()
}

/// Runs experts with so many rows each.
fn run(format: Format, outputs: usize, columns: usize, tile: Tile, counts: &[usize]) {
    let Format::Affine { scales: float, .. } = format else { unreachable!("all cases are affine") };
    let what = format!("{format:?}, {outputs}x{columns}, {tile:?}, {counts:?}");
    let mut rng = fastrand::Rng::with_seed(7);
    let mut device = Device::default();
    let experts: Vec<u32> = counts.iter().enumerate().flat_map(|(e, n)| vec![e as u32; *n]).collect();
    let rows = experts.len();
    let w = matrix(&mut device.memory, &mut rng, format, counts.len() * outputs, columns);
    let x: Vec<f32> =
        floats(&mut rng, rows * columns).iter().map(|v| rounded(float, f64::from(*v)) as f32).collect();
    let kernel = Grouped { experts: counts.len(), outputs, columns, format, tile };
    let operands = GroupedOperands {
        x: device.memory.floats(float, &x),
        experts: device.memory.bytes(Type::U32, experts.iter().flat_map(|e| e.to_ne_bytes()).collect()),
        weights: w.weights,
        out: device.memory.fresh(Type::U16, rows * outputs),
        rows,
    };
    device.run(&kernel.source().unwrap(), &kernel.launch(&operands).unwrap());
    // The codes' values in 16 bits are the matrix; only sums and the result are rounded beside it.
    let values: Vec<f64> = w.values.iter().map(|v| rounded(float, *v)).collect();
    let want: Vec<f64> = (0..rows * outputs)
        .map(|i| {
            let row = i / outputs;
            let x: Vec<f64> = x[row * columns..][..columns].iter().map(|v| f64::from(*v)).collect();
            dot(&values, experts[row] as usize * outputs + i % outputs, &x)
        })
        .collect();
    let got = narrow_floats(&device, operands.out, float);
    // Half a unit in the last place of the result is 2^-9 and 2^-12 at most; about half of that on average.
    close(&what, &got, &want, if float == Float::F16 { 3e-4 } else { 2.2e-3 });
}

#[test]
fn ragged_experts_of_every_format() {
    let bf16 = Float::Bf16;
    for (format, outputs, columns, tile, counts) in [
        (affine(4, 64, bf16), 32, 192, TILE, &[0, 5, 40, 1, 0][..]),
        (affine(4, 32, bf16), 64, 128, Tile { out_warps: 2, ..TILE }, &[33, 0, 1]),
        (affine(4, 128, bf16), 32, 256, Tile { stages: 2, ..TILE }, &[7]),
        (affine(4, 64, Float::F16), 32, 64, TILE, &[3, 0, 0, 9]),
        (affine(8, 64, bf16), 32, 128, TILE, &[2, 35]),
        (affine(8, 32, Float::F16), 32, 64, TILE, &[0, 4]),
        // Outputs that fill no tile, and warps without rows.
        (
            affine(4, 64, bf16),
            96,
            64,
            Tile { out_warps: 2, token_warps: 2, tokens: 32, stages: 4 },
            &[70, 12],
        ),
        (affine(4, 64, bf16), 32, 128, Tile { tokens: 128, ..TILE }, &[1, 100, 129]),
    ] {
        run(format, outputs, columns, tile, counts);
    }
}

/// More experts than a warp has lanes, most of them without rows.
#[test]
fn many_experts() {
    let mut counts = [0; 70];
    (counts[0], counts[31], counts[32], counts[69]) = (1, 2, 34, 3);
    run(affine(4, 64, Float::Bf16), 32, 64, TILE, &counts);
}

#[test]
fn rows_are_sorted_by_expert() {
    let mut rng = fastrand::Rng::with_seed(11);
    for (experts, choices, tokens) in [(5, 2, 700), (3, 1, 1), (40, 8, 9)] {
        let rows = choices * tokens;
        // The first and the last expert have none where there are more than three.
        let chosen: Vec<u32> = (0..rows)
            .map(|_| if experts > 3 { rng.u32(1..experts as u32 - 1) } else { rng.u32(0..experts as u32) })
            .collect();
        let mut device = Device::default();
        let mut fresh = || device.memory.fresh(Type::U32, rows);
        let (sorted_tokens, sorted_experts, places) = (fresh(), fresh(), fresh());
        let operands = SortRowsOperands {
            chosen: device.memory.bytes(Type::U32, chosen.iter().flat_map(|e| e.to_ne_bytes()).collect()),
            tokens: sorted_tokens,
            experts: sorted_experts,
            places,
            rows,
        };
        let kernel = SortRows { experts, choices };
        let source = kernel.source().unwrap();
        device.run(&source, &kernel.launch(&operands).unwrap());
        let read = |address: u64| -> Vec<u32> {
            let bytes = &device.memory.get(address).data;
            bytes.chunks_exact(4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        let mut order: Vec<usize> = (0..rows).collect();
        order.sort_by_key(|&i| chosen[i]);
        let mut want_places = vec![0; rows];
        for (row, &i) in order.iter().enumerate() {
            want_places[i] = row as u32;
        }
        assert_eq!(read(places), want_places);
        assert_eq!(read(sorted_experts), order.iter().map(|&i| chosen[i]).collect::<Vec<_>>());
        assert_eq!(read(sorted_tokens), order.iter().map(|&i| (i / choices) as u32).collect::<Vec<_>>());
        if let Some(nvrtc) = nvrtc() {
            compile(&nvrtc, &format!("{kernel:?}"), &source);
        }
    }
    assert!(SortRows { experts: 0, choices: 1 }.source().is_err());
}

#[test]
fn rows_are_weighted_and_added() {
    for (choices, columns, rows, wide_scores, wide_out) in [
        (4, 264, Float::Bf16, true, true),
        (8, 2048, Float::Bf16, false, false),
        (1, 8, Float::F16, false, true),
        (3, 4000, Float::F16, true, false),
    ] {
        let kernel = CombineRows { choices, columns, rows, wide_scores, wide_out };
        let tokens = 5;
        let mut rng = fastrand::Rng::with_seed(3);
        let mut device = Device::default();
        let n = tokens * choices;
        let round = |v: &f32| rounded(rows, f64::from(*v)) as f32;
        let given: Vec<f32> = floats(&mut rng, n * columns).iter().map(round).collect();
        let mut scores = floats(&mut rng, n);
        if !wide_scores {
            scores = scores.iter().map(round).collect();
        }
        let mut order: Vec<u32> = (0..n as u32).collect();
        rng.shuffle(&mut order);
        let operands = CombineRowsOperands {
            rows: device.memory.floats(rows, &given),
            order: device.memory.bytes(Type::U32, order.iter().flat_map(|o| o.to_ne_bytes()).collect()),
            scores: device.memory.floats(if wide_scores { Float::F32 } else { rows }, &scores),
            out: device.memory.fresh(if wide_out { Type::F32 } else { Type::U16 }, tokens * columns),
            tokens,
        };
        device.run(&kernel.source().unwrap(), &kernel.launch(&operands).unwrap());
        let term = |t: usize, c: usize, column: usize| {
            let i = t * choices + c;
            f64::from(scores[i]) * f64::from(given[order[i] as usize * columns + column])
        };
        let want: Vec<f64> = (0..tokens * columns)
            .map(|i| (0..choices).map(|c| term(i / columns, c, i % columns)).sum())
            .collect();
        let got = if wide_out {
            device.memory.read(operands.out)
        } else {
            narrow_floats(&device, operands.out, rows)
        };
        let most = if wide_out { 1e-6 } else { 2.2e-3 };
        close(&format!("{kernel:?}"), &got, &want, most);
        if let Some(nvrtc) = nvrtc() {
            compile(&nvrtc, &format!("{kernel:?}"), &kernel.source().unwrap());
        }
    }
    let kernel =
        CombineRows { choices: 2, columns: 12, rows: Float::Bf16, wide_scores: true, wide_out: true };
    assert!(matches!(kernel.source(), Err(KernelError::Size { what: "columns", .. })));
}

/// The shapes of LFM2-8B-A1B and Qwen3-30B-A3B, in their plans.
fn published() -> Vec<Grouped> {
    let format = affine(4, 64, Float::Bf16);
    let shapes = [(32, 1792, 2048), (32, 2048, 1792), (128, 768, 2048), (128, 2048, 768)];
    let tiles = [256, 32].map(Tile::new);
    let wide = Tile { out_warps: 8, token_warps: 1, tokens: 128, stages: 4 };
    let shared = Tile { out_warps: 4, token_warps: 2, tokens: 64, stages: 4 };
    let all = tiles.into_iter().chain([wide, shared]);
    all.flat_map(|tile| {
        shapes.map(|(experts, outputs, columns)| Grouped { experts, outputs, columns, format, tile })
    })
    .collect()
}

#[test]
fn compiles_for_sm_90() {
    let Some(nvrtc) = nvrtc() else { return };
    for kernel in published().into_iter().filter(|k| k.experts == 32) {
        let what = format!("{}x{}, {:?}", kernel.outputs, kernel.columns, kernel.tile);
        compile(&nvrtc, &what, &kernel.source().unwrap());
    }
    let format = affine(8, 32, Float::F16);
    compile(&nvrtc, "8 bits", &Grouped { format, ..published()[0] }.source().unwrap());
}

/// The signature that MLX writes: floats have types of their own, and the number of rows comes from a shape.
#[test]
fn compiles_as_mlx_wraps_it() {
    let Some(nvrtc) = nvrtc() else { return };
    let source = published()[0].source().unwrap();
    let body = format!("const int rows = experts_shape[0];\n{}", source.body);
    let kernel = KernelText::new(source.name, &body)
        .header(&source.device)
        .input("x", Dtype::Bf16, 2)
        .input("experts", Dtype::U32, 1)
        .input("codes", Dtype::U32, 3)
        .input("scales", Dtype::Bf16, 3)
        .input("biases", Dtype::Bf16, 3)
        .output("out", Dtype::Bf16);
    nvrtc.compile(&kernel, "sm_90a").unwrap();
}

#[test]
fn sizes_it_is_not_made_for() {
    let good =
        Grouped { experts: 2, outputs: 32, columns: 128, format: affine(4, 64, Float::Bf16), tile: TILE };
    assert!(good.source().is_ok());
    let refused = |kernel: Grouped, named: &str| match kernel.source() {
        Err(KernelError::Size { what, .. }) => assert_eq!(what, named, "{kernel:?}"),
        other => panic!("{kernel:?}: {other:?}"),
    };
    refused(Grouped { columns: 96, ..good }, "columns");
    refused(Grouped { outputs: 40, ..good }, "outputs");
    refused(Grouped { experts: 0, ..good }, "experts");
    refused(Grouped { format: affine(4, 64, Float::F32), ..good }, "bits of a code");
    refused(Grouped { format: Format::Mxfp4, ..good }, "scales with biases");
    refused(Grouped { tile: Tile { tokens: 48, ..TILE }, ..good }, "rows of a warp");
    refused(Grouped { tile: Tile { stages: 1, ..TILE }, ..good }, "stages");
    let most = Tile { out_warps: 2, token_warps: 2, tokens: 128, stages: 8 };
    assert!(matches!(Grouped { tile: most, ..good }.shared(), Err(KernelError::Shared { .. })));
    let operands = GroupedOperands { x: 8, rows: 1, ..GroupedOperands::default() };
    assert!(matches!(good.launch(&operands), Err(KernelError::Misaligned { .. })));
    assert!(matches!(good.launch(&GroupedOperands::default()), Err(KernelError::Size { .. })));
}
