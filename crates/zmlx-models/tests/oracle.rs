//! Every family's tokens and logits are mlx-lm's.
//!
//! Each folder in `oracle/` is a small model with random weights, and what mlx-lm 0.32.2 on the CPU gives for it with every
//! float tensor cast to float32: prompts of 1, 11 and 80 tokens (the last takes the path that sorts expert rows), 32 greedy
//! tokens each, the margin between the two best logits of every step, the smallest gap between the scores of a chosen
//! expert and of one that was not, and the first rows of logits. Stock and patched by the default preset, each must give
//! the same tokens and logits, however the prompt is cut into calls.
//!
//! `ZMLX_ORACLE_DIR` names a folder with more of such folders. `--nocapture` shows how far apart logits are, and where
//! routers nearly tie. How such folders are made: `docs/adding-a-model.md`.

mod golden_folder;

use std::fmt::Write;
use std::path::Path;

use golden_folder::{Case, LOGITS, committed};
use zmlx_models::{
    DeviceChoice, DtypeChoice, Flow, GenerateOptions, LoadOptions, Model, PatchOptions, Session,
};

/// How much of a patched model runs on the CPU engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Engine {
    /// All of it.
    Whole,
    /// Some ops are left to MLX.
    #[allow(dead_code)]
    Part,
}

/// One test for each folder, one line a folder.
macro_rules! folders {
    ($($test:ident: $folder:literal, $engine:ident;)*) => {
        $(#[test]
        fn $test() {
            passes(&committed().join($folder), Some(Engine::$engine));
        })*

        const FOLDERS: &[&str] = &[$($folder),*];
    };
}

folders! {
    deepseek_v32_q4: "deepseek_v32-q4", Whole;
    deepseek_v3_fp8: "deepseek_v3-fp8", Whole;
    deepseek_v3_int4: "deepseek_v3-int4", Whole;
    deepseek_v3_q4: "deepseek_v3-q4", Whole;
    deepseek_v3_q4_whole_kv_b: "deepseek_v3-q4-whole-kv_b", Whole;
    gemma3_q4: "gemma3-q4", Whole;
    gemma3_text_q4: "gemma3_text-q4", Whole;
    glm4_moe_lite_q4: "glm4_moe_lite-q4", Whole;
    glm4_moe_q4: "glm4_moe-q4", Whole;
    gpt_oss_mxfp4: "gpt_oss-mxfp4", Whole;
    gpt_oss_mxfp4_q8: "gpt_oss-mxfp4-q8", Whole;
    gpt_oss_q4: "gpt_oss-q4", Whole;
    kimi_k25_q4: "kimi_k25-q4", Whole;
    lfm2_moe_q4: "lfm2_moe-q4", Whole;
    lfm2_q4: "lfm2-q4", Whole;
    llama_bf16: "llama-bf16", Whole;
    llama_q4: "llama-q4", Whole;
    mistral3_q4: "mistral3-q4", Whole;
    mistral_q4: "mistral-q4", Whole;
    mixtral_q4: "mixtral-q4", Whole;
    olmoe_q4: "olmoe-q4", Whole;
    phi3_q4: "phi3-q4", Whole;
    qwen2_q4: "qwen2-q4", Whole;
    qwen3_5_moe_q4: "qwen3_5_moe-q4", Whole;
    qwen3_5_q4: "qwen3_5-q4", Whole;
    qwen3_moe_mxfp4: "qwen3_moe-mxfp4-all", Whole;
    qwen3_moe_mxfp8: "qwen3_moe-mxfp8-all", Whole;
    qwen3_moe_nvfp4: "qwen3_moe-nvfp4-all", Whole;
    qwen3_moe_q3: "qwen3_moe-q3", Whole;
    qwen3_moe_q4: "qwen3_moe-q4", Whole;
    qwen3_moe_q8: "qwen3_moe-q8", Whole;
    qwen3_next_q4: "qwen3_next-q4", Whole;
    qwen3_q4: "qwen3-q4", Whole;
}

/// Gaps below this are told.
const NEAR_TIE: f64 = 1e-4;

fn smallest_gap(case: &Case) -> f64 {
    case.router_gap_by_width.values().copied().fold(f64::INFINITY, f64::min)
}

#[test]
fn each_folder_has_a_line() {
    let found = golden_folder::models(&committed()).unwrap();
    let mut found: Vec<&str> = found.iter().map(|d| d.file_name().unwrap().to_str().unwrap()).collect();
    let mut listed = FOLDERS.to_vec();
    found.sort_unstable();
    listed.sort_unstable();
    assert_eq!(found, listed);
}

