//! The record of a measurement: one JSON file with a published schema (`docs/capsule.schema.json`).
//!
//! A capsule holds all that a report prints, and what is needed to judge or repeat it. Fields may be added to this version;
//! readers ignore those they do not know. A field that goes or changes its meaning makes a new version.

use std::fs;
use std::io::Write;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::arms::Arm;
use crate::error::{CapsuleError, LabError};
use crate::fidelity::{Class, Fidelity};
use crate::machine::{Conditions, Machine};
use crate::roofline::{Bound, Roofline};
use crate::stats::{Gain, Spread};

/// The `schema` of capsules of this version.
pub const SCHEMA: &str = "zmlx.capsule/1";

/// Largest file that is read.
const LARGEST: u64 = 64 << 20;

/// What was measured, on what, how, and what came out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "ZMLX capsule")]
pub struct Capsule {
    /// `zmlx.capsule/1`.
    #[schemars(extend("const" = SCHEMA))]
    pub schema: String,
    /// Which command wrote it.
    pub kind: Kind,
    /// When it was finished: RFC 3339, UTC.
    pub created: String,
    /// The machine.
    pub machine: Machine,
    /// What ran.
    pub versions: Versions,
    /// The model.
    pub model: ModelRecord,
    /// What was asked for.
    pub settings: Settings,
    /// The prompts.
    pub prompts: Vec<PromptRecord>,
    /// The state of the machine meanwhile.
    pub conditions: Conditions,
    /// Speeds of each arm. Empty if they were refused (see `notes`).
    pub arms: Vec<ArmRecord>,
    /// Patched over stock, where both ran.
    pub gains: Option<Gains>,
    /// The read bandwidth of the same run; none on a GPU, where it is not measured.
    pub roofline: Option<Roofline>,
    /// The patterns of the patched arm.
    pub patterns: Vec<PatternRecord>,
    /// Whether the patched arm runs natively and not on MLX.
    pub native: bool,
    /// What the gate found; only of `validate`.
    pub fidelity: Option<Fidelity>,
    /// What else to know.
    pub notes: Vec<String>,
}

/// A command that writes capsules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// `zmlx bench`.
    Bench,
    /// `zmlx validate`.
    Validate,
}

/// Versions of what ran.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Versions {
    /// ZMLX.
    pub zmlx: String,
    /// MLX, as loaded; none if no library is.
    pub mlx: Option<String>,
    /// The commit that the program was built from, if the build set `ZMLX_COMMIT`, else `unknown`.
    pub commit: String,
}

impl Versions {
    /// Of this program.
    pub fn current() -> Self {
        Self {
            zmlx: env!("CARGO_PKG_VERSION").to_owned(),
            mlx: zmlx_mlx::runtime::doctor().version,
            commit: option_env!("ZMLX_COMMIT").filter(|c| !c.is_empty()).unwrap_or("unknown").to_owned(),
        }
    }
}

/// A model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ModelRecord {
    /// What it was asked for by; of a path, its last part only.
    pub name: String,
    /// `model_type`.
    pub family: String,
    /// Hash of its content: see `model_hash`.
    pub hash: String,
    /// Bytes of its weight files.
    pub file_bytes: u64,
    /// Parameters in all.
    pub parameters_total: u64,
    /// Parameters that a token uses.
    pub parameters_active: u64,
    /// How its weights are stored.
    pub quantization: Vec<QuantizationRecord>,
    /// Dtype of the activations.
    pub dtype: String,
    /// `cpu` or `gpu`.
    pub device: String,
}

