//! What a graph moves and computes in one call, counted before anything runs.

use std::collections::{HashMap, HashSet};
use std::iter::Sum;
use std::ops::Add;

use serde::Serialize;
use zmlx_mlx::Dtype;

use crate::error::Result;
use crate::graph::{Graph, Value};
use crate::infer::Types;
use crate::print::pooled_path;
use crate::shape::{DtypeSpec, Sizes, Type};
use crate::weights::{Weight, WeightId};

/// What a node, or many, moves and computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Work {
    /// Kernels that are started. In stock MLX an op that computes is one, a `fast` op too, and a view none.
    pub launches: u64,
    /// Floating-point operations: exact for products and attention, an estimate for the small rest.
    pub flops: u64,
    /// Bytes of weights that are read.
    pub weight_bytes: u64,
    /// Bytes of state (caches) that are read.
    pub state_read: u64,
    /// Bytes of state that are written.
    pub state_written: u64,
    /// Bytes of activations that are read and written. In decoding they stay in a processor's caches.
    pub activation_bytes: u64,
}

impl Work {
    /// Bytes that must come from memory or go there: weights and state.
    pub fn memory_bytes(&self) -> u64 {
        self.weight_bytes.saturating_add(self.state_read).saturating_add(self.state_written)
    }
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            launches: self.launches.saturating_add(other.launches),
            flops: self.flops.saturating_add(other.flops),
            weight_bytes: self.weight_bytes.saturating_add(other.weight_bytes),
            state_read: self.state_read.saturating_add(other.state_read),
            state_written: self.state_written.saturating_add(other.state_written),
            activation_bytes: self.activation_bytes.saturating_add(other.activation_bytes),
        }
    }
}

impl Sum for Work {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

/// The call whose cost is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CostContext {
    /// Batch, length and positions before the call.
    pub sizes: Sizes,
    /// The dtype that the model runs in.
    pub activation: Dtype,
    /// Bytes of each weight, by number: as stored in a checkpoint, or as held in memory (see [`Graph::weight_bytes`]).
    pub weight_bytes: Vec<u64>,
}

impl CostContext {
    /// One token of one sequence after `position` others, with weights of these sizes.
    pub fn decode(position: u32, activation: Dtype, weight_bytes: Vec<u64>) -> Self {
        Self { sizes: Sizes::decode(position.into()), activation, weight_bytes }
    }
}

/// What an op can see of its node when it counts its work.
#[derive(Debug, Clone, Copy)]
pub struct NodeCost<'a> {
    context: &'a CostContext,
    weights: &'a [Weight],
    inputs: &'a [Type],
    outputs: &'a [Type],
}

impl<'a> NodeCost<'a> {
    /// A node whose inputs and outputs have these types, of a graph with these weights.
    pub fn new(
        context: &'a CostContext,
        weights: &'a [Weight],
        inputs: &'a [Type],
        outputs: &'a [Type],
    ) -> Self {
        Self { context, weights, inputs, outputs }
    }

    /// The call.
    pub fn context(&self) -> &'a CostContext {
        self.context
    }

    /// The declared weights of the graph.
    pub fn weights(&self) -> &'a [Weight] {
        self.weights
    }

    /// The types of the inputs.
    pub fn inputs(&self) -> &'a [Type] {
        self.inputs
    }

    /// The types of the outputs.
    pub fn outputs(&self) -> &'a [Type] {
        self.outputs
    }

    /// Bytes of a value in this call.
    pub fn bytes(&self, t: &Type) -> u64 {
        t.bytes(self.context.sizes, self.context.activation)
    }

    /// Elements of a value in this call.
    pub fn elements(&self, t: &Type) -> u64 {
        u64::try_from(t.shape.elements().at(self.context.sizes)).unwrap_or(0)
    }

    /// Dimension `axis` of a value in this call; 1 if it has fewer.
    pub fn dim(&self, t: &Type, axis: usize) -> u64 {
        t.shape.0.get(axis).and_then(|d| u64::try_from(d.at(self.context.sizes)).ok()).unwrap_or(1)
    }

    /// Bytes of inputs and outputs.
    pub fn activation_bytes(&self) -> u64 {
        self.inputs.iter().chain(self.outputs).map(|t| self.bytes(t)).fold(0, u64::saturating_add)
    }

    /// Bytes of a whole weight.
    pub fn weight(&self, id: WeightId) -> u64 {
        self.context.weight_bytes.get(id.0).copied().unwrap_or(0)
    }

    /// Bytes of `count` parts of a weight, of those along its first axis: rows of a table, experts. At most all of them.
    pub fn parts(&self, id: WeightId, count: u64) -> u64 {
        let all = self.weights.get(id.0).and_then(|w| w.shape.first()).map_or(1, |&n| n.max(1) as u64);
        (u128::from(self.weight(id)) * u128::from(count.min(all)) / u128::from(all)) as u64
    }

    /// Bytes of `count` looked up rows. None if another node reads the whole matrix anyway (a tied head), so that no
    /// byte counts twice.
    pub fn rows(&self, id: WeightId, count: u64) -> u64 {
        if self.weights.get(id.0).is_some_and(|w| w.lookup) { self.parts(id, count) } else { 0 }
    }

    /// `launches` kernels that read all inputs and these weights, write all outputs, and take `per_element` operations
    /// for each element of the outputs.
    pub fn plain(&self, weights: &[WeightId], launches: u64, per_element: u64) -> Work {
        let elements = self.outputs.iter().map(|t| self.elements(t)).fold(0, u64::saturating_add);
        Work {
            launches,
            flops: elements.saturating_mul(per_element),
            weight_bytes: weights.iter().map(|&w| self.weight(w)).fold(0, u64::saturating_add),
            activation_bytes: self.activation_bytes(),
            ..Work::default()
        }
    }
}

