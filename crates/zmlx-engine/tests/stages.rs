//! Stages against their formulas in double precision, over several calls.

mod support;

use half::f16;
use zmlx_engine::cells::Cells;
use zmlx_engine::matrix::{Data, Float, Matrix};
use zmlx_engine::memory::Bytes;
use zmlx_engine::program::{Buffer, Call, Program, Runner, Slot, Wanted};
use zmlx_engine::stages::{Attend, Groups, Route, Scores, ShortConv, Source, Ties};
use zmlx_engine::store::Store;

fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 29 ^ state) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn call(tokens: &[u32], batch: usize, position: usize) -> Call<'_> {
    Call { tokens, batch, position, wanted: Wanted::All }
}

/// `[batch, heads, positions, width]` of a cache, in `capacity` positions.
fn cache(
    values: &dyn Fn(usize, usize, usize, usize) -> f32,
    sizes: [usize; 4],
    capacity: usize,
    half: bool,
) -> Store {
    let [batch, heads, positions, width] = sizes;
    let mut all = vec![f32::NAN; batch * heads * capacity * width];
    for (b, h, p, i) in (0..batch * heads * positions * width).map(|n| {
        (n / (heads * positions * width), n / (positions * width) % heads, n / width % positions, n % width)
    }) {
        all[((b * heads + h) * capacity + p) * width + i] = values(b, h, p, i);
    }
    if half {
        Store::F16(all.into_iter().map(f16::from_f32).collect::<Vec<_>>().into())
    } else {
        Cells::from(all).into()
    }
}

#[test]
fn attention_is_that_of_double_precision() {
    for half in [false, true] {
        attention(half);
    }
}

/// With a cache in half precision, of the numbers that it holds.
fn attention(half: bool) {
    let value = |salt: usize| {
        move |b: usize, h: usize, p: usize, i: usize| {
            let v = noise((salt + 1000 * b + 100 * h + 7 * p) as u64, i + 1)[i];
            if half { f16::from_f32(v).to_f32() } else { v }
        }
    };
    for (heads, kv_heads, d, dv, window, sinks) in [
        (4, 2, 8, 8, None, false),
        (3, 3, 24, 8, None, false),
        (6, 1, 16, 40, None, true),
        (4, 2, 8, 8, Some(3), false),
        (4, 2, 8, 8, Some(30), true),
        (2, 2, 8, 8, Some(1), true),
        (4, 2, 8, 16, Some(300), false),
        (4, 2, 8, 16, Some(300), true),
        (2, 1, 80, 72, None, false),
    ] {
        let sinks = sinks.then(|| noise(5, heads));
        for (batch, position, length) in
            [(1, 0, 1), (1, 37, 1), (3, 5, 4), (1, 0, 33), (2, 255, 2), (2, 256, 1), (1, 700, 1), (1, 510, 4)]
        {
            let (seen, capacity) = (position + length, 768);
            let (k, v) = (value(11), value(12));
            let mut slots = [Slot::Kv {
                keys: cache(&k, [batch, kv_heads, seen, d], capacity, half),
                values: cache(&v, [batch, kv_heads, seen, dv], capacity, half),
                heads: kv_heads,
                key_width: d,
                value_width: dv,
                capacity,
                window: None,
                dropped: 0,
            }];
            let mut program = Program::new();
            let (queries, out) = (program.buffer(heads * d), program.buffer(heads * dv));
            let scale = 0.7;
            let attend = Attend { queries, heads, slot: 0, scale, window, sinks: sinks.clone(), out };
            let merge = attend.merge(dv);
            program.push(0, attend);
            program.push(0, merge);
            let mut runner = Runner::new(2, 2);
            let tokens = vec![0; batch * length];
            let q = noise(99, tokens.len() * heads * d);
            runner.fill(&program, queries, tokens.len(), &q);
            runner.run(&program, &mut slots, &call(&tokens, batch, position));
            let found = runner.buffer(out);
            for (b, t, h) in
                (0..batch * length * heads).map(|n| (n / (length * heads), n / heads % length, n % heads))
            {
                let q = &q[((b * length + t) * heads + h) * d..][..d];
                let (g, end) = (h / (heads / kv_heads), position + t + 1);
                let start = window.map_or(0, |w| end.saturating_sub(w));
                let dot = |p: usize| -> f64 {
                    (0..d).map(|i| f64::from(q[i]) * f64::from(k(b, g, p, i))).sum::<f64>() * f64::from(scale)
                };
                let weights: Vec<f64> = (start..end).map(|p| dot(p).exp()).collect();
                let sink = sinks.as_ref().map_or(0.0, |s| f64::from(s[h]).exp());
                let total = weights.iter().sum::<f64>() + sink;
                for i in 0..dv {
                    let y: f64 = weights
                        .iter()
                        .zip(start..end)
                        .map(|(w, p)| w / total * f64::from(v(b, g, p, i)))
                        .sum();
                    let at = ((b * length + t) * heads + h) * dv + i;
                    let far = (f64::from(found[at]) - y).abs();
                    assert!(
                        far < 2e-6,
                        "half {half}, {heads}/{kv_heads} heads of {d} and {dv}, {window:?}, batch {b} of {batch}, {position}+{t}, \
                         head {h}, {i}: {} for {y}",
                        found[at]
                    );
                }
            }
        }
    }
}

