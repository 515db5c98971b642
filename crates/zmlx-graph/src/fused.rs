//! Ops that stand for several.

use std::sync::Arc;

use zmlx_mlx::{Array, Dtype, Result};

use crate::cost::{NodeCost, Work};
use crate::fidelity::Fidelity;
use crate::graph::{Node, Value};
use crate::infer::{InferContext, ShapeError};
use crate::native::{Lowering, LoweringError};
use crate::op::{Attribute, Context, Op};
use crate::shape::Type;
use crate::state::SlotId;
use crate::weights::WeightId;

/// What a fused op replaces: nodes whose inputs are the op's inputs (numbered first) and one another.
#[derive(Debug, Clone)]
pub struct Reference {
    /// Number of inputs; value `%i` with `i` below it is input `i`, the others are outputs of node `i - inputs`.
    pub inputs: usize,
    /// The nodes, in execution order.
    pub nodes: Vec<Node>,
    /// The types of what each node gives.
    pub types: Vec<Vec<Type>>,
    /// What leaves.
    pub outputs: Vec<Value>,
}

/// How a fused op runs where it is faster than its reference.
pub trait Body: std::fmt::Debug + Send + Sync {
    /// Stages that one token takes.
    fn launches(&self) -> u64 {
        1
    }

    /// The dtype in which output `output` is held if it is a cache and not in the dtype of its type. MLX still gets it in
    /// that one.
    fn held_in(&self, _output: usize) -> Option<Dtype> {
        None
    }

    /// Runs it on MLX for a prompt on a GPU where decode steps run past MLX: as the reference does, unless it has kernels of
    /// its own for many tokens.
    ///
    /// # Errors
    /// Those of MLX.
    fn prompt(
        &self,
        context: &mut Context<'_>,
        reference: &Reference,
        inputs: &[Array],
    ) -> Result<Vec<Array>> {
        reference.run(context, inputs)
    }

    /// Writes the stages that the CPU's engine runs.
    ///
    /// # Errors
    /// [`LoweringError`], if a weight is not what the matcher took it for.
    fn lower(&self, lowering: &mut Lowering<'_>) -> std::result::Result<(), LoweringError>;
}

/// An op that stands for several, and carries them: they say what it means, and run where its body does not.
#[derive(Debug)]
pub struct Fused {
    /// Name of the pattern that made it.
    pub pattern: &'static str,
    /// How close its body is to the reference.
    pub class: Fidelity,
    /// What it stands for.
    pub reference: Reference,
    /// How it runs.
    pub body: Arc<dyn Body>,
}

impl Op for Fused {
    fn name(&self) -> &'static str {
        self.pattern
    }

    fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        vec![
            ("class", Attribute::Text(self.class.to_string())),
            ("ops", Attribute::Int(self.reference.nodes.len() as i64)),
        ]
    }

    fn weights(&self) -> Vec<WeightId> {
        let mut all: Vec<WeightId> = self.reference.nodes.iter().flat_map(|n| n.op.weights()).collect();
        all.sort();
        all.dedup();
        all
    }

    fn slot(&self) -> Option<SlotId> {
        self.reference.nodes.iter().find_map(|n| n.op.slot())
    }

    fn outputs(&self) -> usize {
        self.reference.outputs.len()
    }

    fn fused(&self) -> Option<&Fused> {
        Some(self)
    }

    fn pattern(&self) -> Option<&str> {
        Some(self.pattern)
    }

    /// The reference's weights, state and arithmetic; what passes between its nodes stays where it is made.
    fn work(&self, node: &NodeCost<'_>) -> Work {
        let mut types: Vec<&[Type]> = node.inputs().iter().map(std::slice::from_ref).collect();
        let mut all = Work::default();
        for (inner, made) in self.reference.nodes.iter().zip(&self.reference.types) {
            let inputs: Vec<Type> =
                inner.inputs.iter().filter_map(|v| types.get(v.node)?.get(v.output)).cloned().collect();
            all = all + inner.op.work(&NodeCost::new(node.context(), node.weights(), &inputs, made));
            types.push(made);
        }
        if (0..self.outputs()).any(|output| self.body.held_in(output).is_some_and(|d| d.size() == 2)) {
            // It writes one row of that cache, which its reference counts in float32.
            all.state_written /= 2;
        }
        Work { launches: self.body.launches(), activation_bytes: node.activation_bytes(), ..all }
    }

    fn infer(
        &self,
        context: &InferContext<'_>,
        inputs: &[Type],
    ) -> std::result::Result<Vec<Type>, ShapeError> {
        self.reference.fold(inputs, |node, inputs| node.op.infer(context, inputs))
    }

    fn run(&self, context: &mut Context<'_>, inputs: &[&Array]) -> Result<Vec<Array>> {
        let inputs: Vec<Array> = inputs.iter().map(|a| (*a).clone()).collect();
        if context.unpacks() {
            return self.body.prompt(context, &self.reference, &inputs);
        }
        self.reference.run(context, &inputs)
    }
}

impl Reference {
    /// Runs the nodes on MLX.
    ///
    /// # Errors
    /// Those of MLX.
    pub fn run(&self, context: &mut Context<'_>, inputs: &[Array]) -> Result<Vec<Array>> {
        self.fold(inputs, |node, inputs| {
            let inputs: Vec<&Array> = inputs.iter().collect();
            node.op.run(context, &inputs)
        })
    }

    /// Goes through the nodes with values of any kind.
    pub fn fold<T: Clone, E>(
        &self,
        inputs: &[T],
        mut step: impl FnMut(&Node, &[T]) -> std::result::Result<Vec<T>, E>,
    ) -> std::result::Result<Vec<T>, E> {
        let mut values: Vec<Vec<T>> = inputs.iter().map(|v| vec![v.clone()]).collect();
        for node in &self.nodes {
            let given: Vec<T> = node.inputs.iter().map(|v| values[v.node][v.output].clone()).collect();
            values.push(step(node, &given)?);
        }
        Ok(self.outputs.iter().map(|v| values[v.node][v.output].clone()).collect())
    }
}
