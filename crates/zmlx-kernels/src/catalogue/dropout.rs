//! Dropout with a counter-based generator: the same seed drops the same places on every backend.

use zmlx_lang::Dtype;
use zmlx_mlx::{Array, ops};

use super::case::{Case, Input, shapes};
use super::entry::{Domain, Entry};
use super::{argument, kernel};
use crate::Result;

pub(super) fn entries() -> Vec<Entry> {
    let text = "dropout(x, p: scalar = 0.5, seed: scalar u64 = 0) = dropout(x, p, seed)";
    let formula = "u < p ? 0 : x / (1 - p), u uniform by Philox4x32-10 of the seed and the element's number";
    vec![
        Entry::text(Domain::Dropout, text, formula, cases, |a, _| {
            let scaled = a[0].divide(&ops::subtract(&Array::scalar(1.0f32)?, &a[1])?)?;
            let keep = keep_mlx(a[0].shape(), &a[1], &a[2])?;
            Ok(vec![ops::where_(&keep, &scaled, &scaled.zeros_like()?)?])
        })
        .notes("Salmon et al. 2011. The seed is a run-time argument; the gradient drops the same places."),
    ]
}

fn cases() -> Vec<Case> {
    let with = |x: Input, p: f64, seed: i64| vec![x, Input::scalar(p), Input::int(Dtype::U64, seed)];
    let mut cases = shapes(|s| with(Input::random(s, 2.0, 1), 0.3, 42));
    cases.push(Case::new("p = 0", with(Input::random(&[3, 5], 2.0, 1), 0.0, 1)));
    cases.push(Case::new("p near 1", with(Input::random(&[3, 50], 2.0, 1), 0.99, i64::MAX)).slack(100.0));
    cases
}

/// Where dropout keeps elements, by a generator of its own, independent of the language's.
pub(super) fn keep_mlx(shape: &[i32], p: &Array, seed: &Array) -> zmlx_mlx::Result<Array> {
    let (p, seed) = (p.item::<f32>()?, seed.astype(zmlx_mlx::Dtype::Uint64)?.item::<u64>()?);
    let count: usize = shape.iter().map(|d| usize::try_from(*d).unwrap_or(0)).product();
    let keep: Vec<bool> = (0..count as u64).map(|i| philox_uniform(seed, i) >= p).collect();
    Array::from_vec(keep, shape)
}

fn philox_uniform(seed: u64, i: u64) -> f32 {
    let mut c = [(i / 4) as u32, ((i / 4) >> 32) as u32, 0, 0];
    let (mut k0, mut k1) = (seed as u32, (seed >> 32) as u32);
    for _ in 0..10 {
        let (a, b) = (u64::from(c[0]) * 0xD251_1F53, u64::from(c[2]) * 0xCD9E_8D57);
        c = [(b >> 32) as u32 ^ c[1] ^ k0, b as u32, (a >> 32) as u32 ^ c[3] ^ k1, a as u32];
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    (c[i as usize % 4] >> 8) as f32 / (1 << 24) as f32
}

/// Fails unless `p` can be the part that is dropped.
pub(super) fn check(kernel: &str, p: f32) -> Result<()> {
    if (0.0..1.0).contains(&p) {
        return Ok(());
    }
    Err(argument(kernel, format!("p is {p}, but the part that is dropped must be at least 0 and below 1")))
}

/// Each element of `x` is 0 with probability `p`, else divided by `1 - p`.
///
/// Which ones is decided by `seed` and the element's row-major number alone, on every backend alike; the gradient uses
/// the same places. Same shape and float dtype as `x`.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) unless `0 <= p < 1`.
pub fn dropout(x: &Array, p: f32, seed: u64) -> Result<Array> {
    check("dropout", p)?;
    kernel("dropout")?.bind(&[x]).scalar("p", p).scalar("seed", seed).run1()
}
