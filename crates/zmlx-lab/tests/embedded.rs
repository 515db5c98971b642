//! The lab on the embedded model.

use std::path::PathBuf;

use zmlx_lab::capsule::Kind;
use zmlx_lab::fidelity::Class;
use zmlx_lab::roofline::Bound;
use zmlx_lab::{
    Arm, BenchOptions, Capsule, LabError, Prompt, Reference, Subject, ValidateOptions, Validated, bench,
    report, validate,
};
use zmlx_models::{DeviceChoice, DtypeChoice, LoadOptions, Model};
use zmlx_models::{PatchOptions, Preset};

fn load(dtype: DtypeChoice) -> (PathBuf, LoadOptions, Model) {
    let dir = zmlx_models::embedded_model_dir().unwrap();
    let options = LoadOptions { dtype, device: DeviceChoice::Cpu, ..LoadOptions::default() };
    let model = Model::load(&dir, &options, &mut |_| {}).unwrap();
    (dir, options, model)
}

/// The model without patterns: an A/A test.
fn unpatched() -> PatchOptions {
    PatchOptions { preset: Preset::None, ..PatchOptions::default() }
}

fn small() -> ValidateOptions {
    ValidateOptions { max_tokens: 6, runs: 2, patch: unpatched(), ..ValidateOptions::default() }
}

fn run(dtype: DtypeChoice, options: &ValidateOptions) -> Result<Validated, LabError> {
    let (dir, load, mut model) = load(dtype);
    let mut subject = Subject { path: &dir, name: "embedded", load: &load, model: &mut model };
    validate(&mut subject, options, &mut |_| {})
}

#[test]
fn stock_against_itself_has_no_difference_at_all() {
    let (dir, load, mut model) = load(DtypeChoice::F32);
    let mut subject = Subject { path: &dir, name: "embedded", load: &load, model: &mut model };
    let mut steps = Vec::new();
    let done = validate(&mut subject, &small(), &mut |p| steps.push((p.done, p.total, p.step))).unwrap();
    let capsule = done.capsule;
    let found = capsule.fidelity.as_ref().unwrap();
    assert!(found.gate.passed, "{:?}", found.gate);
    assert_eq!((found.logits.steps, found.logits.max_abs, found.logits.kl_max), (5 * 6, 0.0, 0.0));
    assert_eq!(found.logits.top1_agreement, 1.0);
    let names: Vec<&str> = found.prompts.iter().map(|p| p.prompt.as_str()).collect();
    assert_eq!(names, ["short", "long", "code", "german", "chat"]);
    assert!(found.prompts.iter().all(|p| p.stock_repeats && p.tokens == 6 && p.equal == 6));

    assert_eq!(capsule.kind, Kind::Validate);
    assert!(capsule.model.hash.starts_with("zmlx-sample-v1:") && capsule.model.file_bytes > 10_000_000);
    let orders = |arm| capsule.arm(arm).unwrap().runs.iter().map(|r| r.order).collect::<Vec<_>>();
    assert_eq!((orders(Arm::Stock), orders(Arm::Patched)), (vec![0, 3], vec![1, 2]), "AB, then BA");
    assert!(capsule.notes.iter().any(|n| n.contains("too few")), "{:?}", capsule.notes);
    assert!(capsule.notes.iter().any(|n| n.contains("both arms are stock")), "{:?}", capsule.notes);

    assert_eq!(steps.len(), 2 * 2 + 5);
    assert!(steps.iter().enumerate().all(|(i, (done, total, _))| *done == i && *total == 9), "{steps:?}");

    // It survives its file, and both reports take it.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.json");
    capsule.write(&path).unwrap();
    assert_eq!(Capsule::read(&path).unwrap(), capsule);
    assert!(report::text(&capsule).contains("PASS as bit-exact: 30 of 30 greedy tokens equal"));
    assert!(report::html(&[("c".into(), capsule)]).contains("<svg"));
}

/// The preset with bounded ops is judged by their bounds, and there is something to judge.
#[test]
fn bounded_ops_are_held_to_their_bounds() {
    let patch = PatchOptions { preset: Preset::Fast, environment: false, ..PatchOptions::default() };
    let found =
        run(DtypeChoice::F32, &ValidateOptions { patch, runs: 1, max_tokens: 24, ..small() }).unwrap();
    let fidelity = found.capsule.fidelity.unwrap();
    assert_eq!(fidelity.class, Class::Bounded);
    assert!(fidelity.gate.passed, "{:?}", fidelity.gate);
    let pattern = found.capsule.patterns.iter().find(|p| p.name == "kv_f16").unwrap();
    assert!(pattern.matched == 2 && pattern.executed > 0, "{pattern:?}");
    let strict = PatchOptions { environment: false, ..PatchOptions::default() };
    let strict = ValidateOptions { patch: strict, runs: 1, max_tokens: 24, ..small() };
    let strict = run(DtypeChoice::F32, &strict).unwrap().capsule.fidelity.unwrap();
    assert_eq!(strict.class, Class::TokenIdentical);
    assert!(fidelity.logits.mean_abs > strict.logits.mean_abs, "half precision does round");
}

