//! Graph ops of which fused ones are made, against MLX's own kernels, double precision, or themselves fed otherwise.

use std::sync::Arc;

use zmlx_graph::ops::*;
use zmlx_graph::state::SlotKind;
use zmlx_graph::weights::{Format, TensorSpec};
use zmlx_graph::{Builder, Executor, Graph, Value};
use zmlx_mlx::{Array, Dtype, Result, fast};

const VOCABULARY: i32 = 16;

fn noise(name: &str, len: usize) -> Vec<f32> {
    let mut state = name.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into())) | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 29 ^ state) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn tensor(spec: &TensorSpec) -> Option<Array> {
    let len: i32 = spec.shape.iter().product();
    Array::from_vec(noise(&spec.name, len as usize), &spec.shape).ok()
}

fn executor(write: impl FnOnce(&mut Builder<'_>, Value) -> Value) -> (Graph, Executor) {
    let dense = |_: &str, _: i32| Format::Dense;
    let mut b = Builder::new(&dense);
    let ids = b.tokens();
    let out = write(&mut b, ids);
    let graph = b.finish(out);
    let executor = Executor::new(Arc::new(graph.clone()), tensor).unwrap();
    (graph, executor)
}

fn close(label: &str, expected: &[f32], found: &[f32], most: f32) {
    assert_eq!(expected.len(), found.len(), "{label}");
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for (i, (e, f)) in expected.iter().zip(found).enumerate() {
        assert!((e - f).abs() <= most * largest.max(1.0), "{label}, {i}: {f} for {e}");
    }
}

/// Runs the calls one after another and joins what they give along the length, which is axis 1 or 2.
fn joined(executor: &Executor, ids: &[u32], lengths: &[usize], axis: i32) -> Result<Vec<f32>> {
    let mut state = executor.new_state();
    let (mut parts, mut at) = (Vec::new(), 0);
    for &length in lengths {
        let ids = Array::from_slice(&ids[at..at + length], &[1, length as i32])?;
        parts.push(executor.run(&ids, &mut state).unwrap());
        at += length;
    }
    assert_eq!(at, ids.len());
    zmlx_mlx::ops::concatenate(&parts.iter().collect::<Vec<_>>(), axis)?.to_vec::<f32>()
}

#[test]
fn the_delta_rule_is_that_of_mlx() -> Result<()> {
    let (key_heads, heads, key, value) = (2, 4, 32, 16);
    let sizes = [key_heads * key, key_heads * key, heads * value, heads, heads];
    let part = |b: &mut Builder<'_>, ids, i: usize| {
        let path = ["q", "k", "v", "a", "b"][i];
        let x = b.embedding(path, ids, VOCABULARY, sizes[i]);
        if i < 3 {
            b.node(path, SplitHeads { heads: if i < 2 { key_heads } else { heads } }, &[x])
        } else {
            x
        }
    };
    let write = |wanted: usize| {
        executor(|b, ids| {
            let [q, k, v, a, beta] = std::array::from_fn(|i| part(b, ids, i));
            let unit = |b: &mut Builder<'_>, x| b.node("unit", UnitNorm { scale: 0.2, eps: 1e-6 }, &[x]);
            let (q, k) = (unit(b, q), unit(b, k));
            let (a_log, dt_bias) = (b.bare_f32("A_log", &[heads]), b.bare_f32("dt_bias", &[heads]));
            let g = b.node("gate", DeltaGate { a_log, dt_bias }, &[a]);
            let beta = b.node("beta", Sigmoid, &[beta]);
            let slot = b.slot("delta", SlotKind::DeltaState);
            let y = b.node("delta", GatedDelta { slot }, &[q, k, v, g, beta]);
            [q, k, v, g, beta, y][wanted]
        })
        .1
    };
    let ids: Vec<u32> = (0..13).map(|i| i * 5 % VOCABULARY as u32).collect();
    let row = Array::from_slice(&ids, &[1, ids.len() as i32])?;
    let input = |wanted| {
        let executor = write(wanted);
        executor.run(&row, &mut executor.new_state()).unwrap()
    };
    let [q, k, v, g, beta] = std::array::from_fn(input);
    let (gates, bias) = (noise("A_log", heads as usize), noise("dt_bias", heads as usize));
    let a = noise("a.weight", (VOCABULARY * heads) as usize);
    for (t, id) in ids.iter().enumerate() {
        for h in 0..heads as usize {
            let x = f64::from(a[*id as usize * heads as usize + h] + bias[h]);
            let expected = (-f64::from(gates[h]).exp() * (1.0 + x.exp()).ln()).exp();
            let found = g.to_vec::<f32>()?[t * heads as usize + h];
            assert!((f64::from(found) - expected).abs() < 1e-6, "gate {t}, {h}: {found} for {expected}");
        }
    }
    let expected = fast::gated_delta_update(&q, &k, &v, &g, &beta, None, None)?[0].to_vec::<f32>()?;
    let whole = write(5);
    for lengths in [&[13][..], &[1, 5, 1, 6], &[1; 13]] {
        close(&format!("{lengths:?}"), &expected, &joined(&whole, &ids, lengths, 1)?, 1e-5);
    }
    Ok(())
}

