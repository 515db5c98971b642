//! Patterns: rewrite rules over graphs.

mod rewrite;
mod search;
pub(crate) mod template;

use std::any::Any;
use std::collections::HashMap;
use std::sync::Arc;

use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::graph::{Graph, Node, Value};
use crate::ops::RmsNorm;
use crate::weights::{Format, Weight, WeightId};

pub use rewrite::{Backend, Choice, PatternReport, Rewritten, rewrite};

/// A rewrite rule. One file each, in `patterns/`, and one line in `patterns::ALL`.
pub struct Pattern {
    /// Its name, in the field's terms.
    pub name: &'static str,
    /// What it does, in one line.
    pub summary: &'static str,
    /// How close its body is to what it replaces.
    pub class: Fidelity,
    /// What it matches; see the texts in `patterns/` for the notation. The first that fits is taken.
    pub templates: &'static [&'static str],
    /// Looks at what was matched, and gives the body or says why not.
    pub build: fn(&Match<'_>) -> Result<Arc<dyn Body>, String>,
}

impl std::fmt::Debug for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pattern({}, {})", self.name, self.class)
    }
}

/// What a template matched.
pub struct Match<'a> {
    pub(crate) graph: &'a Graph,
    pub(crate) nodes: HashMap<String, &'a Node>,
    pub(crate) inputs: Vec<String>,
    pub(crate) values: &'a HashMap<String, Value>,
    /// For the inputs, the nodes they come from.
    pub(crate) producers: HashMap<String, &'a Node>,
    pub(crate) output: Value,
}

impl Match<'_> {
    /// The node that gives `name`, if the template had it.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name).copied()
    }

    /// The op that gives `name`, if it is a `T`.
    pub fn op<T: 'static>(&self, name: &str) -> Option<&T> {
        let op: &dyn Any = &*self.node(name)?.op;
        op.downcast_ref()
    }

    /// As [`Self::op`], or why not.
    pub fn need<T: 'static>(&self, name: &str) -> Result<&T, String> {
        self.op(name).ok_or_else(|| format!("{name} is not what it should be"))
    }

    /// The node that an input comes from.
    pub fn producer(&self, name: &str) -> Option<&Node> {
        self.producers.get(name).copied()
    }

    /// Whether `name` is the graph's output.
    pub fn is_output(&self, name: &str) -> bool {
        self.values.get(name) == Some(&self.output)
    }

    /// The norm `name`, if it is there: its weight and epsilon.
    pub fn norm(&self, name: &str) -> Option<(WeightId, f32)> {
        self.op::<RmsNorm>(name).map(|n| (n.weight, n.eps))
    }

    /// Which input of the fused op `name` is.
    pub fn input(&self, name: &str) -> Result<usize, String> {
        let value = self.values.get(name);
        let at = self.inputs.iter().position(|n| self.values.get(n) == value && value.is_some());
        at.ok_or_else(|| format!("{name} is no input"))
    }

    /// A declared weight.
    pub fn weight(&self, id: WeightId) -> Result<&Weight, String> {
        self.graph.weights.get(id.0).ok_or_else(|| format!("weight {} is not declared", id.0))
    }

    /// A matrix that the CPU's products can read: its rows and columns.
    pub fn matrix(&self, id: WeightId) -> Result<(usize, usize), String> {
        let weight = self.weight(id)?;
        let (&columns, rest) = weight.shape.split_last().ok_or("a matrix without dimensions")?;
        let &rows = rest.last().ok_or_else(|| format!("{} is a vector", weight.path))?;
        if let Format::Quantized(q) = &weight.format {
            let known = match (q.mode.as_str(), q.bits) {
                ("affine", 2 | 3 | 4 | 5 | 6 | 8) => matches!(q.group_size, 32 | 64 | 128),
                ("mxfp4", 4) | ("mxfp8", 8) => q.group_size == 32,
                ("nvfp4", 4) => q.group_size == 16,
                _ => false,
            };
            if !known || columns % q.group_size != 0 {
                return Err(format!(
                    "{} is {} {}-bit in groups of {}, for which there is no CPU product",
                    weight.path, q.mode, q.bits, q.group_size
                ));
            }
        }
        Ok((rows as usize, columns as usize))
    }
}
