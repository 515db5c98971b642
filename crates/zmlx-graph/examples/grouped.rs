//! Times products of sorted rows with 4-bit experts on an NVIDIA GPU, at shapes of LFM2-8B-A1B and Qwen3-30B-A3B: MLX's
//! `gather_qmm`, its `dequantize` and `gather_mm`, and the kernel that takes packed codes to tensor cores, in several tiles.
//! Less than a minute, most of it compiling:
//!
//! `cargo run --release -p zmlx-graph --example grouped [-- part of a shape's name]`
//!
//! Each line: the shape and its rows, the way, microseconds a product (the median of five times ten on three matrices in
//! turn), trillions of operations a second, and how far the result is from that of unpacked matrices.

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use zmlx_graph::cuda::{Tile, grouped_linear};
use zmlx_graph::weights::{BoundWeight, Quantization};
use zmlx_mlx::stream::{Device, Stream, with_stream};
use zmlx_mlx::{Array, Dtype, eval, ops, random};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Name, experts, outputs, columns, and numbers of rows.
const SHAPES: [(&str, i32, i32, i32, [i32; 3]); 5] = [
    ("lfm2 up", 32, 1792, 2048, [8192, 512, 128]),
    ("lfm2 down", 32, 2048, 1792, [8192, 512, 128]),
    ("qwen3 up", 128, 768, 2048, [16384, 2048, 512]),
    ("qwen3 down", 128, 2048, 768, [16384, 2048, 512]),
    // Blocks and rows that are not full, for compute-sanitizer.
    ("small", 4, 160, 256, [600, 96, 40]),
];
const TILES: [Tile; 4] = [
    Tile { out_warps: 4, token_warps: 1, tokens: 128, stages: 4 },
    Tile { out_warps: 8, token_warps: 1, tokens: 128, stages: 4 },
    Tile { out_warps: 4, token_warps: 2, tokens: 64, stages: 4 },
    Tile { out_warps: 4, token_warps: 1, tokens: 64, stages: 4 },
];
const REPEATS: usize = 10;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let wanted = std::env::args().nth(1).unwrap_or_default();
    with_stream(Stream::default_of(Device::Gpu)?, || {
        println!("{:<12} {:>6} {:<34} {:>9} {:>8} {:>9}", "shape", "rows", "way", "us", "TFLOP/s", "apart");
        let mut key = random::key(1)?;
        for (name, experts, outputs, columns, rows) in SHAPES.into_iter().filter(|s| s.0.contains(&wanted)) {
            let weights = [(); 3].map(|()| weight(&[experts, outputs, columns], &mut key));
            let weights = weights.into_iter().collect::<Result<Vec<_>>>()?;
            for (which, rows) in rows.into_iter().enumerate() {
                let x = random::normal(&[rows, 1, columns], Dtype::Float32, None, None, &next(&mut key)?)?;
                let x = x.astype(Dtype::Bfloat16)?;
                let chosen = random::bits(&[rows], 4, &next(&mut key)?)?;
                let chosen =
                    chosen.remainder(&Array::scalar_as(f64::from(experts), Dtype::Uint32)?)?.sort(0)?;
                eval(&[&x, &chosen])?;
                let work = 2.0 * f64::from(rows) * f64::from(outputs) * f64::from(columns);
                let reference = weights[0].gather_linear_unpacked(&x, &chosen)?;
                let line = |way: &str, product: &dyn Fn(&BoundWeight) -> Result<Array>| -> Result<()> {
                    let apart = apart(&product(&weights[0])?, &reference)?;
                    let seconds = seconds(&weights, product)?;
                    let (us, rate) = (seconds * 1e6, work / seconds / 1e12);
                    println!("{name:<12} {rows:>6} {way:<34} {us:>9.1} {rate:>8.1} {apart:>9.2e}");
                    Ok(())
                };
                if which > 0 {
                    line("gather_qmm", &|w| Ok(w.gather_linear(&x, &chosen, true)?))?;
                }
                line("unpacked, gather_mm", &|w| Ok(w.gather_linear_unpacked(&x, &chosen)?))?;
                for tile in TILES.into_iter().filter(|t| which == 0 || t.rows() == 64) {
                    let Tile { out_warps, token_warps, tokens, stages } = tile;
                    let way = format!("packed, {out_warps}x{token_warps} warps of {tokens}, {stages} stages");
                    line(&way, &|w| {
                        let product = grouped_linear(w, &x, &chosen, Some(tile))?;
                        Ok(product.ok_or("no kernel for this shape")?)
                    })?;
                }
            }
        }
        Ok(())
    })
}

fn next(key: &mut Array) -> Result<Array> {
    let (own, rest) = random::split(key)?;
    *key = rest;
    Ok(own)
}

/// Random codes, and scales and biases that differ from group to group.
fn weight(shape: &[i32; 3], key: &mut Array) -> Result<BoundWeight> {
    let &[experts, outputs, columns] = shape;
    let quantization = Quantization { group_size: 64, bits: 4, mode: "affine".to_owned() };
    let packed = random::bits(&[experts, outputs, columns / 8], 4, &next(key)?)?;
    let scales = random::normal(&[experts, outputs, columns / 64], Dtype::Float32, None, None, &next(key)?)?;
    let scales = scales.multiply_scalar(0.001)?.add_scalar(0.004)?;
    let biases = scales.multiply_scalar(-7.5)?.astype(Dtype::Bfloat16)?;
    let scales = scales.astype(Dtype::Bfloat16)?;
    eval(&[&packed, &scales, &biases])?;
    Ok(BoundWeight::Quantized { packed, scales, biases: Some(biases), quantization })
}

/// `||a - b|| / ||b||`.
fn apart(a: &Array, b: &Array) -> Result<f64> {
    let wide = |v: &Array| v.astype(Dtype::Float32);
    let norm =
        |v: &Array| -> Result<f64> { Ok(f64::from(ops::sum_all(&v.square()?)?.item::<f32>()?).sqrt()) };
    let (a, b) = (wide(a)?, wide(b)?);
    Ok(norm(&a.subtract(&b)?)? / norm(&b)?)
}

/// The median time of a product.
fn seconds(weights: &[BoundWeight], product: &dyn Fn(&BoundWeight) -> Result<Array>) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        let made = (0..REPEATS).map(|i| product(&weights[i % weights.len()])).collect::<Result<Vec<_>>>()?;
        eval(&made.iter().collect::<Vec<_>>())?;
        times.push(start.elapsed().as_secs_f64() / REPEATS as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
