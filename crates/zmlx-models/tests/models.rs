//! What is said of families is so: the table in `docs/models.md`, where they were verified, and how many places a family
//! takes.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;
use zmlx_models::survey::Verified;
use zmlx_models::{families, survey};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// Set `ZMLX_UPDATE_DOCS` to write the file.
#[test]
fn the_documentation_has_these_tables() {
    let path = root().join("../../docs/models.md");
    let text = survey::markdown().unwrap();
    if std::env::var_os("ZMLX_UPDATE_DOCS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == text, "docs/models.md is out of date: run this test with ZMLX_UPDATE_DOCS=1");
}

/// Folders of models with goldens, by name.
fn tested() -> Vec<(String, PathBuf)> {
    let mut found = vec![("embedded".to_owned(), root().join("../../models/tiny-lfm2-moe"))];
    for path in std::fs::read_dir(root().join("tests/oracle")).unwrap().map(|entry| entry.unwrap().path()) {
        if path.join("golden.json").exists() {
            found.push((path.file_name().unwrap().to_str().unwrap().to_owned(), path));
        }
    }
    found.sort();
    found
}

/// The family of a model folder, by the first name that it goes by.
fn family(folder: &Path) -> &'static str {
    let config: Json = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let model_type = config["model_type"].as_str().unwrap();
    families::groups().find(|group| group.contains(&model_type)).unwrap()[0]
}

/// What `tests/oracle.rs` compares of each of its folders.
const ORACLE: &str =
    "32 greedy tokens and logits after prompts of 1, 11 and 80 are mlx-lm's, stock and patched";

/// Set `ZMLX_UPDATE_DOCS` to add the folders of `tests/oracle` that are not there; then build anew.
#[test]
fn what_was_verified_is_what_the_tests_have() {
    let mut verified = survey::verified();
    let tested = tested();
    for entry in &verified {
        assert!(["cpu", "cuda", "metal"].contains(&entry.backend.as_str()), "{entry:?}");
        for model in &entry.models {
            let folder = tested.iter().find(|(name, _)| name == model);
            let (_, folder) = folder.unwrap_or_else(|| panic!("no test has a model {model}: {entry:?}"));
            assert_eq!(family(folder), entry.family, "{model}");
        }
    }
    let new = |entries: &[Verified], name: &String| {
        !entries.iter().any(|entry| entry.backend == "cpu" && entry.models.contains(name))
    };
    if std::env::var_os("ZMLX_UPDATE_DOCS").is_some() {
        for (name, folder) in &tested {
            let family = family(folder);
            let same = |e: &&mut Verified| e.family == family && e.what == ORACLE && e.backend == "cpu";
            if !new(&verified, name) {
                continue;
            }
            if let Some(entry) = verified.iter_mut().find(same) {
                entry.models.push(name.clone());
            } else {
                let [family, backend, dtype, what] = [family, "cpu", "f32", ORACLE].map(str::to_owned);
                verified.push(Verified { family, backend, dtype, models: vec![name.clone()], what });
            }
        }
        verified.sort_by(|a, b| (&a.family, &a.backend).cmp(&(&b.family, &b.backend)));
        let text = serde_json::to_string_pretty(&verified).unwrap() + "\n";
        std::fs::write(root().join("src/verified.json"), text).unwrap();
    }
    for (name, folder) in &tested {
        let missing = new(&verified, name);
        assert!(
            !missing,
            "{} is not in src/verified.json: run this test with ZMLX_UPDATE_DOCS=1",
            folder.display()
        );
    }
}

#[test]
fn a_survey_says_what_patterns_do() {
    let all = survey::survey().unwrap();
    assert_eq!(all.iter().flat_map(|f| f.model_types).copied().collect::<Vec<_>>(), families::known());
    let of = |family: &str| all.iter().find(|f| f.family == family).unwrap().patched.as_ref().unwrap();
    let matched = |family: &str, pattern: &str| {
        of(family).patterns.iter().find(|p| p.name == pattern).unwrap_or_else(|| panic!("{pattern}")).matched
    };
    // 24 layers, of which 6 attend, 18 convolve and 22 have experts.
    assert_eq!(matched("lfm2_moe", "short_conv"), 18);
    assert_eq!(matched("lfm2_moe", "qkv_rope_append"), 6);
    assert_eq!(matched("lfm2_moe", "router"), 22);
    assert_eq!(matched("lfm2_moe", "swiglu_mlp"), 2);
    assert_eq!(matched("lfm2_moe", "geglu_mlp"), 0);
    assert_eq!(matched("qwen3_moe", "moe_mlp"), 48);
    for family in ["lfm2_moe", "llama", "qwen3_moe"] {
        let survey = of(family);
        assert!(survey.native && survey.launches_patched * 2 < survey.launches_stock, "{family}: {survey:?}");
    }
    for (family, launches) in [("lfm2_moe", 126), ("qwen3_moe", 290), ("gpt_oss", 146), ("qwen3_5_moe", 462)]
    {
        assert_eq!(of(family).launches_cuda, Some(launches), "{family}: {:?}", of(family).cuda_refused);
    }
    for family in &all {
        let survey = of(family.family);
        assert!(survey.launches_cuda.is_some() != survey.cuda_refused.is_some(), "{survey:?}");
    }
}

/// Rust files below `folder`.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// A new family is one file and one line: `families/mod.rs` names it in its `mod` line and its entry of `FAMILIES`, and no
/// code beyond the families knows a `model_type`. What may: tables of published models and of GGUF architectures.
#[test]
fn a_family_is_one_file_and_one_line() {
    let folder = root().join("src/families");
    let registry = std::fs::read_to_string(folder.join("mod.rs")).unwrap();
    let list = registry.split_once("const FAMILIES: &[Family] = &[").unwrap().1.split_once("];").unwrap().0;
    let entries: Vec<(&str, &str)> = list
        .split(',')
        .map(str::trim)
        .filter(|e| !e.is_empty())
        .map(|e| e.split_once("::").unwrap())
        .collect();
    assert_eq!(entries.len(), survey::survey().unwrap().len());
    for (name, entry) in &entries {
        // Relatives may share a file, each with an entry of its own.
        let text = std::fs::read_to_string(folder.join(format!("{name}.rs"))).unwrap();
        assert_eq!(text.matches(&format!("const {entry}: Family")).count(), 1, "{name}::{entry}");
        assert_eq!(registry.matches(&format!("mod {name};")).count(), 1, "{name}");
        let word = |c: char| c.is_alphanumeric() || c == '_';
        let named = registry.split(|c| !word(c)).filter(|w| w == name).count();
        let listed = entries.iter().filter(|(other, _)| other == name).count();
        assert_eq!(named, 1 + listed, "families/mod.rs names {name} besides its mod line and its entries");
    }

    let mut files = Vec::new();
    for room in std::fs::read_dir(root().join("..")).unwrap().map(|entry| entry.unwrap().path()) {
        if room.join("src").is_dir() {
            sources(&room.join("src"), &mut files);
        }
    }
    assert!(files.len() > 100, "{}", files.len());
    for file in files {
        let path = file.to_str().unwrap();
        let table = ["/families/", "/random/", "/gguf/"].iter().any(|part| path.contains(part));
        let test = path.ends_with("tests.rs");
        let text = std::fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for model_type in families::known() {
            let quoted = format!("\"{model_type}\"");
            assert!(table || test || !code.contains(&quoted), "{path} knows the family {quoted}");
        }
    }
}