/// Weights stored in one way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct QuantizationRecord {
    /// `affine`, `mxfp4`, and so on, or `none`.
    pub mode: String,
    /// Bits an element.
    pub bits: u32,
    /// Elements that share a scale; 0 when not quantised.
    pub group_size: u32,
    /// Their bytes.
    pub bytes: u64,
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Settings {
    /// Preset of patterns.
    pub preset: String,
    /// Patterns named in its stead.
    pub patterns: Option<Vec<String>>,
    /// Patterns left out.
    pub exclude: Vec<String>,
    /// Threads, where they were set.
    pub threads: Option<u64>,
    /// Tokens generated for each prompt.
    pub max_tokens: u64,
    /// Timed runs of each arm.
    pub runs: u64,
    /// Seconds of rest before each timed run.
    pub cooldown_seconds: f64,
    /// How the arms took turns: `AB/BA` (stock first in one run, patched first in the next), or `A` for a single arm.
    pub order: String,
}

/// A prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PromptRecord {
    /// Its name.
    pub name: String,
    /// Its tokens.
    pub tokens: u64,
    /// Its text; none for token ids from the seeded generator.
    pub text: Option<String>,
}

/// Speeds of an arm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ArmRecord {
    /// Which arm.
    pub arm: Arm,
    /// Its timed runs, in the order they were taken.
    pub runs: Vec<RunRecord>,
    /// Prompt tokens a second.
    pub prefill: Spread,
    /// Generated tokens a second after the first.
    pub decode: Spread,
    /// Peak memory of MLX's arrays and of the CPU engine's weights over its runs, in bytes.
    pub peak_memory_bytes: u64,
    /// The most physical memory that the process held over its runs, in bytes: the other arm's weights too, where both arms
    /// are measured, and the buffer of the bandwidth probe. None where the system does not tell.
    #[serde(default)]
    pub resident_peak_bytes: Option<u64>,
    /// Bytes of weights that a token reads, as this arm holds them in memory.
    pub bytes_per_token: u64,
    /// Nodes of the graph that a token runs through.
    pub graph_nodes: u64,
    /// Kernel launches for a token, where they are counted.
    pub launches_per_token: Option<u64>,
    /// What bounds its decoding; none where no bandwidth was measured.
    pub bound: Option<Bound>,
}

/// A timed run over all prompts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct RunRecord {
    /// Its place among all timed runs, from 0.
    pub order: u64,
    /// Prompt tokens a second.
    pub prefill_tok_s: f64,
    /// Generated tokens a second after the first.
    pub decode_tok_s: f64,
}

/// Patched over stock.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Gains {
    /// Of prefill.
    pub prefill: Gain,
    /// Of decode.
    pub decode: Gain,
}

/// What became of a pattern.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PatternRecord {
    /// Its name.
    pub name: String,
    /// What it promises.
    pub class: Class,
    /// Places where it was put in.
    pub matched: u64,
    /// Why it was not put in elsewhere.
    pub refused: Vec<String>,
    /// How often it ran.
    pub executed: u64,
}

impl ArmRecord {
    /// The decode speeds of its runs.
    pub fn decode_runs(&self) -> Vec<f64> {
        self.runs.iter().map(|r| r.decode_tok_s).collect()
    }

    /// The prefill speeds of its runs.
    pub fn prefill_runs(&self) -> Vec<f64> {
        self.runs.iter().map(|r| r.prefill_tok_s).collect()
    }
}

impl Capsule {
    /// The figures of an arm, if it ran.
    pub fn arm(&self, arm: Arm) -> Option<&ArmRecord> {
        self.arms.iter().find(|a| a.arm == arm)
    }