/// Latent attention, over the `k` best positions if it is sparse.
fn latent_attention(b: &mut Builder<'_>, ids: Value, k: Option<i32>) -> Value {
    let (heads, nope, rope, latent, value) = (3, 12, 8, 20, 10);
    let head_first = |b: &mut Builder<'_>, path: &str, heads: i32, width: i32| {
        let x = b.embedding(path, ids, VOCABULARY, heads * width);
        let x = b.node(path, SplitHeads { heads }, &[x]);
        b.node(path, Transpose(vec![0, 2, 1, 3]), &[x])
    };
    let (q, q_pe) = (head_first(b, "q", heads, nope), head_first(b, "q_pe", heads, rope));
    let (c, k_pe) = (head_first(b, "c", 1, latent), head_first(b, "k_pe", 1, rope));
    let slot = b.slot("mla", SlotKind::KvCache);
    let [c, k_pe] = b.node_n("mla", KvAppend { slot }, &[c, k_pe]);
    let embed = b.matrices("embed", [heads, latent, nope]);
    let unembed = b.matrices("unembed", [heads, value, latent]);
    let attention = MlaAttention { embed, unembed, scale: 0.25 };
    let Some(k) = k else { return b.node("mla", attention, &[q, q_pe, c, k_pe]) };
    let (index_q, index_k) = (head_first(b, "index_q", 4, 16), head_first(b, "index_k", 1, 16));
    let turned = |b: &mut Builder<'_>, x| {
        b.node("index", Rope { dims: 8, base: 1e2, traditional: false, scale: 1.0 }, &[x])
    };
    let (index_q, index_k) = (turned(b, index_q), turned(b, index_k));
    let weights = b.embedding("weights", ids, VOCABULARY, 4);
    let slot = b.slot("index", SlotKind::KvCache);
    let [keys, _] = b.node_n("index", KvAppend { slot }, &[index_k, index_k]);
    let positions = b.node("index", TopPositions { k }, &[index_q, keys, weights]);
    b.node("mla", SparseMlaAttention(attention), &[q, q_pe, c, k_pe, positions])
}

#[test]
fn sparse_latent_attention_gathered_and_masked_is_the_same() -> Result<()> {
    let ids: Vec<u32> = (0..23).map(|i| i * 7 % VOCABULARY as u32).collect();
    let run = |k: Option<i32>, lengths: &[usize]| {
        let (_, executor) = executor(|b, ids| latent_attention(b, ids, k));
        joined(&executor, &ids, lengths, 2)
    };
    let dense = run(None, &[1; 23])?;
    let sparse = run(Some(5), &[1; 23])?;
    for lengths in [&[23][..], &[4, 1, 6, 12], &[2, 20, 1]] {
        close(&format!("{lengths:?}"), &sparse, &run(Some(5), lengths)?, 2e-6);
        close(&format!("all in {lengths:?}"), &dense, &run(Some(23), lengths)?, 2e-6);
    }
    // Values of a head are 10 wide: the first five tokens see all there is, the others do not.
    let head = |v: &[f32], token: usize| v[token * 10..(token + 1) * 10].to_vec();
    for token in 0..23 {
        let same = head(&dense, token) == head(&sparse, token);
        assert_eq!(same, token < 5, "token {token}");
    }
    Ok(())
}

