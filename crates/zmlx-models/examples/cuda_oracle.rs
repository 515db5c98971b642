//! Small models beside mlx-lm's tokens on an NVIDIA GPU: `cuda_oracle [embedded] [DIR...]`.
//!
//! Each DIR is a model folder with the `golden.json` and `golden.safetensors` that mlx-lm made on a CPU in float32, or a folder
//! of such folders; without one, the folders of this crate's tests. `embedded` is the embedded model with the first 100 of its
//! golden tokens in `fixtures/`.
//!
//! In float32 and in bfloat16, stock on MLX and patched by the default preset, each prompt is followed by the greedy tokens.
//! Where they part from the golden ones the step is shown with the golden margin there and how far the logits of that step
//! are from those in float32 on the CPU. Where they are off by more than rounding ([`noise`]), rounded caches or experts
//! whose scores nearly tie must account for it: with those, float32 on the CPU gives these logits (`zmlx_models::tipped`).
//! If none do that counts as wrong, and so do tokens that are not the likeliest of their step fed again; both end the
//! program with status 1, but for what runs on MLX in bfloat16, which is not explained.
//! `--f32` and `--bf16` take one of the two dtypes. `--stepwise`: prompts token by token, since MLX compiles kernels for each
//! shape of a longer call, which takes minutes. `--patched`: that alone. `--tokens=N`: no more than N of the golden tokens.
//! `--times=N`: each prompt N times, all of which must give the same tokens; of use while other programs keep the GPU busy.

#[path = "../tests/golden_folder/mod.rs"]
mod golden_folder;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use golden_folder::{Case, EmbeddedCase};
use zmlx_mlx::Dtype;
use zmlx_models::tipped::{Allowed, Explanation, Kind, Tip, explain};
use zmlx_models::{
    DeviceChoice, DtypeChoice, Flow, GenerateOptions, LoadOptions, Model, PatchOptions, Session,
};

const USAGE: &str =
    "cuda_oracle [--f32 | --bf16] [--stepwise] [--patched] [--tokens=N] [--times=N] [embedded] [DIR...]";

/// What is to be run.
struct Asked {
    dtypes: Vec<DtypeChoice>,
    /// Tokens of a prompt in one call.
    chunk: usize,
    /// Whether stock is run as well.
    stock: bool,
    /// Tokens after a prompt at most.
    tokens: usize,
    /// How often each prompt is run.
    times: usize,
}

/// A model with what it must give.
struct Golden {
    name: String,
    dir: PathBuf,
    cases: Vec<Case>,
}

impl Golden {
    fn of_folder(dir: PathBuf) -> Result<Self> {
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let cases = golden_folder::cases(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        Ok(Self { name, dir, cases })
    }

    fn embedded() -> Result<Self> {
        let case = |case: EmbeddedCase| {
            let EmbeddedCase { prompt_ids, mut tokens, mut margins, .. } = case;
            tokens.truncate(EMBEDDED_TOKENS);
            margins.truncate(EMBEDDED_TOKENS);
            Case { prompt: prompt_ids, tokens, margins, ..Case::default() }
        };
        let cases = golden_folder::embedded()?.into_iter().map(case).collect();
        Ok(Self { name: "embedded".to_owned(), dir: zmlx_models::embedded_model_dir()?, cases })
    }
}

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Golden tokens of the embedded model that are asked for.
const EMBEDDED_TOKENS: usize = 100;
/// Scores of experts as close as this, as a part of the root of their mean square, are rounded past one another in bfloat16.
const ROUTER_TIE: f32 = 0.05;

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
        times: 1,
    };
    for flag in flags {
        match flag.as_str() {
            "--f32" => asked.dtypes = vec![DtypeChoice::F32],
            "--bf16" => asked.dtypes = vec![DtypeChoice::Bf16],
            "--stepwise" => asked.chunk = 1,
            "--patched" => asked.stock = false,
            other => match other.split_once('=').map(|(name, count)| (name, count.parse())) {
                Some(("--tokens", Ok(count))) => asked.tokens = count,
                Some(("--times", Ok(count))) => asked.times = count,
                _ => return Err(format!("{other}: {USAGE}").into()),
            },
        }
    }
    let committed = golden_folder::committed().to_string_lossy().into_owned();
    let given = if folders.is_empty() { std::slice::from_ref(&committed) } else { folders };
    let mut models = Vec::new();
    for name in given {
        match name.as_str() {
            "embedded" => models.push(Golden::embedded()?),
            name => {
                for dir in golden_folder::models(Path::new(name))? {
                    models.push(Golden::of_folder(dir)?);
                }
            }
        }
    }
    let mut wrong = 0;
    for model in &models {
        for &dtype in &asked.dtypes {
            // One that cannot be run says nothing about the others.
            wrong += compare(model, dtype, &asked).unwrap_or_else(|error| {
                println!("{}, {dtype}: {error}", model.dir.display());
                1
            });
        }
    }
    Ok(wrong)
}

