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
use crate::infer::Types;
use crate::ops::RmsNorm;
use crate::shape::{Dim, Shape};
use crate::state::{Slot, SlotId};
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
    pub(crate) types: &'a Types,
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

    /// The shape of `name`.
    pub fn shape(&self, name: &str) -> Option<&Shape> {
        Some(&self.types.get(*self.values.get(name)?)?.shape)
    }

    /// The width of `name`, which must be one row a token: `[B, L, width]`.
    pub fn row_width(&self, name: &str) -> Result<usize, String> {
        match self.shape(name).map(|s| s.0.as_slice()) {
            Some([b, l, width]) if (b, l) == (&Dim::batch(), &Dim::length()) => width
                .constant()
                .and_then(|w| usize::try_from(w).ok())
                .ok_or(format!("{name} has no fixed width")),
            Some(_) => Err(format!("{name} is not one row a token, but perhaps heads")),
            None => Err(format!("{name} has no shape")),
        }
    }

    /// Which input `name` is, which must be one row a token.
    pub fn rows(&self, name: &str) -> Result<usize, String> {
        self.row_width(name)?;
        self.input(name)
    }

    /// The input `residual` that the node `sum`, if it is there, adds to `part`: of the same shape.
    pub fn residual(&self, sum: &str, part: &str, residual: &str) -> Result<Option<usize>, String> {
        if self.node(sum).is_none() {
            return Ok(None);
        }
        if self.shape(part) != self.shape(residual) {
            return Err("what is added to the product has another shape".to_owned());
        }
        self.input(residual).map(Some)
    }

    /// Whether all these weights are stored alike, so that one pass over the activations serves them all.
    pub fn alike(&self, weights: &[WeightId]) -> Result<(), String> {
        let formats: Vec<(&Format, bool)> = weights
            .iter()
            .map(|id| self.weight(*id).map(|w| (&w.format, w.exact)))
            .collect::<Result<_, _>>()?;
        if formats.windows(2).all(|pair| pair[0] == pair[1]) {
            return Ok(());
        }
        let paths: Vec<&str> =
            weights.iter().filter_map(|id| self.weight(*id).ok()).map(|w| w.path.as_str()).collect();
        Err(format!("{} are stored differently", paths.join(", ")))
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

    /// A declared slot.
    pub fn slot(&self, id: SlotId) -> Result<&Slot, String> {
        self.graph.slots.get(id.0).ok_or_else(|| format!("slot {} is not declared", id.0))
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
