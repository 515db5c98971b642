//! The embedded model's greedy tokens are mlx-lm's, step by step.
//!
//! `fixtures/tiny-lfm2-moe.golden.json` holds what mlx-lm 0.32.2 on the CPU gives with every float tensor cast to float32:
//! prompts of one token, 5, 92 and one through the chat template, 200 tokens each, and the margin between the two best
//! logits of every step (never below 0.004, so equal tokens are no luck).

use std::path::{Path, PathBuf};

use serde::Deserialize;
use zmlx_graph::GraphError;
use zmlx_models::{
    ChatMessage, DeviceChoice, DtypeChoice, Event, FinishReason, Flow, GenerateOptions, LoadOptions, Model,
    PatchOptions, Session,
};

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: serde_json::Value,
    prompt_ids: Vec<u32>,
    tokens: Vec<u32>,
    margins: Vec<f32>,
    top5_first: Vec<(u32, f32)>,
    text: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn golden() -> Golden {
    let text = std::fs::read_to_string(root().join("fixtures/tiny-lfm2-moe.golden.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// What the default preset is, whatever the environment says.
fn default_preset() -> PatchOptions {
    PatchOptions { environment: false, ..PatchOptions::default() }
}

fn load_with(patch: Option<PatchOptions>) -> Model {
    let options =
        LoadOptions { dtype: DtypeChoice::F32, device: DeviceChoice::Cpu, patch, ..LoadOptions::default() };
    Model::load(&root().join("models/tiny-lfm2-moe"), &options, &mut |_| {}).unwrap()
}

fn stock() -> Model {
    load_with(None)
}

/// The model as stock MLX runs it, and as the default preset does, which is to make no difference to any token.
fn both() -> [(&'static str, Model); 2] {
    let patched = load_with(Some(default_preset()));
    let report = patched.patch_report().unwrap();
    assert!(report.native, "the whole model runs on the engine: {report}");
    [("stock", stock()), ("patched", patched)]
}

fn greedy(model: &Model, prompt: &[u32], max_tokens: usize) -> Vec<u32> {
    Session::new(model).generate(prompt, &options(max_tokens), &mut |_| Flow::Continue).unwrap().tokens
}

fn options(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_tokens, ignore_eos: true, ..GenerateOptions::default() }
}

#[test]
fn greedy_tokens_are_those_of_mlx_lm() {
    let golden = golden();
    assert_eq!(golden.cases.len(), 4);
    let models = both();
    for ((form, model), case) in models.iter().flat_map(|m| golden.cases.iter().map(move |c| (m, c))) {
        let done =
            Session::new(model).generate(&case.prompt_ids, &options(200), &mut |_| Flow::Continue).unwrap();
        if let Some(step) = (0..200).find(|&i| done.tokens.get(i) != case.tokens.get(i)) {
            panic!(
                "{form}, prompt {}: step {step}: {:?} instead of {} (margin {})",
                case.prompt,
                done.tokens.get(step),
                case.tokens[step],
                case.margins[step]
            );
        }
        assert_eq!((done.tokens.len(), done.finish_reason), (200, FinishReason::Length));
        let tokenizer = model.tokenizer().unwrap();
        let mut stream = tokenizer.stream();
        let mut text: String = case.tokens.iter().map(|&id| stream.push(id).unwrap()).collect();
        text.push_str(&stream.finish().unwrap());
        assert_eq!(done.text, text);
        assert_eq!(tokenizer.decode(&case.tokens, false).unwrap(), case.text);
    }
}

#[test]
fn first_logits_are_those_of_mlx_lm() {
    let golden = golden();
    for ((form, model), case) in both().iter().flat_map(|m| golden.cases.iter().map(move |c| (m, c))) {
        // The engine's products take activations as 16-bit integers.
        let bound = if model.is_patched() { 2e-3 } else { 1e-4 };
        let mut state = model.new_state();
        let logits = model.run(&case.prompt_ids, &mut state).unwrap();
        let last = case.prompt_ids.len() - 1;
        let row = &logits.to_vec::<f32>().unwrap()[last * model.vocab_size()..];
        for &(id, want) in &case.top5_first {
            let got = row[id as usize];
            let prompt = &case.prompt;
            assert!((got - want).abs() < bound, "{form}, {prompt}: token {id}: {got} instead of {want}");
        }
        assert_eq!(state.position() as usize, case.prompt_ids.len());
    }
}

#[test]
fn prompts_encode_to_the_same_ids() {
    let model = stock();
    let tokenizer = model.tokenizer().unwrap();
    for case in &golden().cases {
        let ids = match &case.prompt {
            serde_json::Value::String(text) => tokenizer.encode(text, false).unwrap(),
            message => {
                let message: ChatMessage = serde_json::from_value(message.clone()).unwrap();
                let text = tokenizer.apply_chat_template(&[message], true).unwrap();
                tokenizer.encode(&text, false).unwrap()
            }
        };
        assert_eq!(ids, case.prompt_ids);
    }
}

#[test]
fn chunks_and_continued_sessions_change_nothing() {
    let golden = golden();
    for (_, model) in both() {
        chunks_and_continued_sessions(&model, &golden);
    }
}

fn chunks_and_continued_sessions(model: &Model, golden: &Golden) {
    let case = golden.cases.iter().max_by_key(|c| c.prompt_ids.len()).unwrap();
    for prefill_chunk in [1, 7, 64] {
        let options = GenerateOptions { prefill_chunk, ..options(30) };
        let mut events = Vec::new();
        let done = Session::new(model)
            .generate(&case.prompt_ids, &options, &mut |event| {
                if let Event::Prefill { done, total } = event {
                    events.push((done, total));
                }
                Flow::Continue
            })
            .unwrap();
        assert_eq!(done.tokens, case.tokens[..30], "chunk {prefill_chunk}");
        let n = case.prompt_ids.len();
        assert_eq!(events.first(), Some(&(0, n)));
        assert_eq!(events.last(), Some(&(n, n)));
        assert!(events.is_sorted());
    }

    // A second turn that extends the first is continued from the caches, whichever way the first one ended.
    for (stop_at, ignore_eos) in [(12, true), (1, true), (30, false)] {
        let mut session = Session::new(model);
        let first = GenerateOptions { ignore_eos, ..options(stop_at) };
        let done = session.generate(&case.prompt_ids, &first, &mut |_| Flow::Continue).unwrap();
        let longer = [&case.prompt_ids[..], &case.tokens[..done.tokens.len() + 5]].concat();
        let mut totals = Vec::new();
        let again = session
            .generate(&longer, &options(40), &mut |event| {
                if let Event::Prefill { total, .. } = event {
                    totals.push(total);
                }
                Flow::Continue
            })
            .unwrap();
        let from = done.tokens.len() + 5;
        assert_eq!(again.tokens, case.tokens[from..from + 40]);
        assert!(totals[0] <= 6, "only the new tokens are processed: {totals:?}");
        // Another prompt starts afresh.
        let other =
            session.generate(&golden.cases[0].prompt_ids, &options(20), &mut |_| Flow::Continue).unwrap();
        assert_eq!(other.tokens, golden.cases[0].tokens[..20]);
    }

    // Cancelled in the middle, then continued.
    let mut session = Session::new(model);
    let mut count = 0;
    let cut = session
        .generate(&case.prompt_ids, &options(50), &mut |event| {
            count += usize::from(matches!(event, Event::Token { .. }));
            if count == 9 { Flow::Stop } else { Flow::Continue }
        })
        .unwrap();
    assert_eq!((cut.tokens.len(), cut.finish_reason), (9, FinishReason::Cancelled));
    let longer = [&case.prompt_ids[..], &case.tokens[..20]].concat();
    let again = session.generate(&longer, &options(10), &mut |_| Flow::Continue).unwrap();
    assert_eq!(again.tokens, case.tokens[20..30]);
}

#[test]
fn streamed_text_adds_up_and_stop_strings_end_it() {
    let golden = golden();
    for (_, model) in both() {
        streamed_text_and_stop_strings(&model, &golden.cases[1]);
    }
}

fn streamed_text_and_stop_strings(model: &Model, case: &Case) {
    let mut streamed = String::new();
    let done = Session::new(model)
        .generate(&case.prompt_ids, &options(60), &mut |event| {
            if let Event::Token { text, .. } = event {
                streamed.push_str(text);
            }
            Flow::Continue
        })
        .unwrap();
    assert_eq!(streamed, done.text);

    let word = done.text.split_whitespace().nth(12).unwrap().to_owned();
    let options = GenerateOptions { stop: vec![word.clone(), "never there".to_owned()], ..options(60) };
    let mut streamed = String::new();
    let cut = Session::new(model)
        .generate(&case.prompt_ids, &options, &mut |event| {
            if let Event::Token { text, .. } = event {
                streamed.push_str(text);
            }
            Flow::Continue
        })
        .unwrap();
    assert_eq!(cut.finish_reason, FinishReason::Stop);
    assert_eq!(streamed, cut.text);
    assert_eq!(cut.text, done.text[..done.text.find(&word).unwrap()]);
}

/// The logits of all positions of `tokens`, handed to the model in calls of these lengths; the last one takes the rest.
fn logits_in_calls(model: &Model, tokens: &[u32], lengths: &[usize]) -> Vec<f32> {
    let mut state = model.new_state();
    let (mut rest, mut all) = (tokens, Vec::new());
    for &length in lengths.iter().chain([&usize::MAX]) {
        let (now, later) = rest.split_at(length.min(rest.len()));
        if !now.is_empty() {
            all.extend(model.run(now, &mut state).unwrap().to_vec::<f32>().unwrap());
        }
        rest = later;
    }
    assert_eq!(state.position() as usize, tokens.len());
    all
}

/// Whole, in chunks, token by token, patched: stock's logits but for rounding.
#[test]
fn a_prompt_gives_the_same_logits_however_it_is_cut() {
    let golden = golden();
    let case = golden.cases.iter().max_by_key(|c| c.prompt_ids.len()).unwrap();
    // Past the length where caches grow.
    let tokens = [&case.prompt_ids[..], &case.tokens[..]].concat();
    assert!(tokens.len() > 256);
    let [(_, stock), (_, patched)] = both();
    let want = logits_in_calls(&stock, &tokens, &[]);
    for lengths in [vec![], vec![64; 4], vec![1; tokens.len()], vec![1, 2, 3, 5, 255, 1], vec![255, 1, 1]] {
        let got = logits_in_calls(&patched, &tokens, &lengths);
        assert_eq!(got.len(), want.len());
        assert!(got.iter().all(|v| v.is_finite()));
        let rows = got.chunks(stock.vocab_size()).zip(want.chunks(stock.vocab_size()));
        let worst =
            |(a, b): (&[f32], &[f32])| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let mut worst: Vec<f32> = rows.map(worst).collect();
        worst.sort_by(f32::total_cmp);
        let part = |share: f64| worst[(worst.len() as f64 * share) as usize];
        let calls = &lengths[..lengths.len().min(6)];
        assert!(
            part(0.5) < 2e-3,
            "calls of {calls:?}: half of the positions differ by {} and more",
            part(0.5)
        );
        // Where two experts tie but for rounding, another one is taken: that position and some after it differ by more.
        assert!(
            part(0.95) < 1e-2,
            "calls of {calls:?}: a twentieth of them differs by {} and more",
            part(0.95)
        );
        assert!(part(0.999) < 1.0, "calls of {calls:?}: one differs by {}", part(0.999));
    }
}

#[test]
fn patching_and_unpatching_come_back_to_where_they_were() {
    let golden = golden();
    let case = &golden.cases[1];
    let mut model = stock();
    let bits = |model: &Model| -> Vec<u32> {
        let logits = model.run(&case.prompt_ids, &mut model.new_state()).unwrap();
        logits.to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    };
    let (before, nodes) = (bits(&model), model.graph().nodes.len());
    for keep in [false, true] {
        model.keep_both(keep);
        let mut last = None;
        for _ in 0..2 {
            let report = model.patch(&default_preset()).unwrap();
            assert!(report.native && model.is_patched() && model.graph().nodes.len() < nodes);
            assert_eq!(greedy(&model, &case.prompt_ids, 40), case.tokens[..40]);
            let patched = bits(&model);
            assert_ne!(patched, before, "the engine rounds otherwise than MLX");
            assert_eq!(*last.get_or_insert(patched.clone()), patched, "and always in the same way");
            let executed = model.patch_report().unwrap().patterns;
            assert!(executed.iter().all(|p| (p.executed > 0) == (p.matched > 0)), "{executed:?}");
            model.unpatch().unwrap();
            assert!(!model.is_patched() && model.patch_report().is_none());
            assert_eq!((bits(&model), model.graph().nodes.len()), (before.clone(), nodes));
            model.unpatch().unwrap();
        }
    }
}

#[test]
fn a_state_of_another_form_is_refused() {
    let mut model = stock();
    let only = |names: &[&str]| PatchOptions {
        patterns: Some(names.iter().map(|n| (*n).to_owned()).collect()),
        ..default_preset()
    };
    // Each has other slots on the engine: none, all, those of attention, those of convolutions.
    let forms = [
        None,
        Some(default_preset()),
        Some(only(&["qkv_rope_append", "attention_out"])),
        Some(only(&["short_conv"])),
    ];
    let select = |model: &mut Model, form: &Option<PatchOptions>| match form {
        Some(options) => drop(model.patch(options).unwrap()),
        None => model.unpatch().unwrap(),
    };
    for (made, of) in forms.iter().enumerate() {
        select(&mut model, of);
        let mut state = model.new_state();
        model.run(&[1, 2], &mut state).unwrap();
        for (used, with) in forms.iter().enumerate() {
            select(&mut model, with);
            let result = model.run(&[3], &mut state.clone());
            match result {
                Ok(_) => assert_eq!(made, used),
                Err(GraphError::WrongState) => assert_ne!(made, used),
                Err(error) => panic!("{error}"),
            }
        }
    }
}