/// The cost of nodes that have something in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CostRow {
    /// Name of the op, or path of the module with `*` for the number of the layer.
    pub name: String,
    /// How many nodes.
    pub nodes: usize,
    /// What they do together.
    pub work: Work,
}

/// The cost of one call of a graph.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// All nodes together.
    pub total: Work,
    /// By op, the most bytes first.
    pub by_op: Vec<CostRow>,
    /// By module, all layers together, the most bytes first.
    pub by_module: Vec<CostRow>,
    /// Node by node.
    #[serde(skip)]
    pub nodes: Vec<Work>,
}

impl Cost {
    /// The least time of the call where memory moves `bandwidth` bytes a second: weights and state once, nothing else.
    pub fn roofline_seconds(&self, bandwidth: f64) -> f64 {
        self.total.memory_bytes() as f64 / bandwidth
    }
}

impl Graph {
    /// Bytes of each weight where floats are held in `activation`, as an executor holds them that was given such. (On
    /// the CPU stock MLX runs in float32, so the scales of a quantised matrix take twice what a file has for them.)
    pub fn weight_bytes(&self, activation: Dtype) -> Vec<u64> {
        let of = |w: &Weight| w.tensors().iter().map(|t| t.bytes(w.dtype().resolve(activation))).sum();
        self.weights.iter().map(of).collect()
    }

    /// Bytes of each weight as an executor of [fused](crate::fused) nodes holds it, where its files have `stored` bytes of
    /// each: the engine keeps matrices as they are stored and the rest in float32, and what only nodes on MLX read is
    /// held in float32.
    pub fn engine_weight_bytes(&self, stored: &[u64]) -> Vec<u64> {
        let fused = self.nodes.iter().filter(|n| n.op.fused().is_some());
        let on_engine: HashSet<WeightId> = fused.flat_map(|n| n.op.weights()).collect();
        let mut bytes = self.weight_bytes(Dtype::Float32);
        for (index, weight) in self.weights.iter().enumerate() {
            // A convolution's kernel `[channels, taps, 1]` is a vector to the engine.
            let matrix = weight.shape.len() > 1 && weight.shape.last() != Some(&1);
            if matrix && on_engine.contains(&WeightId(index)) {
                bytes[index] = stored.get(index).copied().unwrap_or(0);
            }
        }
        bytes
    }

    /// What a call costs. Growing of caches, every 256 positions, is left out. Of experts, as many are counted as rows
    /// are sent to them, and all at most: tokens that share experts make it less.
    ///
    /// # Errors
    /// As [`Graph::infer`].
    pub fn cost(&self, context: &CostContext) -> Result<Cost> {
        let types = self.infer()?;
        let nodes: Vec<Work> =
            (0..self.nodes.len()).map(|index| self.node_work(context, &types, index)).collect();
        let rows = |name_of: &dyn Fn(usize) -> String| {
            let named = nodes.iter().enumerate().map(|(index, work)| (name_of(index), *work));
            let mut rows = pool(named, |a: Work, b| a + b)
                .into_iter()
                .map(|(name, nodes, work)| CostRow { name, nodes, work })
                .collect::<Vec<_>>();
            rows.sort_by_key(|r| std::cmp::Reverse((r.work.memory_bytes(), r.work.flops)));
            rows
        };
        Ok(Cost {
            total: nodes.iter().copied().sum(),
            by_op: rows(&|index| self.nodes[index].op.name().to_owned()),
            by_module: rows(&|index| pooled_path(&self.nodes[index].path)),
            nodes,
        })
    }

    fn node_work(&self, context: &CostContext, types: &Types, index: usize) -> Work {
        let node = &self.nodes[index];
        let held = |v: &Value| {
            let mut found = types.get(*v)?.clone();
            // What is read of a cache is what the engine holds.
            let fused = self.nodes.get(v.node).and_then(|n| n.op.fused());
            if let Some(dtype) = fused.and_then(|f| f.body.held_in(v.output)) {
                found.dtype = DtypeSpec::Fixed(dtype);
            }
            Some(found)
        };
        let inputs: Vec<Type> = node.inputs.iter().filter_map(held).collect();
        node.op.work(&NodeCost::new(context, &self.weights, &inputs, types.node(index)))
    }
}

/// Joins what has the same name: name, how many, and all of it, in order of first appearance.
pub(crate) fn pool<T: Copy>(
    named: impl Iterator<Item = (String, T)>,
    join: impl Fn(T, T) -> T,
) -> Vec<(String, usize, T)> {
    let mut rows: Vec<(String, usize, T)> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    for (name, one) in named {
        match places.get(&name) {
            Some(&place) => {
                let (_, count, all) = &mut rows[place];
                (*count, *all) = (*count + 1, join(*all, one));
            }
            None => {
                places.insert(name.clone(), rows.len());
                rows.push((name, 1, one));
            }
        }
    }
    rows
}
