use std::fmt;
use std::sync::Arc;

use crate::error::{GraphError, Result};
use crate::op::Op;
use crate::state::{Slot, SlotId, State};
use crate::weights::Weight;

/// A value: output number `output` of node number `node`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value {
    pub(crate) node: usize,
    pub(crate) output: usize,
}

impl Value {
    /// Number of the node that computes it, and which of the node's outputs it is.
    pub fn place(self) -> (usize, usize) {
        (self.node, self.output)
    }
}

/// A node: an op, what it reads, and where it belongs.
#[derive(Debug, Clone)]
pub struct Node {
    /// What it computes.
    pub op: Arc<dyn Op>,
    /// The values it reads.
    pub inputs: Vec<Value>,
    /// Path of the module, such as `model.layers.3.feed_forward`.
    pub path: String,
}

/// A model as data. Made by a [`Builder`](crate::Builder); nodes are in execution order.
#[derive(Debug, Clone)]
pub struct Graph {
    /// The nodes.
    pub nodes: Vec<Node>,
    /// The weights.
    pub weights: Vec<Weight>,
    /// The state slots.
    pub slots: Vec<Slot>,
    /// The logits, `[batch, length, vocabulary]`.
    pub output: Value,
}

impl Graph {
    /// Checks that every value is written before it is read.
    pub fn check(&self) -> Result<()> {
        let fail = |what: String| Err(GraphError::Malformed(what));
        for (index, node) in self.nodes.iter().enumerate() {
            for input in &node.inputs {
                if input.node >= index || input.output >= self.nodes[input.node].op.outputs() {
                    return fail(format!("{} ({}) reads {input} too early", node.path, node.op.name()));
                }
            }
            if node.op.weights().iter().any(|w| w.0 >= self.weights.len()) {
                return fail(format!("{} names an undeclared weight", node.path));
            }
            if node.op.slot().is_some_and(|s| s.0 >= self.slots.len()) {
                return fail(format!("{} names an undeclared slot", node.path));
            }
        }
        if self.output.node >= self.nodes.len() {
            return fail("it has no output".to_owned());
        }
        Ok(())
    }

    /// All values, in the order in which they are computed.
    pub fn values(&self) -> impl Iterator<Item = Value> + '_ {
        let outputs =
            |(node, n): (usize, &Node)| (0..n.op.outputs()).map(move |output| Value { node, output });
        self.nodes.iter().enumerate().flat_map(outputs)
    }

    /// The numbers of all state slots.
    pub fn slot_ids(&self) -> impl Iterator<Item = SlotId> + use<> {
        (0..self.slots.len()).map(SlotId)
    }

    /// A fresh state for it.
    pub fn new_state(&self) -> State {
        State::new(&self.slots)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.node)?;
        if self.output > 0 { write!(f, ".{}", self.output) } else { Ok(()) }
    }
}

/// One line a node: `%12 = rms_norm(%11) eps=0.00001 [model.layers.0.operator_norm]`.
impl fmt::Display for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, node) in self.nodes.iter().enumerate() {
            let inputs: Vec<String> = node.inputs.iter().map(ToString::to_string).collect();
            write!(f, "%{index} = {}({})", node.op.name(), inputs.join(", "))?;
            for (name, value) in node.op.attributes() {
                write!(f, " {name}={value}")?;
            }
            writeln!(f, " [{}]", node.path)?;
        }
        write!(f, "return {}", self.output)
    }
}
