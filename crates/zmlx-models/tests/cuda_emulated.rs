//! The launches of a token, run in the emulator: tokens and logits are those that mlx-lm gave on a CPU. And of a token of
//! each of a few sequences: those of each sequence alone.

mod emulated;
mod golden_folder;

use std::path::Path;

use emulated::Emulated;
use golden_folder::LOGITS;
use zmlx_cuda::plan::{Memory, Plan, WeightAddress};
use zmlx_graph::cuda::Extent;

#[test]
fn the_embedded_model_decodes_as_on_a_cpu() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let (model, fused) = emulated::load(&root.join("models/tiny-lfm2-moe")).unwrap();
    let cases = golden_folder::embedded().unwrap();
    // The prompt of one token begins with nothing in any cache.
    let case = cases.iter().find(|c| c.prompt_ids.len() == 1).unwrap();
    let mut sequence = Emulated::new(&fused, model.vocab_size(), Extent::new(256)).unwrap();
    sequence.feed(&case.prompt_ids[..1]);
    let mut tokens = sequence.step();
    let logits = sequence.logits();
    for &(id, want) in &case.top5_first {
        assert!((logits[id] - want).abs() < 1e-4, "{id}: {} and not {want}", logits[id]);
    }
    tokens.extend((1..3).flat_map(|_| sequence.step()));
    assert_eq!(tokens, case.tokens[..3]);
}

/// Memory that remembers what it was asked for.
#[derive(Default)]
struct Recorded {
    rooms: Vec<usize>,
    constants: Vec<Vec<u32>>,
    tables: Vec<usize>,
    next: u64,
}

impl Recorded {
    fn address(&mut self) -> u64 {
        self.next += 1 << 32;
        self.next
    }
}

impl Memory for Recorded {
    fn room(&mut self, bytes: usize) -> zmlx_cuda::Result<u64> {
        self.rooms.push(bytes);
        Ok(self.address())
    }

    fn constant(&mut self, floats: &[f32]) -> zmlx_cuda::Result<u64> {
        self.constants.push(floats.iter().map(|f| f.to_bits()).collect());
        Ok(self.address())
    }

    fn table(&mut self, floats: &[f32]) -> zmlx_cuda::Result<u64> {
        self.tables.push(floats.len());
        Ok(self.address())
    }

    fn weight(&self, number: usize) -> zmlx_cuda::Result<WeightAddress> {
        Ok(WeightAddress { codes: (number as u64 + 1) << 52, scales: 1 << 51, biases: 1 << 51 })
    }
}

/// A sequence that grows is planned anew, and one that is copied is planned beside the first: both count on the same
/// requests in the same order, on constants that do not change, and on kernels that are compiled already.
#[test]
fn more_positions_ask_for_the_same_memory_but_longer_caches() {
    for (folder, sequences) in [("gpt_oss-q4", 1), ("qwen3_5_moe-q4", 1), ("qwen3_5_moe-q4", 3)] {
        let dir = golden_folder::committed().join(folder);
        let (_, fused) = emulated::load(&dir).unwrap();
        let plans = [1024, 1024, 5120].map(|capacity| {
            let mut memory = Recorded::default();
            let extent = Extent { sequences, ..Extent::new(capacity) };
            let plan = zmlx_graph::cuda::plan(&fused, extent, &mut memory).unwrap();
            (plan, memory)
        });
        let [(first, short), (again, same), (longer, long)] = &plans;
        assert_eq!((&short.rooms, &short.tables, short.next), (&same.rooms, &same.tables, same.next));
        assert_eq!(short.constants, same.constants);
        assert_eq!(short.constants, long.constants);
        assert!(short.rooms.len() == long.rooms.len() && short.tables.len() == long.tables.len());
        let grown =
            |a: &[usize], b: &[usize]| a.iter().zip(b).filter(|(a, b)| a != b).map(|(a, b)| b / a).collect();
        let rooms: Vec<usize> = grown(&short.rooms, &long.rooms);
        // Keys and values of each layer that attends, and the tables of angles.
        let attends = first.steps.iter().filter(|s| s.name.contains("attention")).count();
        assert!(attends > 0 && rooms == vec![5; 2 * attends], "{folder}: {rooms:?}");
        let tables: Vec<usize> = grown(&short.tables, &long.tables);
        assert_eq!(tables, vec![5; short.tables.len()]);
        let kernels = |plan: &Plan| plan.steps.iter().map(|s| s.source.clone()).collect::<Vec<_>>();
        assert!(kernels(first) == kernels(again) && kernels(first) == kernels(longer), "{folder}");
    }
}