    /// The JSON Schema of this version, as in `docs/capsule.schema.json`.
    pub fn json_schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }

    /// Writes it under a temporary name in the same folder, then renames it, so that nobody ever sees half of it.
    pub fn write(&self, path: &Path) -> Result<(), LabError> {
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|e| LabError::Write { path: path.to_owned(), source: e.into() })?;
        text.push(b'\n');
        write_whole(path, &text)
    }

    /// Reads and checks a capsule. The file may come from a stranger: any flaw is a [`CapsuleError`].
    pub fn read(path: &Path) -> Result<Self, CapsuleError> {
        let fail = |source| CapsuleError::Read { path: path.to_owned(), source };
        let metadata = fs::metadata(path).map_err(fail)?;
        if !metadata.is_file() {
            return Err(fail(std::io::Error::other("not a regular file")));
        }
        if metadata.len() > LARGEST {
            let path = path.to_owned();
            return Err(CapsuleError::TooLarge { path, bytes: metadata.len(), limit: LARGEST });
        }
        Self::parse(path, &fs::read(path).map_err(fail)?)
    }

    fn parse(path: &Path, text: &[u8]) -> Result<Self, CapsuleError> {
        let path = || path.to_owned();
        let value: serde_json::Value = serde_json::from_slice(text)
            .map_err(|e| CapsuleError::NotJson { path: path(), message: e.to_string() })?;
        // The version first: of another one, complaints about fields would mislead.
        match value.get("schema").and_then(serde_json::Value::as_str) {
            Some(SCHEMA) => {}
            Some(found) => {
                let found = found.chars().take(60).collect();
                return Err(CapsuleError::Version { path: path(), found, known: SCHEMA });
            }
            None => return Err(CapsuleError::NotACapsule { path: path() }),
        }
        // Again from the text, so that messages name lines.
        let capsule: Self = serde_json::from_slice(text)
            .map_err(|e| CapsuleError::Schema { path: path(), message: e.to_string() })?;
        capsule.check().map_err(|message| CapsuleError::Inconsistent { path: path(), message })?;
        Ok(capsule)
    }

    /// Whether the figures can be what they say they are.
    fn check(&self) -> Result<(), String> {
        for (index, arm) in self.arms.iter().enumerate() {
            let name = arm.arm;
            if self.arms[..index].iter().any(|other| other.arm == name) {
                return Err(format!("arm {name} is there twice"));
            }
            let rates =
                |values: Vec<f64>| if values.iter().all(|v| *v > 0.0) { Spread::of(&values) } else { None };
            for (what, runs, spread) in
                [("prefill", arm.prefill_runs(), arm.prefill), ("decode", arm.decode_runs(), arm.decode)]
            {
                let found = rates(runs).ok_or_else(|| format!("arm {name}: {what} has no speeds above 0"))?;
                if !close(found, spread) {
                    return Err(format!("arm {name}: the spread of {what} is not that of its runs"));
                }
            }
            if let Some(Bound::Memory { fraction, .. }) = arm.bound
                && !(0.0..=1.0).contains(&fraction)
            {
                return Err(format!("arm {name}: decoding at {fraction} of the roofline cannot be"));
            }
        }
        if let Some(roofline) = &self.roofline
            && !Spread::of(&roofline.probes).is_some_and(|s| s.min > 0.0 && close(s, roofline.bandwidth))
        {
            return Err("the read bandwidth is not that of its probes".to_owned());
        }
        match (&self.fidelity, self.kind) {
            (None, Kind::Validate) => Err("a validation without fidelity".to_owned()),
            (Some(f), _) if f.gate.passed != f.gate.failures.is_empty() => {
                Err("the gate's verdict is not that of its failures".to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// Equal but for what printing and reading a number can change.
fn close(a: Spread, b: Spread) -> bool {
    let pairs = [(a.median, b.median), (a.min, b.min), (a.max, b.max), (a.mad, b.mad)];
    pairs.iter().all(|(x, y)| (x - y).abs() <= 1e-9 * a.max.abs())
}

/// Writes a file whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), LabError> {
    let fail = |source| LabError::Write { path: path.to_owned(), source };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".zmlx-").tempfile_in(folder).map_err(fail)?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(fail)?;
    share(file.as_file()).map_err(fail)?;
    file.persist(path).map_err(|e| fail(e.error))?;
    Ok(())
}

/// Temporary files are for their owner alone; a result is as readable as any new file with the usual mask.
#[cfg(unix)]
fn share(file: &fs::File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn share(_: &fs::File) -> std::io::Result<()> {
    Ok(())
}

#[cfg(test)]
#[path = "capsule_tests.rs"]
pub(crate) mod tests;
