//! Stock, decode past MLX and float32, fed the same tokens.

use std::collections::BTreeMap;
use std::sync::Arc;

use zmlx_graph::{Executor, Held};
use zmlx_mlx::{Array, Dtype};
use zmlx_models::measured::{Compared, Distance, Divergence, Divergences, likeliest};

use crate::{Pair, Result, prefilled};

/// Steps whose logits are compared.
const COMPARED: usize = 32;

/// The family's graph in float32 on MLX, with the same weights.
fn reference(pair: &Pair) -> Result<Executor> {
    let graph = Arc::clone(pair.stock.graph());
    let mut tensors: BTreeMap<String, Array> = BTreeMap::new();
    for (weight, bound) in graph.weights.iter().zip(pair.stock.weights()) {
        let arrays = bound.iter().flat_map(|bound| bound.arrays());
        for (spec, array) in weight.tensors().into_iter().zip(arrays) {
            let array = if spec.float { array.astype(Dtype::Float32)? } else { array.clone() };
            // It was added when the weight was bound, and will be again.
            let offset = f64::from(weight.offset);
            let array = if offset == 0.0 { array } else { array.add_scalar(-offset)? };
            tensors.insert(spec.name, array);
        }
    }
    Ok(Held::none().stock(graph, |spec| tensors.get(&spec.name).cloned())?)
}

/// The same tokens on stock, past MLX and in float32: how far logits are from float32's, how often the likeliest differs, and
/// where first. Float32 is exact only with `MLX_ENABLE_TF32=0`.
pub(crate) fn compare(pair: &Pair, prompt: &[u32]) -> Result<Compared> {
    let exact = reference(pair)?;
    let executors = [&exact, &pair.stock, &pair.past];
    let mut states = Vec::new();
    for executor in executors {
        states.push(prefilled(executor, prompt)?);
    }
    let mut token = prompt[prompt.len() - 1];
    let (mut errors, mut flips, mut divergence) = ([0f64; 2], [0u64; 2], [0f64; 3]);
    // Of stock and ours beside float32, and of ours beside stock.
    let mut first: [Option<Divergence>; 3] = Default::default();
    for step in 0..COMPARED as u64 {
        let ids = Array::from_slice(&[token], &[1, 1])?;
        let mut rows = Vec::new();
        for (executor, state) in executors.into_iter().zip(&mut states) {
            let logits = executor.run(&ids, state)?.astype(Dtype::Float32)?;
            rows.push(logits.to_vec::<f32>()?);
        }
        let norm = |row: &mut dyn Iterator<Item = f64>| row.map(|v| v * v).sum::<f64>().sqrt();
        for form in [1, 2] {
            let pairs = || rows[0].iter().zip(&rows[form]).map(|(a, b)| (f64::from(*a), f64::from(*b)));
            let error = norm(&mut pairs().map(|(a, b)| a - b)) / norm(&mut pairs().map(|(a, _)| a));
            errors[form - 1] += error / COMPARED as f64;
            divergence[form - 1] += kl(&rows[0], &rows[form]) / COMPARED as f64;
            flips[form - 1] += u64::from(likeliest(&rows[0]) != likeliest(&rows[form]));
        }
        for (known, [base, other]) in first.iter_mut().zip([[0, 1], [0, 2], [1, 2]]) {
            *known = known.take().or_else(|| Divergence::of(step, &rows[base], &rows[other]));
        }
        divergence[2] += kl(&rows[1], &rows[2]) / COMPARED as f64;
        token = likeliest(&rows[0]);
    }
    for (form, name) in ["stock", "past MLX"].into_iter().enumerate() {
        println!(
            "  {COMPARED} steps beside float32, {name}: logits apart by {:.2e} of their norm, mean KL {:.2e}, {} other tokens",
            errors[form], divergence[form], flips[form]
        );
    }
    println!("  mean KL of stock and past MLX {:.2e}", divergence[2]);
    let names = ["stock beside float32", "past MLX beside float32", "past MLX beside stock"];
    for (name, first) in names.iter().zip(&first) {
        let told = first.as_ref().map_or_else(|| format!("none in {COMPARED} steps"), Divergence::to_string);
        println!("  first other token, {name}: {told}");
    }
    let distance =
        |form: usize| Distance { error: errors[form], kl: divergence[form], other_tokens: Some(flips[form]) };
    let [stock, ours, ours_beside_stock] = first;
    Ok(Compared {
        steps: COMPARED as u64,
        stock: distance(0),
        ours: distance(1),
        kl_of_both: Some(divergence[2]),
        divergences: Some(Divergences { stock, ours, ours_beside_stock }),
    })
}

/// KL(softmax(a) || softmax(b)).
pub(crate) fn kl(a: &[f32], b: &[f32]) -> f64 {
    let log_sum = |row: &[f32]| {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(most) + row.iter().map(|v| f64::from(v - most).exp()).sum::<f64>().ln()
    };
    let (la, lb) = (log_sum(a), log_sum(b));
    a.iter()
        .zip(b)
        .map(|(x, y)| {
            let (x, y) = (f64::from(*x) - la, f64::from(*y) - lb);
            x.exp() * (x - y)
        })
        .sum()
}
