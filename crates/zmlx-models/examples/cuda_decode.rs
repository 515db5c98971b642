//! Checks and times decode past MLX on an NVIDIA GPU: `cuda_decode lfm2_8b qwen3_30b`.
//!
//! Each name is a published shape, with random 4-bit weights made on the GPU. The logits of the same tokens on stock MLX
//! and past it beside float32, with the first step at which the likeliest token differs; then 128 tokens after a prompt of
//! 64, three times each, interleaved; with `--prefill` prompts of 128, 512 and 2,048 tokens in one call; with `--launches`
//! the time of each launch; with `--context N` after a prompt of N.
//! Without all that: with `--prefill-ops` the time of each kind of op of a prompt of 2,048; with `--past` decode past MLX
//! alone, after as many tokens of its own (and `--tokens N` instead of 128 timed), since MLX takes minutes to compile its
//! kernels; a context of more than 1,024 is read on MLX all the same.
//! With `--json FILE` each published shape adds a line to FILE (`zmlx_models::measured`), of which the tables of
//! `docs/performance.md` are made; `ZMLX_COMMIT` says which commit ran.
//! `ZMLX_CUDA_OVERLAP=0` compares with launches that wait for one another.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use zmlx_graph::{Executor, GraphError, State, Wanted};
use zmlx_mlx::stream::{Device, Stream, with_stream};
use zmlx_mlx::{Array, Dtype, eval};
use zmlx_models::Blueprint;
use zmlx_models::measured::{Form, Measured, appendable, commit, today};

#[path = "cuda_decode/compare.rs"]
mod compare;
#[path = "cuda_decode/launches.rs"]
mod launches;
#[path = "cuda_decode/prefill.rs"]
mod prefill;
mod support;

use compare::compare;
use launches::{timeline, times};
use prefill::{prefill_ops, prefill_rates};
use support::random_shape;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Tokens that are timed.
const TOKENS: usize = 128;
/// Longer contexts are read on MLX, also where nothing else runs on it.
const READ_FROM: usize = 1024;

/// What is asked for.
struct Asked {
    context: usize,
    tokens: usize,
    past: bool,
    launches: bool,
    prefill: bool,
    ops: bool,
    json: Option<PathBuf>,
    names: Vec<String>,
}

impl Asked {
    fn read(arguments: impl Iterator<Item = String>) -> Result<Self> {
        let mut asked = Self {
            context: 64,
            tokens: TOKENS,
            past: false,
            launches: false,
            prefill: false,
            ops: false,
            json: None,
            names: Vec::new(),
        };
        let mut rest = arguments;
        while let Some(argument) = rest.next() {
            let mut value = || rest.next().ok_or_else(|| format!("{argument}: a value is missing"));
            match argument.as_str() {
                "--context" => asked.context = value()?.parse()?,
                "--tokens" => asked.tokens = value()?.parse()?,
                "--json" => asked.json = Some(value()?.into()),
                "--past" => asked.past = true,
                "--launches" => asked.launches = true,
                "--prefill" => asked.prefill = true,
                "--prefill-ops" => asked.ops = true,
                unknown if unknown.starts_with("--") => return Err(format!("{unknown} is unknown").into()),
                _ => asked.names.push(argument),
            }
        }
        if asked.context == 0 {
            return Err("--context 0: give 1 token or more".into());
        }
        if let Some(path) = &asked.json {
            appendable(path)?;
        }
        Ok(asked)
    }
}

fn main() -> ExitCode {
    support::exit(run())
}

fn run() -> Result<()> {
    let asked = Asked::read(std::env::args().skip(1))?;
    for name in &asked.names {
        let measured = match name.as_str() {
            name if asked.past => past_alone(name, &asked)?,
            name if asked.ops => {
                prefill_ops(name)?;
                continue;
            }
            name => shape(name, &asked)?,
        };
        if let Some(path) = &asked.json {
            measured.append(path)?;
        }
    }
    Ok(())
}

/// Stock and patched executors of one shape, which share their weights.
struct Pair {
    stock: Executor,
    past: Executor,
    blueprint: Blueprint,
}

fn make(name: &str) -> Result<Pair> {
    let (past, blueprint) = random_shape(name)?;
    let stock = past.held().stock(Arc::new(blueprint.graph.clone()), |_| None)?;
    Ok(Pair { stock, past, blueprint })
}

