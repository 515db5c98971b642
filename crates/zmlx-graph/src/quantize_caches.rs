//! From caches in the model's dtype to caches in few bits.

use std::any::Any;
use std::sync::Arc;

use crate::error::GraphError;
use crate::graph::{Graph, Node, Value};
use crate::ops::{Attention, KvAppend, QuantizedAttention};
use crate::quantized_cache::KvQuantization;
use crate::state::{SlotId, SlotKind};

/// Why a model's keys and values cannot be held in few bits.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum KvQuantizationError {
    /// Bits, group size or start that there is not.
    #[error("quantised keys and values: {name} = {value}: must be {allowed}")]
    Setting {
        /// Which.
        name: &'static str,
        /// What was asked for.
        value: i32,
        /// What there is.
        allowed: &'static str,
    },
    /// A cache that cannot be quantised.
    #[error("{path}: {reason}: this model's caches cannot be quantised, leave --kv-bits out")]
    Cache {
        /// Path of the module.
        path: String,
        /// Why.
        reason: String,
    },
    /// Heads that cannot be cut into groups.
    #[error("{path}: heads of {width} elements cannot be cut into groups of {group_size}: {hint}")]
    Heads {
        /// Path of the module.
        path: String,
        /// Width of a head.
        width: i64,
        /// The group size asked for.
        group_size: i32,
        /// What to do.
        hint: String,
    },
    /// No attention over a cache of all positions.
    #[error("the model keeps no keys and values, so there is nothing to quantise: leave --kv-bits out")]
    None,
    /// The graph is not sound.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

/// The group sizes of MLX.
const GROUPS: [i32; 3] = [32, 64, 128];

impl KvQuantization {
    /// Checks that every value is in its range.
    ///
    /// # Errors
    /// [`KvQuantizationError::Setting`].
    pub fn validate(self) -> Result<(), KvQuantizationError> {
        let fail = |name, value, allowed| Err(KvQuantizationError::Setting { name, value, allowed });
        match self {
            Self { bits, .. } if bits != 4 && bits != 8 => fail("bits", bits, "4 or 8"),
            Self { group_size, .. } if !GROUPS.contains(&group_size) => {
                fail("group size", group_size, "32, 64 or 128")
            }
            Self { start, .. } if start < 0 => fail("start", start, "0 or more"),
            _ => Ok(()),
        }
    }
}

/// The graph with its caches in few bits: each pair of [`KvAppend`] and [`Attention`] becomes a [`QuantizedAttention`]. States
/// of convolutions and delta nets stay as they are.
///
/// # Errors
/// [`KvQuantizationError`], for settings that are none, and for a model of which a cache is read in another way: latents, a
/// sliding window, sinks. mlx-lm refuses these too.
pub fn quantize_caches(graph: &Graph, with: KvQuantization) -> Result<Graph, KvQuantizationError> {
    with.validate()?;
    let types = graph.infer()?;
    let mut slots = graph.slots.clone();
    let mut replaced: Vec<Option<Node>> = vec![None; graph.nodes.len()];
    let mut dropped = vec![false; graph.nodes.len()];
    for (index, slot) in graph.slots.iter().enumerate().filter(|(_, slot)| slot.kind.holds_keys()) {
        let id = SlotId(index);
        let refuse =
            |reason: &str| KvQuantizationError::Cache { path: slot.path.clone(), reason: reason.to_owned() };
        if slot.kind.window().is_some() {
            return Err(refuse("its attention has a sliding window"));
        }
        let (append, attention) = pair(graph, id).map_err(|reason| refuse(&reason))?;
        for t in types.slot(id) {
            let width = t.shape.last().and_then(|d| d.constant()).unwrap_or(0);
            if width == 0 || width % i64::from(with.group_size) != 0 {
                let fits = GROUPS.iter().rfind(|&&g| width > 0 && width % i64::from(g) == 0);
                let hint = fits.map_or_else(
                    || "no group size fits, leave --kv-bits out".to_owned(),
                    |g| format!("--kv-group-size {g} fits"),
                );
                let (path, group_size) = (slot.path.clone(), with.group_size);
                return Err(KvQuantizationError::Heads { path, width, group_size, hint });
            }
        }
        let node = &graph.nodes[attention];
        let Some(Attention { scale }) = downcast(node) else { return Err(refuse("no attention reads it")) };
        let op = QuantizedAttention { slot: id, scale: *scale, quantization: with };
        let inputs = [&node.inputs[..1], &graph.nodes[append].inputs[..]].concat();
        replaced[attention] = Some(Node { op: Arc::new(op), inputs, path: node.path.clone() });
        dropped[append] = true;
        slots[index].kind = SlotKind::QuantizedKvCache(with);
    }
    if !dropped.contains(&true) {
        return Err(KvQuantizationError::None);
    }
    // Numbers of the nodes that stay.
    let places: Vec<usize> =
        (0..dropped.len()).map(|n| dropped[..n].iter().filter(|&&d| !d).count()).collect();
    let moved = |value: &Value| Value { node: places[value.node], ..*value };
    let nodes = graph.nodes.iter().zip(replaced).zip(&dropped).filter(|(_, dropped)| !**dropped);
    let nodes = nodes.map(|((node, new), _)| {
        let node = new.unwrap_or_else(|| node.clone());
        Node { inputs: node.inputs.iter().map(moved).collect(), ..node }
    });
    let quantized =
        Graph { nodes: nodes.collect(), weights: graph.weights.clone(), slots, output: moved(&graph.output) };
    quantized.infer()?;
    Ok(quantized)
}

fn downcast<T: 'static>(node: &Node) -> Option<&T> {
    let op: &dyn Any = &*node.op;
    op.downcast_ref()
}

/// The node that appends to a cache, and the attention that alone reads what it gives.
fn pair(graph: &Graph, slot: SlotId) -> Result<(usize, usize), String> {
    let users: Vec<usize> =
        (0..graph.nodes.len()).filter(|&n| graph.nodes[n].op.slot() == Some(slot)).collect();
    let append = match users.as_slice() {
        &[append] if downcast::<KvAppend>(&graph.nodes[append]).is_some() => append,
        _ => return Err("its cache is not used in the usual way".to_owned()),
    };
    let readers: Vec<usize> =
        (0..graph.nodes.len()).filter(|&n| graph.nodes[n].inputs.iter().any(|v| v.node == append)).collect();
    let outputs = [0, 1].map(|output| Value { node: append, output });
    match readers.as_slice() {
        &[reader] if downcast::<Attention>(&graph.nodes[reader]).is_some() => {
            let inputs = &graph.nodes[reader].inputs;
            if inputs.len() == 3 && inputs[0].node != append && inputs[1..] == outputs {
                return Ok((append, reader));
            }
            Err("its keys and values are read in another order".to_owned())
        }
        readers => {
            let names: Vec<&str> = readers.iter().map(|&n| graph.nodes[n].op.name()).collect();
            Err(format!("its cache is read by {}", names.join(", ")))
        }
    }
}
