//! Shape and dtype inference: the type of every value of a graph, before anything runs.

use std::cell::RefCell;
use std::fmt;

use crate::error::{GraphError, Result};
use crate::graph::{Graph, Value};
use crate::shape::{DtypeSpec, Shape, Type};
use crate::state::{Slot, SlotId, SlotKind};
use crate::weights::{Weight, WeightId};

/// Why an op cannot take its inputs, weights or state.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ShapeError {
    /// Wrong number of inputs.
    #[error("takes {expected} inputs, not {found}")]
    Count {
        /// How many it takes.
        expected: usize,
        /// How many it got.
        found: usize,
    },
    /// An input of the wrong shape or dtype.
    #[error("input {input} is {found}, expected {expected}")]
    Input {
        /// Number of the input, from 0.
        input: usize,
        /// What would be right.
        expected: String,
        /// What it is.
        found: Type,
    },
    /// A weight of the wrong shape.
    #[error("weight {path} is {found}, expected {expected}")]
    Weight {
        /// Path of the weight.
        path: String,
        /// What would be right.
        expected: String,
        /// What it is.
        found: Shape,
    },
    /// A state slot of another kind, or used for two different things.
    #[error("slot {path} holds {found}, expected {expected}")]
    Slot {
        /// Path of the slot.
        path: String,
        /// What would be right.
        expected: String,
        /// What it is.
        found: String,
    },
    /// A parameter of the op that makes no sense for these inputs.
    #[error("{0}")]
    Parameter(String),
    /// A weight or slot that the graph does not declare.
    #[error("it names {0}, which the graph does not declare")]
    Undeclared(String),
}

impl ShapeError {
    /// Input number `input` is not what the op takes.
    pub fn input(input: usize, found: &Type, expected: impl fmt::Display) -> Self {
        Self::Input { input, expected: expected.to_string(), found: found.clone() }
    }

    /// `weight` is not what the op takes.
    pub fn weight(weight: &Weight, expected: impl fmt::Display) -> Self {
        let (path, found) = (weight.path.clone(), Shape::from(weight.shape.as_slice()));
        Self::Weight { path, expected: expected.to_string(), found }
    }
}

/// What an op can see of its graph while types are inferred.
#[derive(Debug)]
pub struct InferContext<'a> {
    weights: &'a [Weight],
    slots: &'a [Slot],
    /// What each slot holds, once an op has said so.
    state: RefCell<Vec<Vec<Type>>>,
}

impl<'a> InferContext<'a> {
    /// A context of these weights and slots.
    pub fn new(weights: &'a [Weight], slots: &'a [Slot]) -> Self {
        Self { weights, slots, state: RefCell::new(vec![Vec::new(); slots.len()]) }
    }

    /// A declared weight.
    pub fn weight(&self, id: WeightId) -> std::result::Result<&'a Weight, ShapeError> {
        self.weights.get(id.0).ok_or_else(|| ShapeError::Undeclared(format!("weight {}", id.0)))
    }

    /// A declared slot.
    pub fn slot(&self, id: SlotId) -> std::result::Result<&'a Slot, ShapeError> {
        self.slots.get(id.0).ok_or_else(|| ShapeError::Undeclared(format!("slot {}", id.0)))
    }

    /// Says what arrays a slot holds after the call. Ops with a slot call it.
    pub fn holds(&self, id: SlotId, arrays: Vec<Type>) -> std::result::Result<(), ShapeError> {
        let slot = self.slot(id)?;
        let mut state = self.state.borrow_mut();
        let known = &mut state[id.0];
        if !known.is_empty() && *known != arrays {
            let (expected, found) = (list(known), list(&arrays));
            return Err(ShapeError::Slot { path: slot.path.clone(), expected, found });
        }
        *known = arrays;
        Ok(())
    }
}

fn list(types: &[Type]) -> String {
    types.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
}