/// Stock and past MLX in turn.
fn shape(name: &str, asked: &Asked) -> Result<Measured> {
    let context = asked.context;
    with_stream(Stream::default_of(Device::Gpu)?, || {
        let start = Instant::now();
        let pair = make(name)?;
        let ready = start.elapsed().as_secs_f64();
        let device = pair.past.cuda_device().map_or("?", |d| d.name.as_str());
        println!(
            "{name} on {device}: ready after {ready:.1} s, {} launches a token",
            pair.past.launches_per_token()
        );
        let vocabulary = pair.blueprint.info.vocab_size as u64;
        let ids = |n: usize| (0..n as u64).map(|i| (i.wrapping_mul(2_654_435_761) % vocabulary) as u32);
        let prompt: Vec<u32> = ids(context).collect();
        let form = Form { context: context as u64, tokens: TOKENS as u64, beside_stock: true };
        let mut measured = record(name, form, &pair)?;
        if asked.prefill {
            for n in [128, 512, 2048] {
                measured.prefill.push(prefill_rates(&pair, &ids(n).collect::<Vec<u32>>())?);
            }
        }
        measured.compared = Some(compare(&pair, &prompt)?);
        for _ in 0..3 {
            measured.stock.push(stock_rate(&pair.stock, &prompt)?);
            measured.ours.push(past_rate(&pair.past, &prompt)?);
        }
        for (form, rates) in [("past MLX", &measured.ours), ("stock MLX", &measured.stock)] {
            println!("  {form}: {} tok/s", shown(rates));
        }
        if asked.launches {
            times(&pair.past, prompt[context - 1], &mut prefilled(&pair.past, &prompt)?)?;
            timeline(&pair.past, prompt[context - 1], &mut prefilled(&pair.past, &prompt)?)?;
        }
        Ok(measured)
    })
}

/// Rates of decode past MLX after as many tokens that it has chosen itself.
fn past_alone(name: &str, asked: &Asked) -> Result<Measured> {
    let (context, tokens) = (asked.context, asked.tokens);
    with_stream(Stream::default_of(Device::Gpu)?, || {
        let start = Instant::now();
        let pair = make(name)?;
        let form = Form { context: context as u64, tokens: tokens as u64, beside_stock: false };
        let mut measured = record(name, form, &pair)?;
        let past = pair.past;
        let ready = start.elapsed().as_secs_f64();
        let (on_mlx, own) = if context > READ_FROM { (context, 8) } else { (1, context) };
        let read: Vec<u32> = (0..on_mlx as u32).map(|i| i % 1000 + 1).collect();
        let mut filled = prefilled(&past, &read)?;
        let mut token = 1;
        past.decode::<GraphError>(1, &mut filled, own, |chosen| {
            token = chosen;
            Ok(true)
        })?;
        for _ in 0..3 {
            measured.ours.push(decode_rate(&past, token, &mut filled.clone(), tokens)?);
        }
        let rates = shown(&measured.ours);
        println!("{name}: ready after {ready:.1} s, {} launches, {rates} tok/s", past.launches_per_token());
        if asked.launches {
            timeline(&past, token, &mut filled.clone())?;
        }
        Ok(measured)
    })
}

/// What is known of a run before it is timed.
fn record(name: &str, form: Form, pair: &Pair) -> Result<Measured> {
    let context = u32::try_from(form.context)?;
    Ok(Measured {
        model: name.to_owned(),
        device: pair.past.cuda_device().map_or("?", |d| d.name.as_str()).to_owned(),
        date: today(),
        commit: commit(),
        form,
        bytes_per_token: pair.blueprint.decode_cost(context)?.total.memory_bytes(),
        launches_per_token: pair.past.launches_per_token(),
        stock: Vec::new(),
        ours: Vec::new(),
        compared: None,
        prefill: Vec::new(),
    })
}

fn shown(rates: &[f64]) -> String {
    rates.iter().map(|r| format!("{r:.1}")).collect::<Vec<_>>().join(", ")
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

fn past_rate(executor: &Executor, prompt: &[u32]) -> Result<f64> {
    decode_rate(executor, prompt[prompt.len() - 1], &mut prefilled(executor, prompt)?, TOKENS)
}

fn decode_rate(executor: &Executor, token: u32, state: &mut State, count: usize) -> Result<f64> {
    let time = executor.decode_time(token, state, count)?.ok_or("nothing was timed: give 1 token or more")?;
    if !time.finite {
        return Err("a logit is not a number".into());
    }
    Ok(1.0 / time.seconds)
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
