//! What there is: the families, which patterns take their graphs, and where each was verified.
//!
//! Nothing of it is written by hand but `verified.json`. Patterns are tried on the graph of a published shape of the
//! family, in 4 bits, without weights.

use std::collections::BTreeSet;
use std::fmt::Write;

use serde::{Deserialize, Serialize};
use zmlx_graph::pattern::PatternReport;
use zmlx_graph::patterns;

use crate::blueprint::Blueprint;
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::families::{self, Family};
use crate::patch::{PatchError, PatchOptions, Preset};
use crate::random::{MODELS, PublishedModel, config_of};

/// What was held against what, kept by hand; a test compares it with the models that the tests have.
const VERIFIED: &str = include_str!("verified.json");

/// What a pattern's report says of a graph in which it found nothing.
const NOTHING: &str = "nothing in this graph looks like it";

/// A family.
#[derive(Debug, Clone, Serialize)]
pub struct FamilySurvey {
    /// Its name: the first of `model_types`.
    pub family: &'static str,
    /// Values of `model_type` that mean it.
    pub model_types: &'static [&'static str],
    /// The published shapes of it that `zmlx lab random-model` knows.
    pub models: Vec<&'static str>,
    /// What patching makes of the first of them; `None` if there is none.
    pub patched: Option<PatternSurvey>,
    /// Where it was verified.
    pub verified: Vec<Verified>,
}

/// What patching makes of a model on the CPU.
#[derive(Debug, Clone, Serialize)]
pub struct PatternSurvey {
    /// Which model.
    pub model: &'static str,
    /// Kernel launches a token of the stock graph.
    pub launches_stock: u64,
    /// Those of the graph as the default preset patches it.
    pub launches_patched: u64,
    /// Whether fused ops are all that is left, so that the engine runs it as a whole.
    pub native: bool,
    /// Launches a token on an NVIDIA GPU past MLX; `None` if MLX runs it there.
    pub launches_cuda: Option<u64>,
    /// Why MLX runs it there.
    pub cuda_refused: Option<String>,
    /// What became of each pattern.
    pub patterns: Vec<PatternUse>,
}

/// What became of a pattern.
#[derive(Debug, Clone, Serialize)]
pub struct PatternUse {
    /// Its name.
    pub name: String,
    /// Its class.
    pub class: String,
    /// Whether the default preset has it.
    pub default: bool,
    /// How many places it replaced: so often its op runs for a token.
    pub matched: usize,
    /// Why it did not replace others that look like it.
    pub refused: Vec<String>,
}

/// A comparison that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// The family.
    pub family: String,
    /// `cpu`, `cuda` or `metal`.
    pub backend: String,
    /// Dtype of the activations.
    pub dtype: String,
    /// The models: folders of this repository's tests, or `embedded`.
    pub models: Vec<String>,
    /// What was compared, and with what.
    pub what: String,
}

/// All families. No weights are read.
///
/// # Errors
/// [`PatchError`] if a graph cannot be made or patched, which would be a fault of the family or a pattern.
pub fn survey() -> Result<Vec<FamilySurvey>, PatchError> {
    let verified = verified();
    families::all().iter().map(|family| one(family, &verified)).collect()
}

/// What was verified where.
pub fn verified() -> Vec<Verified> {
    // A test reads it, so it does parse.
    serde_json::from_str(VERIFIED).unwrap_or_default()
}

fn one(family: &'static Family, verified: &[Verified]) -> Result<FamilySurvey, PatchError> {
    let name = family.model_types.first().copied().unwrap_or_default();
    let mut models = Vec::new();
    for model in MODELS {
        let config = ModelConfig::from_json((model.config)().as_object().cloned().unwrap_or_default());
        if family.model_types.contains(&config.model_type()) {
            models.push(model);
        }
    }
    Ok(FamilySurvey {
        family: name,
        model_types: family.model_types,
        models: models.iter().map(|m| m.name).collect(),
        patched: models.first().map(|model| patched(model)).transpose()?,
        verified: verified.iter().filter(|v| v.family == name).cloned().collect(),
    })
}

fn patched(model: &PublishedModel) -> Result<PatternSurvey, PatchError> {
    let config = config_of(model)?;
    let blueprint = Blueprint::from_config(&config)?;
    let with = |preset| PatchOptions { preset, environment: false, ..PatchOptions::default() };
    let default = blueprint.patched(&with(Preset::Default))?;
    let fast = blueprint.patched(&with(Preset::Fast))?;
    let cuda = blueprint.on_cuda(&with(Preset::Default), 0)?;
    let reports = |of: &[PatternReport], name: &str| of.iter().find(|r| r.name == name).cloned();
    let mut patterns = Vec::new();
    for pattern in patterns::ALL {
        let usual = reports(&default.report.patterns, pattern.name);
        let is_default = usual.is_some();
        let Some(report) = usual.or_else(|| reports(&fast.report.patterns, pattern.name)) else { continue };
        patterns.push(PatternUse {
            name: report.name,
            class: report.class.to_string(),
            default: is_default,
            matched: report.matched,
            refused: report.refused.into_iter().filter(|r| r != NOTHING).collect(),
        });
    }
    Ok(PatternSurvey {
        model: model.name,
        launches_stock: blueprint.decode_cost(0).map_err(LoadError::from)?.total.launches,
        launches_patched: default.report.launches_per_token,
        native: default.report.native,
        launches_cuda: cuda.count(),
        cuda_refused: cuda.launches.err(),
        patterns,
    })
}