/// Stock and patched.
fn compare(golden: &Golden, dtype: DtypeChoice, asked: &Asked) -> Result<usize> {
    let Golden { name, dir, cases } = golden;
    let default = PatchOptions { environment: false, ..PatchOptions::default() };
    let mut reference = None;
    let mut wrong = 0;
    let forms = [("stock", None), ("patched", Some(default))];
    for (form, patch) in forms.into_iter().skip(usize::from(!asked.stock)) {
        let start = Instant::now();
        let options = LoadOptions { dtype, device: DeviceChoice::Gpu, patch, ..LoadOptions::default() };
        let model = Model::load(dir, &options, &mut |_| {})?;
        let past = model.patch_report().is_some_and(|r| r.cuda.is_some());
        let (mut equal, mut notes) = (0, Vec::new());
        for case in cases {
            let options = GenerateOptions {
                max_tokens: case.tokens.len().min(asked.tokens),
                ignore_eos: true,
                prefill_chunk: asked.chunk,
                ..Default::default()
            };
            let run = || Session::new(&model).generate(&case.prompt, &options, &mut |_| Flow::Continue);
            let tokens = run()?.tokens;
            for time in 1..asked.times {
                let again = run()?.tokens;
                if let Some(step) = (0..tokens.len()).find(|&i| again.get(i) != Some(&tokens[i])) {
                    wrong += 1;
                    let (found, first) = (again.get(step), tokens[step]);
                    notes.push(format!(
                        "    after {}: time {time}, step {step} is {found:?}, and {first} the first time: NOT REPEATED",
                        case.prompt.len()
                    ));
                }
            }
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
            // How MLX rounds in 16 bits is not ours.
            let ours = past || dtype == DtypeChoice::F32;
            let reason = match (again, apart <= noise(dtype)) {
                (false, _) => Err("NOT REPEATED by the same tokens fed one by one".to_owned()),
                (true, true) => Ok("rounding".to_owned()),
                (true, false) if ours => {
                    let fed: Vec<u32> = case.prompt.iter().chain(&case.tokens[..step]).copied().collect();
                    let found = explain(exact, &fed, &row, &allowed(dtype))?;
                    if found.after <= noise(dtype) {
                        Ok(told(&found))
                    } else {
                        Err(format!("WRONG; {}", told(&found)))
                    }
                }
                (true, false) => Ok("not explained".to_owned()),
            };
            wrong += usize::from(reason.is_err() && ours);
            let reason = reason.unwrap_or_else(|wrong| wrong);
            notes.push(format!(
                "    after {}: step {step} is {found:?}, golden {token}, margin {margin:.3}; logits up to {off:.3} off, {apart:.1e} \
                 of their norm: {reason}",
                case.prompt.len()
            ));
        }
        let seconds = start.elapsed().as_secs_f64();
        let runs = match (form, past) {
            ("stock", _) => "",
            (_, true) => ", past MLX",
            (_, false) => ", on MLX",
        };
        println!("{name}, {dtype}, {form}{runs}: {equal} of {} prompts equal, {seconds:.1} s", cases.len());
        notes.iter().for_each(|note| println!("{note}"));
    }
    Ok(wrong)
}

/// Logits that are off by this part of their norm, and no more, are off by rounding.
fn noise(dtype: DtypeChoice) -> f32 {
    if dtype == DtypeChoice::F32 { 1e-4 } else { 0.03 }
}

/// What may account for logits in that dtype.
fn allowed(dtype: DtypeChoice) -> Allowed {
    let caches = (dtype == DtypeChoice::Bf16).then_some(Dtype::Bfloat16);
    Allowed { caches, gap: ROUTER_TIE, distance: noise(dtype) }
}

fn told(found: &Explanation) -> String {
    let tip = |t: &Tip| {
        let kind = if t.kind == Kind::Group { "group " } else { "" };
        format!("; {} token {}: {kind}{} for {}, gap {:.1e}", t.path, t.position, t.to, t.from, t.gap)
    };
    let rounded = found.rounded.map_or_else(String::new, |off| format!("{off:.1e} with rounded caches, "));
    let tips: String = found.tips.iter().map(tip).collect();
    format!("{rounded}{:.1e} with {} choices of experts turned over{tips}", found.after, found.tips.len())
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
