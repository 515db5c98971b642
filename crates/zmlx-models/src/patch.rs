//! Patching: from a model's stock graph to one of fused ops, and back.

use std::fmt;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zmlx_graph::pattern::{Choice, Pattern, PatternReport};
use zmlx_graph::{Fidelity, GraphError, patterns};

use crate::error::LoadError;

/// The variable that overrides what is patched: a preset, or names of patterns between commas.
pub const PATCH_VARIABLE: &str = "ZMLX_PATCH";

/// With a pattern's name in capitals after it: the variable that switches that pattern on (`1`) or off (`0`).
pub const PATTERN_PREFIX: &str = "ZMLX_PATTERN_";

/// Which patterns are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// Those whose class the gate has confirmed: the same greedy tokens.
    #[default]
    Default,
    /// Those with a bounded error too.
    Fast,
    /// None: the stock graph.
    None,
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Default => "default",
            Self::Fast => "fast",
            Self::None => "none",
        })
    }
}

impl std::str::FromStr for Preset {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "default" => Ok(Self::Default),
            "fast" => Ok(Self::Fast),
            "none" => Ok(Self::None),
            other => Err(format!("{other:?} is none of default, fast, none")),
        }
    }
}

/// What to patch. Explicit patterns go before the preset, then exclusions, then the environment.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchOptions {
    /// Which patterns.
    pub preset: Preset,
    /// These and no others, in place of the preset's.
    pub patterns: Option<Vec<String>>,
    /// Not these.
    pub exclude: Vec<String>,
    /// The loosest class allowed; by default the preset's.
    pub max_class: Option<Fidelity>,
    /// Threads of the CPU's engine; by default as many as the process may use.
    pub threads: Option<usize>,
    /// Whether `ZMLX_PATCH` and `ZMLX_PATTERN_<NAME>` are heard.
    pub environment: bool,
}

impl Default for PatchOptions {
    fn default() -> Self {
        Self {
            preset: Preset::Default,
            patterns: None,
            exclude: Vec::new(),
            max_class: None,
            threads: None,
            environment: true,
        }
    }
}

/// Why a model cannot be patched.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PatchError {
    /// There is no pattern of that name.
    #[error("there is no pattern {name:?}; there are {known}")]
    UnknownPattern {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// A variable of the environment has a value that means nothing.
    #[error("{variable}={value}: must be {allowed}")]
    Environment {
        /// The variable.
        variable: String,
        /// Its value.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// More or fewer threads than make sense.
    #[error("{threads} threads: must be 1 to {most}")]
    Threads {
        /// What was asked for.
        threads: usize,
        /// The most.
        most: usize,
    },
    /// The patched graph could not be made ready.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// Weights could not be read.
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// Most threads of an engine.
pub const MOST_THREADS: usize = 256;

/// What a patch did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PatchReport {
    /// What became of each pattern that was tried.
    pub patterns: Vec<PatternReport>,
    /// Kernels of MLX and stages of the engine that one token takes, one after another.
    pub launches_per_token: u64,
    /// Whether the whole graph runs on the CPU's engine.
    pub native: bool,
    /// Threads of the engine.
    pub threads: usize,
    /// The NVIDIA GPU that decode steps run on past MLX, if they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cuda: Option<String>,
}

impl fmt::Display for PatchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<18} {:<16} {:>7} {:>9}  refused", "pattern", "class", "matched", "executed")?;
        for p in &self.patterns {
            let refused = p.refused.join("; ");
            let mut line = format!("{:<18} {:<16} {:>7} {:>9}", p.name, p.class, p.matched, p.executed);
            if !refused.is_empty() {
                // Writing to a String cannot fail.
                let _ = write!(line, "  {refused}");
            }
            writeln!(f, "{line}")?;
        }
        write!(f, "{} launches a token", self.launches_per_token)?;
        if let Some(device) = &self.cuda {
            return write!(f, ", all as one graph on {device}");
        }
        if self.native { write!(f, ", all on the CPU engine with {} threads", self.threads) } else { Ok(()) }
    }
}

impl PatchOptions {
    /// Nothing is patched.
    pub fn none() -> Self {
        Self { preset: Preset::None, environment: false, ..Self::default() }
    }

    /// The patterns to try and the loosest class, the environment heard if it is to be.
    pub(crate) fn choose(&self, backend: zmlx_graph::pattern::Backend) -> Result<Choice, PatchError> {
        let variable = |name: &str| self.environment.then(|| std::env::var(name).ok()).flatten();
        let switches: Vec<(String, String)> = match self.environment {
            true => std::env::vars().filter(|(name, _)| name.starts_with(PATTERN_PREFIX)).collect(),
            false => Vec::new(),
        };
        self.chosen(backend, variable(PATCH_VARIABLE).as_deref(), &switches)
    }

