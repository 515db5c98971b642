//! Writing graphs.

use std::collections::HashMap;
use std::sync::Arc;

use crate::graph::{Graph, Node, Value};
use crate::op::Op;
use crate::ops;
use crate::state::{Slot, SlotId, SlotKind};
use crate::weights::{Format, Weight, WeightId};

/// Says how the matrix at a module path with that many columns is stored.
pub type FormatOf<'a> = dyn Fn(&str, i32) -> Format + 'a;

/// Says whether the checkpoint at hand has a tensor of that name.
pub type Stored<'a> = dyn Fn(&str) -> bool + 'a;

/// Writes a graph node by node. Methods name the module path they belong to; a weight that is named twice (a tied head)
/// is declared once.
pub struct Builder<'a> {
    nodes: Vec<Node>,
    weights: Vec<Weight>,
    by_path: HashMap<String, WeightId>,
    slots: Vec<Slot>,
    format_of: &'a FormatOf<'a>,
    stored: Option<&'a Stored<'a>>,
}

impl<'a> Builder<'a> {
    /// An empty graph; `format_of` says how matrices are stored in the checkpoint at hand.
    pub fn new(format_of: &'a FormatOf<'a>) -> Self {
        Self {
            nodes: Vec::new(),
            weights: Vec::new(),
            by_path: HashMap::new(),
            slots: Vec::new(),
            format_of,
            stored: None,
        }
    }

    /// The same, which knows what tensors the checkpoint has.
    pub fn knowing(self, stored: &'a Stored<'a>) -> Self {
        Self { stored: Some(stored), ..self }
    }

    /// Whether the checkpoint has a tensor of that name; none if there is no checkpoint at hand.
    pub fn has(&self, name: &str) -> Option<bool> {
        self.stored.map(|stored| stored(name))
    }

    /// Adds a node of one output.
    pub fn node(&mut self, path: &str, op: impl Op, inputs: &[Value]) -> Value {
        self.nodes.push(Node { op: Arc::new(op), inputs: inputs.to_vec(), path: path.to_owned() });
        Value { node: self.nodes.len() - 1, output: 0 }
    }

    /// Adds a node of `N` outputs.
    pub fn node_n<const N: usize>(&mut self, path: &str, op: impl Op, inputs: &[Value]) -> [Value; N] {
        let first = self.node(path, op, inputs);
        std::array::from_fn(|output| Value { output, ..first })
    }

    /// Declares a state slot.
    pub fn slot(&mut self, path: &str, kind: SlotKind) -> SlotId {
        self.slots.push(Slot { path: path.to_owned(), kind });
        SlotId(self.slots.len() - 1)
    }

    /// Declares a weight, or finds the one with that path.
    pub fn weight(&mut self, weight: Weight) -> WeightId {
        if let Some(id) = self.by_path.get(&weight.path) {
            // A matrix that is multiplied with is read whole, also if it serves as an embedding too.
            self.weights[id.0].lookup &= weight.lookup;
            return *id;
        }
        let id = WeightId(self.weights.len());
        self.by_path.insert(weight.path.clone(), id);
        self.weights.push(weight);
        id
    }

    /// Declares the matrix `path.weight` of `shape`, in whatever format the checkpoint has it.
    pub fn matrix(&mut self, path: &str, shape: &[i32]) -> WeightId {
        let format = (self.format_of)(path, shape.last().copied().unwrap_or(0));
        let experts = (shape.len() == 3).then(|| shape[0]);
        self.weight(Weight { format, experts, ..dense(path, shape) })
    }

    /// Declares the matrices `path.weight` `[n, out, in]`, of which every token uses all (one a head).
    pub fn matrices(&mut self, path: &str, shape: [i32; 3]) -> WeightId {
        let format = (self.format_of)(path, shape[2]);
        self.weight(Weight { format, ..dense(path, &shape) })
    }

    /// Declares the tensor `path.weight` of `shape`, never quantised.
    pub fn tensor(&mut self, path: &str, shape: &[i32]) -> WeightId {
        self.weight(dense(path, shape))
    }

