//! Converted folders are, tensor by tensor and bit by bit, those of `mlx_lm.convert` 0.32.2, and quantising on load gives
//! the model that converting writes.
//!
//! `convert/` holds a small LFM2-MoE with random weights as it would be published (bfloat16, experts apart, projections
//! named w1 to w3), and `expected.json`: for each setting the dtype, shape and FNV-1a hash of every tensor that
//! `mlx_lm.convert` writes on the CPU, and the section on quantisation.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};
use zmlx_mlx::Dtype;
use zmlx_models::checkpoint::Checkpoint;
use zmlx_models::{
    ConvertError, ConvertOptions, Converted, DeviceChoice, DtypeChoice, Flow, FolderError, GenerateOptions,
    LoadError, LoadOptions, Model, PatchOptions, Recode, Session, convert, inspect, quantization,
};

fn published() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/convert")
}

fn read(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn options(matrices: Recode, dtype: DtypeChoice) -> ConvertOptions {
    ConvertOptions { matrices, dtype, device: DeviceChoice::Cpu }
}

fn to_bits(bits: i32, group_size: i32) -> Recode {
    Recode::Quantize(quantization("affine", Some(bits), Some(group_size)).unwrap())
}

fn to_mode(mode: &str) -> Recode {
    Recode::Quantize(quantization(mode, None, None).unwrap())
}

fn write(source: &Path, dir: &Path, options: &ConvertOptions) -> Result<Converted, ConvertError> {
    convert(source, dir, options, &mut |_, _| Flow::Continue)
}

/// FNV-1a.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// dtype, shape and hash of every tensor of a folder.
fn tensors(dir: &Path) -> BTreeMap<String, String> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let one = |(name, info): (&String, &zmlx_models::checkpoint::TensorInfo)| {
        let file = std::fs::read(&info.file).unwrap();
        let data = &file[info.offset as usize..(info.offset + info.bytes) as usize];
        (name.clone(), format!("{} {:?} {:016x}", info.dtype, info.shape, hash(data)))
    };
    checkpoint.tensors.iter().map(one).collect()
}

fn assert_expected(setting: &str, dir: &Path) {
    let expected = &read(&published().join("expected.json"))[setting];
    let wanted: BTreeMap<String, String> = serde_json::from_value(expected["tensors"].clone()).unwrap();
    let found = tensors(dir);
    assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>(), "{setting}");
    for (name, tensor) in &wanted {
        assert_eq!(found[name], *tensor, "{setting}: {name}");
    }
    let config = read(&dir.join("config.json"));
    assert_eq!(*config.get("quantization").unwrap_or(&Json::Null), expected["quantization"], "{setting}");
    assert_eq!(config.get("quantization"), config.get("quantization_config"), "{setting}");
}

#[test]
fn tensors_are_those_that_mlx_lm_writes() {
    let parent = tempfile::tempdir().unwrap();
    let auto = DtypeChoice::Auto;
    let settings = [
        ("q4", options(to_bits(4, 64), auto)),
        ("q3g32", options(to_bits(3, 32), auto)),
        ("q4f32", options(to_bits(4, 64), DtypeChoice::F32)),
        ("mxfp4", options(to_mode("mxfp4"), auto)),
        ("mxfp8", options(to_mode("mxfp8"), auto)),
        ("nvfp4", options(to_mode("nvfp4"), auto)),
        ("f16", options(Recode::Keep, DtypeChoice::F16)),
        ("keep", options(Recode::Keep, auto)),
    ];
    for (setting, options) in &settings {
        let dir = parent.path().join(setting);
        let written = write(&published(), &dir, options).unwrap();
        assert_expected(setting, &dir);
        let info = inspect(&dir).unwrap();
        assert_eq!(
            (info.parameters_total, info.file_bytes),
            (written.parameters, written.bytes),
            "{setting}"
        );
        let index = read(&dir.join("model.safetensors.index.json"));
        assert_eq!(index["metadata"]["total_size"], written.bytes);
        let map = index["weight_map"].as_object().unwrap();
        assert_eq!(map.len(), tensors(&dir).len());
        assert!(map.values().all(|file| file == "model.safetensors"));
    }
    // And back.
    let dir = parent.path().join("deq");
    write(&parent.path().join("q4"), &dir, &options(Recode::Dequantize, auto)).unwrap();
    assert_expected("deq", &dir);
}