/// The cache's positions are cut at the same places for any number of threads.
#[test]
fn attention_is_the_same_bits_on_any_number_of_threads() {
    let (heads, kv_heads, d, seen) = (6, 2, 16, 1500);
    let rows = |salt, len| Cells::from(noise(salt, len));
    let of = |threads: usize| {
        let mut slots = [Slot::Kv {
            keys: rows(1, kv_heads * seen * d).into(),
            values: rows(2, kv_heads * seen * d).into(),
            heads: kv_heads,
            key_width: d,
            value_width: d,
            capacity: seen,
            window: None,
            dropped: 0,
        }];
        let mut program = Program::new();
        let (queries, out) = (program.buffer(heads * d), program.buffer(heads * d));
        let attend = Attend { queries, heads, slot: 0, scale: 0.5, window: None, sinks: None, out };
        let merge = attend.merge(d);
        program.push(0, attend);
        program.push(0, merge);
        let mut runner = Runner::new(threads, 2);
        runner.fill(&program, queries, 1, &noise(3, heads * d));
        runner.run(&program, &mut slots, &call(&[0], 1, seen - 1));
        runner.buffer(out).to_vec()
    };
    let expected = of(1);
    assert!(expected.iter().all(|v| v.is_finite() && *v != 0.0));
    for threads in [2, 3, 8] {
        assert_eq!(of(threads), expected, "{threads} threads");
    }
}

#[test]
fn a_window_keeps_what_is_seen_and_its_memory_stays_small() {
    let (batch, heads, width, window) = (2, 3, 4, 100);
    let mut slot = Slot::kv(heads, width, width).windowed(Some(window));
    let at = |b: usize, h: usize, p: usize| (1_000_000 * b + 100_000 * h + p) as f32;
    let mut position = 0;
    for length in [1, 1, 700, 1, 300, 2, 90].into_iter().chain(std::iter::repeat_n(1, 3000)) {
        slot.reserve(batch, position, position + length);
        let Slot::Kv { keys, values, capacity, dropped, .. } = &mut slot else {
            panic!("not keys and values")
        };
        for (b, h) in (0..batch * heads).map(|n| (n / heads, n % heads)) {
            for store in [&mut *keys, &mut *values] {
                let Store::F32(cells) = store else { panic!("not of float32") };
                let all = cells.as_mut_slice();
                let base = (b * heads + h) * *capacity;
                for p in position..position + length {
                    all[(base + p - *dropped) * width..][..width].fill(at(b, h, p));
                }
                for p in (position + 1).saturating_sub(window)..position + length {
                    let found = &all[(base + p - *dropped) * width..][..width];
                    assert_eq!(found, [at(b, h, p); 4], "position {p} after {position}, {length} more");
                }
            }
        }
        position += length;
    }
    let bytes = 2 * 4 * batch * heads * width * 256;
    assert_eq!(slot.bytes(), bytes, "after {position} positions");
}