    fn chosen(
        &self,
        backend: zmlx_graph::pattern::Backend,
        patch: Option<&str>,
        switches: &[(String, String)],
    ) -> Result<Choice, PatchError> {
        let (mut preset, mut listed) = (self.preset, self.patterns.clone());
        match patch.map(str::trim) {
            None | Some("") => {}
            Some(text) => match text.parse() {
                Ok(named) => (preset, listed) = (named, None),
                Err(_) => listed = Some(text.split(',').map(|n| n.trim().to_owned()).collect()),
            },
        }
        let max_class = self.max_class.unwrap_or(match preset {
            Preset::Fast => Fidelity::Bounded,
            _ => Fidelity::TokenIdentical,
        });
        let mut chosen: Vec<&'static Pattern> = match (&listed, preset) {
            (Some(names), _) => {
                let named: Result<Vec<_>, _> = names.iter().map(|n| pattern(n)).collect();
                let named = named?;
                // In the order in which patterns are tried, whatever order they were named in.
                patterns::ALL.iter().copied().filter(|p| named.iter().any(|n| n.name == p.name)).collect()
            }
            (None, Preset::None) => Vec::new(),
            // Those too loose are dropped here, so that a report names only what was meant to run.
            (None, _) => patterns::ALL.iter().copied().filter(|p| p.class <= max_class).collect(),
        };
        for name in &self.exclude {
            let excluded = pattern(name)?;
            chosen.retain(|p| p.name != excluded.name);
        }
        for (variable, value) in switches {
            let name = variable.trim_start_matches(PATTERN_PREFIX).to_ascii_lowercase();
            let switched = pattern(&name)?;
            match value.as_str() {
                "0" => chosen.retain(|p| p.name != switched.name),
                "1" if chosen.iter().all(|p| p.name != switched.name) => {
                    let wanted =
                        |p: &&&Pattern| p.name == switched.name || chosen.iter().any(|c| c.name == p.name);
                    chosen = patterns::ALL.iter().filter(wanted).copied().collect();
                }
                "1" => {}
                _ => {
                    let (variable, value) = (variable.clone(), value.clone());
                    return Err(PatchError::Environment { variable, value, allowed: "0 or 1".to_owned() });
                }
            }
        }
        Ok(Choice { patterns: chosen, max_class, backend })
    }

    /// How many threads the engine gets.
    pub(crate) fn thread_count(&self) -> Result<usize, PatchError> {
        match self.threads {
            Some(threads) if (1..=MOST_THREADS).contains(&threads) => Ok(threads),
            Some(threads) => Err(PatchError::Threads { threads, most: MOST_THREADS }),
            None => Ok(std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS)),
        }
    }
}

fn pattern(name: &str) -> Result<&'static Pattern, PatchError> {
    let known = || patterns::ALL.iter().map(|p| p.name).collect::<Vec<_>>().join(", ");
    patterns::named(name).ok_or_else(|| PatchError::UnknownPattern { name: name.to_owned(), known: known() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use zmlx_graph::pattern::Backend;

    fn names(
        options: &PatchOptions,
        patch: Option<&str>,
        switches: &[(&str, &str)],
    ) -> Result<Vec<&'static str>, String> {
        let switches: Vec<_> = switches.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let chosen = options.chosen(Backend::Cpu, patch, &switches).map_err(|e| e.to_string())?;
        Ok(chosen.patterns.iter().map(|p| p.name).collect())
    }

    #[test]
    fn patterns_are_chosen_by_preset_list_exclusion_and_environment() {
        let all = names(&PatchOptions::default(), None, &[]).unwrap();
        assert!(all.contains(&"moe_mlp") && all.contains(&"router"));
        let base = PatchOptions::default();
        let fast = PatchOptions { preset: Preset::Fast, ..base.clone() };
        let fast = names(&fast, None, &[]).unwrap();
        assert!(fast.contains(&"kv_f16") && !all.contains(&"kv_f16"), "{fast:?} {all:?}");
        assert!(all.iter().all(|name| fast.contains(name)));
        assert_eq!(names(&base, Some("fast"), &[("ZMLX_PATTERN_KV_F16", "0")]).unwrap(), all);
        assert_eq!(names(&PatchOptions::none(), None, &[]).unwrap(), Vec::<&str>::new());
        assert_eq!(names(&base, Some("none"), &[]).unwrap(), Vec::<&str>::new());
        assert_eq!(names(&base, Some("moe_mlp, router"), &[]).unwrap(), ["router", "moe_mlp"]);
        let without = PatchOptions { exclude: vec!["router".into()], ..base.clone() };
        assert_eq!(names(&without, None, &[]).unwrap().len(), all.len() - 1);
        assert_eq!(
            names(&base, Some("router"), &[("ZMLX_PATTERN_MOE_MLP", "1")]).unwrap(),
            ["router", "moe_mlp"]
        );
        assert_eq!(names(&base, None, &[("ZMLX_PATTERN_ROUTER", "0")]).unwrap().len(), all.len() - 1);
    }

    #[test]
    fn what_means_nothing_is_an_error_that_says_what_there_is() {
        let base = PatchOptions::default();
        let listed = PatchOptions { patterns: Some(vec!["moe".into()]), ..base.clone() };
        let excluded = PatchOptions { exclude: vec!["nothing".into()], ..base.clone() };
        for (result, says) in [
            (names(&listed, None, &[]), "\"moe\""),
            (names(&excluded, None, &[]), "\"nothing\""),
            (names(&base, Some("default,router"), &[]), "\"default\""),
            (names(&base, None, &[("ZMLX_PATTERN_X", "1")]), "\"x\""),
            (names(&base, None, &[("ZMLX_PATTERN_ROUTER", "yes")]), "0 or 1"),
        ] {
            let error = result.unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        for threads in [0, 1000] {
            let options = PatchOptions { threads: Some(threads), ..base.clone() };
            assert!(options.thread_count().is_err());
        }
    }
}
