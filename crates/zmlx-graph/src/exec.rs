use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use zmlx_engine::program::{Call, Runner, Wanted};
use zmlx_mlx::{Array, Dtype};

use crate::cost::CostContext;
use crate::cuda::Gpu;
use crate::error::{GraphError, Result};
use crate::graph::{Graph, Value};
use crate::held::Held;
use crate::native::{Cut, Plan, Region, Step, Tensors};
use crate::op::Context;
use crate::state::{SlotId, SlotValue, State};
use crate::weights::{BoundWeight, TensorSpec, WeightId};

/// A graph with its weights.
#[derive(Debug)]
pub struct Executor {
    graph: Arc<Graph>,
    /// The weights of the nodes that run on MLX.
    weights: Vec<Option<BoundWeight>>,
    plan: Plan,
    runner: Option<Mutex<Runner>>,
    /// What runs calls of one token, of one sequence or each of a few, past MLX.
    pub(crate) gpu: Option<Gpu>,
    /// Whether products of many rows on MLX may take another way than the graph's.
    unpacks: bool,
    /// For each node, the values that nobody reads after it.
    last_reads: Vec<Vec<Value>>,
    pub(crate) runs: AtomicU64,
}

/// Hands out tensors as arrays.
pub(crate) type Arrays<'a> = dyn FnMut(&TensorSpec) -> Option<Array> + 'a;

impl Executor {
    /// Binds the weights that `tensor` hands out by name, and runs all nodes on MLX.
    pub fn new(graph: Arc<Graph>, tensor: impl FnMut(&TensorSpec) -> Option<Array>) -> Result<Self> {
        Held::none().stock(graph, tensor)
    }

    /// Runs fused nodes on the CPU's engine with `threads` threads, and the others on MLX. `stored` writes the
    /// bytes of a tensor as the checkpoint has them and says their dtype, `converted` gives it in the dtype that MLX is to
    /// run in.
    pub fn native(
        graph: Arc<Graph>,
        threads: usize,
        stored: impl FnMut(&TensorSpec, &mut Vec<u8>) -> Option<Dtype>,
        converted: impl FnMut(&TensorSpec) -> Option<Array>,
    ) -> Result<Self> {
        Held::none().native(graph, threads, stored, converted)
    }

    /// As [`Self::native`], but each fused node is a program of its own: slower, and the value of each can be seen. For
    /// [`bisect`](crate::bisect::bisect).
    pub fn separate(
        graph: Arc<Graph>,
        threads: usize,
        stored: impl FnMut(&TensorSpec, &mut Vec<u8>) -> Option<Dtype>,
        converted: impl FnMut(&TensorSpec) -> Option<Array>,
    ) -> Result<Self> {
        Held::none().separate(graph, threads, stored, converted)
    }

    pub(crate) fn on_mlx(graph: Arc<Graph>, held: &Held, tensor: &mut Arrays<'_>) -> Result<Self> {
        graph.check()?;
        let steps = (0..graph.nodes.len()).map(Step::Node).collect();
        let plan = Plan { steps, ..Plan::default() };
        Self::with_plan(graph, plan, held, tensor, 1)
    }

    /// As [`Self::on_mlx`]; calls of one token, of one sequence or each of a few, run past MLX on an NVIDIA GPU, if all nodes
    /// are fused and have kernels there. Else it says why not.
    pub(crate) fn on_cuda(
        graph: Arc<Graph>,
        held: &Held,
        tensor: &mut Arrays<'_>,
    ) -> Result<(Self, Option<String>)> {
        let mut executor = Self::on_mlx(graph, held, tensor)?;
        let made = Gpu::new(&executor.graph, &executor.weights, &executor.last_reads, executor.activation());
        match made {
            Ok(gpu) => (executor.gpu, executor.unpacks) = (Some(gpu), true),
            Err(refusal) => return Ok((executor, Some(refusal.to_string()))),
        }
        Ok((executor, None))
    }

    /// As [`Self::on_mlx`], with products of many rows as [`Self::on_cuda`] has them.
    pub(crate) fn on_mlx_unpacking(graph: Arc<Graph>, held: &Held, tensor: &mut Arrays<'_>) -> Result<Self> {
        Ok(Self { unpacks: true, ..Self::on_mlx(graph, held, tensor)? })
    }

    pub(crate) fn on_engine(
        graph: Arc<Graph>,
        threads: usize,
        cut: Cut,
        held: &Held,
        stored: &mut Tensors<'_>,
        converted: &mut Arrays<'_>,
    ) -> Result<Self> {
        graph.check()?;
        let reads = last_reads(&graph);
        let plan = Plan::new(&graph, &reads, held, stored, cut)?;
        Self::with_plan(graph, plan, held, converted, threads)
    }

