//! The regions of a graph.

use std::collections::HashMap;

use zmlx_engine::matrix::Matrix;
use zmlx_engine::program::{Buffer, Call, Program, Runner, Slot};
use zmlx_mlx::{Array, Dtype, Error, Result};

use super::lower::{Form, Lowering, LoweringError, Place, Tensors, WeightSource};
use crate::graph::{Graph, Value};
use crate::held::Held;
use crate::state::SlotId;
use crate::weights::WeightId;

/// One thing to do in a call.
#[derive(Debug)]
pub(crate) enum Step {
    /// A node, on MLX.
    Node(usize),
    /// A program, on the engine.
    Region(Region),
}

/// Fused nodes that run as one program.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) program: Program,
    /// The nodes.
    pub(crate) nodes: Vec<usize>,
    inputs: Vec<(Value, Buffer, Form)>,
    outputs: Vec<(Value, Place)>,
}

/// Where programs end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// Where a node follows that is not fused.
    Regions,
    /// After each node.
    Nodes,
}

/// A graph cut into steps.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    /// Which slots of the graph are slots of the engine, and their empty forms.
    pub(crate) slots: HashMap<SlotId, usize>,
    pub(crate) templates: Vec<Slot>,
    /// The weights that the engine holds.
    pub(crate) matrices: HashMap<WeightId, Matrix>,
    pub(crate) vectors: HashMap<WeightId, Vec<f32>>,
}

impl Plan {
    /// Cuts the graph and loads the weights of its fused nodes that `held` lacks. `last_reads`: for each node, the values
    /// that nobody reads after it.
    pub(crate) fn new(
        graph: &Graph,
        last_reads: &[Vec<Value>],
        held: &Held,
        tensors: &mut Tensors<'_>,
        cut: Cut,
    ) -> std::result::Result<Self, LoweringError> {
        let mut lowering = Lowering::new(graph, held.of(graph), WeightSource::Stored(tensors));
        let mut steps = Vec::new();
        let mut index = 0;
        while index < graph.nodes.len() {
            if graph.nodes[index].op.fused().is_none() {
                steps.push(Step::Node(index));
                index += 1;
                continue;
            }
            lowering.begin();
            let first = index;
            while index < graph.nodes.len()
                && graph.nodes[index].op.fused().is_some()
                && (index == first || cut == Cut::Regions)
            {
                lowering.node(index, &graph.nodes[index], &last_reads[index])?;
                index += 1;
            }
            let nodes: Vec<usize> = (first..index).collect();
            let leaves = |value: &Value| {
                *value == graph.output || graph.nodes[index..].iter().any(|n| n.inputs.contains(value))
            };
            let mut outputs: Vec<(Value, Place)> = lowering
                .places
                .iter()
                .filter(|(value, _)| nodes.contains(&value.node) && leaves(value))
                .map(|(value, place)| (*value, *place))
                .collect();
            outputs.sort_by_key(|(value, _)| *value);
            steps.push(Step::Region(Region {
                program: std::mem::take(&mut lowering.program),
                nodes,
                inputs: std::mem::take(&mut lowering.inputs),
                outputs,
            }));
        }
        let Lowering { slots, templates, matrices, vectors, .. } = lowering;
        Ok(Self { steps, slots, templates, matrices, vectors })
    }

    /// Bytes of a weight as the engine holds it, if it does.
    pub(crate) fn held(&self, id: WeightId) -> Option<u64> {
        let matrix = self.matrices.get(&id).map(|m| (m.experts() * m.rows() * m.row_bytes()) as u64);
        matrix.or_else(|| self.vectors.get(&id).map(|v| size_of_val(v.as_slice()) as u64))
    }

    /// Most stages of a program.
    pub(crate) fn stages(&self) -> usize {
        let count = |step: &Step| match step {
            Step::Node(_) => 0,
            Step::Region(region) => region.program.stages().len(),
        };
        self.steps.iter().map(count).max().unwrap_or(0)
    }
}

impl Region {
    /// Runs the program; gives the values that are read outside. Of the graph's output only the rows that the call wants.
    pub(crate) fn run(
        &self,
        runner: &mut Runner,
        slots: &mut [Slot],
        call: &Call<'_>,
        output: Value,
        value: impl Fn(Value) -> Option<Array>,
    ) -> Result<Vec<(Value, Array)>> {
        let length = call.tokens.len() / call.batch;
        for (input, buffer, form) in &self.inputs {
            let array = value(*input).ok_or_else(|| Error::Argument(format!("{input} has no value")))?;
            let floats = import(&array, *form)?;
            runner.fill(&self.program, *buffer, call.tokens.len(), &floats);
        }
        runner.run(&self.program, slots, call);
        let mut out = Vec::new();
        for (value, place) in &self.outputs {
            let array = match place {
                Place::Buffer(buffer, form) => {
                    let floats = &runner.buffer(*buffer)[..call.tokens.len() * form.width()];
                    let wanted = if *value == output { call.wanted.rows(length) } else { length };
                    export(floats, *form, call.batch, length, wanted)?
                }
                Place::Cache { slot, values } => export_cache(&mut slots[*slot], *values, call, length)?,
            };
            out.push((*value, array));
        }
        Ok(out)
    }
}

/// An array as the engine has it.
fn import(array: &Array, form: Form) -> Result<Vec<f32>> {
    let array = match form {
        Form::Heads { .. } => array.transpose(&[0, 2, 1, 3])?,
        _ => array.clone(),
    };
    array.astype(Dtype::Float32)?.to_vec::<f32>()
}

/// A buffer as MLX has it, the last `wanted` tokens of each sequence.
fn export(floats: &[f32], form: Form, batch: usize, length: usize, wanted: usize) -> Result<Array> {
    let width = form.width();
    let rows: Vec<f32> = if wanted == length {
        floats.to_vec()
    } else {
        let part = |b: usize| &floats[((b + 1) * length - wanted) * width..(b + 1) * length * width];
        (0..batch).flat_map(part).copied().collect()
    };
    let (b, l) = (batch as i32, wanted as i32);
    match form {
        Form::Flat { width } => Array::from_vec(rows, &[b, l, width as i32]),
        Form::Heads { heads, width } => {
            Array::from_vec(rows, &[b, l, heads as i32, width as i32])?.transpose(&[0, 2, 1, 3])
        }
        Form::Indices { width } => {
            let indices: Vec<u32> = rows.into_iter().map(|v| v as u32).collect();
            Array::from_vec(indices, &[b, l, width as i32])
        }
    }
}

/// Keys or values of all positions, `[B, heads, S, width]`; with a window, of those that a call of that length sees.
fn export_cache(slot: &mut Slot, values: bool, call: &Call<'_>, length: usize) -> Result<Array> {
    let Slot::Kv { keys, values: v, heads, key_width, value_width, capacity, window, dropped } = slot else {
        return Err(Error::Argument("a slot without keys and values".to_owned()));
    };
    let (store, width) = if values { (v, *value_width) } else { (keys, *key_width) };
    let first = window.map_or(0, |w| (call.position + 1).saturating_sub(w));
    let seen = call.position + length - first;
    let part = |p: usize| {
        let at = p * *capacity + first - *dropped;
        store.to_f32(at * width..(at + seen) * width)
    };
    let rows: Vec<f32> = (0..call.batch * *heads).flat_map(part).collect();
    Array::from_vec(rows, &[call.batch as i32, *heads as i32, seen as i32, width as i32])
}
