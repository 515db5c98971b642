//! The embedded model's greedy tokens are mlx-lm's, step by step.
//!
//! `fixtures/tiny-lfm2-moe.golden.json` holds what mlx-lm 0.32.2 on the CPU gives with every float tensor cast to float32:
//! prompts of one token, 5, 92 and one through the chat template, 200 tokens each, and the margin between the two best
//! logits of every step (never below 0.004, so equal tokens are no luck).

use std::path::{Path, PathBuf};

use serde::Deserialize;
use zmlx_models::{
    ChatMessage, DeviceChoice, DtypeChoice, Event, FinishReason, Flow, GenerateOptions, LoadOptions, Model,
    Session,
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

fn load() -> Model {
    let options = LoadOptions { dtype: DtypeChoice::F32, device: DeviceChoice::Cpu, patch: None };
    Model::load(&root().join("models/tiny-lfm2-moe"), &options, &mut |_| {}).unwrap()
}

fn options(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_tokens, ignore_eos: true, ..GenerateOptions::default() }
}

#[test]
fn greedy_tokens_are_those_of_mlx_lm() {
    let model = load();
    let golden = golden();
    assert_eq!(golden.cases.len(), 4);
    for case in &golden.cases {
        let done =
            Session::new(&model).generate(&case.prompt_ids, &options(200), &mut |_| Flow::Continue).unwrap();
        if let Some(step) = (0..200).find(|&i| done.tokens.get(i) != case.tokens.get(i)) {
            panic!(
                "prompt {}: step {step}: {:?} instead of {} (margin {})",
                case.prompt,
                done.tokens.get(step),
                case.tokens[step],
                case.margins[step]
            );
        }
        assert_eq!((done.tokens.len(), done.finish_reason), (200, FinishReason::Length));
        let tokenizer = model.tokenizer().unwrap();
        assert_eq!(done.text, tokenizer.decode(&case.tokens, true).unwrap());
        assert_eq!(tokenizer.decode(&case.tokens, false).unwrap(), case.text);
    }
}

#[test]
fn first_logits_are_those_of_mlx_lm() {
    let model = load();
    for case in &golden().cases {
        let mut state = model.new_state();
        let logits = model.run(&case.prompt_ids, &mut state).unwrap();
        let last = case.prompt_ids.len() - 1;
        let row = &logits.to_vec::<f32>().unwrap()[last * model.vocab_size()..];
        for &(id, want) in &case.top5_first {
            let got = row[id as usize];
            assert!((got - want).abs() < 1e-4, "prompt {}: token {id}: {got} instead of {want}", case.prompt);
        }
        assert_eq!(state.position() as usize, case.prompt_ids.len());
    }
}

#[test]
fn prompts_encode_to_the_same_ids() {
    let model = load();
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
    let model = load();
    let golden = golden();
    let case = golden.cases.iter().max_by_key(|c| c.prompt_ids.len()).unwrap();
    for prefill_chunk in [1, 7, 64] {
        let options = GenerateOptions { prefill_chunk, ..options(30) };
        let mut events = Vec::new();
        let done = Session::new(&model)
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
        let mut session = Session::new(&model);
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
    let mut session = Session::new(&model);
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
    let model = load();
    let golden = golden();
    let case = &golden.cases[1];
    let mut streamed = String::new();
    let done = Session::new(&model)
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
    let cut = Session::new(&model)
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
