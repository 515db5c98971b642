//! Decode as measured on a GPU: one JSON line a model and run, kept in `docs/measured/`, and the tables of
//! `docs/performance.md` that are made of these lines.
//!
//! The example `cuda_decode` writes them (`--json FILE`). Models are random weights at published shapes; of loaded models
//! there are the lab's capsules.

mod divergence;
mod tables;

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::chat_template::strftime;

pub use divergence::{Divergence, likeliest};
pub use tables::with_tables;

/// Bytes a second that the memory of a device moves, as its maker states them, by the name that its driver gives.
const BANDWIDTHS: &[(&str, f64)] = &[("NVIDIA H100 80GB HBM3", 3.35e12), ("NVIDIA H200", 4.8e12)];

/// What a run of one model came to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// The published shape, by its name in [`crate::random::MODELS`].
    pub model: String,
    /// The GPU, by the name that its driver gives.
    pub device: String,
    /// The day in UTC: `2026-11-23`.
    pub date: String,
    /// Short hash of the commit that ran; `unknown` if nobody said.
    pub commit: String,
    /// What ran.
    pub form: Form,
    /// Bytes of weights and state that a token must move, by the cost of the stock graph after [`Form::context`] tokens.
    pub bytes_per_token: u64,
    /// Launches a token past MLX.
    pub launches_per_token: u64,
    /// Decoded tokens a second of stock MLX, run by run; may be empty.
    pub stock: Vec<f64>,
    /// Decoded tokens a second past MLX, run by run.
    pub ours: Vec<f64>,
    /// Both beside float32, if that was compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compared: Option<Compared>,
    /// Prompts in one call, if they were measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefill: Vec<Prefill>,
}

/// What ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Form {
    /// Tokens before those that were timed.
    pub context: u64,
    /// Tokens timed.
    pub tokens: u64,
    /// Whether stock MLX ran in turn with it; else nothing ran on MLX but the reading of long contexts.
    pub beside_stock: bool,
}

/// Steps of the same tokens beside the same graph in float32 on MLX.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compared {
    /// How many steps.
    pub steps: u64,
    /// Stock MLX beside float32.
    pub stock: Distance,
    /// Ours beside float32.
    pub ours: Distance,
    /// Mean of `KL(stock || ours)` in nats; absent where it was not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_of_both: Option<f64>,
    /// Where likeliest tokens first differ; absent where nobody looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub divergences: Option<Divergences>,
}

/// How far logits are from those of float32.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distance {
    /// Mean over the steps of the norm of the difference over that of float32's.
    pub error: f64,
    /// Mean of `KL(float32 || this)` in nats.
    pub kl: f64,
    /// Steps with another likeliest token; absent where they were not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_tokens: Option<u64>,
}

/// The first steps with another likeliest token; `None` where it is the same in all.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Divergences {
    /// Stock beside float32.
    pub stock: Option<Divergence>,
    /// Ours beside float32.
    pub ours: Option<Divergence>,
    /// Ours beside stock.
    pub ours_beside_stock: Option<Divergence>,
}

/// Prompts of one length in one call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prefill {
    /// Tokens.
    pub length: u64,
    /// Tokens a second of stock MLX, run by run, or the least and the greatest.
    pub stock: Vec<f64>,
    /// Tokens a second of ours, run by run, or the least and the greatest.
    pub ours: Vec<f64>,
}

/// Why measurements cannot be kept or shown.
#[derive(Debug, thiserror::Error)]
pub enum MeasuredError {
    /// The file cannot be read or written.
    #[error("cannot use {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A line is no record, or its figures cannot be.
    #[error("{}:{line}: {message}; mend or remove this line", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A record that would be written has figures that cannot be.
    #[error("the run of {model} is not kept: {message}")]
    Record {
        /// The model.
        model: String,
        /// What is wrong.
        message: String,
    },
    /// The document has no place for a table.
    #[error(
        "the document has no line `{begin}` with a line `{end}` after it: put both where the table belongs"
    )]
    NoMarkers {
        /// The line before the table.
        begin: String,
        /// The line after it.
        end: String,
    },
}

/// Today in UTC: `2026-11-23`.
pub fn today() -> String {
    strftime("%F", SystemTime::now())
}

/// The commit that runs: the environment's `ZMLX_COMMIT`, else that of the build, else `unknown`.
pub fn commit() -> String {
    let now = std::env::var("ZMLX_COMMIT").ok();
    let given = now.as_deref().into_iter().chain(option_env!("ZMLX_COMMIT")).find(|c| !c.is_empty());
    given.unwrap_or("unknown").to_owned()
}