fn load(dir: &Path, quantize: Option<&Recode>, patch: Option<PatchOptions>) -> Model {
    let quantize = quantize.map(|recode| match recode {
        Recode::Quantize(q) => q.clone(),
        other => panic!("{other:?}"),
    });
    let (dtype, device) = (DtypeChoice::F32, DeviceChoice::Cpu);
    Model::load(dir, &LoadOptions { dtype, device, patch, quantize, kv_quantization: None }, &mut |_| {})
        .unwrap()
}

fn tokens(model: &Model) -> Vec<u32> {
    let options = GenerateOptions { max_tokens: 16, ignore_eos: true, ..GenerateOptions::default() };
    Session::new(model).generate(&[5, 17, 40], &options, &mut |_| Flow::Continue).unwrap().tokens
}

/// Stock and patched: the bits of the logits are those of the converted folder.
#[test]
fn quantised_on_load_is_what_would_be_written() {
    let parent = tempfile::tempdir().unwrap();
    for (name, recode) in [("q4", to_bits(4, 64)), ("q8", to_bits(8, 32)), ("mxfp4", to_mode("mxfp4"))] {
        let dir = parent.path().join(name);
        write(&published(), &dir, &options(recode.clone(), DtypeChoice::Auto)).unwrap();
        let default = PatchOptions { environment: false, ..PatchOptions::default() };
        for patch in [None, Some(default)] {
            let written = load(&dir, None, patch.clone());
            let on_load = load(&published(), Some(&recode), patch);
            assert_eq!(on_load.is_patched(), written.is_patched());
            assert!(on_load.patch_report().is_none_or(|report| report.native), "{name}");
            let logits = |model: &Model| {
                model.run(&[5, 17, 40], &mut model.new_state()).unwrap().to_vec::<f32>().unwrap()
            };
            assert_eq!(logits(&on_load), logits(&written), "{name}");
            assert_eq!(tokens(&on_load), tokens(&written), "{name}");
            let (a, b) = (on_load.info(), written.info());
            assert_eq!(a.bytes_per_token, b.bytes_per_token, "{name}");
            assert_eq!(format!("{:?}", a.quantization), format!("{:?}", b.quantization), "{name}");
        }
    }
}

