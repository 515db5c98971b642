//! Selection and gating on the CPU, against a plain sort and MLX's own gradients.

use zmlx_kernels::Error;
use zmlx_kernels::catalogue::{self, MAX_TOP_K, top_k, top_k_gating, top_k_gating_bias};
use zmlx_mlx::{Array, Dtype, ops, transforms};

type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;

/// Pseudo-random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In -4..4.
    fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 21) as f32 - 4.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.bits() % n
    }
}

/// Kinds of rows.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Random,
    /// Five values only.
    Tied,
    Equal,
    /// Zeros of both signs, infinities, NaN, denormals among numbers.
    Special,
    /// Ascending: every element enters the list.
    Rising,
}

const KINDS: [Kind; 5] = [Kind::Random, Kind::Tied, Kind::Equal, Kind::Special, Kind::Rising];

fn values(kind: Kind, n: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    let special =
        [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN, 1e-40, -1e-40, f32::MAX, f32::MIN];
    let mut one = |i: usize| match kind {
        Kind::Random => random.float(),
        Kind::Tied => random.below(5) as f32 - 2.0,
        Kind::Equal => 0.25,
        Kind::Special if random.below(3) == 0 => special[random.below(special.len() as u64) as usize],
        Kind::Special => random.float(),
        Kind::Rising => i as f32 / 64.0,
    };
    (0..n).map(&mut one).collect()
}

/// Places of the first k of a row: larger first, NaN first of all, lower place first among equals.
fn reference(row: &[f32], k: usize) -> Vec<u32> {
    let mut places: Vec<u32> = (0..row.len() as u32).collect();
    let at = |p: &u32| row[*p as usize];
    places.sort_by(|a, b| match (at(a).is_nan(), at(b).is_nan()) {
        (true, true) => a.cmp(b),
        (true, false) => std::cmp::Ordering::Less,
        (false, true) => std::cmp::Ordering::Greater,
        (false, false) => at(b).partial_cmp(&at(a)).unwrap().then(a.cmp(b)),
    });
    places.truncate(k);
    places
}

fn rounded(x: &[f32], dtype: Dtype) -> zmlx_mlx::Result<(Array, Vec<f32>)> {
    let array = Array::from_slice(x, &[x.len() as i32])?.astype(dtype)?;
    let back = array.astype(Dtype::Float32)?.to_vec::<f32>()?;
    Ok((array, back))
}

fn sizes(cols: usize) -> Vec<usize> {
    let mut ks: Vec<usize> = [1, 2, 3, 4, 6, 8, 9, 16, 17, 32, 33, 64, 100, cols / 2, cols - 1, cols]
        .into_iter()
        .filter(|k| (1..=cols).contains(k))
        .collect();
    ks.sort_unstable();
    ks.dedup();
    ks
}

#[test]
fn top_k_equals_a_sort() -> Outcome {
    let mut calls = 0;
    for cols in [1, 2, 7, 31, 32, 33, 64, 128, 257, 513, 1000, 1024, 1030, 5000] {
        let many = if cols > 1000 { vec![1, 3, 9] } else { vec![1, 5, 8, 21] };
        for (rows, kind) in many.iter().flat_map(|r| KINDS.map(|kind| (*r, kind))) {
            let x = values(kind, rows * cols, (rows * cols) as u64);
            for dtype in [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16] {
                let (array, x) = rounded(&x, dtype)?;
                let array = array.reshape(&[rows as i32, cols as i32])?;
                for k in sizes(cols).into_iter().filter(|k| *k <= MAX_TOP_K) {
                    let (v, p) = top_k(&array, k)?;
                    assert_eq!((v.shape(), v.dtype()), (&[rows as i32, k as i32][..], dtype));
                    let (v, p) = (v.astype(Dtype::Float32)?.to_vec::<f32>()?, p.to_vec::<u32>()?);
                    for (r, row) in x.chunks(cols).enumerate() {
                        let want = reference(row, k);
                        let what = || format!("{rows} x {cols}, k {k}, {kind:?}, {dtype}, row {r}");
                        assert_eq!(p[r * k..][..k], want, "{}", what());
                        let bits: Vec<u32> = v[r * k..][..k].iter().map(|v| v.to_bits()).collect();
                        let want: Vec<u32> = want.iter().map(|p| row[*p as usize].to_bits()).collect();
                        assert_eq!(bits, want, "{}", what());
                    }
                    calls += 1;
                }
            }
        }
    }
    println!("{calls} calls");
    Ok(())
}

