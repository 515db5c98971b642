//! Products of every coding against double precision, from the rows that the matrix itself decodes.

mod support;

use std::ops::Range;

use half::{bf16, f16};
use zmlx_engine::matrix::{
    Activations, Coding, Data, Float, Layout, Matrix, MatrixError, ScaleFormat, Scratch, Tokens,
};
use zmlx_engine::memory::Bytes;

/// Numbers that look random and are the same in every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 29) ^ self.0
    }

    /// In -1..1.
    fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Dense(Float),
    Quantized(Coding, ScaleFormat, usize),
}

/// All that products know.
fn kinds() -> Vec<Kind> {
    let mut all = vec![Kind::Dense(Float::F32), Kind::Dense(Float::F16), Kind::Dense(Float::Bf16)];
    for bits in [2, 3, 4, 5, 6, 8] {
        for group in [32, 64, 128] {
            for scale in [ScaleFormat::F32, ScaleFormat::F16, ScaleFormat::Bf16] {
                all.push(Kind::Quantized(Coding::Affine(bits), scale, group));
            }
        }
    }
    all.push(Kind::Quantized(Coding::E2m1, ScaleFormat::E8m0, 32));
    all.push(Kind::Quantized(Coding::E4m3, ScaleFormat::E8m0, 32));
    all.push(Kind::Quantized(Coding::E2m1, ScaleFormat::E4m3, 16));
    all
}

fn store(value: f32, format: ScaleFormat, to: &mut Vec<u8>) {
    match format {
        ScaleFormat::F32 => to.extend(value.to_le_bytes()),
        ScaleFormat::F16 => to.extend(f16::from_f32(value).to_le_bytes()),
        ScaleFormat::Bf16 => to.extend(bf16::from_f32(value).to_le_bytes()),
        // 2^-6 to 2^1.
        ScaleFormat::E8m0 => to.push(121 + (value.to_bits() >> 9 & 7) as u8),
        // Every finite value but zero and subnormals, of both signs.
        ScaleFormat::E4m3 => to.push(((value.to_bits() >> 8 & 0xff) as u8 | 8) & !4),
    }
}

fn bytes(b: &[u8]) -> Bytes {
    Bytes::copy_of(b).unwrap()
}

fn data(kind: Kind, elements: usize, noise: &mut Noise) -> Data {
    match kind {
        Kind::Dense(float) => {
            let format = match float {
                Float::F32 => ScaleFormat::F32,
                Float::F16 => ScaleFormat::F16,
                Float::Bf16 => ScaleFormat::Bf16,
            };
            let mut stored = Vec::new();
            (0..elements).for_each(|_| store(noise.float(), format, &mut stored));
            Data::Dense { elements: bytes(&stored), float }
        }
        Kind::Quantized(coding, scale, group) => {
            let mut codes: Vec<u8> =
                (0..elements * coding.bits() as usize / 8).map(|_| noise.next() as u8).collect();
            if coding == Coding::E4m3 {
                // Without NaN, which is tested apart.
                codes.iter_mut().filter(|c| **c & 0x7f == 0x7f).for_each(|c| *c ^= 1);
            }
            let (mut scales, mut biases) = (Vec::new(), Vec::new());
            for _ in 0..elements / group {
                store(0.02 + 0.01 * noise.float(), scale, &mut scales);
                store(0.3 * noise.float(), scale, &mut biases);
            }
            let affine = matches!(coding, Coding::Affine(_));
            let biases = affine.then(|| bytes(&biases));
            Data::Quantized { codes: bytes(&codes), scales: bytes(&scales), biases, coding, scale, group }
        }
    }
}

/// The matrix with its rows as they are stored, in the order that products like, and there with exact products.
fn matrices(data: Data, experts: usize, rows: usize, columns: usize) -> [Matrix; 3] {
    let borrowed = match &data {
        Data::Dense { elements, float } => Data::Dense { elements: &**elements, float: *float },
        Data::Quantized { codes, scales, biases, coding, scale, group } => Data::Quantized {
            codes: &**codes,
            scales: &**scales,
            biases: biases.as_deref(),
            coding: *coding,
            scale: *scale,
            group: *group,
        },
    };
    let copied = |exact| Matrix::copied(&borrowed, experts, rows, columns, exact).unwrap();
    let [copied, exact] = [copied(false), copied(true)];
    [Matrix::new(data, experts, rows, columns).unwrap(), copied, exact]
}

