//! Row kernels in the emulator against the evaluator, both dialects: held in registers and looped.

mod emit_support;

use std::slice::from_ref;

use emit_support::{Case, case, check, input, params, random};
use zmlx_lang::Dtype;
use zmlx_lang::emit::Params;

/// Plans for rows of up to 1,100 elements: one thread a row, parts of 32 threads, 32, several times 32; register and
/// looped texts.
const PLANS: [Params; 12] = [
    // threads, vec, rows a group, items
    Params { threads: 32, vec: 1, rows_per_group: 1, items: 0 },
    Params { threads: 128, vec: 1, rows_per_group: 1, items: 0 },
    Params { threads: 128, vec: 4, rows_per_group: 1, items: 0 },
    Params { threads: 128, vec: 2, rows_per_group: 2, items: 0 },
    Params { threads: 64, vec: 4, rows_per_group: 8, items: 0 },
    Params { threads: 32, vec: 1, rows_per_group: 32, items: 0 },
    Params { threads: 32, vec: 4, rows_per_group: 1, items: 9 },
    Params { threads: 256, vec: 1, rows_per_group: 1, items: 5 },
    Params { threads: 256, vec: 8, rows_per_group: 1, items: 1 },
    Params { threads: 128, vec: 2, rows_per_group: 2, items: 9 },
    Params { threads: 64, vec: 4, rows_per_group: 8, items: 2 },
    Params { threads: 64, vec: 1, rows_per_group: 64, items: 3 },
];

/// Every other plan, from the first or from the second on: looped ones and register ones both ways.
fn half(from: usize) -> impl Iterator<Item = Params> {
    PLANS.into_iter().skip(from).step_by(2)
}

fn capacity(p: Params) -> usize {
    if p.items == 0 { usize::MAX } else { (p.threads / p.rows_per_group * p.items * p.vec) as usize }
}

/// The kernel on random inputs of `rows` rows of each length that a plan covers.
fn lengths(text: &str, dtype: Dtype, lengths: &[usize], rows: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for p in PLANS {
        for &cols in lengths.iter().filter(|n| **n <= capacity(p)) {
            cases.push(case(text, &[random(dtype, &[rows, cols], cols as u64)], p));
        }
    }
    cases
}

#[test]
fn softmax_and_logsumexp() {
    let text = "f(x) -> (y, m, s keep) = let m = row_max(x); let e = exp(x - m); let s = row_sum(e); e / s, m, m + log(s)";
    let mut cases = lengths(text, Dtype::F32, &[1, 3, 31, 32, 33, 128, 1000, 1025], 3);
    cases.extend(lengths(text, Dtype::F16, &[33, 1024], 2));
    check(&cases);
}

#[test]
fn long_rows() {
    let text = "f(x: bf16) = let e = exp(x - row_max(x)); e / row_sum(e)";
    let p = params(1024, 8, 1, 0);
    check(&[
        case(text, &[random(Dtype::Bf16, &[2, 20_000], 1)], p),
        case(text, &[random(Dtype::Bf16, &[2, 20_000], 1)], p).misaligned(),
        case("row_sum(x)", &[random(Dtype::F32, &[2, 4097], 1)], params(1024, 4, 1, 4)).tolerance(1e-5, 1e-3),
        case("row_sum(x)", &[random(Dtype::F32, &[1, 4097], 1)], params(512, 1, 1, 0)).tolerance(1e-5, 1e-3),
    ]);
}

