//! Small models beside mlx-lm's tokens on an NVIDIA GPU: `cuda_oracle [DIR...]`.
//!
//! Each DIR is a model folder with the `golden.json` and `golden.safetensors` that mlx-lm made on a CPU in float32, or a folder
//! of such folders; without one, the folders of this crate's tests. In float32 and in bfloat16, stock on MLX and patched by the
//! default preset, each prompt is followed by the greedy tokens. Where they part from the golden ones the step is shown with
//! the golden margin there, how far the logits of that step are from those in float32 on the CPU, and the smallest gap of a
//! router in the whole run. Logits that are off by more than [`NOISE`] where no router nearly ties count as wrong, and so do
//! tokens that are not the likeliest of their step fed again; both end the program with status 1, but for stock in bfloat16.
//! `--f32` and `--bf16` take one of the two dtypes. `--stepwise`: prompts token by token, since MLX compiles kernels for each
//! shape of a longer call, which takes minutes. `--patched`: that alone. `--tokens=N`: no more than N of the golden tokens.

#[path = "../tests/golden_folder/mod.rs"]
mod golden_folder;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use golden_folder::Case;
use zmlx_mlx::Dtype;
use zmlx_models::{
    DeviceChoice, DtypeChoice, Flow, GenerateOptions, LoadOptions, Model, PatchOptions, Session,
};

const USAGE: &str = "cuda_oracle [--f32 | --bf16] [--stepwise] [--patched] [--tokens=N] [DIR...]";

/// What is to be run.
struct Asked {
    dtypes: Vec<DtypeChoice>,
    /// Tokens of a prompt in one call.
    chunk: usize,
    /// Whether stock is run as well.
    stock: bool,
    /// Tokens after a prompt at most.
    tokens: usize,
}

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Logits that are off by this part of their norm, and no more, are off by rounding.
const NOISE: f32 = 0.03;
/// Scores of experts as close as this are rounded past one another in bfloat16, and a choice that tips moves logits far.
const ROUTER_TIE: f64 = 1.0 / 256.0;