/// Enough rows for several tasks on several threads.
#[test]
fn many_rows_views_and_nothing() -> Outcome {
    for (rows, cols, k) in [(3001, 128, 8), (2000, 17, 3), (40, 3000, 20), (70, 2000, 5)] {
        let x = values(Kind::Tied, rows * cols, 5);
        let (_, p) = top_k(&Array::from_slice(&x, &[rows as i32, cols as i32])?, k)?;
        let p = p.to_vec::<u32>()?;
        for (r, row) in x.chunks(cols).enumerate() {
            assert_eq!(p[r * k..][..k], reference(row, k), "{rows} x {cols}, row {r}");
        }
    }
    let x = values(Kind::Random, 6 * 40, 9);
    let view = Array::from_slice(&x, &[40, 6])?.transpose(&[1, 0])?.slice_axis(0, 1, 4)?;
    let (v, p) = top_k(&view.reshape(&[1, 3, 40])?, 4)?;
    let (w, q) = top_k_gating(&view, 4, true)?;
    assert_eq!((v.shape(), p.shape(), w.shape()), (&[1, 3, 4][..], &[1, 3, 4][..], &[3, 4][..]));
    let (v, p, q) = (v.to_vec::<f32>()?, p.to_vec::<u32>()?, q.to_vec::<u32>()?);
    for r in 0..3 {
        let row: Vec<f32> = (0..40).map(|c| x[c * 6 + r + 1]).collect();
        let want = reference(&row, 4);
        assert_eq!((&p[r * 4..][..4], &q[r * 4..][..4]), (&want[..], &want[..]));
        assert_eq!(v[r * 4], row[want[0] as usize]);
    }
    let one = Array::from_slice(&x, &[240])?;
    assert_eq!(top_k(&one, 2)?.1.to_vec::<u32>()?, reference(&x, 2));
    let none = Array::from_slice::<f32>(&[], &[0, 16])?;
    assert_eq!(top_k(&none, 3)?.0.shape(), [0, 3]);
    assert_eq!(top_k_gating(&none, 3, false)?.0.to_vec::<f32>()?.len(), 0);
    Ok(())
}

#[test]
fn bad_calls_say_what_is_wrong() -> Outcome {
    let x = Array::from_slice(&[0.0f32; 24], &[3, 8])?;
    let wide = Array::from_slice(&[0.0f32; 2000], &[2000])?;
    let ints = Array::from_slice(&[0i32; 8], &[8])?;
    let scalar = Array::from_slice(&[0.0f32], &[])?;
    let bias = |n: i32| Array::from_slice(&vec![0.0f32; n as usize], &[n]);
    let cases = [
        (top_k(&x, 0), "k = 0 with D = 8"),
        (top_k(&x, 9), "k = 9 with D = 8; it must be 1 <= k <= min(D, 1024)"),
        (top_k(&wide, 1025), "k = 1025 with D = 2000"),
        (top_k(&x, usize::MAX), "with D = 8"),
        (top_k(&ints, 1), "x is int32"),
        (top_k(&scalar, 1), "scalar"),
        (top_k_gating(&x, 9, true), "k = 9 with D = 8"),
        (top_k_gating(&ints, 2, true), "logits is int32"),
        (top_k_gating_bias(&x, &bias(7)?, 2, true), "bias is float32 [7]; it must be float32 [8]"),
        (
            catalogue::top_k_gating_kernel().call(&[&x], &[2, 3]).map(|_| (x.clone(), x.clone())),
            "norm (0 or 1)",
        ),
        (catalogue::top_k_kernel().call(&[&x], &[]).map(|_| (x.clone(), x.clone())), "k; it is missing"),
    ];
    for (found, what) in cases {
        match found {
            Err(Error::Argument { what: text, .. }) => assert!(text.contains(what), "{text} lacks {what}"),
            other => panic!("{what}: {:?}", other.map(|_| ())),
        }
    }
    Ok(())
}

/// Weights of one row in f64, for given places.
fn weights(row: &[f32], bias: Option<&[f32]>, places: &[u32], norm: bool) -> Vec<f64> {
    let most = row.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let e: Vec<f64> = row.iter().map(|x| f64::from(x - most).exp()).collect();
    let all: f64 = e.iter().sum();
    let part = |p: &u32| match bias {
        None => e[*p as usize] / all,
        Some(bias) => e[*p as usize] / all + f64::from(bias[*p as usize]),
    };
    let chosen: Vec<f64> = places.iter().map(part).collect();
    let sum: f64 = if norm { chosen.iter().sum::<f64>() + bias.map_or(0.0, |_| 1e-20) } else { 1.0 };
    chosen.iter().map(|c| c / sum).collect()
}