#[test]
fn norms() {
    let rms = "f(x, w, eps: scalar) = x * rsqrt(row_mean(x * x) + eps) * w";
    let layer = "f(x, w, b) = let m = row_mean(x); let d = x - m; d * rsqrt(row_mean(d * d) + 1e-5) * w + b";
    let mut cases = Vec::new();
    for p in half(0) {
        for cols in [5, 64, 260] {
            if cols > capacity(p) {
                continue;
            }
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let (x, w) = (random(dtype, &[5, cols], 1), random(dtype, &[cols], 2));
                let eps = input(Dtype::F32, &[], &[1e-5]);
                cases.push(case(rms, &[x.clone(), w.clone(), eps], p));
                let b = random(dtype, &[1, cols], 3);
                let c = case(layer, &[x, w, b], p);
                let c = if dtype == Dtype::F32 { c } else { c.tolerance(1e-5, 1e-3) };
                cases.push(c.clone());
                if cols == 64 {
                    cases.extend([c.clone().wide(), c.clone().misaligned(), c.strided()]);
                }
            }
        }
    }
    check(&cases);
}

#[test]
fn reductions_of_every_type() {
    let mut cases = Vec::new();
    let text = "row_sum(x), row_max(x), row_min(x), row_argmax(x), row_argmin(x), row_prod(x)";
    for p in [PLANS[1], PLANS[3], PLANS[4], PLANS[8]] {
        for dtype in [Dtype::F32, Dtype::I32, Dtype::U32, Dtype::I64, Dtype::U64, Dtype::I8, Dtype::Bool] {
            for cols in [1, 45, 64, 300] {
                if cols <= capacity(p) {
                    cases.push(case(text, &[random(dtype, &[3, cols], 9)], p).tolerance(2e-5, 2e-4));
                }
            }
        }
    }
    check(&cases);
}

#[test]
fn ties_and_nan() {
    let nan = f64::NAN;
    let inf = f64::INFINITY;
    let mut rows: Vec<Vec<f64>> = vec![vec![1.0; 70], vec![-inf; 70], vec![inf; 70], vec![0.0; 70]];
    for at in [0, 5, 33, 69] {
        let mut row: Vec<f64> = (0..70).map(|i| f64::from(i * 13 % 11)).collect();
        row[at] = nan;
        row[69] = nan;
        rows.push(row);
    }
    rows.push((0..70).map(|i| f64::from(i % 7)).collect());
    let x = input(Dtype::F32, &[rows.len(), 70], &rows.concat());
    let text = "row_argmax(x), row_argmin(x), row_max(x), row_min(x), row_sum(x)";
    let covering = PLANS.into_iter().filter(|p| capacity(*p) >= 70);
    check(&covering.map(|p| case(text, from_ref(&x), p)).collect::<Vec<_>>());
}

#[test]
fn empty_rows() {
    let text = "row_sum(x), row_max(x), row_min(x), row_argmax(x), row_prod(x)";
    let cases = |dtype| PLANS.map(|p| case(text, &[input(dtype, &[3, 0], &[])], p));
    check(&[cases(Dtype::F32), cases(Dtype::I32)].concat());
}

#[test]
fn scans() {
    let mut cases = Vec::new();
    for text in [
        "cumsum(x)",
        "cumsum_exclusive(x)",
        "cumsum_reverse(x)",
        "cummax_exclusive_reverse(x)",
        "cumsum(x), cummax(x), cummin_exclusive(x)",
    ] {
        for c in lengths(text, Dtype::F32, &[1, 3, 33, 300], 3) {
            cases.push(c.tolerance(2e-5, 2e-4));
        }
    }
    check(&cases);
}

#[test]
fn scans_of_integers_and_products() {
    let mut cases = Vec::new();
    for p in [PLANS[1], PLANS[3], PLANS[4], PLANS[5], PLANS[9]] {
        for dtype in [Dtype::I32, Dtype::I64, Dtype::U8] {
            let x = random(dtype, &[3, 150], 4);
            if 150 <= capacity(p) {
                cases.push(case("cumprod(x), cumsum_exclusive(x)", from_ref(&x), p));
                cases.push(case("cummin_reverse(x)", &[x], p).wide());
            }
        }
    }
    check(&cases);
}

