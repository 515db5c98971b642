//! Products of one row of activations with a matrix larger than the caches, against the read bandwidth of the same
//! memory, interleaved. `cargo bench -p zmlx-engine --bench product`
use std::time::Instant;

use zmlx_engine::matrix::{Activations, Coding, Data, Matrix, ScaleFormat, Scratch, Tokens};
use zmlx_engine::memory::Huge;

fn fill(bytes: &mut [u8], mut seed: u64) {
    for chunk in bytes.chunks_exact_mut(8) {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        chunk.copy_from_slice(&(seed >> 3 ^ seed).to_le_bytes());
    }
}

fn matrix(rows: usize, columns: usize, bits: u32, group: usize) -> Matrix {
    let mut codes = Huge::new(rows * columns * bits as usize / 8).unwrap();
    fill(codes.bytes_mut(), 7);
    let part = |value: u16| -> Vec<u8> { value.to_le_bytes().repeat(rows * columns / group) };
    let (scales, biases) = (part(0x3c00), part(0xbd80));
    let data = Data::Quantized {
        codes: &*codes.bytes_mut(),
        scales: scales.as_slice(),
        biases: Some(biases.as_slice()),
        coding: Coding::Affine(bits),
        scale: ScaleFormat::Bf16,
        group,
    };
    Matrix::copied(&data, 1, rows, columns, false).unwrap()
}

fn median(mut v: Vec<f64>) -> f64 {
    v.sort_by(f64::total_cmp);
    v[v.len() / 2]
}

fn main() {
    let only = std::env::args().nth(2);
    let wanted = |name: &str| only.as_deref().is_none_or(|o| o == name);
    let read = Huge::new(512 << 20).unwrap().share();
    for (bits, group) in [(4, 64), (4, 32), (4, 128), (8, 64)]
        .into_iter()
        .filter(|(b, g)| wanted("memory") || wanted(&format!("memory{b}-{g}")))
    {
        let (rows, columns) = (if bits == 4 { 480_000 } else { 240_000 }, 2048);
        let m = matrix(rows, columns, bits, group);
        let x: Vec<f32> = (0..columns).map(|i| (i as f32 * 1.7).sin()).collect();
        let mut acts = Activations::default();
        acts.reserve(m.layout(), 1, columns);
        acts.set(m.layout(), 0, &x);
        for threads in [1, 2] {
            let (mut ours, mut bound) = (Vec::new(), Vec::new());
            for _ in 0..7 {
                let start = Instant::now();
                let next = std::sync::atomic::AtomicUsize::new(0);
                std::thread::scope(|s| {
                    for _ in 0..threads {
                        s.spawn(|| {
                            let (mut scratch, mut out) = (Scratch::default(), vec![0.0; 64]);
                            loop {
                                let i = next.fetch_add(64, std::sync::atomic::Ordering::Relaxed);
                                if i >= rows {
                                    break;
                                }
                                m.product(
                                    0,
                                    i..(i + 64).min(rows),
                                    acts.rows(m.layout(), columns),
                                    Tokens::Run(0, 1),
                                    &mut out,
                                    64,
                                    &mut scratch,
                                );
                            }
                            std::hint::black_box(out);
                        });
                    }
                });
                ours.push((rows * m.row_bytes()) as f64 / start.elapsed().as_secs_f64() / 1e9);
                let start = Instant::now();
                std::thread::scope(|s| {
                    for part in read.chunks(read.len() / threads) {
                        s.spawn(move || {
                            let mut sums = [0u64; 32];
                            for c in part.chunks_exact(256) {
                                for (s, b) in sums.iter_mut().zip(c.chunks_exact(8)) {
                                    *s = s.wrapping_add(u64::from_le_bytes(b.try_into().unwrap()));
                                }
                            }
                            std::hint::black_box(sums);
                        });
                    }
                });
                bound.push(read.len() as f64 / start.elapsed().as_secs_f64() / 1e9);
            }
            let (ours, bound) = (median(ours), median(bound));
            println!(
                "{bits}-bit g{group} threads {threads}: {ours:5.1} GB/s, read {bound:5.1} GB/s, {:.2}",
                ours / bound
            );
        }
    }
    // In the second-level cache: what the kernels themselves take.
    for (bits, group) in [(4, 64), (4, 32), (8, 64)].into_iter().filter(|_| wanted("cache")) {
        let (rows, columns) = (128, 2048);
        let m = matrix(rows, columns, bits, group);
        let mut acts = Activations::default();
        acts.reserve(m.layout(), 1, columns);
        acts.set(m.layout(), 0, &vec![0.5; columns]);
        let (mut scratch, mut out) = (Scratch::default(), vec![0.0; 64]);
        let mut rate = Vec::new();
        for _ in 0..9 {
            let start = Instant::now();
            for _ in 0..200 {
                for i in (0..rows).step_by(64) {
                    m.product(
                        0,
                        i..i + 64,
                        acts.rows(m.layout(), columns),
                        Tokens::Run(0, 1),
                        &mut out,
                        64,
                        &mut scratch,
                    );
                }
            }
            rate.push((200 * rows * m.row_bytes()) as f64 / start.elapsed().as_secs_f64() / 1e9);
        }
        println!("{bits}-bit g{group} from the cache: {:.1} GB/s", median(rate));
    }
    // Many tokens: integer operations a second.
    let many = [(4, 64, 16), (4, 64, 64), (4, 32, 64), (8, 64, 64)];
    for (bits, group, tokens) in many.into_iter().filter(|_| wanted("tokens")) {
        let (rows, columns) = (2048, 2048);
        let m = matrix(rows, columns, bits, group);
        let mut acts = Activations::default();
        acts.reserve(m.layout(), tokens, columns);
        for t in 0..tokens {
            let x: Vec<f32> = (0..columns).map(|i| ((i + t) as f32 * 1.7).sin()).collect();
            acts.set(m.layout(), t, &x);
        }
        for threads in [1, 2] {
            let mut rate = Vec::new();
            for _ in 0..7 {
                let start = Instant::now();
                let next = std::sync::atomic::AtomicUsize::new(0);
                std::thread::scope(|s| {
                    for _ in 0..threads {
                        s.spawn(|| {
                            let (mut scratch, mut out) = (Scratch::default(), vec![0.0; 16 * tokens]);
                            loop {
                                let i = next.fetch_add(16, std::sync::atomic::Ordering::Relaxed);
                                if i >= rows {
                                    break;
                                }
                                m.product(
                                    0,
                                    i..i + 16,
                                    acts.rows(m.layout(), columns),
                                    Tokens::Run(0, tokens),
                                    &mut out,
                                    16,
                                    &mut scratch,
                                );
                            }
                            std::hint::black_box(out);
                        });
                    }
                });
                rate.push((2 * rows * columns * tokens) as f64 / start.elapsed().as_secs_f64() / 1e9);
            }
            println!("{bits}-bit g{group} {tokens} tokens, threads {threads}: {:.0} GOP/s", median(rate));
        }
    }
}