#[test]
fn gating_equals_its_definition() -> Outcome {
    let mut worst: f64 = 0.0;
    for cols in [1, 2, 5, 8, 31, 32, 33, 64, 65, 128, 257, 1000, 2100] {
        for (rows, kind) in
            [1, 19].into_iter().flat_map(|r| [Kind::Random, Kind::Tied, Kind::Equal].map(|k| (r, k)))
        {
            for dtype in [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16] {
                let (array, x) = rounded(&values(kind, rows * cols, 3), dtype)?;
                let array = array.reshape(&[rows as i32, cols as i32])?;
                for (k, norm) in
                    sizes(cols).into_iter().filter(|k| *k <= 64).flat_map(|k| [(k, true), (k, false)])
                {
                    let (w, p) = top_k_gating(&array, k, norm)?;
                    assert_eq!(w.dtype(), Dtype::Float32);
                    let (w, p) = (w.to_vec::<f32>()?, p.to_vec::<u32>()?);
                    for (r, row) in x.chunks(cols).enumerate() {
                        let places = reference(row, k);
                        assert_eq!(
                            p[r * k..][..k],
                            places,
                            "{rows} x {cols}, k {k}, {kind:?}, {dtype}, row {r}"
                        );
                        for (w, want) in w[r * k..][..k].iter().zip(weights(row, None, &places, norm)) {
                            worst = worst.max((f64::from(*w) - want).abs() / want);
                        }
                    }
                }
            }
        }
    }
    println!("largest relative error {worst:.1e}");
    assert!(worst < 2e-6, "{worst}");
    Ok(())
}

#[test]
fn biased_gating_equals_its_definition() -> Outcome {
    let mut worst: f64 = 0.0;
    for (rows, cols) in [(1, 1), (3, 8), (9, 33), (20, 64), (20, 257), (2, 2000)] {
        for (kind, k) in [Kind::Random, Kind::Tied].into_iter().flat_map(|kind| sizes(cols).map_k(kind)) {
            let x = values(kind, rows * cols, 11);
            // Multiples of 1/64 above zero: sums stay away from zero, so relative errors mean something.
            let mut random = Random(cols as u64);
            let bias: Vec<f32> = (0..cols).map(|_| random.below(32) as f32 / 64.0 + 0.25).collect();
            let (array, b) = (
                Array::from_slice(&x, &[rows as i32, cols as i32])?,
                Array::from_slice(&bias, &[cols as i32])?,
            );
            for norm in [false, true] {
                let (w, p) = top_k_gating_bias(&array, &b, k, norm)?;
                let (w, p) = (w.to_vec::<f32>()?, p.to_vec::<u32>()?);
                for (r, row) in x.chunks(cols).enumerate() {
                    let (w, p) = (&w[r * k..][..k], &p[r * k..][..k]);
                    let all: Vec<u32> = (0..cols as u32).collect();
                    let scores: Vec<f64> = weights(row, Some(&bias), &all, false);
                    let mut sorted = scores.clone();
                    sorted.sort_by(|a, b| b.total_cmp(a));
                    let what = format!("{rows} x {cols}, k {k}, {kind:?}, norm {norm}, row {r}: {p:?}");
                    // What was chosen is best, up to the rounding of the sums, and exact ties go to the lower index.
                    for (j, place) in p.iter().enumerate() {
                        assert!((scores[*place as usize] - sorted[j]).abs() < 2e-7, "{what}");
                    }
                    let same = |a: usize, b: usize| row[a] == row[b] && bias[a] == bias[b];
                    for pair in p.windows(2).filter(|n| same(n[0] as usize, n[1] as usize)) {
                        assert!(pair[0] < pair[1], "{what}");
                    }
                    for (w, want) in w.iter().zip(weights(row, Some(&bias), p, norm)) {
                        worst = worst.max((f64::from(*w) - want).abs() / want);
                    }
                }
            }
        }
    }
    println!("largest relative error {worst:.1e}");
    assert!(worst < 2e-6, "{worst}");
    Ok(())
}

/// Pairs a kind with every k.
trait MapK {
    fn map_k(self, kind: Kind) -> Vec<(Kind, usize)>;
}