/// Widths of a kind: odd multiples of its group, so that no vector loop comes out even; a narrow one and a wide one.
fn widths(kind: Kind) -> [usize; 2] {
    match kind {
        Kind::Dense(_) => [37, 96],
        Kind::Quantized(_, _, 16) => [48, 528],
        Kind::Quantized(_, _, group) => [3 * group, 512 + group],
    }
}

/// Rows of activations, among them zeros, outliers, and one all alike.
fn activations(rows: usize, width: usize, noise: &mut Noise) -> Vec<Vec<f32>> {
    let row = |r: usize, noise: &mut Noise| -> Vec<f32> {
        (0..width)
            .map(|i| match (r % 6, i % 29) {
                (1, _) => 0.0,
                (2, 7) => 300.0 * noise.float(),
                (3, _) => 0.5,
                (4, _) => 1e-20 * noise.float(),
                _ => noise.float(),
            })
            .collect()
    };
    (0..rows).map(|r| row(r, noise)).collect()
}

/// Half a step of an activation, as a part of the largest of its group.
fn step(terms: usize) -> f64 {
    0.501 / 32639f64.powi(terms as i32)
}

/// How far a product may be from its exact value: what 16-bit integers lose, and rounding in float32.
fn tolerance(layout: Layout, w: &[f32], x: &[f32]) -> f64 {
    let abs = |(a, b): (&f32, &f32)| (f64::from(*a) * f64::from(*b)).abs();
    let rounding = 2e-6 * w.iter().zip(x).map(abs).sum::<f64>();
    let (group, terms) = match layout {
        Layout::Floats => return rounding,
        Layout::Integers { group, terms } | Layout::Bytes { group, terms } => (group, terms),
    };
    let lost = |(w, x): (&[f32], &[f32])| {
        let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let sum: f64 = w.iter().map(|w| f64::from(w.abs())).sum();
        // Bias and codes may cancel in `w`, which the sums of the integers do not see: rounding of the larger terms.
        step(terms) * f64::from(largest) * sum + 3e-6 * f64::from(largest) * w.len() as f64
    };
    rounding + w.chunks(group).zip(x.chunks(group)).map(lost).sum::<f64>()
}

fn exact(w: &[f32], x: &[f32]) -> f64 {
    w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
}

/// Checks a product of some rows of the activations; the rest of `out` must stay as it was.
fn check(m: &Matrix, expert: usize, rows: Range<usize>, x: &[Vec<f32>], tokens: Tokens<'_>, kind: Kind) {
    let layout = m.layout();
    let mut packed = Activations::default();
    packed.reserve(layout, x.len(), m.columns());
    x.iter().enumerate().for_each(|(i, x)| packed.set(layout, i, x));
    let (stride, count) = (rows.len() + 3, tokens.len());
    let mut out = vec![f32::NEG_INFINITY; count * stride];
    let rows_of_x = packed.rows(layout, m.columns());
    m.product(expert, rows.clone(), rows_of_x, tokens, &mut out, stride, &mut Scratch::default());
    let mut w = vec![0.0; m.columns()];
    for (i, r) in rows.clone().enumerate() {
        m.row(expert, r, &mut w);
        for t in 0..count {
            let x = &x[tokens.row(t)];
            let (y, expected) = (f64::from(out[t * stride + i]), exact(&w, x));
            let most = tolerance(layout, &w, x);
            assert!(
                (y - expected).abs() <= most,
                "{kind:?} {layout:?}, {} columns, expert {expert}, row {r} of {rows:?}, token {t} of {count}: \
                 {y} for {expected}, {:e} apart, {most:e} allowed",
                m.columns(),
                (y - expected).abs()
            );
        }
    }
    for t in 0..count {
        let rest = &out[t * stride + rows.len()..(t + 1) * stride];
        assert!(rest.iter().all(|v| *v == f32::NEG_INFINITY), "{kind:?}: written past its rows");
    }
}

