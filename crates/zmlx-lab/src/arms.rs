//! The two arms of a comparison: one model, stock or patched. The only place that patches.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use zmlx_graph::Fidelity;
use zmlx_graph::pattern::PatternReport;
use zmlx_models::{Model, PatchOptions, PatchReport};

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

/// Counts that do not depend on the machine's mood.
pub(crate) struct Counts {
    pub(crate) bytes_per_token: u64,
    pub(crate) graph_nodes: u64,
    pub(crate) launches_per_token: Option<u64>,
}

/// A model that changes between its arms.
pub(crate) struct Arms<'m> {
    model: &'m mut Model,
    options: PatchOptions,
    report: Option<PatchReport>,
}

impl Drop for Arms<'_> {
    fn drop(&mut self) {
        self.model.keep_both(false);
    }
}

impl<'m> Arms<'m> {
    /// A model between whose forms it is easy to change: both are kept in memory where `both` are measured.
    pub(crate) fn new(model: &'m mut Model, options: &PatchOptions, both: bool) -> Result<Self, LabError> {
        model.keep_both(both);
        Ok(Self { model, options: options.clone(), report: None })
    }

    /// Makes this arm the one that runs. States of the model are void afterwards.
    pub(crate) fn select(&mut self, arm: Arm) -> Result<&Model, LabError> {
        match arm {
            Arm::Stock => self.model.unpatch()?,
            Arm::Patched => {
                self.model.patch(&self.options).map_err(|e| LabError::Patch(e.to_string()))?;
            }
        }
        Ok(self.model)
    }

    /// The model as it runs now.
    pub(crate) fn model(&self) -> &Model {
        self.model
    }

    /// Says in a capsule what the patched arm was. To be called once it has run.
    pub(crate) fn describe(&mut self, capsule: &mut Capsule) -> Result<(), LabError> {
        self.select(Arm::Patched)?;
        self.report = self.model.patch_report();
        capsule.patterns = self.patterns();
        capsule.native = self.report.as_ref().is_some_and(|r| r.native);
        capsule.notes.extend(self.notes());
        Ok(())
    }

    fn patterns(&self) -> Vec<PatternRecord> {
        let record = |p: &PatternReport| PatternRecord {
            name: p.name.clone(),
            class: match p.class {
                Fidelity::BitExact => Class::BitExact,
                Fidelity::TokenIdentical => Class::TokenIdentical,
                Fidelity::Bounded => Class::Bounded,
            },
            matched: p.matched as u64,
            refused: p.refused.clone(),
            executed: p.executed,
        };
        self.report.iter().flat_map(|r| &r.patterns).map(record).collect()
    }

    /// The weakest promise among the patterns that matched.
    pub(crate) fn class(&self) -> Class {
        let patterns = self.patterns();
        let matched = patterns.iter().filter(|p| p.matched > 0);
        matched.map(|p| p.class).max().unwrap_or(Class::BitExact)
    }

    /// Counts of the arm that runs now, with weights as this arm holds them in memory.
    pub(crate) fn counts(&self) -> Result<Counts, LabError> {
        Ok(Counts {
            bytes_per_token: self.model.decode_cost(0)?.total.weight_bytes,
            graph_nodes: self.model.graph().nodes.len() as u64,
            launches_per_token: Some(self.model.executor().launches_per_token()),
        })
    }

    /// What a reader must know about the patched arm.
    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let patterns = self.patterns();
        if !patterns.iter().any(|p| p.matched > 0) {
            notes
                .push("no pattern was put in: both arms are stock, and the differences are noise".to_owned());
        }
        for idle in patterns.iter().filter(|p| p.matched > 0 && p.executed == 0) {
            notes.push(format!("pattern {} was put in at {} places and never ran", idle.name, idle.matched));
        }
        notes
    }
}
