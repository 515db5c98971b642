use std::sync::Arc;

use zmlx_mlx::Array;

use crate::error::{GraphError, Result};
use crate::graph::{Graph, Value};
use crate::op::Context;
use crate::state::State;
use crate::weights::{BoundWeight, TensorSpec};

/// A graph with its weights.
#[derive(Debug)]
pub struct Executor {
    graph: Arc<Graph>,
    weights: Vec<BoundWeight>,
    /// For each node, the values that nobody reads after it.
    last_reads: Vec<Vec<Value>>,
}

impl Executor {
    /// Binds the weights that `tensor` hands out by name.
    pub fn new(graph: Arc<Graph>, mut tensor: impl FnMut(&TensorSpec) -> Option<Array>) -> Result<Self> {
        graph.check()?;
        let mut weights = Vec::with_capacity(graph.weights.len());
        for weight in &graph.weights {
            let mut arrays = Vec::new();
            for spec in weight.tensors() {
                arrays.push(tensor(&spec).ok_or(GraphError::MissingWeight(spec.name))?);
            }
            let bound = BoundWeight::new(weight, arrays);
            weights.push(bound.ok_or_else(|| GraphError::MissingWeight(weight.path.clone()))?);
        }
        let last_reads = last_reads(&graph);
        Ok(Self { graph, weights, last_reads })
    }

    /// The graph.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    /// The logits of `tokens` (`[batch, length]`), which continue what `state` has seen. Nothing is evaluated.
    pub fn run(&self, tokens: &Array, state: &mut State) -> Result<Array> {
        if state.slots.len() != self.graph.slots.len() {
            let (found, expected) = (state.slots.len(), self.graph.slots.len());
            return Err(GraphError::WrongState { found, expected });
        }
        let at = |path: &str, op: &'static str| {
            let path = path.to_owned();
            move |source| GraphError::Node { path, op, source }
        };
        let length = tokens.dim(1).map_err(at("input", "tokens"))?;
        let mut values: Vec<Vec<Option<Array>>> = Vec::with_capacity(self.graph.nodes.len());
        for (node, last) in self.graph.nodes.iter().zip(&self.last_reads) {
            let mut context =
                Context { tokens, position: state.position, weights: &self.weights, slots: &mut state.slots };
            let mut inputs = Vec::with_capacity(node.inputs.len());
            for input in &node.inputs {
                let value = values.get(input.node).and_then(|v| v.get(input.output)).and_then(Option::as_ref);
                inputs.push(value.ok_or_else(|| GraphError::Malformed(format!("{input} has no value")))?);
            }
            let outputs = node.op.run(&mut context, &inputs).map_err(at(&node.path, node.op.name()))?;
            values.push(outputs.into_iter().map(Some).collect());
            // Handles are dropped as soon as possible, so that MLX can reuse the buffers.
            for value in last {
                values[value.node][value.output] = None;
            }
        }
        state.position += length;
        let output = values.get_mut(self.graph.output.node).and_then(|v| v.get_mut(self.graph.output.output));
        output
            .and_then(Option::take)
            .ok_or_else(|| GraphError::Malformed("the output has no value".to_owned()))
    }
}

fn last_reads(graph: &Graph) -> Vec<Vec<Value>> {
    let mut last: Vec<Vec<Value>> = vec![Vec::new(); graph.nodes.len()];
    let mut seen = std::collections::HashSet::from([graph.output]);
    for (index, node) in graph.nodes.iter().enumerate().rev() {
        for input in &node.inputs {
            if seen.insert(*input) {
                last[index].push(*input);
            }
        }
    }
    last
}
