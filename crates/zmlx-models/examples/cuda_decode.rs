//! Checks and times decode past MLX on an NVIDIA GPU: `cuda_decode embedded`, then `cuda_decode lfm2_8b qwen3_30b`.
//!
//! `embedded`: the embedded model's greedy tokens in float32 and bfloat16 beside those of `fixtures/`, which mlx-lm gave on
//! a CPU; the first that differs is shown with the margin that the CPU saw there.
//! Any other name: a published shape with random 4-bit weights made on the GPU. The logits of the same tokens on stock MLX
//! and past it, then 128 tokens after a prompt of 64, three times each, interleaved; with `--prefill` prompts of
//! 128, 512 and 2,048 tokens in one call; with `--launches` the time of each launch; with `--context N` after a prompt of N.
//! Without all that: with `--prefill-ops` the time of each kind of op of a prompt of 2,048; with `--past` decode past MLX
//! alone, after as many tokens of its own (and `--tokens N` instead of 128 timed), since MLX takes minutes to compile its
//! kernels; a context of more than 1,024 is read on MLX all the same.
//! `ZMLX_CUDA_OVERLAP=0` compares with launches that wait for one another.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use zmlx_graph::pattern::{Backend, Choice, rewrite};
use zmlx_graph::profile::ProfileRow;
use zmlx_graph::weights::TensorSpec;
use zmlx_graph::{
    CostContext, Executor, Fidelity, GraphError, Held, Profile, ProfileReport, Sizes, State, Wanted, patterns,
};
use zmlx_mlx::stream::{Device, Stream, with_stream};
use zmlx_mlx::{Array, Dtype, eval, ops, random};
use zmlx_models::random::MODELS;
use zmlx_models::{
    Blueprint, DeviceChoice, DtypeChoice, Flow, GenerateOptions, LoadOptions, Model, ModelConfig,
    PatchOptions, Session,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Tokens that are timed.
const TOKENS: usize = 128;
/// Longer contexts are read on MLX, also where nothing else runs on it.
const READ_FROM: usize = 1024;
/// Steps whose logits are compared.
const COMPARED: usize = 32;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let launches = arguments.iter().any(|a| a == "--launches");
    let given = arguments.iter().position(|a| a == "--context").and_then(|at| arguments.get(at + 1));
    let context: usize = given.map_or(Ok(64), |n| n.parse())?;
    if context == 0 {
        return Err("--context 0: give 1 token or more".into());
    }
    let count = arguments.iter().position(|a| a == "--tokens").and_then(|at| arguments.get(at + 1));
    let tokens: usize = count.map_or(Ok(TOKENS), |n| n.parse())?;
    let past = arguments.iter().any(|a| a == "--past");
    let names = arguments.iter().filter(|a| !a.starts_with("--") && ![given, count].contains(&Some(*a)));
    let prefill = arguments.iter().any(|a| a == "--prefill");
    let ops = arguments.iter().any(|a| a == "--prefill-ops");
    for name in names {
        match name.as_str() {
            "embedded" => embedded()?,
            name if past => past_alone(name, [context, tokens], launches)?,
            name if ops => prefill_ops(name)?,
            name => shape(name, context, launches, prefill)?,
        }
    }
    Ok(())
}

fn embedded() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let golden: Value = serde_json::from_str(include_str!("../../../fixtures/tiny-lfm2-moe.golden.json"))?;
    let folder = match root.join("models/tiny-lfm2-moe") {
        folder if folder.is_dir() => folder,
        _ => zmlx_models::embedded_model_dir()?,
    };
    for dtype in [DtypeChoice::F32, DtypeChoice::Bf16] {
        let patch = Some(PatchOptions { environment: false, ..PatchOptions::default() });
        let options = LoadOptions { dtype, device: DeviceChoice::Gpu, patch, ..LoadOptions::default() };
        let start = Instant::now();
        let model = Model::load(&folder, &options, &mut |_| {})?;
        println!("embedded, {dtype}: ready after {:.2} s", start.elapsed().as_secs_f64());
        for case in golden["cases"].as_array().into_iter().flatten() {
            let ids = |name: &str| -> Vec<u32> {
                case[name]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(|v| v.as_u64())
                    .map(|v| v as u32)
                    .collect()
            };
            let (prompt, wanted) = (ids("prompt_ids"), ids("tokens"));
            let options = GenerateOptions { max_tokens: 100, ignore_eos: true, ..GenerateOptions::default() };
            let done = Session::new(&model).generate(&prompt, &options, &mut |_| Flow::Continue)?;
            let differs = (0..100).find(|&i| done.tokens.get(i) != wanted.get(i));
            let verdict = differs.map_or("100 tokens are the CPU's".to_owned(), |at| {
                let (got, want) = (done.tokens[at], wanted[at]);
                format!("token {at} is {got}, the CPU's {want}, margin there {}", case["margins"][at])
            });
            println!("  prompt of {}: {verdict}; {:.0} tok/s", prompt.len(), done.decode_tps);
        }
        if let Some(report) = model.patch_report() {
            println!("{report}");
        }
    }
    Ok(())
}

