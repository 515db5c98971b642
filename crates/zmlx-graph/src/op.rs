//! What a node does.

use std::any::Any;
use std::fmt;

use serde::Serialize;
use zmlx_mlx::{Array, Result};

use crate::cost::{NodeCost, Work};
use crate::fused::Fused;
use crate::infer::{InferContext, ShapeError};
use crate::shape::Type;
use crate::state::{SlotId, SlotValue};
use crate::weights::{BoundWeight, WeightId};

/// An op's parameter, for printing and matching.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Attribute {
    /// An integer.
    Int(i64),
    /// A float.
    Float(f64),
    /// A word.
    Text(String),
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(v) => write!(f, "{v}"),
            Self::Float(v) => write!(f, "{v}"),
            Self::Text(v) => f.write_str(v),
        }
    }
}

/// A semantic op: what one node computes. An op is a small struct of its parameters; its arrays come as inputs, its
/// weights and its state by id.
pub trait Op: Any + fmt::Debug + Send + Sync {
    /// Name in the field's terms, such as `rms_norm`.
    fn name(&self) -> &'static str;

    /// Parameters that tell two nodes of the same op apart.
    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        Vec::new()
    }

    /// The weights it reads.
    fn weights(&self) -> Vec<WeightId> {
        Vec::new()
    }

    /// The state slot it reads and writes.
    fn slot(&self) -> Option<SlotId> {
        None
    }

    /// The pattern that put it into the graph; none for the ops of a stock graph.
    fn pattern(&self) -> Option<&str> {
        None
    }

    /// How many values it gives.
    fn outputs(&self) -> usize {
        1
    }

    /// Itself, if it stands for several ops.
    fn fused(&self) -> Option<&Fused> {
        None
    }

    /// The types of its outputs for inputs of these types. Symbols in dimensions stay symbols.
    ///
    /// # Errors
    /// Says which input, weight or slot does not fit, and what would.
    fn infer(
        &self,
        context: &InferContext<'_>,
        inputs: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError>;

    /// What one call of it moves and computes. Unless an op says otherwise, it is one kernel that reads its inputs and
    /// weights whole, writes its outputs, and takes one operation for each of their elements.
    fn work(&self, node: &NodeCost<'_>) -> Work {
        node.plain(&self.weights(), 1, 1)
    }

    /// Builds the op's part of MLX's lazy graph.
    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>>;
}

/// What a running op can see besides its inputs.
pub struct Context<'a> {
    pub(crate) tokens: &'a Array,
    pub(crate) position: i32,
    pub(crate) weights: &'a [Option<BoundWeight>],
    pub(crate) slots: &'a mut [SlotValue],
    pub(crate) unpacks: bool,
}

impl Context<'_> {
    /// Token ids of this call, `[batch, length]`.
    pub fn tokens(&self) -> &Array {
        self.tokens
    }

    /// Number of positions that came before this call.
    pub fn position(&self) -> i32 {
        self.position
    }

    /// Whether products of many rows unpack their matrix to floats first. On a GPU with tensor cores that is faster than
    /// products with packed codes; the graph as it is in mlx-lm does not.
    pub fn unpacks(&self) -> bool {
        self.unpacks
    }

    /// A weight.
    ///
    /// # Panics
    /// If it was not bound, which [`crate::Executor`] rules out for the ops it runs.
    pub fn weight(&self, id: WeightId) -> &BoundWeight {
        self.weights[id.0].as_ref().expect("weights of ops that run on MLX are bound")
    }

    /// A state slot.
    pub fn slot(&mut self, id: SlotId) -> &mut SlotValue {
        &mut self.slots[id.0]
    }
}