#[test]
fn a_convolution_goes_on_where_the_last_call_stopped() {
    let (channels, width, taps, batch) = (16, 12, 4, 2);
    let stored = |floats: &[f32]| {
        let bytes: Vec<u8> = floats.iter().flat_map(|f| f.to_le_bytes()).collect();
        Data::Dense { elements: Bytes::copy_of(&bytes).unwrap(), float: Float::F32 }
    };
    let w = noise(1, 3 * channels * width);
    let matrix = Matrix::new(stored(&w), 1, 3 * channels, width).unwrap();
    let (bias, kernel, conv_bias) = (noise(2, 3 * channels), noise(3, channels * taps), noise(4, channels));
    let mut program = Program::new();
    let (x, out) = (program.buffer(width), program.buffer(channels));
    let source = Source::new(x, None, &matrix);
    program.push(0, source.pack());
    program.push(
        0,
        ShortConv {
            source,
            matrix,
            bias: Some(bias.clone()),
            kernel: kernel.clone(),
            taps,
            conv_bias: Some(conv_bias.clone()),
            slot: 0,
            out,
        },
    );
    let mut runner = Runner::new(2, 2);
    let mut slots = [Slot::rows(taps - 1, channels)];
    let total = 14;
    // [batch, total, width]
    let input = noise(5, batch * total * width);
    let row = |b: usize, t: usize| &input[(b * total + t) * width..][..width];
    let product = |b: usize, t: usize, r: usize| -> f64 {
        let sum: f64 = (0..width).map(|i| f64::from(w[r * width + i]) * f64::from(row(b, t)[i])).sum();
        sum + f64::from(bias[r])
    };
    let mut position = 0;
    for length in [1, 1, 2, 3, 1, 5, 1] {
        let tokens = vec![0; batch * length];
        let now: Vec<f32> =
            (0..batch).flat_map(|b| (0..length).flat_map(move |t| row(b, position + t)).copied()).collect();
        runner.fill(&program, x, tokens.len(), &now);
        runner.run(&program, &mut slots, &call(&tokens, batch, position));
        let found = runner.buffer(out);
        for (b, t, c) in (0..batch * length * channels)
            .map(|n| (n / (length * channels), n / channels % length, n % channels))
        {
            let gated = |t: usize| product(b, t, c) * product(b, t, 2 * channels + c);
            let at = position + t;
            let conv: f64 = (0..taps)
                .filter(|k| at + k + 1 >= taps)
                .map(|k| f64::from(kernel[c * taps + k]) * gated(at + k + 1 - taps))
                .sum();
            let y = product(b, at, channels + c) * (conv + f64::from(conv_bias[c]));
            let got = found[(b * length + t) * channels + c];
            assert!(
                (f64::from(got) - y).abs() < 2e-5 * y.abs().max(1.0),
                "{b}, {at}, channel {c}: {got} for {y}"
            );
        }
        position += length;
    }
    assert_eq!(position, total);
}

/// Runs a router over one row of logits a token.
fn route(
    logits: &[Vec<f32>],
    k: usize,
    make: impl Fn(Buffer, Buffer, Buffer) -> Route,
) -> Vec<Vec<(usize, f32)>> {
    let experts = logits[0].len();
    let mut program = Program::new();
    let buffers = [program.buffer(experts), program.buffer(k), program.buffer(k)];
    program.push(0, make(buffers[0], buffers[1], buffers[2]));
    let mut runner = Runner::new(2, 1);
    let tokens = vec![0; logits.len()];
    runner.fill(&program, buffers[0], tokens.len(), &logits.concat());
    runner.run(&program, &mut [], &call(&tokens, 1, 0));
    let indices: Vec<usize> = runner.buffer(buffers[1]).iter().map(|i| *i as usize).collect();
    let weights = runner.buffer(buffers[2]).to_vec();
    let pairs: Vec<(usize, f32)> = indices.into_iter().zip(weights).collect();
    pairs.chunks(k).take(logits.len()).map(<[_]>::to_vec).collect()
}