/// Stock and patched executors of one shape, which share their weights.
struct Pair {
    stock: Executor,
    past: Executor,
    vocabulary: usize,
}

fn make(name: &str) -> Result<Pair> {
    let model = MODELS.iter().find(|m| m.name == name);
    let known = || MODELS.iter().map(|m| m.name).collect::<Vec<_>>().join(", ");
    let model = model.ok_or_else(|| format!("{name} is none of embedded, {}", known()))?;
    let mut config = (model.config)();
    if config.get("quantization").is_none() {
        config["quantization"] = json!({"group_size": 64, "bits": 4});
    }
    let config = ModelConfig::from_json(config.as_object().cloned().unwrap_or_default());
    let blueprint = Blueprint::from_config(&config)?;
    let choice = Choice {
        patterns: patterns::ALL.iter().copied().filter(|p| p.class <= Fidelity::TokenIdentical).collect(),
        max_class: Fidelity::TokenIdentical,
        backend: Backend::Cuda,
    };
    let patched = Arc::new(rewrite(&blueprint.graph, &choice)?.graph);
    let mut key = random::key(0)?;
    let mut failure = None;
    let tensor = |spec: &TensorSpec| match tensor(spec, &mut key) {
        Ok(array) => Some(array),
        Err(error) => {
            failure.get_or_insert(error);
            None
        }
    };
    let made = Held::none().cuda(patched, tensor);
    if let Some(error) = failure {
        return Err(error.into());
    }
    let (past, refusal) = made?;
    if let Some(reason) = refusal {
        return Err(format!("{name} does not decode past MLX: {reason}").into());
    }
    let stock = past.held().stock(Arc::new(blueprint.graph), |_| None)?;
    Ok(Pair { stock, past, vocabulary: blueprint.info.vocab_size })
}

/// Random values on the GPU whose products have about the size of their input.
fn tensor(spec: &TensorSpec, key: &mut Array) -> zmlx_mlx::Result<Array> {
    let (own, rest) = random::split(key)?;
    *key = rest;
    let array = match (spec.float, spec.name.rsplit('.').next().unwrap_or("")) {
        (false, "scales") => ops::full(&spec.shape, &Array::scalar(120u8)?, Dtype::Uint8)?,
        (false, _) => random::bits(&spec.shape, 4, &own)?,
        (true, "scales" | "biases") => {
            // Codes of 4 bits around 0, with a standard deviation of 0.02.
            let value = if spec.name.ends_with("scales") { 0.0043f32 } else { -0.0043 * 7.5 };
            ops::full(&spec.shape, &Array::scalar(value)?, Dtype::Bfloat16)?
        }
        (true, _) if spec.shape.len() == 1 => ops::ones(&spec.shape, Dtype::Bfloat16)?,
        (true, _) => {
            let x = random::normal(&spec.shape, Dtype::Float32, None, None, &own)?;
            x.multiply_scalar(0.02)?.astype(Dtype::Bfloat16)?
        }
    };
    array.eval()?;
    Ok(array)
}

fn shape(name: &str, context: usize, launches: bool, prefill: bool) -> Result<()> {
    with_stream(Stream::default_of(Device::Gpu)?, || {
        let start = Instant::now();
        let pair = make(name)?;
        let ready = start.elapsed().as_secs_f64();
        let device = pair.past.cuda_device().map_or("?", |d| d.name.as_str());
        println!(
            "{name} on {device}: ready after {ready:.1} s, {} launches a token",
            pair.past.launches_per_token()
        );
        let ids =
            |n: usize| (0..n as u64).map(|i| (i.wrapping_mul(2_654_435_761) % pair.vocabulary as u64) as u32);
        let prompt: Vec<u32> = ids(context).collect();
        if prefill {
            for n in [128, 512, 2048] {
                prefill_rates(&pair, &ids(n).collect::<Vec<u32>>())?;
            }
        }
        compare(&pair, &prompt)?;
        let mut rates: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for _ in 0..3 {
            rates.entry("stock MLX").or_default().push(stock_rate(&pair.stock, &prompt)?);
            rates.entry("past MLX").or_default().push(past_rate(&pair.past, &prompt)?);
        }
        for (form, all) in &rates {
            let all: Vec<String> = all.iter().map(|r| format!("{r:.1}")).collect();
            println!("  {form}: {} tok/s", all.join(", "));
        }
        if launches {
            times(&pair.past, prompt[context - 1], &mut prefilled(&pair.past, &prompt)?)?;
            timeline(&pair.past, prompt[context - 1], &mut prefilled(&pair.past, &prompt)?)?;
        }
        Ok(())
    })
}