/// bf16 on the CPU loses digits: stock's error against float32 is really measured, and patched equals it here.
#[test]
fn errors_against_float32_are_measured() {
    let prompts = vec![Prompt { name: "p".into(), text: "Once upon a time".into(), chat: false }];
    let options =
        ValidateOptions { prompts, runs: 1, max_tokens: 4, reference: Some(Reference::F32), ..small() };
    let found = run(DtypeChoice::Bf16, &options).unwrap().capsule.fidelity.unwrap();
    assert!(found.gate.passed, "{:?}", found.gate);
    let errors = found.reference.unwrap();
    assert!(!errors.stock_is_reference);
    assert!(errors.stock.max_abs > 1e-3, "{:?}", errors.stock);
    assert_eq!(errors.stock, errors.patched);

    let found = run(DtypeChoice::F32, &options).unwrap().capsule.fidelity.unwrap();
    let errors = found.reference.unwrap();
    assert!(errors.stock_is_reference && errors.stock.max_abs == 0.0 && found.gate.passed);
}

#[test]
fn bench_times_both_arms_in_turn() {
    let (dir, load, mut model) = load(DtypeChoice::F32);
    let mut subject = Subject { path: &dir, name: "embedded", load: &load, model: &mut model };
    let options =
        BenchOptions { prompt_tokens: 8, max_tokens: 6, runs: 3, patch: unpatched(), ..Default::default() };
    let capsule = bench(&mut subject, &options, &mut |_| {}).unwrap();
    for arm in [Arm::Stock, Arm::Patched] {
        let record = capsule.arm(arm).unwrap();
        assert_eq!(record.runs.len(), 3);
        assert!(record.decode.median > 0.0 && record.prefill.median > 0.0);
        assert_eq!(record.bytes_per_token, subject.model.decode_cost(0).unwrap().total.weight_bytes);
        assert_eq!(record.launches_per_token, Some(167));
        assert!(record.graph_nodes > 50);
        // Where the system says how large its caches are, ten megabytes fit on any current server.
        if capsule.machine.last_level_cache_bytes >= Some(capsule.model.file_bytes) {
            assert_eq!(record.bound, Some(Bound::CacheResident));
        }
    }
    let roofline = capsule.roofline.as_ref().unwrap();
    assert_eq!(roofline.probes.len(), 7, "before each timed run and after the last");
    assert!(roofline.bandwidth.median > 1e8);
    assert!(capsule.gains.is_some() && capsule.fidelity.is_none());

    let alone = BenchOptions { arms: vec![Arm::Stock], runs: 1, ..options };
    let capsule = bench(&mut subject, &alone, &mut |_| {}).unwrap();
    assert!(capsule.arm(Arm::Patched).is_none() && capsule.gains.is_none());
    assert_eq!(capsule.settings.order, "A");
}

#[test]
fn what_cannot_be_meant_is_refused_before_anything_runs() {
    let (dir, load, mut model) = load(DtypeChoice::F32);
    let mut subject = Subject { path: &dir, name: "embedded", load: &load, model: &mut model };
    let cases = [
        (BenchOptions { max_tokens: 1, ..Default::default() }, "max tokens = 1"),
        (BenchOptions { prompt_tokens: 0, ..Default::default() }, "prompt tokens = 0"),
        (BenchOptions { runs: 0, ..Default::default() }, "runs = 0"),
        (BenchOptions { arms: vec![], ..Default::default() }, "stock, patched, or both"),
        (BenchOptions { prompt_tokens: 2000, ..Default::default() }, "context of 2048"),
    ];
    for (options, word) in cases {
        let error = bench(&mut subject, &options, &mut |_| panic!("nothing may run")).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    }
    let options = ValidateOptions { max_tokens: 2048, ..small() };
    let error = validate(&mut subject, &options, &mut |_| panic!("nothing may run")).unwrap_err();
    assert!(matches!(error, LabError::TooLong { .. }), "{error}");
    let none = ValidateOptions { prompts: vec![], ..small() };
    assert!(validate(&mut subject, &none, &mut |_| panic!("nothing may run")).is_err());
}

#[test]
fn unknown_patterns_are_named() {
    let patch = PatchOptions { patterns: Some(vec!["no_such_pattern".into()]), ..PatchOptions::default() };
    let error = run(DtypeChoice::F32, &ValidateOptions { patch, ..small() }).unwrap_err();
    assert!(error.to_string().contains("no_such_pattern"), "{error}");
}
