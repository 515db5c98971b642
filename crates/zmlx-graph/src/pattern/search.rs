//! Finding templates in graphs.

use std::collections::{HashMap, HashSet};

use super::template::Template;
use crate::graph::{Graph, Node, Value};

/// Where a template was found.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    /// The graph's node for each node of the template.
    pub(crate) nodes: Vec<usize>,
    /// The value of each name.
    pub(crate) values: HashMap<String, Value>,
}

/// A graph with its nodes' readers.
pub(crate) struct Searched<'a> {
    nodes: &'a [Option<Node>],
    readers: HashMap<Value, Vec<usize>>,
    output: Value,
}

impl<'a> Searched<'a> {
    pub(crate) fn new(nodes: &'a [Option<Node>], output: Value) -> Self {
        let mut readers: HashMap<Value, Vec<usize>> = HashMap::new();
        for (index, node) in nodes.iter().enumerate() {
            for input in node.iter().flat_map(|n| &n.inputs) {
                readers.entry(*input).or_default().push(index);
            }
        }
        Self { nodes, readers, output }
    }

    pub(crate) fn node(&self, index: usize) -> Option<&'a Node> {
        self.nodes.get(index)?.as_ref()
    }

    /// The template with its last node at node `anchor`.
    pub(crate) fn find(&self, template: &Template, anchor: usize) -> Option<Found> {
        let last = template.nodes.len().checked_sub(1)?;
        let node = self.node(anchor)?;
        if !template.nodes[last].ops.iter().any(|op| is(node, op)) {
            return None;
        }
        let start = Partial { nodes: vec![None; template.nodes.len()], values: HashMap::new() };
        start.bind(self, template, last, anchor).into_iter().find_map(|p| p.solve(self, template))
    }

    /// Whether a value is read by nodes outside of `inside`, or is the graph's output.
    fn leaves(&self, value: Value, inside: &HashSet<usize>) -> bool {
        value == self.output
            || self.readers.get(&value).is_some_and(|r| r.iter().any(|n| !inside.contains(n)))
    }
}

/// Whether a node is the op of that name; with `@` before it, the fused op of that pattern. (A fused op may be named as an
/// op that it stands for: it is not that op.)
fn is(node: &Node, name: &str) -> bool {
    match (name.strip_prefix('@'), node.op.fused()) {
        (Some(pattern), Some(fused)) => fused.pattern == pattern,
        (None, None) => node.op.name() == name,
        _ => false,
    }
}

/// Some nodes of a template found.
#[derive(Clone)]
struct Partial {
    nodes: Vec<Option<usize>>,
    values: HashMap<String, Value>,
}

impl Partial {
    /// Template node `step` at graph node `index`, in every way that fits: sums and products either way round.
    fn bind(&self, graph: &Searched<'_>, template: &Template, step: usize, index: usize) -> Vec<Self> {
        let wanted = &template.nodes[step];
        let Some(node) = graph.node(index) else { return Vec::new() };
        let fits = wanted.ops.iter().any(|op| is(node, op))
            && node.inputs.len() == wanted.inputs.len()
            && node.op.outputs() >= wanted.outputs.len()
            && !self.nodes.contains(&Some(index));
        if !fits {
            return Vec::new();
        }
        let mut orders = vec![node.inputs.clone()];
        if matches!(node.op.name(), "add" | "multiply") {
            orders.push(node.inputs.iter().rev().copied().collect());
        }
        let outputs = (0..wanted.outputs.len()).map(|output| Value { node: index, output });
        let outputs: Vec<(&String, Value)> = wanted.outputs.iter().zip(outputs).collect();
        let with = |inputs: Vec<Value>| {
            let mut next = self.clone();
            next.nodes[step] = Some(index);
            let all = wanted.inputs.iter().zip(inputs).chain(outputs.iter().copied());
            for (name, value) in all {
                if *next.values.entry(name.clone()).or_insert(value) != value {
                    return None;
                }
            }
            Some(next)
        };
        orders.into_iter().filter_map(with).collect()
    }

    /// The rest of the template, if it is there.
    fn solve(self, graph: &Searched<'_>, template: &Template) -> Option<Found> {
        let open = |i: &usize| self.nodes[*i].is_none();
        let all = 0..template.nodes.len();
        // A node whose output is known has one place; one whose input is known has as many as that has readers.
        let produced = all.clone().filter(open).find_map(|i| {
            let value = template.nodes[i].outputs.iter().find_map(|name| self.values.get(name))?;
            Some((i, vec![value.node]))
        });
        let read = || {
            all.clone().filter(open).find_map(|i| {
                let value = template.nodes[i].inputs.iter().find_map(|name| self.values.get(name))?;
                Some((i, graph.readers.get(value).cloned().unwrap_or_default()))
            })
        };
        let Some((step, places)) = produced.or_else(read) else {
            let nodes: Vec<usize> = self.nodes.iter().flatten().copied().collect();
            let complete = nodes.len() == template.nodes.len();
            let found = Found { nodes, values: self.values };
            return (complete && found.is_closed(graph, template)).then_some(found);
        };
        places
            .into_iter()
            .flat_map(|place| self.bind(graph, template, step, place))
            .find_map(|next| next.solve(graph, template))
    }
}

impl Found {
    /// Whether nothing but the template's outputs (and what may be shared) is read from outside.
    fn is_closed(&self, graph: &Searched<'_>, template: &Template) -> bool {
        let all = template.nodes.iter().zip(&self.nodes);
        let inside: HashSet<usize> = all.filter(|(step, _)| !step.witness).map(|(_, &index)| index).collect();
        // An input that the match itself makes, and that goes away with it, would be read from nowhere.
        let kept = |node: usize| {
            template
                .nodes
                .iter()
                .zip(&self.nodes)
                .all(|(step, &index)| index != node || step.shared || step.witness)
        };
        if !template.inputs().iter().filter_map(|n| self.values.get(*n)).all(|v| kept(v.node)) {
            return false;
        }
        let outputs: HashSet<Value> =
            template.outputs.iter().filter_map(|n| self.values.get(n)).copied().collect();
        template.nodes.iter().zip(&self.nodes).all(|(step, &index)| {
            let count = graph.node(index).map_or(0, |n| n.op.outputs());
            step.shared
                || step.witness
                || (0..count).all(|output| {
                    let value = Value { node: index, output };
                    outputs.contains(&value) || !graph.leaves(value, &inside)
                })
        })
    }
}

/// The nodes of a graph, to be searched and taken out.
pub(crate) fn nodes_of(graph: &Graph) -> Vec<Option<Node>> {
    graph.nodes.iter().cloned().map(Some).collect()
}
