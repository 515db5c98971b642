//! Prompts in one call.

use std::sync::Arc;
use std::time::Instant;

use zmlx_graph::profile::ProfileRow;
use zmlx_graph::{CostContext, Profile, ProfileReport, Sizes, Wanted};
use zmlx_mlx::stream::{Device, Stream, with_stream};
use zmlx_mlx::{Array, Dtype};
use zmlx_models::measured::Prefill;

use crate::compare::kl;
use crate::{Pair, Result, make};

/// A prompt of one call on both, the first time left out (MLX compiles kernels then), and how far the last logits are apart.
pub(crate) fn prefill_rates(pair: &Pair, prompt: &[u32]) -> Result<Prefill> {
    let tokens = Array::from_slice(prompt, &[1, prompt.len() as i32])?;
    let mut rates: [Vec<f64>; 2] = Default::default();
    let mut rows: [Vec<f32>; 2] = Default::default();
    for _ in 0..4 {
        for (form, executor) in [&pair.stock, &pair.past].into_iter().enumerate() {
            let start = Instant::now();
            let mut state = executor.new_state();
            let logits = executor.run_for(&tokens, &mut state, Wanted::Last)?.ok_or("no logits")?;
            rows[form] = logits.astype(Dtype::Float32)?.to_vec()?;
            rates[form].push(prompt.len() as f64 / start.elapsed().as_secs_f64());
        }
    }
    let [stock, ours] = rates.map(|all| all[1..].to_vec());
    let shown = |all: &[f64]| all.iter().map(|r| format!("{r:.0}")).collect::<Vec<_>>().join(", ");
    println!(
        "  prefill of {}: {} tok/s, stock {}; KL of the last logits {:.1e}",
        prompt.len(),
        shown(&ours),
        shown(&stock),
        kl(&rows[0], &rows[1])
    );
    Ok(Prefill { length: prompt.len() as u64, stock, ours })
}

/// Where the time of a prompt of 2,048 tokens goes, by op and by module: each node is evaluated before the next, so that the sum is
/// more than an undisturbed call takes. All rows pass through the head here; a call that wants the last has one.
pub(crate) fn prefill_ops(name: &str) -> Result<()> {
    with_stream(Stream::default_of(Device::Gpu)?, || {
        let pair = make(name)?;
        let past = pair.past.held().prompts(Arc::clone(pair.stock.graph()), |_| None)?;
        let ids: Vec<u32> = (0..2048u64)
            .map(|i| (i.wrapping_mul(2_654_435_761) % pair.blueprint.info.vocab_size as u64) as u32)
            .collect();
        let tokens = Array::from_slice(&ids, &[1, ids.len() as i32])?;
        let sizes = Sizes { batch: 1, length: ids.len() as i64, position: 0 };
        let mut reports = Vec::new();
        for executor in [&pair.stock, &past] {
            let mut calls = Vec::new();
            for call in 0..4 {
                let profile = executor.profile(&tokens, &mut executor.new_state())?.1;
                // MLX compiles kernels in the first.
                if call > 0 {
                    calls.push(profile);
                }
            }
            let weight_bytes = executor.weight_bytes();
            let cost = executor.graph().cost(&CostContext {
                sizes,
                activation: executor.activation(),
                weight_bytes,
            })?;
            reports.push(ProfileReport::new(executor.graph(), &cost, &Profile::median(&calls), 3e12));
        }
        let [stock, past] = &reports[..] else { return Err("two reports were made".into()) };
        println!("{name}, prompt of {}: ms on stock MLX and past it, each node waited for", ids.len());
        beside("op", &stock.by_op, &past.by_op);
        beside("module", &stock.by_module, &past.by_module);
        println!("  together {:.2} and {:.2} ms", stock.total.seconds * 1e3, past.total.seconds * 1e3);
        Ok(())
    })
}

/// A table of the second's rows, the longest first, beside those of the first that have the same name.
fn beside(kind: &str, stock: &[ProfileRow], past: &[ProfileRow]) {
    println!("  {kind:<48} {:>6} {:>9} {:>6} {:>9} {:>6}", "nodes", "stock", "share", "past", "share");
    for row in past {
        let other = stock.iter().find(|s| s.name == row.name);
        let (ms, share) = other.map_or((0.0, 0.0), |s| (s.seconds * 1e3, s.share * 100.0));
        println!(
            "  {:<48} {:>6} {ms:>9.3} {share:>5.1}% {:>9.3} {:>5.1}%",
            row.name,
            row.nodes,
            row.seconds * 1e3,
            row.share * 100.0
        );
    }
}