#[test]
fn products_of_every_coding_are_as_exact_as_their_activations() {
    let mut noise = Noise(1);
    for kind in kinds() {
        for width in widths(kind) {
            // 24 rows make panels where there are any; 21 do not.
            for rows in [24, 21] {
                let experts = 3;
                let [plain, arranged, exact] =
                    matrices(data(kind, experts * rows * width, &mut noise), experts, rows, width);
                let x = activations(40, width, &mut noise);
                for m in [&plain, &arranged, &exact] {
                    let (mut a, mut b) = (vec![0.0; width], vec![0.0; width]);
                    for r in [0, 9, rows - 1] {
                        plain.row(2, r, &mut a);
                        m.row(2, r, &mut b);
                        assert_eq!(a, b, "{kind:?}: the arranged row {r} is another");
                    }
                    for count in [1, 2, 3, 4, 5, 33] {
                        check(m, count % experts, 0..rows, &x, Tokens::Run(7, count), kind);
                    }
                    let list: Vec<u32> = (0..33u32).map(|i| i * 7 % 40).collect();
                    for count in [1, 2, 3, 5, 33] {
                        check(m, 2, 0..rows, &x, Tokens::List(&list[..count]), kind);
                    }
                    let cut = if m.granule() > 1 { 8..16 } else { 5..18 };
                    for count in [1, 3] {
                        check(m, 1, cut.clone(), &x, Tokens::Run(0, count), kind);
                    }
                    check(m, 1, 8..8, &x, Tokens::Run(0, 1), kind);
                    check(m, 1, 0..8, &x, Tokens::Run(0, 0), kind);
                }
            }
        }
    }
}

#[test]
fn long_rows_do_not_overflow_what_sums_integers() {
    // The largest codes against the largest activations, with the same sign all along.
    for kind in [
        Kind::Quantized(Coding::Affine(8), ScaleFormat::F32, 128),
        Kind::Quantized(Coding::Affine(4), ScaleFormat::F32, 128),
        Kind::Quantized(Coding::Affine(6), ScaleFormat::F32, 128),
        Kind::Quantized(Coding::E2m1, ScaleFormat::E8m0, 32),
    ] {
        let (rows, width) = (8, 128 * 9);
        let mut made = data(kind, rows * width, &mut Noise(5));
        let Data::Quantized { codes, coding, .. } = &mut made else { unreachable!() };
        let all = if *coding == Coding::E2m1 { 0x77 } else { 0xff };
        *codes = bytes(&vec![all; codes.len()]);
        let both = matrices(made, 1, rows, width);
        for sign in [1.0, -1.0] {
            let x: Vec<Vec<f32>> = (0..4).map(|t| vec![sign * 1.5 * (t + 1) as f32; width]).collect();
            for m in &both {
                for count in [1, 2, 4] {
                    check(m, 0, 0..rows, &x, Tokens::Run(0, count), kind);
                }
            }
        }
    }
}

/// A matrix of ones on the diagonal, whose product gives the activations as they were packed.
fn identity(coding: Coding, group: usize, width: usize, exact: bool) -> Matrix {
    let bits = coding.bits() as usize;
    let mut codes = vec![0u8; width * width * bits / 8];
    for i in 0..width {
        let bit = (i * width + i) * bits;
        codes[bit / 8] |= 1 << (bit % 8);
    }
    let groups = width * width / group;
    let scales: Vec<u8> = (0..groups).flat_map(|_| 1f32.to_le_bytes()).collect();
    let data = Data::Quantized {
        codes: bytes(&codes),
        scales: bytes(&scales),
        biases: Some(bytes(&vec![0; 4 * groups])),
        coding,
        scale: ScaleFormat::F32,
        group,
    };
    let [_, arranged, made_exact] = matrices(data, 1, width, width);
    if exact { made_exact } else { arranged }
}

fn through(m: &Matrix, x: &[f32]) -> Vec<f32> {
    let mut packed = Activations::default();
    packed.reserve(m.layout(), 1, m.columns());
    packed.set(m.layout(), 0, x);
    let mut out = vec![0.0; m.rows()];
    let tokens = Tokens::Run(0, 1);
    let rows = packed.rows(m.layout(), m.columns());
    m.product(0, 0..m.rows(), rows, tokens, &mut out, m.rows(), &mut Scratch::default());
    out
}