impl MapK for Vec<usize> {
    fn map_k(self, kind: Kind) -> Vec<(Kind, usize)> {
        self.into_iter().filter(|k| *k <= 64).map(|k| (kind, k)).collect()
    }
}

#[test]
fn rows_that_are_not_finite_have_nan_weights() -> Outcome {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let rows = [[0.0, nan, 1.0, nan], [inf, 0.0, inf, 1.0], [-inf; 4]];
    let x = Array::from_slice(&rows.concat(), &[3, 4])?;
    let bias = Array::from_slice(&[0.5f32; 4], &[4])?;
    for norm in [true, false] {
        let (w, p) = top_k_gating(&x, 2, norm)?;
        assert_eq!(p.to_vec::<u32>()?, [1, 3, 0, 2, 0, 1]);
        assert!(w.to_vec::<f32>()?.iter().all(|w| w.is_nan()));
        let (w, p) = top_k_gating_bias(&x, &bias, 2, norm)?;
        assert_eq!(p.to_vec::<u32>()?, [0, 1, 0, 1, 0, 1]);
        assert!(w.to_vec::<f32>()?.iter().all(|w| w.is_nan()));
    }
    let masked = Array::from_slice(&[-inf, 2.0, -inf, -inf], &[1, 4])?;
    let (w, p) = top_k_gating(&masked, 3, true)?;
    assert_eq!((w.to_vec::<f32>()?, p.to_vec::<u32>()?), (vec![1.0, 0.0, 0.0], vec![1, 0, 2]));
    Ok(())
}

/// The ops in MLX's own, which differentiates them, at given places.
fn in_mlx(inputs: &[Array], places: &Array, norm: bool) -> zmlx_mlx::Result<Array> {
    let x = inputs[0].astype(Dtype::Float32)?;
    let p = ops::softmax(&x, &[-1], true)?;
    match inputs.get(1) {
        None if norm => ops::softmax(&ops::take_along_axis(&x, places, -1)?, &[-1], true),
        None => ops::take_along_axis(&p, places, -1),
        Some(bias) => {
            let chosen = ops::take_along_axis(&p.add(&bias.astype(Dtype::Float32)?)?, places, -1)?;
            if norm { chosen.divide(&chosen.sum(&[-1], true)?) } else { Ok(chosen) }
        }
    }
}

fn close(found: &Array, expected: &Array, tolerance: f32, what: &str) -> zmlx_mlx::Result<()> {
    assert_eq!((found.shape(), found.dtype()), (expected.shape(), expected.dtype()), "{what}");
    let (f, e) =
        (found.astype(Dtype::Float32)?.to_vec::<f32>()?, expected.astype(Dtype::Float32)?.to_vec::<f32>()?);
    let size = e.iter().fold(0.05f32, |m, e| m.max(e.abs()));
    for (i, (f, e)) in f.iter().zip(&e).enumerate() {
        assert!((f - e).abs() <= tolerance * size, "{what}, element {i}: {f} is not {e}");
    }
    Ok(())
}

