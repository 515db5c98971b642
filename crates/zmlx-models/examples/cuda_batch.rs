//! Checks and times batches of sequences that are decoded together past MLX on an NVIDIA GPU: `cuda_batch lfm2_8b qwen3_30b`.
//!
//! Of each name, a published shape, random 4-bit weights are made on the GPU. For 1, 2, 4 and 8 sequences: tokens a second of
//! all together, three times 128 steps after a context of 64 (`--context N`, `--tokens N`), and how far the logits of each
//! sequence are from those of the same sequence alone, as a part of their norm: the largest of 16 steps of given tokens.
//!
//! All of that is decoded one token at a time. With `--prefill` the contexts that logits are compared after are read on MLX in
//! one call, and the last two tokens too, so that the state goes both ways: MLX rounds its activations to bfloat16, and no two
//! shapes of a call alike.

mod support;

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use zmlx_graph::{Executor, GraphError, State, Wanted};
use zmlx_mlx::stream::{Device, Stream, with_stream};
use zmlx_mlx::{Array, Dtype, eval};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Sequences that are decoded together.
const BATCHES: [usize; 4] = [1, 2, 4, 8];
/// Steps whose logits are compared.
const COMPARED: usize = 16;

/// What was asked for.
#[derive(Clone, Copy)]
struct Options {
    context: usize,
    tokens: usize,
    prefill: bool,
}

fn main() -> ExitCode {
    support::exit(run())
}

fn run() -> Result<()> {
    let mut options = Options { context: 64, tokens: 128, prefill: false };
    let (mut names, mut arguments) = (Vec::new(), std::env::args().skip(1));
    while let Some(argument) = arguments.next() {
        let mut number = || -> Result<usize> {
            let given = arguments.next().and_then(|n| n.parse().ok()).filter(|n| *n > 0);
            given.ok_or_else(|| format!("{argument}: give a number from 1 on").into())
        };
        match argument.as_str() {
            "--context" => options.context = number()?,
            "--tokens" => options.tokens = number()?,
            "--prefill" => options.prefill = true,
            _ => names.push(argument),
        }
    }
    if names.is_empty() {
        return Err("name a published shape, such as lfm2_8b".into());
    }
    names.iter().try_for_each(|name| with_stream(Stream::default_of(Device::Gpu)?, || shape(name, options)))
}

fn shape(name: &str, options: Options) -> Result<()> {
    let start = Instant::now();
    let (executor, blueprint) = support::random_shape(name)?;
    let vocabulary = blueprint.info.vocab_size;
    let device = executor.cuda_device().map_or("?", |d| d.name.as_str());
    println!("{name} on {device}: ready after {:.1} s", start.elapsed().as_secs_f64());
    // Tokens that differ from sequence to sequence.
    let id = |i: usize, at: usize| ((at * 8 + i) as u64).wrapping_mul(2_654_435_761) % vocabulary as u64;
    let length = options.context + COMPARED;
    let ids = |i: usize| (0..length).map(|at| id(i, at) as u32).collect::<Vec<u32>>();
    let all: Vec<Vec<u32>> = (0..BATCHES[BATCHES.len() - 1]).map(ids).collect();
    let mut alone = Vec::new();
    for sequence in &all {
        alone.extend(logits(&executor, std::slice::from_ref(sequence), options)?);
    }
    for batch in BATCHES {
        let sequences = &all[..batch];
        let mut filled = executor.new_state();
        for at in 0..options.context {
            step(&executor, sequences, [at, 1], &mut filled, Wanted::None)?;
        }
        let last: Vec<u32> = sequences.iter().map(|s| s[options.context]).collect();
        let mut rates = Vec::new();
        for _ in 0..3 {
            match rate(&executor, &last, &mut filled.clone(), options.tokens)? {
                Some(rate) => rates.push(rate * batch as f64),
                None => println!("  {batch} together: this many go to MLX"),
            }
        }
        let together = logits(&executor, sequences, options)?;
        let apart = together.iter().zip(&alone).map(|(a, b)| apart(a, b, vocabulary)).collect::<Vec<_>>();
        let shown =
            |all: &[f64], digits: fn(&f64) -> String| all.iter().map(digits).collect::<Vec<_>>().join(", ");
        println!(
            "  {batch} together: {} tok/s; logits apart from each alone by {}",
            shown(&rates, |r| format!("{r:.1}")),
            shown(&apart, |a| format!("{a:.1e}"))
        );
    }
    Ok(())
}

/// A call of `count` tokens from number `at` on of each sequence.
fn step(
    executor: &Executor,
    sequences: &[Vec<u32>],
    [at, count]: [usize; 2],
    state: &mut State,
    wanted: Wanted,
) -> Result<Option<Array>> {
    let ids: Vec<u32> = sequences.iter().flat_map(|s| &s[at..at + count]).copied().collect();
    let tokens = Array::from_slice(&ids, &[sequences.len() as i32, count as i32])?;
    let logits = executor.run_for(&tokens, state, wanted)?;
    if logits.is_none() && !state.is_on_device() {
        eval(&state.arrays())?;
    }
    Ok(logits)
}

/// The logits of each sequence after its context, those of a token behind those of the token before.
fn logits(executor: &Executor, sequences: &[Vec<u32>], options: Options) -> Result<Vec<Vec<f32>>> {
    let mut state = executor.new_state();
    let mut rows = vec![Vec::new(); sequences.len()];
    let (mut at, length) = (0, options.context + COMPARED);
    while at < length {
        let count = match options.prefill {
            true if at == 0 => options.context,
            true if at + 2 == length => 2,
            _ => 1,
        };
        let wanted = if at < options.context { Wanted::None } else { Wanted::All };
        if let Some(made) = step(executor, sequences, [at, count], &mut state, wanted)? {
            let values = made.astype(Dtype::Float32)?.to_vec::<f32>()?;
            let each = values.chunks(values.len() / sequences.len());
            rows.iter_mut().zip(each).for_each(|(row, own)| row.extend(own));
        }
        at += count;
    }
    Ok(rows)
}

/// The largest of `||a - b|| / ||b||` over rows of logits; NaN if any is.
fn apart(a: &[f32], b: &[f32], vocabulary: usize) -> f64 {
    let norm = |row: &mut dyn Iterator<Item = f64>| row.map(|v| v * v).sum::<f64>().sqrt();
    let rows = a.chunks(vocabulary).zip(b.chunks(vocabulary)).map(|(a, b)| {
        let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        difference / norm(&mut b.iter().map(|v| f64::from(*v)))
    });
    rows.fold(0.0, |most, row| if row.is_nan() || row > most { row } else { most })
}

/// Steps a second of greedy decode; nothing if so many sequences go to MLX.
fn rate(executor: &Executor, tokens: &[u32], state: &mut State, count: usize) -> Result<Option<f64>> {
    let (mut first, mut seconds, mut told) = (Instant::now(), 0.0, 0);
    // The first step is not timed: it may capture the graph.
    let done = executor.decode_batch::<GraphError>(tokens, state, count + 1, |_| {
        told += 1;
        if told == 1 {
            first = Instant::now();
        }
        seconds = first.elapsed().as_secs_f64();
        Ok(true)
    })?;
    match done {
        Some(done) if !done.finite => Err("a logit is not a number".into()),
        Some(_) => Ok(Some(count as f64 / seconds)),
        None => Ok(None),
    }
}
