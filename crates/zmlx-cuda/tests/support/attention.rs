//! What attention is made of, in double precision, and its caches.

use half::{bf16, f16};
use zmlx_cuda::kernels::{Angles, Float};

use super::{Device, Memory, floats};

/// Cosines, then sines of each position.
pub fn table(half: usize, positions: usize) -> Vec<f32> {
    (0..positions)
        .flat_map(|p| {
            let angle = move |i: usize| p as f64 / 10000f64.powf(i as f64 / half as f64);
            (0..half).map(move |i| angle(i).cos() as f32).chain((0..half).map(move |i| angle(i).sin() as f32))
        })
        .collect()
}

/// Rotary embedding by a table's angles.
pub fn turned(angles: Angles, mut y: Vec<f64>, table: &[f32], position: usize) -> Vec<f64> {
    let Angles { half, traditional, magnitude } = angles;
    for i in 0..half {
        let (a, b) = if traditional { (2 * i, 2 * i + 1) } else { (i, i + half) };
        let at = |i: usize| f64::from(table[2 * half * position + i]);
        let (c, s) = (at(i), at(half + i));
        let (u, v) = (y[a] * f64::from(magnitude), y[b] * f64::from(magnitude));
        (y[a], y[b]) = (u * c - v * s, u * s + v * c);
    }
    y
}

/// `exp(x) / sum(exp(x))`
pub fn softmax(x: &[f64]) -> Vec<f64> {
    let most = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - most).exp()).collect();
    let total: f64 = e.iter().sum();
    e.into_iter().map(|e| e / total).collect()
}

/// A value as a cache keeps it.
pub fn kept(cache: Float, v: f64) -> f64 {
    match cache {
        Float::F32 => f64::from(v as f32),
        Float::F16 => f16::from_f32(v as f32).to_f64(),
        Float::Bf16 => bf16::from_f32(v as f32).to_f64(),
    }
}

/// A cache that holds random values, and those.
pub fn filled(memory: &mut Memory, rng: &mut fastrand::Rng, cache: Float, values: usize) -> (u64, Vec<f64>) {
    let values: Vec<f64> = floats(rng, values).iter().map(|v| kept(cache, f64::from(*v))).collect();
    let narrow: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    (memory.floats(cache, &narrow), values)
}

/// What a cache holds.
pub fn cached(cache: Float, device: &Device, address: u64) -> Vec<f32> {
    let data = &device.memory.get(address).data;
    let bits = || data.chunks_exact(2).map(|c| u16::from_ne_bytes([c[0], c[1]]));
    match cache {
        Float::F32 => device.memory.read(address),
        Float::F16 => bits().map(|b| f16::from_bits(b).to_f32()).collect(),
        Float::Bf16 => bits().map(|b| bf16::from_bits(b).to_f32()).collect(),
    }
}
