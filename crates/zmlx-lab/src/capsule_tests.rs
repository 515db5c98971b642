//! Capsules written, read back, cut and damaged.

use super::*;
use crate::fidelity::{Gate, PromptFidelity};
use crate::logits::LogitDifference;

/// An arm with these decode speeds; prefill ten times as fast.
pub(crate) fn arm(arm: Arm, decode: &[f64]) -> ArmRecord {
    let runs: Vec<RunRecord> = (0u64..)
        .zip(decode)
        .map(|(order, &decode_tok_s)| RunRecord { order, prefill_tok_s: 10.0 * decode_tok_s, decode_tok_s })
        .collect();
    let prefill: Vec<f64> = decode.iter().map(|v| 10.0 * v).collect();
    ArmRecord {
        arm,
        runs,
        prefill: Spread::of(&prefill).unwrap(),
        decode: Spread::of(decode).unwrap(),
        peak_memory_bytes: 5_100_000_000,
        resident_peak_bytes: Some(5_400_000_000),
        bytes_per_token: 880_000_000,
        graph_nodes: 700,
        launches_per_token: None,
        bound: Some(Bound::Memory { fraction: 0.5, against: crate::roofline::Against::Median }),
    }
}

/// A capsule with both arms.
pub(crate) fn sample(stock: &[f64], patched: &[f64]) -> Capsule {
    let probes = vec![25e9, 26e9, 27e9];
    let prompt = PromptFidelity {
        prompt: "short".into(),
        tokens: 128,
        equal: 128,
        divergence: None,
        length_differs: false,
        stock_repeats: true,
        logits: LogitDifference { steps: 128, top1_agreement: 1.0, max_abs: 1e-5, ..Default::default() },
    };
    let class = Class::TokenIdentical;
    let gate = Gate::judge(class, std::slice::from_ref(&prompt), None);
    let logits = prompt.logits.clone();
    Capsule {
        schema: SCHEMA.into(),
        kind: Kind::Validate,
        created: "2026-11-23T08:06:38Z".into(),
        machine: Machine { cpu: Some("AMD EPYC".into()), cores: 2, os: "Linux".into(), ..Machine::default() },
        versions: Versions { zmlx: "0.1.0".into(), mlx: Some("0.32.4".into()), commit: "abc".into() },
        model: ModelRecord {
            name: "lfm2".into(),
            family: "lfm2_moe".into(),
            hash: "zmlx-sample-v1:00".into(),
            file_bytes: 4_700_000_000,
            parameters_total: 8_340_000_000,
            parameters_active: 1_560_000_000,
            quantization: vec![QuantizationRecord {
                mode: "affine".into(),
                bits: 4,
                group_size: 64,
                bytes: 1,
            }],
            dtype: "float32".into(),
            device: "cpu".into(),
        },
        settings: Settings {
            preset: "default".into(),
            patterns: None,
            exclude: vec![],
            threads: Some(2),
            max_tokens: 128,
            runs: stock.len() as u64,
            cooldown_seconds: 0.0,
            order: "AB/BA".into(),
        },
        prompts: vec![PromptRecord {
            name: "short".into(),
            tokens: 5,
            text: Some("Once upon a time".into()),
        }],
        conditions: Conditions::default(),
        arms: vec![arm(Arm::Stock, stock), arm(Arm::Patched, patched)],
        gains: Gain::paired(stock, patched).map(|gain| Gains { prefill: gain, decode: gain }),
        roofline: Some(Roofline {
            threads: 2,
            buffer_bytes: 1 << 29,
            bandwidth: Spread::of(&probes).unwrap(),
            probes,
            last_level_cache_bytes: Some(32 << 20),
            working_set_bytes: 4_700_000_000,
        }),
        patterns: vec![PatternRecord {
            name: "swiglu_mlp".into(),
            class,
            matched: 2,
            refused: vec!["layers.0: <bias>".into()],
            executed: 256,
        }],
        native: true,
        fidelity: Some(Fidelity { class, prompts: vec![prompt], logits, reference: None, gate }),
        notes: vec![],
    }
}

const PATH: &str = "a.json";

fn parse(text: &[u8]) -> Result<Capsule, CapsuleError> {
    Capsule::parse(Path::new(PATH), text)
}

fn json(capsule: &Capsule) -> serde_json::Value {
    serde_json::to_value(capsule).unwrap()
}

#[test]
fn what_is_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("capsule.json");
    let capsule = sample(&[10.1, 1.0 / 3.0, 9.7], &[20.5, 21.0, 19.123_456_789_012_3]);
    capsule.write(&path).unwrap();
    assert_eq!(Capsule::read(&path).unwrap(), capsule);
    capsule.write(&path).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let error = sample(&[1.0], &[1.0]).write(Path::new("/nowhere/at/all.json")).unwrap_err();
    assert!(matches!(&error, LabError::Write { .. }) && error.to_string().contains("/nowhere"), "{error}");
    let error = Capsule::read(Path::new("/nowhere/at/all.json")).unwrap_err();
    assert!(matches!(error, CapsuleError::Read { .. }), "{error}");
    assert!(matches!(Capsule::read(Path::new("/")), Err(CapsuleError::Read { .. })));
}

