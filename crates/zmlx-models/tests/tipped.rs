//! Which choices of experts account for other logits: choices that are turned over by hand are found again.

mod golden_folder;

use zmlx_graph::GraphError;
use zmlx_mlx::stream::with_stream;
use zmlx_mlx::{Array, Dtype};
use zmlx_models::tipped::{Allowed, Kind, Tip, explain};
use zmlx_models::{DeviceChoice, DtypeChoice, LoadOptions, Model, PatchOptions};

/// The tokens of a prompt of 11 and some that follow it.
fn model_and_tokens(name: &str) -> (Model, Vec<u32>) {
    let dir = golden_folder::committed().join(name);
    let options =
        LoadOptions { dtype: DtypeChoice::F32, device: DeviceChoice::Cpu, ..LoadOptions::default() };
    let case = golden_folder::cases(&dir).unwrap().swap_remove(1);
    let tokens = case.prompt.iter().chain(&case.tokens[..6]).copied().collect();
    (Model::load(&dir, &options, &mut |_| {}).unwrap(), tokens)
}

fn allowed(distance: f32, gap: f32) -> Allowed {
    Allowed { caches: None, gap, distance }
}

/// The last logits with some choices turned over, and those choices: for router number `n` and place `p` in `turned`, the
/// expert of the smallest chosen score goes and that of the largest other score comes.
fn with_turned(model: &Model, tokens: &[u32], turned: &[(usize, usize)]) -> (Vec<f32>, Vec<Tip>) {
    let executor = model.executor();
    let nodes = &executor.graph().nodes;
    let routers: Vec<usize> =
        (0..nodes.len()).filter(|&i| nodes[i].op.name().starts_with("top_k_")).collect();
    assert!(!routers.is_empty());
    let mut scores = vec![Vec::new(); nodes.len()];
    let mut tips = Vec::new();
    let logits = with_stream(model.stream(), || {
        let ids = Array::from_slice(tokens, &[1, tokens.len() as i32]).unwrap();
        executor.run_changed(&ids, &mut executor.new_state(), &mut |node, outputs| {
            scores[node] = outputs.clone();
            let Some(router) = routers.iter().position(|&r| r == node) else { return Ok(()) };
            let from = nodes[node].inputs[0].place();
            let scores = &scores[from.0][from.1];
            let (experts, k) = (scores.dim(-1)? as usize, outputs[0].dim(-1)? as usize);
            let (scores, mut chosen) = (scores.to_vec::<f32>()?, outputs[0].to_vec::<u32>()?);
            for &(_, position) in turned.iter().filter(|t| t.0 == router) {
                let scores = &scores[position * experts..][..experts];
                let row = &mut chosen[position * k..][..k];
                let mut order: Vec<u32> = (0..experts as u32).collect();
                order.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
                let (goes, comes) = (order[k - 1], order[k]);
                let place = row.iter().position(|e| *e == goes).unwrap();
                row[place] = comes;
                let mean = scores.iter().map(|s| s * s).sum::<f32>() / experts as f32;
                let gap = (scores[goes as usize] - scores[comes as usize]) / mean.sqrt();
                tips.push(Tip {
                    kind: Kind::Expert,
                    path: nodes[node].path.clone(),
                    position,
                    from: goes,
                    to: comes,
                    gap,
                });
            }
            outputs[0] = Array::from_slice(&chosen, outputs[0].shape())?;
            Ok(())
        })
    });
    let logits = logits.unwrap().astype(Dtype::Float32).unwrap().to_vec::<f32>().unwrap();
    (logits[logits.len() - model.vocab_size()..].to_vec(), tips)
}

/// Of every family's way of choosing one: softmax of all, sigmoid with a bias, softmax of the chosen.
const FOLDERS: [&str; 3] = ["qwen3_moe-q4", "lfm2_moe-q4", "gpt_oss-q4"];

