use serde::Serialize;

use super::format_words;
use crate::error::Result;
use crate::graph::Graph;
use crate::op::Attribute;
use crate::shape::Type;

/// A graph as plain data, for JSON. Symbols in shapes: B is the batch, L the length of the call, S all positions so far.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GraphRecord {
    /// The weights, by number.
    pub weights: Vec<WeightRecord>,
    /// The state slots, by number.
    pub slots: Vec<SlotRecord>,
    /// The nodes, in order of execution.
    pub nodes: Vec<NodeRecord>,
    /// The value that holds the logits.
    pub output: String,
}

/// A weight.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WeightRecord {
    /// Path of its module, or its whole name.
    pub path: String,
    /// Shape before packing.
    pub shape: Vec<i32>,
    /// How it is stored, such as `affine 4-bit group 64`.
    pub format: String,
}

/// A state slot.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SlotRecord {
    /// Path of the module that owns it.
    pub path: String,
    /// `kv_cache` or `conv_state`.
    pub kind: &'static str,
    /// The arrays that it holds after a call.
    pub holds: Vec<TypeRecord>,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NodeRecord {
    /// Its first output, such as `%12`.
    pub value: String,
    /// Name of the op.
    pub op: &'static str,
    /// Path of the module.
    pub path: String,
    /// The pattern that put it here; absent for the nodes of a stock graph.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// The values it reads, such as `%11` and `%9.1`.
    pub inputs: Vec<String>,
    /// Parameters of the op.
    pub attributes: Vec<(&'static str, Attribute)>,
    /// Numbers of the weights it reads.
    pub weights: Vec<usize>,
    /// Number of the state slot that it reads or writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<usize>,
    /// The types of its outputs.
    pub outputs: Vec<TypeRecord>,
}

/// The type of a value.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TypeRecord {
    /// The dimensions, as text since they can be symbols.
    pub shape: Vec<String>,
    /// `activation` for the dtype that the model runs in, else MLX's name.
    pub dtype: String,
}

impl From<&Type> for TypeRecord {
    fn from(t: &Type) -> Self {
        Self { shape: t.shape.0.iter().map(ToString::to_string).collect(), dtype: t.dtype.to_string() }
    }
}

impl Graph {
    /// The graph with the types of its values as plain data.
    ///
    /// # Errors
    /// As [`Graph::infer`].
    pub fn record(&self) -> Result<GraphRecord> {
        let types = self.infer()?;
        let weights = self.weights.iter().map(|w| WeightRecord {
            path: w.path.clone(),
            shape: w.shape.clone(),
            format: format_words(w),
        });
        let slots = self.slots.iter().zip(self.slot_ids()).map(|(slot, id)| SlotRecord {
            path: slot.path.clone(),
            kind: slot.kind.word(),
            holds: types.slot(id).iter().map(TypeRecord::from).collect(),
        });
        let nodes = self.nodes.iter().enumerate().map(|(index, node)| NodeRecord {
            value: format!("%{index}"),
            op: node.op.name(),
            path: node.path.clone(),
            pattern: node.op.pattern().map(str::to_owned),
            inputs: node.inputs.iter().map(ToString::to_string).collect(),
            attributes: node.op.attributes(),
            weights: node.op.weights().iter().map(|w| w.0).collect(),
            slot: node.op.slot().map(|s| s.0),
            outputs: types.node(index).iter().map(TypeRecord::from).collect(),
        });
        Ok(GraphRecord {
            weights: weights.collect(),
            slots: slots.collect(),
            nodes: nodes.collect(),
            output: self.output.to_string(),
        })
    }
}