#[test]
fn every_way_to_cut_it_is_an_error() {
    let text = serde_json::to_vec(&sample(&[1.0, 2.0], &[2.0, 3.0])).unwrap();
    for end in (0..text.len()).step_by(7) {
        assert!(matches!(parse(&text[..end]), Err(CapsuleError::NotJson { .. })), "cut at {end}");
    }
    assert!(parse(&text).is_ok());
}

#[test]
fn other_files_and_versions_are_told_apart() {
    type Expected = fn(&CapsuleError) -> bool;
    let cases: [(&[u8], Expected); 8] = [
        (b"{}", |e| matches!(e, CapsuleError::NotACapsule { .. })),
        (b"[1,2]", |e| matches!(e, CapsuleError::NotACapsule { .. })),
        (b"null", |e| matches!(e, CapsuleError::NotACapsule { .. })),
        (b"{\"schema\":1}", |e| matches!(e, CapsuleError::NotACapsule { .. })),
        (b"{\"schema\":\"zmlx.capsule/0\"}", |e| matches!(e, CapsuleError::Version { .. })),
        (b"{\"schema\":\"zmlx.capsule/2\"}", |e| matches!(e, CapsuleError::Version { .. })),
        (b"{\"schema\":\"zmlx.capsule/1\"}", |e| matches!(e, CapsuleError::Schema { .. })),
        (b"\xff\xfe{", |e| matches!(e, CapsuleError::NotJson { .. })),
    ];
    for (text, expected) in cases {
        let error = parse(text).unwrap_err();
        assert!(expected(&error), "{error:?}");
        assert!(error.to_string().starts_with(PATH), "{error}");
    }
    // Deep nesting must not overflow the stack.
    let deep = "[".repeat(200_000);
    assert!(matches!(parse(deep.as_bytes()), Err(CapsuleError::NotJson { .. })));
}

#[test]
fn fields_of_another_type_and_infinite_numbers_are_errors() {
    let good = json(&sample(&[1.0, 2.0], &[2.0, 3.0]));
    for (pointer, value) in [
        ("/arms/0/runs/0/decode_tok_s", serde_json::Value::Null),
        ("/arms/0/arm", "third".into()),
        ("/machine/cores", (-1).into()),
        ("/kind", "guess".into()),
        ("/fidelity/class", "perfect".into()),
    ] {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer).unwrap() = value;
        let error = parse(bad.to_string().as_bytes()).unwrap_err();
        assert!(matches!(error, CapsuleError::Schema { .. }), "{pointer}: {error:?}");
    }
    let text = good.to_string().replacen("\"decode_tok_s\":1.0", "\"decode_tok_s\":1e999", 1);
    assert!(text.contains("1e999"));
    assert!(matches!(parse(text.as_bytes()), Err(CapsuleError::NotJson { .. })));
    let mut more = good.clone();
    more["new_field"] = 1.into();
    assert!(parse(more.to_string().as_bytes()).is_ok(), "fields may be added");
}

#[test]
fn figures_that_contradict_each_other_are_errors() {
    let good = json(&sample(&[1.0, 2.0], &[2.0, 3.0]));
    for (pointer, value) in [
        ("/arms/0/decode/median", serde_json::json!(99.0)),
        ("/arms/0/runs/0/decode_tok_s", (-1.0).into()),
        ("/arms/0/runs", serde_json::json!([])),
        ("/arms/0/arm", "patched".into()),
        ("/arms/1/bound/fraction", 1.01.into()),
        ("/roofline/probes/0", 0.0.into()),
        ("/roofline/bandwidth/max", 1e12.into()),
        ("/fidelity", serde_json::Value::Null),
        ("/fidelity/gate/passed", false.into()),
    ] {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer).unwrap() = value;
        let error = parse(bad.to_string().as_bytes()).unwrap_err();
        assert!(matches!(error, CapsuleError::Inconsistent { .. }), "{pointer}: {error:?}");
    }
}

#[test]
fn the_published_schema_is_this_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/capsule.schema.json");
    let text = fs::read_to_string(path).unwrap();
    let published: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        published,
        Capsule::json_schema(),
        "write it anew: cargo run --release -- bench schema > docs/capsule.schema.json"
    );
}

#[test]
fn the_schema_names_every_field_that_is_written() {
    let schema = Capsule::json_schema();
    assert_eq!(schema["properties"]["schema"]["const"], SCHEMA);
    let written = json(&sample(&[1.0], &[1.0]));
    for name in written.as_object().unwrap().keys() {
        assert!(schema["properties"].get(name).is_some(), "{name}");
    }
}