#[test]
fn a_choice_that_was_turned_over_is_found() {
    for name in FOLDERS {
        let (model, tokens) = model_and_tokens(name);
        let last = tokens.len() - 1;
        // The last token's own choice, and one in a token before it, which is read from the caches.
        for place in [(0, last), (1, last), (0, last - 1)] {
            let (other, tips) = with_turned(&model, &tokens, &[place]);
            let found = explain(&model, &tokens, &other, &allowed(1e-5, f32::INFINITY)).unwrap();
            assert!(found.before > 1e-4 && found.after <= 1e-5, "{name} {place:?}: {found:?}");
            assert_eq!(found.tips, tips, "{name} {place:?}");
            // Not where it is not close enough.
            let found = explain(&model, &tokens, &other, &allowed(1e-5, tips[0].gap / 2.0)).unwrap();
            assert!(!found.tips.contains(&tips[0]) && found.after > 1e-5, "{name} {place:?}: {found:?}");
        }
    }
}

/// DeepSeek's routers choose among groups first, by the sum of each group's two largest scores.
#[test]
fn a_group_that_was_turned_over_is_found() {
    let (model, tokens) = model_and_tokens("deepseek_v3-q4");
    let (groups, keep) = (4, 2);
    let last = tokens.len() - 1;
    let executor = model.executor();
    let nodes = &executor.graph().nodes;
    let router = nodes.iter().position(|n| n.op.name() == "mask_groups").unwrap();
    let mut scores = vec![Vec::new(); nodes.len()];
    let mut wanted = None;
    let logits = with_stream(model.stream(), || {
        let ids = Array::from_slice(&tokens, &[1, tokens.len() as i32]).unwrap();
        executor.run_changed(&ids, &mut executor.new_state(), &mut |node, outputs| {
            scores[node] = outputs.clone();
            if node == router {
                let from = nodes[node].inputs[0].place();
                let scores = &scores[from.0][from.1];
                let experts = scores.dim(-1)? as usize;
                let width = experts / groups;
                let (scores, mut left) = (scores.to_vec::<f32>()?, outputs[0].to_vec::<f32>()?);
                let sum = |group: &usize| {
                    let mut of = scores[last * experts + group * width..][..width].to_vec();
                    of.sort_by(|a, b| b.total_cmp(a));
                    of[0] + of[1]
                };
                let mut order: Vec<usize> = (0..groups).collect();
                order.sort_by(|a, b| sum(b).total_cmp(&sum(a)));
                let (goes, comes) = (order[keep - 1], order[keep]);
                for i in 0..width {
                    let at = |group: usize| last * experts + group * width + i;
                    assert!(left[at(goes)] != 0.0 && left[at(comes)] == 0.0);
                    (left[at(goes)], left[at(comes)]) = (0.0, scores[at(comes)]);
                }
                wanted = Some((nodes[node].path.clone(), goes as u32, comes as u32));
                outputs[0] = Array::from_slice(&left, outputs[0].shape())?;
            }
            Ok(())
        })
    });
    let logits = logits.unwrap().to_vec::<f32>().unwrap();
    let other = &logits[logits.len() - model.vocab_size()..];
    let found = explain(&model, &tokens, other, &allowed(1e-5, f32::INFINITY)).unwrap();
    assert!(found.before > 1e-4 && found.after <= 1e-5, "{found:?}");
    let [tip] = found.tips.as_slice() else { panic!("{found:?}") };
    let (path, from, to) = wanted.unwrap();
    assert_eq!((tip.kind, &tip.path, tip.position, tip.from, tip.to), (Kind::Group, &path, last, from, to));
}