#[test]
fn packed_rows_come_back_within_half_a_step() {
    for (coding, group) in [(4, 32), (4, 64), (4, 128), (8, 32), (8, 64), (8, 128), (5, 64)] {
        let width = 512 + group;
        for (terms, magnitude) in [1, 2].into_iter().flat_map(|t| [1.0, 1e-30, 1e30, 1e34].map(|m| (t, m))) {
            let m = identity(Coding::Affine(coding), group, width, terms == 2);
            let mut noise = Noise(9);
            let mut x: Vec<f32> = (0..width).map(|_| magnitude * noise.float()).collect();
            // The largest comes back as it is, and zeros are zeros.
            (x[3], x[4], x[group + 1]) = (magnitude, 0.0, -magnitude);
            x[2 * group..].fill(0.0);
            let y = through(&m, &x);
            for (g, (x, y)) in x.chunks(group).zip(y.chunks(group)).enumerate() {
                let largest = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                for (x, y) in x.iter().zip(y) {
                    // Two integers are finer than a float, and each sum of products is rounded to one.
                    // What the first leaves of 1e-30 is too small for a second.
                    let second = terms == 2 && magnitude > 1e-20;
                    let most = largest * (if second { step(2) + 2e-7 } else { step(1) }) as f32;
                    assert!((x - y).abs() <= most, "{:?} group {g}: {y:e} for {x:e}", m.layout());
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_is_not_hidden() {
    let mut kinds = vec![
        (identity(Coding::Affine(4), 64, 576, false), 64),
        (identity(Coding::Affine(8), 32, 96, true), 32),
    ];
    let dense: Vec<u8> =
        (0..96 * 96).flat_map(|i| if i % 97 == 0 { 1f32 } else { 0.0 }.to_le_bytes()).collect();
    let dense = Data::Dense { elements: bytes(&dense), float: Float::F32 };
    kinds.push((Matrix::new(dense, 1, 96, 96).unwrap(), 96));
    for (m, group) in kinds {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![0.25; m.columns()];
            x[group / 2] = bad;
            let y = through(&m, &x);
            assert!(!y[group / 2].is_finite(), "{bad} became {} ({:?})", y[group / 2], m.layout());
            // A sum with it is not finite either.
            assert!(y.iter().sum::<f32>().is_nan() || bad.is_infinite(), "{:?}", m.layout());
        }
    }
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let mut noise = Noise(3);
    let kind = Kind::Quantized(Coding::Affine(4), ScaleFormat::F16, 64);
    let size = |rows, noise: &mut Noise| Matrix::new(data(kind, 8 * 64, noise), 1, rows, 64).unwrap_err();
    let expected = MatrixError::Size { what: "codes", expected: 9 * 32, found: 8 * 32 };
    assert_eq!(size(9, &mut noise), expected);
    for (coding, scale, group, columns) in [
        (Coding::Affine(7), ScaleFormat::F16, 64, 64),
        (Coding::Affine(4), ScaleFormat::F16, 16, 64),
        (Coding::Affine(4), ScaleFormat::E8m0, 32, 64),
        (Coding::Affine(4), ScaleFormat::F16, 64, 96),
        (Coding::E2m1, ScaleFormat::E8m0, 64, 64),
        (Coding::E4m3, ScaleFormat::E4m3, 16, 64),
    ] {
        let none = || bytes(&[]);
        let biases = matches!(coding, Coding::Affine(_)).then(none);
        let data = Data::Quantized { codes: none(), scales: none(), biases, coding, scale, group };
        let error = Matrix::new(data, 1, 8, columns).unwrap_err();
        assert!(matches!(error, MatrixError::Unsupported(_)), "{coding:?} {scale:?} {group}: {error}");
    }
    let huge = Data::Dense { elements: bytes(&[]), float: Float::F32 };
    assert!(matches!(Matrix::new(huge, usize::MAX, 2, 2), Err(MatrixError::Unsupported(_))));
}

#[test]
fn all_of_this_holds_on_the_portable_path() {
    support::all_again("all_of_this_holds_on_the_portable_path");
}