    /// Declares the vector `path.bias`.
    pub fn bias(&mut self, path: &str, width: i32) -> WeightId {
        self.weight(Weight { bare: true, ..dense(&format!("{path}.bias"), &[width]) })
    }

    /// Declares the vectors `path.bias` `[experts, width]`, one an expert.
    pub fn expert_bias(&mut self, path: &str, experts: i32, width: i32) -> WeightId {
        let experts_of = Some(experts);
        let vectors = dense(&format!("{path}.bias"), &[experts, width]);
        self.weight(Weight { bare: true, experts: experts_of, ..vectors })
    }

    /// Declares the tensor named `path` itself, never quantised.
    pub fn bare(&mut self, path: &str, shape: &[i32]) -> WeightId {
        self.weight(Weight { bare: true, ..dense(path, shape) })
    }

    /// Declares the tensor named `path` itself, kept in float32.
    pub fn bare_f32(&mut self, path: &str, shape: &[i32]) -> WeightId {
        self.weight(Weight { bare: true, keep_f32: true, ..dense(path, shape) })
    }

    /// The token ids of the call.
    pub fn tokens(&mut self) -> Value {
        self.node("input", ops::Tokens, &[])
    }

    /// Rows of the matrix `path.weight` `[vocabulary, width]`.
    pub fn embedding(&mut self, path: &str, ids: Value, vocabulary: i32, width: i32) -> Value {
        let id = self.matrix(path, &[vocabulary, width]);
        self.weights[id.0].lookup = true;
        self.node(path, ops::Embedding { weight: id }, &[ids])
    }

    /// `x @ w.T` with the matrix `path.weight` `[out, in]`.
    pub fn linear(&mut self, path: &str, x: Value, out: i32, input: i32) -> Value {
        let weight = self.matrix(path, &[out, input]);
        self.node(path, ops::Linear { weight, bias: None }, &[x])
    }

    /// `x @ w.T + b`.
    pub fn linear_bias(&mut self, path: &str, x: Value, out: i32, input: i32) -> Value {
        let weight = self.matrix(path, &[out, input]);
        let bias = self.bias(path, out);
        self.node(path, ops::Linear { weight, bias: Some(bias) }, &[x])
    }

    /// Says that `value` is compared with others, so that the product that makes it may not round its input (see
    /// [`Weight::exact`]).
    pub fn compared(&mut self, value: Value) -> Value {
        for id in self.nodes[value.node].op.weights() {
            self.weights[id.0].exact = true;
        }
        value
    }

    /// RMS norm over the last axis with the vector `path.weight`.
    pub fn rms_norm(&mut self, path: &str, x: Value, width: i32, eps: f32) -> Value {
        let weight = self.tensor(path, &[width]);
        self.node(path, ops::RmsNorm { weight, eps }, &[x])
    }

    /// RMS norm over the last axis whose factors are 1 more than the vector `path.weight`.
    pub fn rms_norm_above_one(&mut self, path: &str, x: Value, width: i32, eps: f32) -> Value {
        let weight = self.weight(Weight { offset: 1.0, ..dense(path, &[width]) });
        self.node(path, ops::RmsNorm { weight, eps }, &[x])
    }

    /// `a + b`.
    pub fn add(&mut self, path: &str, a: Value, b: Value) -> Value {
        self.node(path, ops::Binary::Add, &[a, b])
    }

    /// `a * b`.
    pub fn multiply(&mut self, path: &str, a: Value, b: Value) -> Value {
        self.node(path, ops::Binary::Multiply, &[a, b])
    }

    /// The finished graph with `output` as its logits.
    pub fn finish(self, output: Value) -> Graph {
        Graph { nodes: self.nodes, weights: self.weights, slots: self.slots, output }
    }
}

fn dense(path: &str, shape: &[i32]) -> Weight {
    Weight {
        path: path.to_owned(),
        shape: shape.to_vec(),
        format: Format::Dense,
        bare: false,
        keep_f32: false,
        experts: None,
        lookup: false,
        offset: 0.0,
        exact: false,
    }
}