#[test]
fn choices_of_several_layers_are_found_together() {
    let (model, tokens) = model_and_tokens("qwen3_moe-q4");
    let last = tokens.len() - 1;
    let (other, mut tips) = with_turned(&model, &tokens, &[(0, last), (2, last)]);
    let mut found = explain(&model, &tokens, &other, &allowed(1e-5, f32::INFINITY)).unwrap();
    let by_path = |a: &Tip, b: &Tip| a.path.cmp(&b.path);
    tips.sort_by(by_path);
    found.tips.sort_by(by_path);
    assert!(found.after <= 1e-5, "{found:?}");
    let places = |tips: &[Tip]| -> Vec<_> { tips.iter().map(|t| (t.path.clone(), t.from, t.to)).collect() };
    assert_eq!(places(&found.tips), places(&tips));
}

#[test]
fn equal_logits_need_no_choice_and_wrong_ones_have_none() {
    let (model, tokens) = model_and_tokens("qwen3_moe-q4");
    let (same, _) = with_turned(&model, &tokens, &[]);
    let found = explain(&model, &tokens, &same, &allowed(1e-5, 0.05)).unwrap();
    assert!(found.tips.is_empty() && found.before <= 1e-6, "{found:?}");

    let wrong: Vec<f32> = same.iter().rev().copied().collect();
    let found = explain(&model, &tokens, &wrong, &allowed(0.03, f32::INFINITY)).unwrap();
    assert!(found.before > 0.5 && found.after > 0.3, "{found:?}");
}

#[test]
fn the_exact_model_is_not_patched() {
    let (mut model, tokens) = model_and_tokens("qwen3_moe-q4");
    model.patch(&PatchOptions { environment: false, ..PatchOptions::default() }).unwrap();
    let other = vec![0.0; model.vocab_size()];
    let error = explain(&model, &tokens, &other, &allowed(0.03, 0.05)).unwrap_err();
    assert!(matches!(&error, GraphError::Malformed(what) if what.contains("is patched")), "{error}");
}

#[test]
fn other_logits_must_be_of_the_vocabulary() {
    let (model, tokens) = model_and_tokens("qwen3_moe-q4");
    let error = explain(&model, &tokens, &[0.0; 3], &allowed(0.03, 0.05)).unwrap_err();
    assert!(matches!(&error, GraphError::Malformed(what) if what.starts_with("3 other logits")), "{error}");
}

/// Keys and values of 16 bits in GPT-OSS' first layer choose other experts three layers on: the step where decode in
/// bfloat16 on a GPU parts from float32, its logits a third of their norm off.
#[test]
fn rounded_keys_and_values_account_for_what_they_do() {
    let dir = golden_folder::committed().join("gpt_oss-mxfp4");
    let options =
        LoadOptions { dtype: DtypeChoice::F32, device: DeviceChoice::Cpu, ..LoadOptions::default() };
    let model = Model::load(&dir, &options, &mut |_| {}).unwrap();
    let case = golden_folder::cases(&dir).unwrap().swap_remove(1);
    let tokens: Vec<u32> = case.prompt.iter().chain(&case.tokens[..9]).copied().collect();
    let executor = model.executor();
    let logits = with_stream(model.stream(), || {
        let ids = Array::from_slice(&tokens, &[1, tokens.len() as i32]).unwrap();
        executor.run_changed(&ids, &mut executor.new_state(), &mut |node, outputs| {
            if executor.graph().nodes[node].op.name() == "kv_append" {
                for array in outputs.iter_mut() {
                    *array = array.astype(Dtype::Bfloat16)?.astype(Dtype::Float32)?;
                }
            }
            Ok(())
        })
    });
    let logits = logits.unwrap().to_vec::<f32>().unwrap();
    let other = &logits[logits.len() - model.vocab_size()..];
    let none = explain(&model, &tokens, other, &allowed(0.03, 0.05)).unwrap();
    assert!(none.before > 0.3 && none.after > 0.3 && none.rounded.is_none(), "{none:?}");
    let found =
        explain(&model, &tokens, other, &Allowed { caches: Some(Dtype::Bfloat16), ..allowed(0.03, 0.05) });
    let found = found.unwrap();
    assert!(found.before > 0.3 && found.rounded == Some(found.after) && found.after < 1e-5, "{found:?}");
    assert!(found.tips.is_empty());
}