    fn with_plan(
        graph: Arc<Graph>,
        plan: Plan,
        held: &Held,
        tensor: &mut Arrays<'_>,
        threads: usize,
    ) -> Result<Self> {
        let on_mlx: HashSet<WeightId> = plan
            .steps
            .iter()
            .filter_map(|s| match s {
                Step::Node(index) => Some(graph.nodes[*index].op.weights()),
                Step::Region(_) => None,
            })
            .flatten()
            .collect();
        let held = held.of(&graph);
        let mut weights = Vec::with_capacity(graph.weights.len());
        for (index, weight) in graph.weights.iter().enumerate() {
            if !on_mlx.contains(&WeightId(index)) {
                weights.push(None);
                continue;
            }
            if let Some(bound) = held.and_then(|h| h.bound.get(&WeightId(index))) {
                weights.push(Some(bound.clone()));
                continue;
            }
            let mut arrays = Vec::new();
            for spec in weight.tensors() {
                arrays.push(tensor(&spec).ok_or(GraphError::MissingWeight(spec.name))?);
            }
            let path = || weight.path.clone();
            let bound = BoundWeight::new(weight, arrays);
            let bound = bound.map_err(|source| GraphError::Node { path: path(), op: "weight", source })?;
            weights.push(Some(bound.ok_or_else(|| GraphError::MissingWeight(path()))?));
        }
        let last_reads = last_reads(&graph);
        let stages = plan.stages();
        let runner = (stages > 0).then(|| Mutex::new(Runner::new(threads, stages)));
        Ok(Self {
            graph,
            weights,
            plan,
            runner,
            gpu: None,
            unpacks: false,
            last_reads,
            runs: AtomicU64::new(0),
        })
    }

    /// The graph.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    /// Whether the whole graph runs on the engine, so that a call returns when it is computed.
    pub fn is_native(&self) -> bool {
        matches!(self.plan.steps.as_slice(), [Step::Region(_)])
    }

