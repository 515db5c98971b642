use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use zmlx_engine::program::{Call, Runner};
use zmlx_mlx::Array;

use crate::error::{GraphError, Result};
use crate::graph::{Graph, Value};
use crate::native::{Plan, Step, Tensors};
use crate::op::Context;
use crate::state::{SlotValue, State};
use crate::weights::{BoundWeight, TensorSpec};

/// A graph with its weights.
#[derive(Debug)]
pub struct Executor {
    graph: Arc<Graph>,
    /// The weights of the nodes that run on MLX.
    weights: Vec<Option<BoundWeight>>,
    plan: Plan,
    runner: Option<Mutex<Runner>>,
    /// For each node, the values that nobody reads after it.
    last_reads: Vec<Vec<Value>>,
    runs: AtomicU64,
}

/// Of which positions of a call the logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// All.
    All,
    /// The last.
    Last,
    /// None: only the state is to move on.
    None,
}

impl Executor {
    /// Binds the weights that `tensor` hands out by name, and runs all nodes on MLX.
    pub fn new(graph: Arc<Graph>, mut tensor: impl FnMut(&TensorSpec) -> Option<Array>) -> Result<Self> {
        graph.check()?;
        let steps = (0..graph.nodes.len()).map(Step::Node).collect();
        let plan = Plan { steps, slots: Default::default(), templates: Vec::new() };
        Self::with_plan(graph, plan, &mut tensor, 1)
    }

    /// Runs fused nodes on the CPU's engine with `threads` threads, and the others on MLX. `stored` hands out tensors as
    /// the checkpoint has them, `converted` in the dtype that MLX is to run in.
    pub fn native(
        graph: Arc<Graph>,
        threads: usize,
        mut stored: impl FnMut(&TensorSpec) -> Option<Array>,
        mut converted: impl FnMut(&TensorSpec) -> Option<Array>,
    ) -> Result<Self> {
        graph.check()?;
        let reads = last_reads(&graph);
        let stored: &mut Tensors<'_> = &mut stored;
        let plan = Plan::new(&graph, &reads, stored)?;
        Self::with_plan(graph, plan, &mut converted, threads)
    }

    fn with_plan(graph: Arc<Graph>, plan: Plan, tensor: &mut Tensors<'_>, threads: usize) -> Result<Self> {
        let on_mlx: HashSet<usize> = plan
            .steps
            .iter()
            .filter_map(|s| match s {
                Step::Node(index) => Some(graph.nodes[*index].op.weights()),
                Step::Region(_) => None,
            })
            .flatten()
            .map(|id| id.0)
            .collect();
        let mut weights = Vec::with_capacity(graph.weights.len());
        for (index, weight) in graph.weights.iter().enumerate() {
            if !on_mlx.contains(&index) {
                weights.push(None);
                continue;
            }
            let mut arrays = Vec::new();
            for spec in weight.tensors() {
                arrays.push(tensor(&spec).ok_or(GraphError::MissingWeight(spec.name))?);
            }
            let bound = BoundWeight::new(weight, arrays);
            weights.push(Some(bound.ok_or_else(|| GraphError::MissingWeight(weight.path.clone()))?));
        }
        let last_reads = last_reads(&graph);
        let stages = plan.stages();
        let runner = (stages > 0).then(|| Mutex::new(Runner::new(threads, stages)));
        Ok(Self { graph, weights, plan, runner, last_reads, runs: AtomicU64::new(0) })
    }

    /// The graph.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    /// Whether the whole graph runs on the engine, so that a call returns when it is computed.
    pub fn is_native(&self) -> bool {
        matches!(self.plan.steps.as_slice(), [Step::Region(_)])
    }

    /// Threads of the engine; 0 if it is not used.
    pub fn threads(&self) -> usize {
        self.runner
            .as_ref()
            .map_or(0, |r| r.lock().unwrap_or_else(std::sync::PoisonError::into_inner).threads())
    }

    /// How many calls ran.
    pub fn runs(&self) -> u64 {
        self.runs.load(Ordering::Relaxed)
    }

    /// What runs one after another in a call with one token: kernels of MLX (one a node that is not a mere view) and stages
    /// of the engine.
    pub fn launches_per_token(&self) -> u64 {
        let count = |step: &Step| match step {
            Step::Node(_) => 1,
            Step::Region(region) => region.program.decode_stages() as u64,
        };
        self.plan.steps.iter().map(count).sum()
    }

    /// An empty state.
    pub fn new_state(&self) -> State {
        let mut state = self.graph.new_state();
        for (id, slot) in &self.plan.slots {
            state.slots[id.0] = SlotValue::Engine(*slot);
        }
        state.engine.clone_from(&self.plan.templates);
        state
    }