#[test]
fn more_folders_where_they_are_at_hand() {
    let Some(folder) = std::env::var_os("ZMLX_ORACLE_DIR") else { return };
    let models = golden_folder::models(Path::new(&folder)).unwrap_or_else(|e| panic!("ZMLX_ORACLE_DIR: {e}"));
    let failures: Vec<String> = models.iter().filter_map(|dir| check(dir, None).err()).collect();
    assert!(failures.is_empty(), "{} of {} folders:\n{}", failures.len(), models.len(), failures.concat());
}

#[track_caller]
fn passes(dir: &Path, engine: Option<Engine>) {
    if let Err(failures) = check(dir, engine) {
        panic!("\n{failures}");
    }
}

/// Stock, and patched by the default preset. The error has a line for each thing that is wrong.
fn check(dir: &Path, engine: Option<Engine>) -> Result<(), String> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let fail = |e: &dyn std::fmt::Display| format!("{name}: {e}\n");
    let cases = golden_folder::cases(dir).map_err(|e| fail(&e))?;
    let mut failures = String::new();
    if cases.len() != 3 {
        failures += &fail(&"expected three prompts");
    }
    let default = PatchOptions { environment: false, ..PatchOptions::default() };
    for patch in [None, Some(default)] {
        let options = LoadOptions {
            dtype: DtypeChoice::F32,
            device: DeviceChoice::Cpu,
            patch,
            ..LoadOptions::default()
        };
        let model = Model::load(dir, &options, &mut |_| {}).map_err(|e| fail(&e))?;
        if let Some((report, engine)) = model.patch_report().zip(engine)
            && report.native != (engine == Engine::Whole)
        {
            failures += &fail(&format_args!("{engine:?} of it on the engine was expected: {report}"));
        }
        for case in &cases {
            let name = format!(
                "{name} {} after {} tokens",
                if model.is_patched() { "patched" } else { "stock" },
                case.prompt.len()
            );
            check_case(&model, case, &name, &mut failures).map_err(|e| format!("{failures}{name}: {e}\n"))?;
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(failures) }
}

fn check_case(
    model: &Model,
    case: &Case,
    name: &str,
    failures: &mut String,
) -> Result<(), Box<dyn std::error::Error>> {
    // The prompt and the first tokens after it, each row of which mlx-lm's logits are there for.
    let (vocabulary, last) = (model.vocab_size(), case.prompt.len() - 1);
    let known = case.logits.len() / vocabulary;
    let ids = [&case.prompt[..], &case.tokens[..known - 1]].concat();
    let whole = logits(model, &ids, ids.len())?;
    let off = farthest(&whole[last * vocabulary..], &case.logits);
    let cut = [7, 1].map(|chunk| logits(model, &ids, chunk).map(|rows| farthest(&rows, &whole)));
    let cut = cut.into_iter().collect::<Result<Vec<f32>, _>>()?;

    let options = GenerateOptions { max_tokens: case.tokens.len(), ignore_eos: true, ..Default::default() };
    let tokens = Session::new(model).generate(&case.prompt, &options, &mut |_| Flow::Continue)?.tokens;

    let gap = smallest_gap(case);
    let near =
        format!("smallest gap of a router {gap:.1e}{}", if gap < NEAR_TIE { " (near-tie)" } else { "" });
    println!("{name}: logits {off:.1e} off; cut in 7 and 1 {:.1e} and {:.1e}; {near}", cut[0], cut[1]);

    // A near-tie excuses nothing.
    if off.is_nan() || off > LOGITS {
        writeln!(failures, "{name}: logits are {off} off; {near}")?;
    }
    for (chunk, apart) in [7, 1].into_iter().zip(cut) {
        if apart.is_nan() || apart > LOGITS {
            writeln!(failures, "{name}: in calls of {chunk} logits are {apart} off; {near}")?;
        }
    }
    if let Some(step) = (0..case.tokens.len()).find(|&i| tokens.get(i) != case.tokens.get(i)) {
        let (found, expected, margin) = (tokens.get(step), case.tokens[step], case.margins[step]);
        writeln!(failures, "{name}: step {step}: {found:?} instead of {expected}, margin {margin}; {near}")?;
    }
    Ok(())
}

/// Logits `[ids, vocabulary]`, `chunk` ids a call.
fn logits(model: &Model, ids: &[u32], chunk: usize) -> Result<Vec<f32>, Box<dyn std::error::Error>> {
    let mut state = model.new_state();
    let mut rows = Vec::new();
    for part in ids.chunks(chunk) {
        rows.extend(model.run(part, &mut state)?.to_vec::<f32>()?);
    }
    Ok(rows)
}

/// The largest absolute difference; NaN if there is one, infinity if the lengths differ.
fn farthest(a: &[f32], b: &[f32]) -> f32 {
    if a.len() != b.len() {
        return f32::INFINITY;
    }
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |m, d| if m.is_nan() || d <= m { m } else { d })
}