    /// The weights that MLX runs with, by number; none for those that only the engine reads.
    pub fn weights(&self) -> &[Option<BoundWeight>] {
        &self.weights
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

    /// What runs one after another in a call with one token: kernels of MLX, as [`Graph::cost`] counts them, and stages of
    /// the engine. Of a graph whose shapes do not fit, one kernel a node.
    pub fn launches_per_token(&self) -> u64 {
        if let Some(gpu) = &self.gpu {
            return gpu.launches as u64;
        }
        let context = CostContext::decode(0, self.activation(), Vec::new());
        let kernels = self.graph.cost(&context).map(|c| c.nodes).unwrap_or_default();
        let count = |step: &Step| match step {
            Step::Node(index) => kernels.get(*index).map_or(1, |work| work.launches),
            Step::Region(region) => region.program.decode_stages() as u64,
        };
        self.plan.steps.iter().map(count).sum()
    }

    /// The dtype that the nodes on MLX run in, which is that of their weights; float32 if there are none.
    pub fn activation(&self) -> Dtype {
        let declared = self.graph.weights.iter().zip(&self.weights).filter(|(w, _)| !w.keep_f32);
        declared.filter_map(|(_, bound)| bound.as_ref()?.float()).next().unwrap_or(Dtype::Float32)
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
        self.run_changed(tokens, state, &mut |_, _| Ok(()))
    }

    /// As [`Self::run`], for some positions: `[batch, wanted, vocabulary]`.
    pub fn run_for(&self, tokens: &Array, state: &mut State, wanted: Wanted) -> Result<Option<Array>> {
        self.walk(tokens, state, wanted, &mut |_| Ok(()))
    }

    /// As [`Self::run`], but `change` is shown what each node on MLX gave, by the node's number and before others read it, and
    /// may put other arrays in place of the outputs. It does not see nodes that run on the engine or past MLX.
    pub fn run_changed(
        &self,
        tokens: &Array,
        state: &mut State,
        change: &mut dyn FnMut(usize, &mut Vec<Array>) -> zmlx_mlx::Result<()>,
    ) -> Result<Array> {
        let missing = || GraphError::Malformed("the output has no value".to_owned());
        let logits = self.walk(tokens, state, Wanted::All, &mut |done| match done {
            Done::Node { index, outputs, .. } => change(index, outputs),
            Done::Tokens { .. } | Done::Region { .. } => Ok(()),
        })?;
        logits.ok_or_else(missing)
    }

    /// Its weights, for other executors of the same model to share.
    pub fn held(&self) -> Held {
        let bound = self.weights.iter().enumerate();
        let bound = bound.filter_map(|(index, w)| Some((WeightId(index), w.clone()?))).collect();
        let (matrices, vectors) = (self.plan.matrices.clone(), self.plan.vectors.clone());
        Held { declared: self.graph.weights.clone(), matrices, vectors, bound }
    }

    /// Bytes of each weight as it is held, by number: by the engine if a fused node reads it, else for MLX.
    pub fn weight_bytes(&self) -> Vec<u64> {
        let held = |(index, bound): (usize, &Option<BoundWeight>)| {
            let on_mlx = || bound.as_ref().map_or(0, BoundWeight::bytes);
            self.plan.held(WeightId(index)).unwrap_or_else(on_mlx)
        };
        self.weights.iter().enumerate().map(held).collect()
    }

    /// An error of MLX, in the words of node number `index`.
    pub(crate) fn node_error(&self, index: usize, source: zmlx_mlx::Error) -> GraphError {
        let (path, op) = match self.graph.nodes.get(index) {
            Some(node) => (node.path.clone(), node.op.name()),
            None => ("input".to_owned(), "tokens"),
        };
        GraphError::Node { path, op, source }
    }

    /// Whether the state is one of this executor.
    pub(crate) fn check_state(&self, state: &State) -> Result<()> {
        let same = |(index, slot): (usize, &SlotValue)| match (slot, self.plan.slots.get(&SlotId(index))) {
            (SlotValue::Engine(found), Some(expected)) => found == expected,
            (SlotValue::Engine(_), None) | (_, Some(_)) => false,
            (_, None) => true,
        };
        let fits = state.slots.len() == self.graph.slots.len()
            && state.engine.len() == self.plan.templates.len()
            && state.slots.iter().enumerate().all(same);
        if fits { Ok(()) } else { Err(GraphError::WrongState) }
    }

    /// Whether the state is of so many sequences, as it is from its first call on.
    pub(crate) fn check_batch(&self, batch: i32, state: &mut State) -> Result<()> {
        let expected = *state.batch.get_or_insert(batch);
        if expected == batch { Ok(()) } else { Err(GraphError::WrongBatch { expected, found: batch }) }
    }

    /// Runs the steps; `watch` is told about each.
    pub(crate) fn walk(
        &self,
        tokens: &Array,
        state: &mut State,
        wanted: Wanted,
        watch: &mut dyn FnMut(Done<'_>) -> zmlx_mlx::Result<()>,
    ) -> Result<Option<Array>> {
        self.check_state(state)?;
        let at = |index: usize| move |source| self.node_error(index, source);
        let input = usize::MAX;
        let (batch, length) = (tokens.dim(0).map_err(at(input))?, tokens.dim(1).map_err(at(input))?);
        if batch < 1 || length < 1 {
            return Err(GraphError::Empty { batch, length });
        }
        self.check_batch(batch, state)?;
        if let Some(gpu) = self.gpu.as_ref().filter(|gpu| length == 1 && gpu.decoder.takes(batch as usize)) {
            let ids = tokens.to_vec::<u32>().map_err(at(input))?;
            let logits = watch_device(gpu, &ids, state, watch)?;
            self.runs.fetch_add(1, Ordering::Relaxed);
            return Ok((wanted != Wanted::None).then_some(logits));
        }
        self.settle(state)?;
        let outputs = wanted.rows(length as usize) as i32;
        let mut values: Values = vec![Vec::new(); self.graph.nodes.len()];
        for step in &self.plan.steps {
            let done = match step {
                Step::Node(index) => {
                    let mut made = self.run_node(*index, tokens, state, &values)?;
                    let slot = self.graph.nodes[*index].op.slot().and_then(|s| state.slots.get(s.0));
                    watch(Done::Node { index: *index, outputs: &mut made, slot }).map_err(at(*index))?;
                    values[*index] = made.into_iter().map(Some).collect();
                    std::slice::from_ref(index)
                }
                Step::Region(region) => {
                    let first = region.nodes[0];
                    let ids = tokens.to_vec::<u32>().map_err(at(input))?;
                    let position = state.position as usize;
                    let call = Call { tokens: &ids, batch: batch as usize, position, wanted };
                    let runner = self.runner.as_ref();
                    let runner =
                        runner.ok_or_else(|| GraphError::Malformed("a region without an engine".into()))?;
                    let mut runner = runner.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    let value = |v: Value| values[v.node].get(v.output).cloned().flatten();
                    let made = region.run(&mut runner, &mut state.engine, &call, self.graph.output, value);
                    let mut made = made.map_err(at(first))?;
                    watch(Done::Region { region, runner: &mut runner, outputs: &mut made })
                        .map_err(at(first))?;
                    for (value, array) in made {
                        let slot = &mut values[value.node];
                        slot.resize(slot.len().max(value.output + 1), None);
                        slot[value.output] = Some(array);
                    }
                    region.nodes.as_slice()
                }
            };
            // Handles are dropped as soon as possible, so that MLX can reuse the buffers.
            for value in done.iter().flat_map(|node| &self.last_reads[*node]) {
                if let Some(slot) = values[value.node].get_mut(value.output) {
                    *slot = None;
                }
            }
        }
        state.position += length;
        // Where a GPU decodes, MLX has run what the fused ops stand for, not them.
        self.runs.fetch_add(u64::from(self.gpu.is_none()), Ordering::Relaxed);
        let output = self.graph.output;
        let logits =
            values.get_mut(output.node).and_then(|v| v.get_mut(output.output)).and_then(Option::take);
        let logits = logits.ok_or_else(|| GraphError::Malformed("the output has no value".to_owned()))?;
        if wanted == Wanted::All {
            return Ok(Some(logits));
        }
        let had = logits.dim(1).map_err(at(output.node))?;
        match outputs {
            0 => Ok(None),
            n if n == had => Ok(Some(logits)),
            n => logits.slice_axis(1, had - n, had).map(Some).map_err(at(output.node)),
        }
    }

    /// What an op sees that runs on MLX.
    pub(crate) fn context<'a>(&'a self, tokens: &'a Array, state: &'a mut State) -> Context<'a> {
        Context {
            tokens,
            position: state.position,
            weights: &self.weights,
            slots: &mut state.slots,
            unpacks: self.unpacks,
        }
    }