/// Rates of decode past MLX after `context` tokens that it has chosen itself.
fn past_alone(name: &str, [context, tokens]: [usize; 2], launches: bool) -> Result<()> {
    with_stream(Stream::default_of(Device::Gpu)?, || {
        let start = Instant::now();
        let past = make(name)?.past;
        let ready = start.elapsed().as_secs_f64();
        let (on_mlx, own) = if context > READ_FROM { (context, 8) } else { (1, context) };
        let read: Vec<u32> = (0..on_mlx as u32).map(|i| i % 1000 + 1).collect();
        let mut filled = prefilled(&past, &read)?;
        let mut token = 1;
        past.decode::<GraphError>(1, &mut filled, own, |chosen| {
            token = chosen;
            Ok(true)
        })?;
        let mut rates = Vec::new();
        for _ in 0..3 {
            rates.push(format!("{:.1}", decode_rate(&past, token, &mut filled.clone(), tokens)?));
        }
        let all = rates.join(", ");
        println!("{name}: ready after {ready:.1} s, {} launches, {all} tok/s", past.launches_per_token());
        if launches {
            timeline(&past, token, &mut filled.clone())?;
        }
        Ok(())
    })
}

/// A state that has seen all of the prompt but its last token.
fn prefilled(executor: &Executor, prompt: &[u32]) -> Result<State> {
    let mut state = executor.new_state();
    for part in prompt[..prompt.len() - 1].chunks(2048) {
        let tokens = Array::from_slice(part, &[1, part.len() as i32])?;
        executor.run_for(&tokens, &mut state, Wanted::None)?;
        eval(&state.arrays())?;
    }
    Ok(state)
}

/// A prompt of one call on both, the first time left out (MLX compiles kernels then), and how far the last logits are apart.
fn prefill_rates(pair: &Pair, prompt: &[u32]) -> Result<()> {
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
    let shown = |all: &[f64]| all[1..].iter().map(|r| format!("{r:.0}")).collect::<Vec<_>>().join(", ");
    println!(
        "  prefill of {}: {} tok/s, stock {}; KL of the last logits {:.1e}",
        prompt.len(),
        shown(&rates[1]),
        shown(&rates[0]),
        kl(&rows[0], &rows[1])
    );
    Ok(())
}