#[test]
fn scans_of_scans_and_of_reductions() {
    let mut cases = Vec::new();
    for text in [
        "cumsum(cumsum(x) * 0.01)",
        "let c = cumsum(x); c - row_max(c)",
        "let p = x / row_sum(abs(x)); cumsum(p) * exp(p)",
        "let c = cumsum_exclusive(exp(x - row_max(x))); c / row_sum(c + 1)",
        "cumsum_reverse(x) + row_sum(x) * f32(index(0))",
    ] {
        for c in lengths(text, Dtype::F32, &[7, 130], 3) {
            cases.push(c.tolerance(5e-5, 5e-4));
        }
    }
    // Both directions, in passes of their own.
    let both = "let a = cumsum(x); let m = row_max(a); cumsum_reverse(x) / (1 + abs(m))";
    for p in &PLANS[..6] {
        cases.push(case(both, &[random(Dtype::F32, &[3, 130], 3)], *p).tolerance(5e-5, 5e-4));
    }
    check(&cases);
}

#[test]
fn losses_and_roles() {
    let mut cases = Vec::new();
    for p in half(1) {
        let x = random(Dtype::F32, &[2, 3, 50], 1);
        let labels: Vec<f64> = (0..6).map(|i| f64::from(i * 11 % 50)).collect();
        let y = input(Dtype::I32, &[2, 3, 1], &labels);
        if 50 > capacity(p) {
            continue;
        }
        let loss = "f(x, y: row i32) = row_logsumexp(x) - row_sum(index(0) == y ? x : 0)";
        cases.push(case(loss, &[x.clone(), y.clone()], p));
        let gathered = "f(x, y: row i32, t: array[2]) = row_logsumexp(x) - t[index(1) + 3 * index(2), y]";
        let table = random(Dtype::F32, &[6, 50], 1);
        cases.push(case(gathered, &[x.clone(), y.clone(), table], p));
        // Rows of one element.
        let ones = [random(Dtype::F32, &[6, 1], 1), random(Dtype::F32, &[6, 1], 2)];
        cases.push(case("f(x, y: row) = x * y - row_sum(x * 2)", &ones, p));
        // Inputs that repeat along any axis, and one value a row.
        let text = "f(x, a, b, c: row) = x * a + b - c - row_mean(x * a)";
        let inputs = [
            x.clone(),
            random(Dtype::F32, &[3, 1], 2),
            random(Dtype::F32, &[2, 1, 50], 3),
            random(Dtype::F32, &[2, 3, 1], 4),
        ];
        cases.push(case(text, &inputs, p));
        cases.push(case(text, &inputs, p).strided());
        // Additions to places that rows decide.
        let text = "f(x, y: row i32) -> (g: f32) = g[y, index(0)] += x - row_mean(x)";
        cases.push(case(text, &[x.clone(), y], p).output(&[50, 50]).tolerance(1e-5, 1e-5));
        // Dear values that several passes take.
        cases.push(case("let e = exp(sin(x)); e / row_sum(e) * row_max(e) - row_mean(e * e)", &[x], p));
    }
    check(&cases);
}

#[test]
fn random_bits_and_places_in_rows() {
    let seed = input(Dtype::U32, &[], &[99.0]);
    let mut cases = Vec::new();
    for p in half(0) {
        if 60 <= capacity(p) {
            let text = "f(x, seed: scalar u32) = let d = dropout(x, 0.5, seed); d - row_mean(d) + index(0)";
            cases.push(case(text, &[random(Dtype::F32, &[4, 60], 2), seed.clone()], p));
        }
    }
    check(&cases);
}

#[test]
fn strict_rows() {
    let mut cases = Vec::new();
    for p in [PLANS[1], PLANS[8]] {
        // Integers in floats: sums are exact in any order, so that the rest can be compared bit by bit.
        let values: Vec<f64> = (0..600).map(|i| f64::from(i % 97)).collect();
        let x = input(Dtype::F32, &[3, 200], &values);
        let text = "strict f(x) = let s = row_sum(x); x * 1.1 + s / 3";
        cases.push(case(text, &[x], p).tolerance(0.0, 0.0));
    }
    check(&cases);
}