const HEAD: &str = "\
# Models

Written by `zmlx models --patterns --markdown`; a test compares (`ZMLX_UPDATE_DOCS=1 cargo test -p zmlx-models --release \
--test models` writes it anew). How to add a family: [adding-a-model.md](adding-a-model.md).

## Families

Launches are kernel launches a token on the CPU, stock and as the default preset patches it, of the first published shape \
in 4 bits. Launches on CUDA are those of a decode step that runs past MLX as one captured graph, or why MLX runs it; they \
are counted without a GPU. The reference of all comparisons is mlx-lm 0.32.2 on the CPU with weights cast to float32.

";

const PATTERNS_HEAD: &str = "
## Patterns

How often each pattern's op runs for a token, by family, on the CPU in float32: computed from the graph of the first \
published shape. A dash: nothing in the graph looks like it. What another pattern has taken already is not taken twice, \
so that the order of the rows counts. On an NVIDIA GPU the same patterns hold where the table above counts launches. On \
Metal, and with 16-bit activations on the CPU, every pattern is refused with that reason: there are no bodies yet. What the patterns do and what the classes promise: [patching.md](patching.md).

";

/// `docs/models.md`.
///
/// # Errors
/// As [`survey`].
pub fn markdown() -> Result<String, PatchError> {
    let families = survey()?;
    let mut text = HEAD.to_owned();
    text.push_str(
        "| family | `model_type` | published shapes | launches | on CUDA | verified |\n|---|---|---|---|---|---|\n",
    );
    for family in &families {
        let launches = match &family.patched {
            Some(p) => format!("{} → {}", p.launches_stock, p.launches_patched),
            None => "not counted: no published shape here yet".to_owned(),
        };
        let cuda = match family.patched.as_ref().map(|p| (p.launches_cuda, &p.cuda_refused)) {
            Some((Some(launches), _)) => launches.to_string(),
            Some((None, Some(why))) => format!("MLX: {why}"),
            _ => "not counted".to_owned(),
        };
        let verified: Vec<String> = family.verified.iter().map(sentence).collect();
        let verified = if verified.is_empty() { "nowhere yet".to_owned() } else { verified.join("; ") };
        let (types, models) = (code(family.model_types), code(&family.models));
        // Writing to a String cannot fail.
        let _ =
            writeln!(text, "| {} | {types} | {models} | {launches} | {cuda} | {verified} |", family.family);
    }
    text.push_str(PATTERNS_HEAD);
    text.push_str(&table(&families));
    let refused = refusals(&families);
    if !refused.is_empty() {
        text.push_str("\nWhy a pattern left places alone that look like it:\n\n");
        refused.iter().for_each(|line| text.push_str(line));
    }
    Ok(text)
}

/// The table of patterns by family, in Markdown.
fn table(families: &[FamilySurvey]) -> String {
    let columns: Vec<(&FamilySurvey, &PatternSurvey)> =
        families.iter().filter_map(|f| Some((f, f.patched.as_ref()?))).collect();
    let mut text = "| pattern | class |".to_owned();
    columns.iter().for_each(|(family, _)| text.push_str(&format!(" {} |", family.family)));
    text.push_str("\n|---|---|");
    text.push_str(&"---|".repeat(columns.len()));
    text.push('\n');
    for pattern in patterns::ALL {
        let _ = write!(text, "| `{}` | {} |", pattern.name, pattern.class);
        for (_, survey) in &columns {
            let found = survey.patterns.iter().find(|p| p.name == pattern.name);
            let cell = match found {
                Some(p) if p.matched > 0 => p.matched.to_string(),
                Some(p) if !p.refused.is_empty() => "refused".to_owned(),
                _ => "-".to_owned(),
            };
            let _ = write!(text, " {cell} |");
        }
        text.push('\n');
    }
    text
}

fn refusals(families: &[FamilySurvey]) -> Vec<String> {
    let mut lines = BTreeSet::new();
    for family in families {
        for pattern in family.patched.iter().flat_map(|p| &p.patterns) {
            for why in &pattern.refused {
                lines.insert(format!("* `{}` in {}: {why}\n", pattern.name, family.family));
            }
        }
    }
    lines.into_iter().collect()
}

fn sentence(v: &Verified) -> String {
    format!("{} {}: {} ({})", v.backend, v.dtype, v.what, v.models.join(", "))
}

fn code(names: &[&str]) -> String {
    match names {
        [] => "none".to_owned(),
        names => names.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", "),
    }
}