#[test]
fn small_files_come_along_and_the_rest_does_not() {
    let parent = tempfile::tempdir().unwrap();
    let source = parent.path().join("source");
    std::fs::create_dir_all(source.join("additional_chat_templates")).unwrap();
    let files: [(&str, &str); 6] = [
        ("generation_config.json", r#"{"eos_token_id": 7}"#),
        ("special_tokens_map.json", "{}"),
        ("chat_template.jinja", "{{ messages }}"),
        ("tokenization_x.py", "raise SystemExit"),
        ("additional_chat_templates/tool_use.jinja", "{{ tools }}"),
        ("README.md", "not this one"),
    ];
    for (name, text) in files {
        std::fs::write(source.join(name), text).unwrap();
    }
    std::fs::copy(published().join("model.safetensors"), source.join("model.safetensors")).unwrap();
    let mut config = read(&published().join("config.json"));
    config["vision_config"] = json!({});
    std::fs::write(source.join("config.json"), config.to_string()).unwrap();

    let dir = parent.path().join("out");
    write(&source, &dir, &options(to_bits(4, 64), DtypeChoice::F16)).unwrap();
    for (name, text) in &files[..5] {
        assert_eq!(std::fs::read_to_string(dir.join(name)).unwrap(), *text, "{name}");
    }
    assert!(!dir.join("README.md").exists());
    let written = read(&dir.join("config.json"));
    let keys: Vec<&String> = written.as_object().unwrap().keys().collect();
    assert!(keys.is_sorted(), "{keys:?}");
    assert!(written.get("vision_config").is_none() && written.get("_name_or_path").is_none());
    assert_eq!((&written["torch_dtype"], &written["hidden_size"]), (&json!("float16"), &json!(64)));
}

#[test]
fn partly_quantised_models_get_the_rest_quantised() {
    let parent = tempfile::tempdir().unwrap();
    let (first, second) = (parent.path().join("first"), parent.path().join("second"));
    // In groups of 64 the rows of 96 stay as they are; groups of 32 divide them.
    write(&published(), &first, &options(to_bits(4, 64), DtypeChoice::Auto)).unwrap();
    write(&first, &second, &options(to_bits(8, 32), DtypeChoice::Auto)).unwrap();
    let path = "model.layers.0.feed_forward.down_proj";
    let section = read(&second.join("config.json"))["quantization"].clone();
    assert_eq!((&section["bits"], &section["group_size"]), (&json!(4), &json!(64)));
    assert_eq!(section[path], json!({ "group_size": 32, "bits": 8, "mode": "affine" }));
    let (before, after) = (tensors(&first), tensors(&second));
    let kept = before.iter().filter(|(name, _)| !name.starts_with(path));
    for (name, tensor) in kept {
        assert_eq!(after[name], *tensor, "{name}");
    }
    assert!(after[&format!("{path}.scales")].starts_with("BF16 [64, 3]"), "{after:?}");
    tokens(&load(&second, None, None));
}

#[test]
fn what_cannot_be_written_leaves_nothing_behind() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("out");
    let four = options(to_bits(4, 64), DtypeChoice::Auto);
    let stopped = convert(&published(), &dir, &four, &mut |_, _| Flow::Stop).unwrap_err();
    assert!(matches!(stopped, ConvertError::Folder(FolderError::Stopped)), "{stopped}");

    // Nothing to do.
    let wide = write(&published(), &dir, &options(to_bits(8, 128), DtypeChoice::Auto)).unwrap_err();
    assert!(matches!(wide, ConvertError::Load(LoadError::NothingToQuantize { group_size: 128 })), "{wide}");
    let dense = write(&published(), &dir, &options(Recode::Dequantize, DtypeChoice::Auto)).unwrap_err();
    assert!(matches!(dense, ConvertError::Load(LoadError::NothingToDequantize)), "{dense}");
    // No source.
    let nowhere = write(&parent.path().join("nowhere"), &dir, &four).unwrap_err();
    assert!(matches!(nowhere, ConvertError::Load(_)) && nowhere.to_string().contains("nowhere"), "{nowhere}");
    assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);

    // Something there.
    std::fs::write(&dir, "a file").unwrap();
    let there = write(&published(), &dir, &four).unwrap_err();
    assert!(matches!(there, ConvertError::Folder(FolderError::AlreadyThere { .. })), "{there}");
    assert_eq!(std::fs::read(&dir).unwrap(), b"a file");
}

#[test]
fn scales_have_the_dtype_that_the_configuration_names() {
    let model = load(&published(), Some(&to_bits(4, 64)), None);
    assert_eq!(model.dtype(), Dtype::Float32);
    // Two bytes a scale and a bias: 4.5 bits; routers 8.5; the rows of 96 stay in bfloat16.
    let info = model.info();
    let four = info.quantization.iter().find(|q| q.mode == "affine" && q.bits == 4).unwrap();
    let parameters = 64 * 64 + 192 * 64 + 64 * 64 + 2 * 96 * 64 + 4 * 64 * 64 + 3 * 4 * 64 * 64;
    assert_eq!(four.bytes, parameters * 9 / 16);
}