/// Exactly `N` inputs.
pub fn inputs<const N: usize>(inputs: &[Type]) -> std::result::Result<&[Type; N], ShapeError> {
    inputs.try_into().map_err(|_| ShapeError::Count { expected: N, found: inputs.len() })
}

/// The dtype of arithmetic of input number `input` with something of dtype `other`.
pub(crate) fn promoted(
    input: usize,
    found: &Type,
    other: DtypeSpec,
) -> std::result::Result<DtypeSpec, ShapeError> {
    let error = || ShapeError::input(input, found, format_args!("a dtype that goes with {other}"));
    found.dtype.promote(other).ok_or_else(error)
}

/// A slot of another kind than the op needs.
pub(crate) fn wrong_slot(slot: &Slot, expected: impl fmt::Display) -> ShapeError {
    let found = match slot.kind {
        SlotKind::KvCache => "keys and values".to_owned(),
        SlotKind::QuantizedKvCache(q) => format!("keys and values in {} bits", q.bits),
        SlotKind::WindowCache { window } => format!("keys and values of {window} positions"),
        SlotKind::ConvState { keep } => format!("the last {keep} inputs of a convolution"),
        SlotKind::DeltaState => "the state of a delta net".to_owned(),
    };
    ShapeError::Slot { path: slot.path.clone(), expected: expected.to_string(), found }
}

/// The types of all values of a graph and of its state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Types {
    values: Vec<Vec<Type>>,
    slots: Vec<Vec<Type>>,
}

impl Types {
    /// The type of a value.
    pub fn get(&self, value: Value) -> Option<&Type> {
        self.values.get(value.node)?.get(value.output)
    }

    /// The types of all outputs of node number `index`; none if there is no such node.
    pub fn node(&self, index: usize) -> &[Type] {
        self.values.get(index).map_or(&[], Vec::as_slice)
    }

    /// Adds the types of a node that was put behind all others.
    pub(crate) fn push(&mut self, outputs: Vec<Type>) {
        self.values.push(outputs);
    }

    /// What a slot holds after the call: of a key/value cache keys and values `[B, kv_heads, S, head_dim]`, of a
    /// convolution state the inputs `[B, keep, channels]`, of a delta net `[B, heads, value, key]`. Empty if no node uses the slot.
    pub fn slot(&self, id: SlotId) -> &[Type] {
        self.slots.get(id.0).map_or(&[], Vec::as_slice)
    }
}

impl Graph {
    /// The type of every value, with symbolic batch and length (see [`Dim`](crate::shape::Dim)).
    ///
    /// Where the shape hangs on the length of the call, it is that of a short one:
    /// [`ExpertSort`](crate::ops::ExpertSort) gives `[B, L, 1, 1, width]` and leaves the rows in their order, as it does
    /// in decoding. The values that leave the experts have the same shape either way.
    ///
    /// # Errors
    /// [`GraphError::Malformed`] as [`Graph::check`]; [`GraphError::Shape`] for the first node whose op cannot take what
    /// it is given, with what it would take.
    pub fn infer(&self) -> Result<Types> {
        self.check()?;
        let context = InferContext::new(&self.weights, &self.slots);
        let mut types = Types { values: Vec::with_capacity(self.nodes.len()), slots: Vec::new() };
        for (index, node) in self.nodes.iter().enumerate() {
            let inputs: Vec<Type> = node.inputs.iter().filter_map(|&v| types.get(v).cloned()).collect();
            let at = |source| GraphError::Shape {
                value: Value { node: index, output: 0 },
                path: node.path.clone(),
                op: node.op.name(),
                source: Box::new(source),
            };
            let outputs = node.op.infer(&context, &inputs).map_err(at)?;
            if outputs.len() != node.op.outputs() {
                let (found, expected) = (outputs.len(), node.op.outputs());
                let message = format!("inferred {found} outputs of the {expected} it has");
                return Err(at(ShapeError::Parameter(message)));
            }
            types.values.push(outputs);
        }
        types.slots = context.state.into_inner();
        Ok(types)
    }
}