impl Measured {
    /// Adds it to a file as one line; the file is made if there is none.
    ///
    /// # Errors
    /// [`MeasuredError::Record`] for figures that cannot be, [`MeasuredError::File`].
    pub fn append(&self, path: &Path) -> Result<(), MeasuredError> {
        let refuse = |message| MeasuredError::Record { model: self.model.clone(), message };
        self.check().map_err(refuse)?;
        let line = serde_json::to_string(self).map_err(|e| refuse(e.to_string()))?;
        appendable(path)?
            .write_all(format!("{line}\n").as_bytes())
            .map_err(|source| MeasuredError::File { path: path.to_owned(), source })
    }

    /// Reads a file of such lines; empty ones are passed over.
    ///
    /// # Errors
    /// [`MeasuredError::File`]; [`MeasuredError::Line`] for the first line that is no record.
    pub fn read(path: &Path) -> Result<Vec<Self>, MeasuredError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| MeasuredError::File { path: path.to_owned(), source })?;
        let one = |(index, line): (usize, &str)| {
            let fail = |message| MeasuredError::Line { path: path.to_owned(), line: index + 1, message };
            // The parser's own line is always 1.
            let record: Self = serde_json::from_str(line).map_err(|e| fail(without_line(&e)))?;
            record.check().map_err(fail)?;
            if record.bandwidth().is_none() {
                return Err(fail(format!(
                    "the memory bandwidth of the device {:?} is not known: add it to BANDWIDTHS in \
                     crates/zmlx-models/src/measured/mod.rs",
                    record.device
                )));
            }
            Ok(record)
        };
        text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(one).collect()
    }

    /// Bytes a second of its device's memory, if they are known.
    pub fn bandwidth(&self) -> Option<f64> {
        BANDWIDTHS.iter().find(|(name, _)| *name == self.device).map(|(_, bandwidth)| *bandwidth)
    }

    /// Whether the figures can be what they say they are.
    fn check(&self) -> Result<(), String> {
        let words = [("model", &self.model), ("device", &self.device), ("commit", &self.commit)];
        for (name, word) in words {
            // They stand in cells of tables.
            if word.trim().is_empty() || word.contains(['|', '\n']) {
                return Err(format!("{name} is {word:?}"));
            }
        }
        let digits = |part: &str, count| part.len() == count && part.bytes().all(|b| b.is_ascii_digit());
        let date: Vec<&str> = self.date.split('-').collect();
        if !matches!(date[..], [y, m, d] if digits(y, 4) && digits(m, 2) && digits(d, 2)) {
            return Err(format!("date is {:?} and not as 2026-11-23", self.date));
        }
        if self.bytes_per_token == 0 {
            return Err("bytes_per_token is 0".to_owned());
        }
        if self.ours.is_empty() {
            return Err("ours is empty".to_owned());
        }
        let prompts = self.prefill.iter().flat_map(|p| [&p.stock, &p.ours]);
        for rate in [&self.stock, &self.ours].into_iter().chain(prompts).flatten() {
            if !(rate.is_finite() && *rate > 0.0) {
                return Err(format!("a rate is {rate} tok/s"));
            }
        }
        let Some(compared) = &self.compared else { return Ok(()) };
        let [stock, ours] = [compared.stock, compared.ours];
        let all = [stock.error, stock.kl, ours.error, ours.kl].into_iter().chain(compared.kl_of_both);
        let parted = compared.divergences.iter().flat_map(|d| [&d.stock, &d.ours, &d.ours_beside_stock]);
        let parted = parted.flatten().flat_map(|d| [d.margin, d.distance]);
        match all.chain(parted).find(|v| !v.is_finite()) {
            Some(value) => Err(format!("a figure beside float32 is {value}")),
            None => Ok(()),
        }
    }
}

/// Opens a file to add lines to it, so that what cannot be written is known before anything is measured.
///
/// # Errors
/// [`MeasuredError::File`].
pub fn appendable(path: &Path) -> Result<std::fs::File, MeasuredError> {
    let opened = OpenOptions::new().create(true).append(true).open(path);
    opened.map_err(|source| MeasuredError::File { path: path.to_owned(), source })
}

fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.replace(&format!(" at line {} column", error.line()), " at column")
}

#[cfg(test)]
mod tests;