    /// Runs one node on MLX.
    fn run_node(
        &self,
        index: usize,
        tokens: &Array,
        state: &mut State,
        values: &Values,
    ) -> Result<Vec<Array>> {
        let node = &self.graph.nodes[index];
        let mut context = self.context(tokens, state);
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for input in &node.inputs {
            let value = values.get(input.node).and_then(|v| v.get(input.output)).and_then(Option::as_ref);
            inputs.push(value.ok_or_else(|| GraphError::Malformed(format!("{input} has no value")))?);
        }
        node.op.run(&mut context, &inputs).map_err(|source| self.node_error(index, source))
    }

    /// Has the engine measure its stages, or stop.
    pub fn measure(&self, on: bool) {
        if let Some(runner) = &self.runner {
            let mut runner = runner.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            runner.measure(on, self.plan.stages());
        }
    }
}

impl Executor {
    /// Nanoseconds that all threads together spent in each stage of the engine since measuring began or since the last call
    /// of this, by name; of the first region.
    pub fn stage_times(&self) -> Vec<(&'static str, u64)> {
        let region = self.plan.steps.iter().find_map(|s| match s {
            Step::Region(region) => Some(region),
            Step::Node(_) => None,
        });
        let (Some(region), Some(runner)) = (region, &self.runner) else { return Vec::new() };
        let times = runner.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take_times();
        region.program.stages().iter().map(|s| s.name()).zip(times).collect()
    }
}

/// The values of a call so far.
type Values = Vec<Vec<Option<Array>>>;

/// A step that is done. Outputs may be replaced before they are read.
pub(crate) enum Done<'a> {
    /// A node on MLX: its outputs, and its state slot if it has one.
    Node { index: usize, outputs: &'a mut Vec<Array>, slot: Option<&'a SlotValue> },
    /// One token of each sequence past MLX.
    Tokens { gpu: &'a Gpu, tokens: &'a [u32], state: &'a mut State, logits: &'a mut Option<Array> },
    /// A region on the engine: its values that are read outside.
    Region { region: &'a Region, runner: &'a mut Runner, outputs: &'a mut Vec<(Value, Array)> },
}

/// One token of each sequence on a GPU past MLX. Who watches may run it in another way.
fn watch_device(
    gpu: &Gpu,
    tokens: &[u32],
    state: &mut State,
    watch: &mut dyn FnMut(Done<'_>) -> zmlx_mlx::Result<()>,
) -> Result<Array> {
    let mut logits = None;
    let told = watch(Done::Tokens { gpu, tokens, state, logits: &mut logits });
    told.map_err(|source| GraphError::Cuda(source.to_string()))?;
    match logits {
        Some(logits) => Ok(logits),
        None => gpu.step(tokens, state),
    }
}

pub(crate) fn last_reads(graph: &Graph) -> Vec<Vec<Value>> {
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
