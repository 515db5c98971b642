//! The two arms of a comparison: one model, stock or patched. The only place that patches.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use zmlx_models::Model;

use crate::capsule::{Capsule, PatternRecord};
use crate::error::LabError;
use crate::fidelity::Class;

/// An arm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Arm {
    /// The graph as the family builds it.
    Stock,
    /// The graph with fused ops.
    Patched,
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Stock => "stock",
            Self::Patched => "patched",
        })
    }
}

impl FromStr for Arm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "stock" => Ok(Self::Stock),
            "patched" => Ok(Self::Patched),
            other => Err(format!("{other:?} is neither stock nor patched")),
        }
    }
}

/// Which patterns are wanted where none are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preset {
    /// Those whose fidelity the gate has confirmed.
    #[default]
    Default,
    /// Those of class `bounded` too.
    Fast,
    /// None: both arms are stock, which shows how much two equal models differ.
    None,
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Default => "default",
            Self::Fast => "fast",
            Self::None => "none",
        })
    }
}

/// What to patch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PatchChoice {
    /// The preset.
    pub preset: Preset,
    /// These patterns in its stead.
    pub patterns: Option<Vec<String>>,
    /// But not these.
    pub exclude: Vec<String>,
    /// Threads of native ops and of the bandwidth probe; all cores when not given.
    pub threads: Option<usize>,
}

/// Counts that do not depend on the machine's mood.
pub(crate) struct Counts {
    pub(crate) bytes_per_token: u64,
    pub(crate) graph_nodes: u64,
    pub(crate) launches_per_token: Option<u64>,
}

/// A model that changes between its arms.
pub(crate) struct Arms<'m> {
    model: &'m mut Model,
    active: Arm,
    patterns: Vec<PatternRecord>,
}

impl<'m> Arms<'m> {
    /// Begins as stock. Names of patterns are checked here, before anything is measured.
    pub(crate) fn new(model: &'m mut Model, choice: &PatchChoice) -> Result<Self, LabError> {
        let named = choice.patterns.iter().flatten().chain(&choice.exclude).next();
        if let Some(name) = named {
            return Err(LabError::Patch(format!(
                "pattern {name} is unknown: this version has no patterns; leave --patterns and --exclude out"
            )));
        }
        if choice.preset == Preset::Fast {
            return Err(LabError::Patch(
                "preset fast holds no patterns in this version: use --preset default or none".to_owned(),
            ));
        }
        Ok(Self { model, active: Arm::Stock, patterns: Vec::new() })
    }

    /// Makes this arm the one that runs. States of the model are void afterwards.
    pub(crate) fn select(&mut self, arm: Arm) -> Result<&Model, LabError> {
        self.active = arm;
        Ok(self.model)
    }

    /// The model as it runs now.
    pub(crate) fn model(&self) -> &Model {
        self.model
    }

    /// Says in a capsule what the patched arm was.
    pub(crate) fn describe(&self, capsule: &mut Capsule) {
        capsule.patterns = self.patterns.clone();
        capsule.native = false;
        capsule.notes.extend(self.notes());
    }

    /// The weakest promise among the patterns that matched.
    pub(crate) fn class(&self) -> Class {
        let matched = self.patterns.iter().filter(|p| p.matched > 0);
        matched.map(|p| p.class).max().unwrap_or(Class::BitExact)
    }

    /// Counts of the arm that runs now.
    pub(crate) fn counts(&self) -> Counts {
        Counts {
            bytes_per_token: self.model.info().bytes_per_token,
            graph_nodes: self.model.executor().graph().nodes.len() as u64,
            launches_per_token: None,
        }
    }

    /// What a reader must know about the patched arm.
    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.patterns.iter().any(|p| p.matched > 0) {
            notes
                .push("no pattern was put in: both arms are stock, and the differences are noise".to_owned());
        }
        for idle in self.patterns.iter().filter(|p| p.matched > 0 && p.executed == 0) {
            notes.push(format!("pattern {} was put in at {} places and never ran", idle.name, idle.matched));
        }
        notes
    }
}