fn main() -> ExitCode {
    let (flags, folders): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|a| a.starts_with("--"));
    match check(&flags, &folders) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(wrong) => {
            println!("{wrong} wrong");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

/// How many runs part from the golden tokens where there is no near-tie.
fn check(flags: &[String], folders: &[String]) -> Result<usize> {
    let mut asked = Asked {
        dtypes: vec![DtypeChoice::F32, DtypeChoice::Bf16],
        chunk: GenerateOptions::default().prefill_chunk,
        stock: true,
        tokens: usize::MAX,
    };
    for flag in flags {
        match flag.as_str() {
            "--f32" => asked.dtypes = vec![DtypeChoice::F32],
            "--bf16" => asked.dtypes = vec![DtypeChoice::Bf16],
            "--stepwise" => asked.chunk = 1,
            "--patched" => asked.stock = false,
            other => match other.strip_prefix("--tokens=").map(str::parse) {
                Some(Ok(count)) => asked.tokens = count,
                _ => return Err(format!("{other}: {USAGE}").into()),
            },
        }
    }
    let given: Vec<PathBuf> = match folders {
        [] => vec![golden_folder::committed()],
        all => all.iter().map(PathBuf::from).collect(),
    };
    let mut models = Vec::new();
    for folder in &given {
        models.extend(golden_folder::models(folder)?);
    }
    let mut wrong = 0;
    for dir in &models {
        for &dtype in &asked.dtypes {
            // One that cannot be run says nothing about the others.
            wrong += folder(dir, dtype, &asked).unwrap_or_else(|error| {
                println!("{}, {dtype}: {error}", dir.display());
                1
            });
        }
    }
    Ok(wrong)
}

/// Stock and patched.
fn folder(dir: &Path, dtype: DtypeChoice, asked: &Asked) -> Result<usize> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let cases = golden_folder::cases(dir)?;
    let default = PatchOptions { environment: false, ..PatchOptions::default() };
    let mut reference = None;
    let mut wrong = 0;
    let forms = [("stock", None), ("patched", Some(default))];
    for (form, patch) in forms.into_iter().skip(usize::from(!asked.stock)) {
        let start = Instant::now();
        let options = LoadOptions { dtype, device: DeviceChoice::Gpu, patch, ..LoadOptions::default() };
        let model = Model::load(dir, &options, &mut |_| {})?;
        let past =
            model.patch_report().map_or("", |r| if r.cuda.is_some() { ", past MLX" } else { ", on MLX" });
        let (mut equal, mut notes) = (0, Vec::new());
        for case in &cases {
            let options = GenerateOptions {
                max_tokens: case.tokens.len().min(asked.tokens),
                ignore_eos: true,
                prefill_chunk: asked.chunk,
                ..Default::default()
            };
            let tokens =
                Session::new(&model).generate(&case.prompt, &options, &mut |_| Flow::Continue)?.tokens;
            let Some(step) = (0..options.max_tokens).find(|&i| tokens.get(i) != case.tokens.get(i)) else {
                equal += 1;
                continue;
            };
            let exact = match &reference {
                Some(model) => model,
                None => reference.insert(on_cpu(dir)?),
            };
            let golden = logits(exact, case, step, GenerateOptions::default().prefill_chunk)?;
            let row = logits(&model, case, step, asked.chunk)?;
            let (found, token) = (tokens.get(step).copied(), case.tokens[step] as usize);
            let off = golden.iter().zip(&row).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            let norm = |row: &mut dyn Iterator<Item = f32>| row.map(|v| v * v).sum::<f32>().sqrt();
            let apart =
                norm(&mut golden.iter().zip(&row).map(|(a, b)| a - b)) / norm(&mut golden.iter().copied());
            let again = found.is_some_and(|t| row.iter().all(|&v| v <= row[t as usize]));
            let margin = case.margins[step];
            let gap = case.router_gap_by_width.values().copied().fold(f64::INFINITY, f64::min);
            let reason = match (again, apart <= NOISE, gap < ROUTER_TIE) {
                (false, ..) => Err("NOT REPEATED by the same tokens fed one by one"),
                (true, true, _) => Ok("near-tie"),
                (true, false, true) => Ok("a router nearly ties"),
                (true, false, false) => Err("WRONG"),
            };
            // How stock MLX rounds in 16 bits is not ours.
            wrong += usize::from(reason.is_err() && (form != "stock" || dtype == DtypeChoice::F32));
            let reason = reason.unwrap_or_else(|wrong| wrong);
            notes.push(format!(
                "    after {}: step {step} is {found:?}, golden {token}, margin {margin:.3}; logits up to {off:.3} off, {apart:.1e} \
                 of their norm; smallest gap of a router {gap:.1e}: {reason}",
                case.prompt.len()
            ));
        }
        let seconds = start.elapsed().as_secs_f64();
        println!("{name}, {dtype}, {form}{past}: {equal} of {} prompts equal, {seconds:.1} s", cases.len());
        notes.iter().for_each(|note| println!("{note}"));
    }
    Ok(wrong)
}

/// The model in float32 on the CPU, which gives the golden tokens.
fn on_cpu(dir: &Path) -> Result<Model> {
    let options =
        LoadOptions { dtype: DtypeChoice::F32, device: DeviceChoice::Cpu, ..LoadOptions::default() };
    Ok(Model::load(dir, &options, &mut |_| {})?)
}

/// The logits that choose token `step`, after the golden ones before it: the prompt in calls of so many, then token by token.
fn logits(model: &Model, case: &Case, step: usize, chunk: usize) -> Result<Vec<f32>> {
    let mut state = model.new_state();
    let mut last = None;
    let parts = case.prompt.chunks(chunk.max(1)).chain(case.tokens[..step].chunks(1));
    for part in parts {
        let logits = model.run(part, &mut state)?;
        logits.eval()?;
        last = Some(logits);
    }
    let all = last.ok_or("an empty prompt")?.astype(Dtype::Float32)?.to_vec::<f32>()?;
    let row = all[all.len() - model.vocab_size()..].to_vec();
    if row.iter().all(|v| v.is_finite()) { Ok(row) } else { Err("a logit is not a number".into()) }
}