/// One test for each folder of `oracle/`: tokens to decode after the prompt of one token, or of eleven where windows are
/// to be left behind and states to go on. Those that add no kernel of their own run when they are asked for, with
/// `--ignored`.
macro_rules! folders {
    ($($(#[$attribute:meta])* $test:ident: $folder:literal, $prompt:literal tokens, then $count:literal;)*) => {
        $(#[test]
        $(#[$attribute])*
        fn $test() {
            if let Err(failure) = decodes($folder, $prompt, $count) {
                panic!("{}: {failure}", $folder);
            }
        })*
    };
}

folders! {
    gemma3_text_q4: "gemma3_text-q4", 1 tokens, then 2;
    glm4_moe_q4: "glm4_moe-q4", 1 tokens, then 2;
    gpt_oss_mxfp4: "gpt_oss-mxfp4", 1 tokens, then 2;
    gpt_oss_q4: "gpt_oss-q4", 11 tokens, then 8;
    llama_bf16: "llama-bf16", 1 tokens, then 2;
    mixtral_q4: "mixtral-q4", 1 tokens, then 2;
    olmoe_q4: "olmoe-q4", 1 tokens, then 2;
    qwen3_5_moe_q4: "qwen3_5_moe-q4", 1 tokens, then 3;
    qwen3_moe_q4: "qwen3_moe-q4", 1 tokens, then 2;
    qwen3_moe_q8: "qwen3_moe-q8", 1 tokens, then 2;
    qwen3_next_q4: "qwen3_next-q4", 1 tokens, then 3;
    #[ignore = "its window is GPT-OSS's"]
    gemma3_beyond_its_window: "gemma3_text-q4", 11 tokens, then 8;
    #[ignore = "slow"]
    gpt_oss_mxfp4_beyond_its_window: "gpt_oss-mxfp4", 11 tokens, then 8;
    #[ignore = "its formats are in others"]
    gpt_oss_mxfp4_q8: "gpt_oss-mxfp4-q8", 1 tokens, then 3;
    #[ignore = "the embedded model has its kernels"]
    lfm2_q4: "lfm2-q4", 1 tokens, then 3;
    #[ignore = "Mixtral has its kernels"]
    llama_q4: "llama-q4", 1 tokens, then 3;
    #[ignore = "Mixtral has its kernels"]
    mistral_q4: "mistral-q4", 1 tokens, then 3;
    #[ignore = "Mixtral has its kernels"]
    phi3_q4: "phi3-q4", 1 tokens, then 3;
    #[ignore = "GPT-OSS has its kernels"]
    qwen2_q4: "qwen2-q4", 1 tokens, then 3;
    #[ignore = "Qwen3.5's experts are another folder"]
    qwen3_5_q4: "qwen3_5-q4", 11 tokens, then 4;
    #[ignore = "slow"]
    qwen3_5_moe_after_a_prompt: "qwen3_5_moe-q4", 11 tokens, then 4;
    #[ignore = "its formats are in others"]
    qwen3_moe_mxfp4: "qwen3_moe-mxfp4-all", 1 tokens, then 3;
    #[ignore = "slow"]
    qwen3_next_after_a_prompt: "qwen3_next-q4", 11 tokens, then 4;
    #[ignore = "Qwen3 with experts has its kernels"]
    qwen3_q4: "qwen3-q4", 1 tokens, then 3;
    glm4_moe_lite_q4: "glm4_moe_lite-q4", 1 tokens, then 4;
    #[ignore = "GLM-4.7-Flash has its kernels"]
    deepseek_v3_q4: "deepseek_v3-q4", 1 tokens, then 4;
    #[ignore = "GLM-4.7-Flash has its kernels"]
    kimi_k25_q4: "kimi_k25-q4", 1 tokens, then 4;
}

/// Feeds the prompt of that length token by token, then goes on by `count` tokens.
fn decodes(folder: &str, prompt: usize, count: usize) -> Result<(), String> {
    let dir = golden_folder::committed().join(folder);
    let cases = golden_folder::cases(&dir)?;
    let case = cases.iter().find(|c| c.prompt.len() == prompt).ok_or("no such prompt")?;
    let (model, fused) = emulated::load(&dir)?;
    let vocabulary = model.vocab_size();
    let mut sequence = Emulated::new(&fused, vocabulary, Extent::new(64))?;
    let mut off = 0.0f32;
    for step in 0..prompt + count - 1 {
        if let Some(&token) = case.prompt.get(step) {
            sequence.feed(&[token]);
        }
        let token = sequence.step()[0];
        let Some(done) = (step + 1).checked_sub(prompt) else { continue };
        // Logits are there for the first tokens, each token for all.
        let row = case.logits.get(done * vocabulary..(done + 1) * vocabulary).unwrap_or_default();
        if row.is_empty() && done == 0 {
            return Err("no logits to compare".to_owned());
        }
        for (at, (found, want)) in sequence.logits().iter().zip(row).enumerate() {
            let apart = (found - want).abs();
            if apart.is_nan() || apart > LOGITS {
                return Err(format!("token {done}: logit {at} is {found} and not {want}"));
            }
            off = off.max(apart);
        }
        if token != case.tokens[done] {
            let (want, margin) = (case.tokens[done], case.margins[done]);
            return Err(format!("token {done}: {token} and not {want}, margin {margin}"));
        }
    }
    println!("{folder}: logits {off:.1e} off");
    Ok(())
}

/// Sequences that are decoded together, beside each alone: they begin with different tokens, and each goes on with its own.
/// `more`: launches that a step takes more than that of one.
fn together(dir: &Path, extent: Extent, steps: usize, more: usize) -> Result<(), String> {
    let sequences = extent.sequences;
    let (model, fused) = emulated::load(dir)?;
    let vocabulary = model.vocab_size();
    let first: Vec<u32> = (0..sequences as u32).map(|i| (7 + 31 * i) % vocabulary as u32).collect();
    let mut batch = Emulated::new(&fused, vocabulary, extent)?;
    let mut alone = Vec::new();
    for token in &first {
        let mut one = Emulated::new(&fused, vocabulary, Extent::new(extent.capacity))?;
        one.feed(&[*token]);
        alone.push(one);
    }
    batch.feed(&first);
    assert_eq!(batch.launches() - alone[0].launches(), more);
    let mut off = 0.0f32;
    for step in 0..steps {
        let tokens = batch.step();
        let logits = batch.logits();
        for (i, one) in alone.iter_mut().enumerate() {
            let token = one.step()[0];
            let row = &logits[i * vocabulary..][..vocabulary];
            for (at, (found, want)) in row.iter().zip(one.logits()).enumerate() {
                let apart = (found - want).abs();
                if apart.is_nan() || apart > LOGITS {
                    return Err(format!("step {step}, sequence {i}: logit {at} is {found} and not {want}"));
                }
                off = off.max(apart);
            }
            if tokens[i] != token {
                return Err(format!("step {step}, sequence {i}: token {} and not {token}", tokens[i]));
            }
        }
    }
    println!("{}: logits {off:.1e} off", dir.display());
    Ok(())
}

/// One test for each kind of cache and state.
macro_rules! batches {
    ($($test:ident: $folder:literal, $sequences:literal sequences, $steps:literal steps, $more:literal more;)*) => {
        $(#[test]
        fn $test() {
            let extent = Extent { sequences: $sequences, ..Extent::new(64) };
            if let Err(failure) = together(&golden_folder::committed().join($folder), extent, $steps, $more) {
                panic!("{}: {failure}", $folder);
            }
        })*
    };
}

// Of three the next tokens are a launch of their own; queries and latents are two.
batches! {
    three_of_lfm2: "lfm2-q4", 3 sequences, 3 steps, 1 more;
    three_of_qwen3_moe: "qwen3_moe-q4", 3 sequences, 2 steps, 1 more;
    three_of_gpt_oss: "gpt_oss-q4", 3 sequences, 2 steps, 1 more;
    three_of_qwen3_5_moe: "qwen3_5_moe-q4", 3 sequences, 3 steps, 1 more;
    three_of_glm4_moe_lite: "glm4_moe_lite-q4", 3 sequences, 3 steps, 4 more;
    four_of_mixtral: "mixtral-q4", 4 sequences, 2 steps, 0 more;
}

/// Rows of x that shared memory does not hold all at once: products are launches of some of them each.
#[test]
fn three_of_lfm2_in_little_shared_memory() {
    let extent = Extent { sequences: 3, shared_memory: 4 << 10, ..Extent::new(64) };
    together(&golden_folder::committed().join("lfm2-q4"), extent, 2, 15).unwrap();
}
