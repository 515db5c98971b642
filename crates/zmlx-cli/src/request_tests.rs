//! Tables of what may and may not be typed.

use clap::Parser;

use super::*;
use crate::args::{Cli, Command};

fn generate(typed: &[&str], terminal: bool) -> Result<GenerateRequest, Failure> {
    let line = ["zmlx", "generate"].iter().chain(typed);
    match Cli::try_parse_from(line).expect("parses").command {
        Command::Generate(args) => GenerateRequest::new(args, terminal),
        other => panic!("parsed as {other:?}"),
    }
}

#[test]
fn values_out_of_range_are_usage_errors_that_say_the_range() {
    let whole_1 = "a whole number of 1 or more";
    let top_p = "a number above 0 and up to 1";
    let cases = [
        ("--temp", "-1", "a number of 0 or more"),
        ("--temp", "nan", "a number of 0 or more"),
        ("--temp", "inf", "a number of 0 or more"),
        ("--temp", "warm", "a number of 0 or more"),
        ("--top-p", "2", top_p),
        ("--top-p", "0", top_p),
        ("--top-p", "-0.1", top_p),
        ("--top-p", "NaN", top_p),
        ("--min-p", "3", "a number from 0 to 1"),
        ("--min-p", "-0.5", "a number from 0 to 1"),
        ("--top-k", "-1", "from 0 to 4294967295"),
        ("--top-k", "1.5", "from 0 to 4294967295"),
        ("--repetition-penalty", "0", "a number above 0"),
        ("--repetition-penalty", "-inf", "a number above 0"),
        ("--max-tokens", "0", whole_1),
        ("--max-tokens", "-3", whole_1),
        ("--max-tokens", "99999999999999999999999", whole_1),
        ("--prefill-chunk", "0", whole_1),
        ("--seed", "-1", "18446744073709551615"),
        ("--seed", "0x7", "18446744073709551615"),
        ("--logit-bias", "5", "ID=F"),
        ("--logit-bias", "-5=1", "ID=F"),
        ("--logit-bias", "5=nan", "finite number"),
        ("--stop", "", "empty"),
        ("--model", " ", "empty"),
    ];
    let mut wrong = Vec::new();
    for (flag, value, words) in cases {
        let failure = generate(&["--prompt", "x", flag, value], true).err();
        let line = failure.as_ref().and_then(Failure::error).map(ToString::to_string).unwrap_or_default();
        let names_it = line.contains(flag) || flag == "--model";
        if failure.map(|f| f.code()) != Some(2) || !line.contains(words) || !names_it {
            wrong.push(format!("{flag} {value}: {line:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn prompt_ids_that_are_not_ids() {
    for ids in ["", ",", "1,", "a", "1,-2", "4294967296", "1 2", "1.0"] {
        let failure = generate(&["--prompt-ids", ids], true).err().expect(ids);
        assert_eq!(failure.code(), 2, "{ids:?}");
        let line = failure.error().expect(ids).to_string();
        assert!(line.contains("--prompt-ids must be token ids"), "{line}");
    }
}

#[test]
fn defaults_are_greedy_and_everything_else_off() {
    let request = generate(&["--prompt", "x"], true).expect("fine");
    assert_eq!(request.model, ModelSource::Embedded);
    assert_eq!(request.prompt, Prompt::Text("x".into()));
    assert_eq!(request.format, Format::Stream);
    assert!(!request.raw && !request.stats && request.system.is_none());
    let options = request.options;
    assert_eq!((options.max_tokens, options.prefill_chunk), (256, 2048));
    assert!(options.stop.is_empty() && !options.ignore_eos);
    let sampler = options.sampler;
    assert_eq!((sampler.temperature, sampler.top_p), (0.0, 1.0));
    assert_eq!((sampler.min_p, sampler.top_k), (0.0, 0));
    assert_eq!(sampler.repetition_penalty, 1.0);
    assert!(sampler.seed.is_none() && sampler.logit_bias.is_empty());
}

#[test]
fn everything_typed_arrives() {
    let typed = "--model org/name --prompt-ids 1,17,\u{20}5 --max-tokens 9 --temp 0.5 --top-p 1 \
                 --top-k 40 --min-p 0.05 --repetition-penalty 1.1 --logit-bias 5=-2.5 --logit-bias 6=1 \
                 --seed 18446744073709551615 --stop -- --stop b --ignore-eos --stats --json --dtype bf16 \
                 --device cpu --prefill-chunk 64";
    // The blank after a comma belongs to the value.
    let typed: Vec<&str> = typed.split_whitespace().collect();
    let mut typed: Vec<&str> = typed.into_iter().filter(|&word| word != "5").collect();
    let ids = typed.iter().position(|&word| word == "1,17,").expect("ids");
    typed[ids] = "1,17, 5";
    let request = generate(&typed, true).expect("fine");
    assert_eq!(request.model, ModelSource::Named("org/name".into()));
    assert_eq!(request.prompt, Prompt::Ids(vec![1, 17, 5]));
    assert_eq!(request.format, Format::Json);
    assert!(request.stats && request.options.ignore_eos);
    assert!(matches!(request.load.dtype, DtypeChoice::Bf16));
    assert!(matches!(request.load.device, DeviceChoice::Cpu));
    let options = request.options;
    assert_eq!((options.max_tokens, options.prefill_chunk), (9, 64));
    assert_eq!(options.stop, ["--", "b"]);
    let sampler = options.sampler;
    assert_eq!((sampler.temperature, sampler.top_p), (0.5, 1.0));
    assert_eq!((sampler.min_p, sampler.top_k), (0.05, 40));
    assert_eq!(sampler.repetition_penalty, 1.1);
    assert_eq!(sampler.logit_bias, [(5, -2.5), (6, 1.0)]);
    assert_eq!(sampler.seed, Some(u64::MAX));
}

#[test]
fn where_the_prompt_comes_from() {
    let cases: [(&[&str], bool, Option<Prompt>); 5] = [
        (&[], true, None),
        (&[], false, Some(Prompt::Stdin)),
        (&["--prompt", "-"], true, Some(Prompt::Stdin)),
        (&["--prompt", ""], true, Some(Prompt::Text(String::new()))),
        (&["--prompt-ids", "7"], false, Some(Prompt::Ids(vec![7]))),
    ];
    for (typed, terminal, expected) in cases {
        let found = generate(typed, terminal).ok().map(|request| request.prompt);
        assert_eq!(found, expected, "{typed:?}, terminal: {terminal}");
    }
}

#[test]
fn the_demo_is_fixed_without_arguments_and_the_seed_picks_the_subject() {
    let demo = |seed: Option<&str>| {
        let args = DemoArgs { max_tokens: None, seed: seed.map(Into::into), stats: false };
        DemoRequest::try_from(args).expect("fine")
    };
    let fixed = demo(None);
    assert_eq!(fixed.options.sampler.seed, Some(DEMO_SEED));
    assert_eq!(fixed.options.sampler.temperature, 0.6);
    assert_eq!(fixed.prompt, demo(Some(&DEMO_SEED.to_string())).prompt);
    let mut prompts: Vec<String> = (0..8).map(|seed| demo(Some(&seed.to_string())).prompt).collect();
    prompts.sort();
    prompts.dedup();
    assert_eq!(prompts.len(), DEMO_SUBJECTS.len());
    assert!(prompts.iter().all(|p| p.starts_with("Please tell a story about a ")));
}

#[test]
fn ids_outside_the_vocabulary_name_the_last_one() {
    assert!(check_vocabulary("--prompt-ids", &[0, 4095], 4096).is_ok());
    let failure = check_vocabulary("--prompt-ids", &[1, 4096], 4096).expect_err("too large");
    let line = failure.error().expect("message").to_string();
    assert!(line.contains("4096 is not in the vocabulary") && line.ends_with("0 to 4095"), "{line}");
}

#[test]
fn bandwidths_are_above_0_and_contexts_fit_32_bits() {
    assert_eq!(bandwidth(None).ok(), Some(None));
    assert_eq!(bandwidth(Some("3350")).ok(), Some(Some(3.35e12)));
    for bad in ["0", "-1", "nan", "inf", "fast", ""] {
        assert_eq!(bandwidth(Some(bad)).err().map(|f| f.code()), Some(2), "{bad}");
    }
    assert_eq!((context(None).ok(), context(Some("2147483646")).ok()), (Some(0), Some(2_147_483_646)));
    for bad in ["-1", "2147483647", "1.5", ""] {
        assert_eq!(context(Some(bad)).err().map(|f| f.code()), Some(2), "{bad}");
    }
    assert_eq!((count("--steps", None, 7).ok(), count("--steps", Some("3"), 7).ok()), (Some(7), Some(3)));
    assert_eq!(count("--steps", Some("0"), 7).err().map(|f| f.code()), Some(2));
}