#[test]
fn latent_attention_absorbed_and_expanded_is_the_same() -> Result<()> {
    let (heads, latent, value) = (3, 20, 10);
    let (_, executor) = executor(|b, ids| latent_attention(b, ids, None));
    let ids: Vec<u32> = (0..11).map(|i| i * 7 % VOCABULARY as u32).collect();
    let singles = joined(&executor, &ids, &[1; 11], 2)?;
    for lengths in [&[11][..], &[4, 1, 6], &[2, 9]] {
        close(&format!("{lengths:?}"), &singles, &joined(&executor, &ids, lengths, 2)?, 2e-6);
    }
    // The first token sees itself alone: its values are U c.
    let (c, u) = (noise("c.weight", 16 * 20), noise("unembed.weight", 3 * 10 * 20));
    for (h, v) in (0..heads as usize).flat_map(|h| (0..value as usize).map(move |v| (h, v))) {
        let row = &u[(h * value as usize + v) * latent as usize..][..latent as usize];
        let expected: f32 = row.iter().zip(&c).map(|(u, c)| u * c).sum();
        let found = singles[(h * 11) * value as usize + v];
        assert!((found - expected).abs() < 1e-5, "head {h}, {v}: {found} for {expected}");
    }
    Ok(())
}

/// erf by its series, good to 1e-14 where it is used.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

#[test]
fn gelu_gates_and_norms_are_their_formulas() -> Result<()> {
    let ids: Vec<u32> = (0..VOCABULARY as u32).collect();
    let row = Array::from_slice(&ids, &[1, VOCABULARY])?;
    let width = 9;
    let (g, u) = (noise("gate.weight", 144), noise("up.weight", 144));
    let gelu = |kind: GeGlu, x: f64| match kind {
        GeGlu::Tanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        GeGlu::Erf => x * 0.5 * (1.0 + erf(x / std::f64::consts::SQRT_2)),
    };
    for kind in [GeGlu::Tanh, GeGlu::Erf] {
        let (_, executor) = executor(|b, ids| {
            let (g, u) =
                (b.embedding("gate", ids, VOCABULARY, width), b.embedding("up", ids, VOCABULARY, width));
            let g = b.node("mlp", MultiplyScalar(4.0), &[g]);
            b.node("mlp", kind, &[g, u])
        });
        let found = executor.run(&row, &mut executor.new_state()).unwrap().to_vec::<f32>()?;
        let expected: Vec<f32> =
            g.iter().zip(&u).map(|(g, u)| (gelu(kind, f64::from(4.0 * g)) * f64::from(*u)) as f32).collect();
        close(&format!("{kind:?}"), &expected, &found, 1e-6);
    }
    let (_, executor) = executor(|b, ids| {
        let x = b.embedding("gate", ids, VOCABULARY, width);
        let (weight, bias) = (b.tensor("norm", &[width]), b.bias("norm", width));
        b.node("norm", LayerNorm { weight: Some(weight), bias: Some(bias), eps: 1e-5 }, &[x])
    });
    let found = executor.run(&row, &mut executor.new_state()).unwrap();
    assert_eq!(found.dtype(), Dtype::Float32);
    let (w, b) = (noise("norm.weight", 9), noise("norm.bias", 9));
    let norm = |x: &[f32]| -> Vec<f32> {
        let x: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
        let mean = x.iter().sum::<f64>() / 9.0;
        let var = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / 9.0;
        let y = |i: usize| (x[i] - mean) / (var + 1e-5).sqrt() * f64::from(w[i]) + f64::from(b[i]);
        (0..9).map(|i| y(i) as f32).collect()
    };
    let expected: Vec<f32> = g.chunks(9).flat_map(norm).collect();
    close("layer norm", &expected, &found.to_vec::<f32>()?, 1e-5);
    Ok(())
}