/// Where the time of a prompt of 2,048 tokens goes, by op and by module: each node is evaluated before the next, so that the sum is
/// more than an undisturbed call takes. All rows pass through the head here; a call that wants the last has one.
fn prefill_ops(name: &str) -> Result<()> {
    with_stream(Stream::default_of(Device::Gpu)?, || {
        let pair = make(name)?;
        let past = pair.past.held().prompts(Arc::clone(pair.stock.graph()), |_| None)?;
        let ids: Vec<u32> =
            (0..2048u64).map(|i| (i.wrapping_mul(2_654_435_761) % pair.vocabulary as u64) as u32).collect();
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

/// The same tokens on stock, past MLX and in float32: how far logits are from float32's, and how often the likeliest differs.
/// The last is exact only with `MLX_ENABLE_TF32=0`.
fn compare(pair: &Pair, prompt: &[u32]) -> Result<()> {
    let exact = reference(pair)?;
    let executors = [&exact, &pair.stock, &pair.past];
    let mut states = Vec::new();
    for executor in executors {
        states.push(prefilled(executor, prompt)?);
    }
    let mut token = prompt[prompt.len() - 1];
    let (mut errors, mut flips, mut divergence) = ([0f64; 2], [0; 2], [0f64; 3]);
    for _ in 0..COMPARED {
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
            flips[form - 1] += i32::from(likeliest(&rows[0]) != likeliest(&rows[form]));
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
    Ok(())
}

fn likeliest(row: &[f32]) -> u32 {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32
}

/// KL(softmax(a) || softmax(b)).
fn kl(a: &[f32], b: &[f32]) -> f64 {
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

fn past_rate(executor: &Executor, prompt: &[u32]) -> Result<f64> {
    decode_rate(executor, prompt[prompt.len() - 1], &mut prefilled(executor, prompt)?, TOKENS)
}

fn decode_rate(executor: &Executor, token: u32, state: &mut State, count: usize) -> Result<f64> {
    let mut first = Instant::now();
    let mut told = 0;
    let mut seconds = 0.0;
    let done = executor.decode::<GraphError>(token, state, count + 1, |_| {
        told += 1;
        if told == 1 {
            first = Instant::now();
        }
        seconds = first.elapsed().as_secs_f64();
        Ok(true)
    })?;
    if done.is_none_or(|d| !d.finite) {
        return Err("a logit is not a number".into());
    }
    Ok(count as f64 / seconds)
}

fn stock_rate(executor: &Executor, prompt: &[u32]) -> Result<f64> {
    let mut state = prefilled(executor, prompt)?;
    let step = |token: &Array, state: &mut State| -> Result<Array> {
        let logits = executor.run(&token.reshape(&[1, 1])?, state)?;
        let next = logits.reshape(&[-1])?.argmax(-1, false)?.astype(Dtype::Uint32)?;
        zmlx_mlx::async_eval(&[&next])?;
        Ok(next)
    };
    let mut next = step(&Array::from_slice(&prompt[prompt.len() - 1..], &[1])?, &mut state)?;
    let mut start = Instant::now();
    for n in 0..=TOKENS {
        let following = if n < TOKENS { Some(step(&next, &mut state)?) } else { None };
        next.eval()?;
        if n == 0 {
            start = Instant::now();
        }
        if let Some(following) = following {
            next = following;
        }
    }
    Ok(TOKENS as f64 / start.elapsed().as_secs_f64())
}

/// The launches of a token, those of one name and size together.
fn times(executor: &Executor, token: u32, state: &mut State) -> Result<()> {
    executor.launch_times(token, state)?;
    let mut rows: BTreeMap<(&str, u64, i32, i32), Vec<f64>> = BTreeMap::new();
    for _ in 0..5 {
        for l in executor.launch_times(token, state)? {
            rows.entry((l.name, l.bytes, l.registers, l.spilled)).or_default().push(l.seconds);
        }
    }
    println!(
        "  {:<34} {:>6} {:>9} {:>10} {:>8} {:>5} {:>6}",
        "launch", "count", "us each", "bytes", "GB/s", "regs", "spill"
    );
    for ((name, bytes, registers, spilled), mut seconds) in rows {
        seconds.sort_by(f64::total_cmp);
        let (median, count) = (seconds[seconds.len() / 2], seconds.len() / 5);
        let rate = bytes as f64 / median / 1e9;
        let us = median * 1e6;
        println!("  {name:<34} {count:>6} {us:>9.2} {bytes:>10} {rate:>8.0} {registers:>5} {spilled:>6}");
    }
    Ok(())
}

/// Where the time of a step goes while launches overlap, those of one name and size together, in microseconds a launch: from
/// the end of the launch before to the end of the wait, until the last block has placed its activations, until the last has
/// its sums, until the last has ended; and how long before the end of the wait the first and the last block began.
fn timeline(executor: &Executor, token: u32, state: &mut State) -> Result<()> {
    let mut rows: BTreeMap<(&str, u64, usize), (usize, [f64; 8])> = BTreeMap::new();
    let mut whole = Vec::new();
    for round in 0..6 {
        let all = executor.launch_moments(token, state)?;
        if round == 0 {
            continue;
        }
        whole.push(all.last().map_or(0, |l| l.moments[4][1]) as f64 / 1e3);
        let mut before = 0;
        for l in &all {
            let [begun, waited, placed, summed, ended] = l.moments;
            let placed = placed[1].max(waited[1]);
            let summed = summed[1].max(placed);
            let row = rows.entry((l.name, l.bytes, l.blocks)).or_default();
            row.0 += 1;
            let lead = |t: u64| waited[0] as f64 - t as f64;
            let parts = [
                ended[1] as f64 - before as f64,
                waited[0] as f64 - before as f64,
                waited[1] as f64 - waited[0] as f64,
                placed as f64 - waited[1] as f64,
                summed as f64 - placed as f64,
                ended[1] as f64 - summed as f64,
                lead(begun[0]),
                lead(begun[1]),
            ];
            row.1.iter_mut().zip(parts).for_each(|(sum, part)| *sum += part / 1e3);
            before = ended[1];
        }
    }
    whole.sort_by(f64::total_cmp);
    println!("  a step with notes: {:.1} us", whole[whole.len() / 2]);
    println!(
        "  {:<34} {:>5} {:>6} {:>9} {:>7} | {:>6} {:>6} {:>6} {:>6} {:>6} | {:>6} {:>6}",
        "launch", "count", "blocks", "bytes", "us", "wait", "all", "place", "sums", "end", "first", "last"
    );
    for ((name, bytes, blocks), (count, sums)) in rows {
        let each = sums.map(|sum| sum / count as f64);
        let [us, wait, all, place, sum, end, first, last] = each;
        println!(
            "  {name:<34} {:>5} {blocks:>6} {bytes:>9} {us:>7.2} | {wait:>6.2} {all:>6.2} {place:>6.2} {sum:>6.2} {end:>6.2} | {first:>6.2} {last:>6.2}",
            count / 5
        );
    }
    Ok(())
}