    /// The logits of `tokens` (`[batch, length]`), which continue what `state` has seen. On MLX nothing is evaluated.
    pub fn run(&self, tokens: &Array, state: &mut State) -> Result<Array> {
        let missing = || GraphError::Malformed("the output has no value".to_owned());
        self.run_for(tokens, state, Wanted::All)?.ok_or_else(missing)
    }

    /// As [`Self::run`], for some positions: `[batch, wanted, vocabulary]`.
    pub fn run_for(&self, tokens: &Array, state: &mut State, wanted: Wanted) -> Result<Option<Array>> {
        let engine_slots = |s: &State| s.slots.iter().filter(|s| matches!(s, SlotValue::Engine(_))).count();
        if state.slots.len() != self.graph.slots.len()
            || state.engine.len() != self.plan.templates.len()
            || engine_slots(state) != self.plan.slots.len()
        {
            let (found, expected) = (state.slots.len(), self.graph.slots.len());
            return Err(GraphError::WrongState { found, expected });
        }
        let at = |path: &str, op: &'static str| {
            let path = path.to_owned();
            move |source| GraphError::Node { path, op, source }
        };
        let tokens_error = || at("input", "tokens");
        let batch = tokens.dim(0).map_err(tokens_error())?;
        let length = tokens.dim(1).map_err(tokens_error())?;
        let outputs = match wanted {
            Wanted::All => length,
            Wanted::Last => 1,
            Wanted::None => 0,
        };
        let position = state.position;
        let mut values: Vec<Vec<Option<Array>>> = vec![Vec::new(); self.graph.nodes.len()];
        for step in &self.plan.steps {
            let last = match step {
                Step::Node(index) => {
                    let node = &self.graph.nodes[*index];
                    let mut context =
                        Context { tokens, position, weights: &self.weights, slots: &mut state.slots };
                    let mut inputs = Vec::with_capacity(node.inputs.len());
                    for input in &node.inputs {
                        let value =
                            values.get(input.node).and_then(|v| v.get(input.output)).and_then(Option::as_ref);
                        let none = || GraphError::Malformed(format!("{input} has no value"));
                        inputs.push(value.ok_or_else(none)?);
                    }
                    let outputs =
                        node.op.run(&mut context, &inputs).map_err(at(&node.path, node.op.name()))?;
                    values[*index] = outputs.into_iter().map(Some).collect();
                    std::slice::from_ref(index)
                }
                Step::Region(region) => {
                    let ids = tokens.to_vec::<u32>().map_err(tokens_error())?;
                    let call = Call {
                        tokens: &ids,
                        batch: batch as usize,
                        position: position as usize,
                        outputs: outputs as usize,
                    };
                    let mut runner = match &self.runner {
                        Some(runner) => runner.lock().unwrap_or_else(std::sync::PoisonError::into_inner),
                        None => return Err(GraphError::Malformed("a region without an engine".to_owned())),
                    };
                    let value = |v: Value| values[v.node].get(v.output).cloned().flatten();
                    let first = &self.graph.nodes[region.nodes[0]];
                    let out = region
                        .run(&mut runner, &mut state.engine, &call, self.graph.output, value)
                        .map_err(at(&first.path, first.op.name()))?;
                    for (value, array) in out {
                        let slot = &mut values[value.node];
                        slot.resize(slot.len().max(value.output + 1), None);
                        slot[value.output] = Some(array);
                    }
                    region.nodes.as_slice()
                }
            };
            // Handles are dropped as soon as possible, so that MLX can reuse the buffers.
            for value in last.iter().flat_map(|node| &self.last_reads[*node]) {
                if let Some(slot) = values[value.node].get_mut(value.output) {
                    *slot = None;
                }
            }
        }
        state.position += length;
        self.runs.fetch_add(1, Ordering::Relaxed);
        let output = self.graph.output;
        let logits =
            values.get_mut(output.node).and_then(|v| v.get_mut(output.output)).and_then(Option::take);
        let logits = logits.ok_or_else(|| GraphError::Malformed("the output has no value".to_owned()))?;
        let had = logits.dim(1).map_err(at("output", "logits"))?;
        match outputs {
            0 => Ok(None),
            n if n == had => Ok(Some(logits)),
            n => logits.slice_axis(1, had - n, had).map(Some).map_err(at("output", "slice")),
        }
    }
}

fn last_reads(graph: &Graph) -> Vec<Vec<Value>> {
    let mut last: Vec<Vec<Value>> = vec![Vec::new(); graph.nodes.len()];
    let mut seen = HashSet::from([graph.output]);
    for (index, node) in graph.nodes.iter().enumerate().rev() {
        for input in &node.inputs {
            if seen.insert(*input) {
                last[index].push(*input);
            }
        }
    }
    last
}