#[test]
fn routers_choose_by_score_and_index_and_weigh_without_the_bias() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let plain = |scores, bias: Option<Vec<f32>>, renormalise, scale, k, experts| {
        move |logits, indices, weights| Route {
            logits,
            experts,
            k,
            scores,
            bias: bias.clone(),
            ties: Ties::Higher,
            groups: None,
            renormalise,
            scale,
            indices,
            weights,
        }
    };
    let rows = vec![
        vec![0.0; 5],
        vec![1.0, 2.0, 2.0, 1.0, 2.0],
        vec![-inf, 3.0, -inf, -inf, -inf],
        vec![90.0, -90.0, 1.0, 2.0, 3.0],
        vec![nan, 0.0, 1.0, 2.0, 3.0],
    ];
    let found = route(&rows, 2, plain(Scores::Sigmoid, None, Some(0.0), 1.0, 2, 5));
    let chosen: Vec<Vec<usize>> = found.iter().map(|r| r.iter().map(|p| p.0).collect()).collect();
    // Of equal scores the higher index; NaN counts as the largest, so that it shows.
    assert_eq!(chosen, [vec![3, 4], vec![2, 4], vec![4, 1], vec![4, 0], vec![4, 0]]);
    assert_eq!(found[0], [(3, 0.5), (4, 0.5)]);
    assert_eq!(found[2], [(4, 0.0), (1, 1.0)]);
    assert!(found[4].iter().all(|p| p.1.is_nan()), "{:?}", found[4]);

    let biased =
        route(&rows[..2], 2, plain(Scores::Sigmoid, Some(vec![0.0, 9.0, 0.0, 9.0, 0.0]), None, 2.0, 2, 5));
    assert_eq!(biased[0], [(1, 1.0), (3, 1.0)], "the bias chooses, and does not weigh");
    assert_eq!(biased[1].iter().map(|p| p.0).collect::<Vec<_>>(), [3, 1]);

    // All experts, one expert.
    let all = route(&rows[1..2], 5, plain(Scores::Softmax, None, None, 1.0, 5, 5));
    assert_eq!(all[0].iter().map(|p| p.0).collect::<Vec<_>>(), [0, 3, 1, 2, 4]);
    assert!((all[0].iter().map(|p| p.1).sum::<f32>() - 1.0).abs() < 1e-6);
    let one = route(&[vec![-7.0], vec![-inf]], 1, plain(Scores::Sigmoid, None, Some(0.0), 1.0, 1, 1));
    assert_eq!(one[0], [(0, 1.0)]);
    assert!(one[1][0].1.is_nan(), "nothing over nothing");
    let chosen = route(&[vec![1.0, 5.0, 5.0, 2.0]], 3, plain(Scores::SoftmaxOfChosen, None, None, 1.0, 3, 4));
    assert_eq!(chosen[0].iter().map(|p| p.0).collect::<Vec<_>>(), [3, 1, 2]);
    assert!((chosen[0][0].1 - (-3f32).exp() / (2.0 + (-3f32).exp())).abs() < 1e-6);
}

#[test]
fn groups_are_kept_by_the_sum_of_their_two_best() {
    let bias = vec![0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0];
    let make = |ties, keep, bias: Option<Vec<f32>>| {
        move |logits, indices, weights| Route {
            logits,
            experts: 8,
            k: 3,
            scores: Scores::Sigmoid,
            bias: bias.clone(),
            ties,
            groups: Some(Groups { count: 4, keep }),
            renormalise: None,
            scale: 1.0,
            indices,
            weights,
        }
    };
    let experts = |row: &[f32], make| -> Vec<usize> {
        let mut all: Vec<usize> = route(&[row.to_vec()], 3, make)[0].iter().map(|p| p.0).collect();
        all.sort_unstable();
        all
    };
    // The best expert is alone in its group, which the sum of two does not keep.
    let row = [5.0, -9.0, 1.0, 1.0, 2.0, 0.0, -9.0, -9.0];
    assert_eq!(experts(&row, make(Ties::Lower, 2, None)), [2, 3, 4]);
    assert_eq!(experts(&row, make(Ties::Lower, 4, None)), [0, 2, 4]);
    // Equal groups: the lower index goes first; equal experts: as the rule says.
    assert_eq!(experts(&[0.0; 8], make(Ties::Lower, 2, None)), [4, 5, 6]);
    assert_eq!(experts(&[0.0; 8], make(Ties::Higher, 2, None)), [5, 6, 7]);
    // Dropped groups rank as zero, which is above what a bias pushes below.
    let low = Some(vec![-9.0; 8]);
    assert_eq!(experts(&[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], make(Ties::Lower, 1, low)), [0, 1, 2]);
    assert_eq!(experts(&row, make(Ties::Lower, 1, Some(bias))), [0, 2, 3]);
}

#[test]
fn all_of_this_holds_on_the_portable_path() {
    support::all_again("all_of_this_holds_on_the_portable_path");
}