#[test]
fn gradients_equal_mlx() -> Outcome {
    for shape in [vec![1, 1], vec![5], vec![3, 33], vec![2, 3, 64], vec![7, 1000]] {
        let (cols, count) = (*shape.last().unwrap(), shape.iter().product::<i32>());
        let mut outer = shape.clone();
        for dtype in [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16] {
            let x = Array::from_slice(&values(Kind::Random, count as usize, 21), &shape)?.astype(dtype)?;
            let bias = Array::from_slice(&values(Kind::Random, cols as usize, 22), &[cols])?;
            let bias = bias
                .multiply(&Array::from_slice(&[0.02f32], &[1])?)?
                .add(&Array::from_slice(&[0.3f32], &[1])?)?;
            for k in [1, 2, 8, 40].into_iter().filter(|k| *k <= cols) {
                *outer.last_mut().unwrap() = k;
                let g = Array::from_slice(
                    &values(Kind::Random, outer.iter().product::<i32>() as usize, 23),
                    &outer,
                )?;
                let k = k as usize;
                let tolerance = match dtype {
                    Dtype::Float32 => 2e-5,
                    Dtype::Float16 => 2e-3,
                    _ => 1e-2,
                };
                let what = format!("{shape:?}, k {k}, {dtype}");

                let places = top_k(&x, k)?.1;
                let narrow = g.astype(dtype)?;
                let ours = transforms::vjp(move |a| Ok(vec![top_k(&a[0], k)?.0]), &[&x], &[&narrow])?.1;
                let theirs = transforms::vjp(
                    move |a| Ok(vec![ops::take_along_axis(&a[0], &places, -1)?]),
                    &[&x],
                    &[&narrow],
                )?
                .1;
                close(&ours[0], &theirs[0], 0.0, &format!("top_k {what}"))?;

                for norm in [true, false] {
                    let what = format!("{what}, norm {norm}");
                    let places = top_k_gating(&x, k, norm)?.1;
                    let ours =
                        transforms::vjp(move |a| Ok(vec![top_k_gating(&a[0], k, norm)?.0]), &[&x], &[&g])?.1;
                    let theirs =
                        transforms::vjp(move |a| Ok(vec![in_mlx(a, &places, norm)?]), &[&x], &[&g])?.1;
                    close(&ours[0], &theirs[0], tolerance, &what)?;

                    let places = top_k_gating_bias(&x, &bias, k, norm)?.1;
                    let both = [&x, &bias];
                    let biased = move |a: &[Array]| Ok(vec![top_k_gating_bias(&a[0], &a[1], k, norm)?.0]);
                    let ours = transforms::vjp(biased, &both, &[&g])?.1;
                    let theirs =
                        transforms::vjp(move |a| Ok(vec![in_mlx(a, &places, norm)?]), &both, &[&g])?.1;
                    close(&ours[0], &theirs[0], tolerance, &format!("biased {what}, logits"))?;
                    close(&ours[1], &theirs[1], tolerance, &format!("biased {what}, bias"))?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn mapped_and_compiled() -> Outcome {
    let x = Array::from_slice(&values(Kind::Random, 4 * 6 * 20, 31), &[4, 6, 20])?;
    let plain = top_k_gating(&x, 3, true)?;
    let mapped = transforms::vmap(
        |a: &[Array]| {
            let (w, p) = top_k_gating(&a[0], 3, true)?;
            Ok(vec![w, p])
        },
        &[0],
        &[0, 0],
    )(&[&x])?;
    let compiled = transforms::compile(
        |a: &[Array]| {
            let (w, p) = top_k_gating(&a[0], 3, true)?;
            Ok(vec![w, p])
        },
        false,
    )?
    .call(&[&x])?;
    for found in [mapped, compiled] {
        assert_eq!(found[0].to_vec::<f32>()?, plain.0.to_vec::<f32>()?);
        assert_eq!(found[1].to_vec::<u32>()?, plain.1.to_vec::<u32>()?);
    }
    Ok(())
}

/// Prints times; run it by name with `--release -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn times() -> Outcome {
    let cases = [
        (4096, 128, 8),
        (4096, 128, 2),
        (4096, 64, 6),
        (1, 128, 8),
        (64, 128, 8),
        (1024, 1000, 16),
        (1024, 1000, 50),
        (1, 128_000, 8),
        (1, 128_000, 50),
        (4096, 128, 32),
    ];
    for (rows, cols, k) in cases {
        for dtype in [Dtype::Float32, Dtype::Bfloat16] {
            let x = Array::from_slice(&values(Kind::Random, rows * cols, 1), &[rows as i32, cols as i32])?
                .astype(dtype)?;
            let bias = Array::from_slice(&vec![0.01f32; cols], &[cols as i32])?;
            x.eval()?;
            bias.eval()?;
            let time = |f: &dyn Fn() -> zmlx_mlx::Result<Vec<Array>>| -> zmlx_mlx::Result<f64> {
                let mut best = f64::MAX;
                for _ in 0..30 {
                    let start = std::time::Instant::now();
                    zmlx_mlx::eval(&f()?.iter().collect::<Vec<_>>())?;
                    best = best.min(start.elapsed().as_secs_f64());
                }
                Ok(best * 1e3)
            };
            let two = |(a, b): (Array, Array)| vec![a, b];
            println!(
                "{rows} x {cols}, k {k}, {dtype}: top_k {:.3} ms, gating of the chosen {:.3}, of all {:.3}, biased {:.3}; \
                 MLX argpartition {:.3}",
                time(&|| Ok(two(top_k(&x, k)?)))?,
                time(&|| Ok(two(top_k_gating(&x, k, true)?)))?,
                time(&|| Ok(two(top_k_gating(&x, k, false)?)))?,
                time(&|| Ok(two(top_k_gating_bias(&x, &bias, k, true)?)))?,
                time(&|| Ok(vec![ops::argpartition(&x, -(k as i32), -1)?]))?,
            );
        }
    }
    Ok(())
}
