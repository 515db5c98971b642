//! Applying patterns to a graph.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::search::{Found, Searched, nodes_of};
use super::template::{self, Template};
use super::{Match, Pattern};
use crate::error::Result;
use crate::fidelity::Fidelity;
use crate::fused::{Fused, Reference};
use crate::graph::{Graph, Node, Value};
use crate::infer::Types;

/// Where the rewritten graph is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// The CPU's engine, in float32.
    Cpu,
    /// Kernels on an NVIDIA GPU for one token at a time; MLX runs the rest in its own dtype.
    Cuda,
    /// Anything for which no fused bodies exist yet.
    Other(&'static str),
}

/// Which patterns are wanted.
#[derive(Debug, Clone)]
pub struct Choice {
    /// Those to try, in this order.
    pub patterns: Vec<&'static Pattern>,
    /// The loosest class that is allowed.
    pub max_class: Fidelity,
    /// Where the graph runs.
    pub backend: Backend,
}

/// What became of a pattern.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PatternReport {
    /// Its name.
    pub name: String,
    /// Its class.
    pub class: Fidelity,
    /// How many places it replaced.
    pub matched: usize,
    /// Why it did not replace others, each reason once.
    pub refused: Vec<String>,
    /// How many times its op has run.
    pub executed: u64,
}

/// A rewritten graph.
#[derive(Debug, Clone)]
pub struct Rewritten {
    /// The graph.
    pub graph: Graph,
    /// What became of each pattern.
    pub patterns: Vec<PatternReport>,
}

/// Replaces what the patterns match. The graph given stays as it is.
///
/// # Errors
/// [`crate::GraphError`] if the result is not a sound graph, which would be a fault of a pattern.
pub fn rewrite(graph: &Graph, choice: &Choice) -> Result<Rewritten> {
    let types = graph.infer()?;
    let mut work = Work { graph, types, nodes: nodes_of(graph), output: graph.output };
    let patterns = choice.patterns.iter().map(|p| work.apply(p, choice)).collect();
    let graph = work.finish()?;
    Ok(Rewritten { graph, patterns })
}

struct Work<'a> {
    graph: &'a Graph,
    types: Types,
    nodes: Vec<Option<Node>>,
    output: Value,
}

impl Work<'_> {
    fn apply(&mut self, pattern: &'static Pattern, choice: &Choice) -> PatternReport {
        let (name, class) = (pattern.name.to_owned(), pattern.class);
        let mut report = PatternReport { name, class, matched: 0, refused: Vec::new(), executed: 0 };
        if pattern.class > choice.max_class {
            report.refused.push(format!("{} is looser than {}", pattern.class, choice.max_class));
            return report;
        }
        if let Backend::Other(name) = choice.backend {
            report.refused.push(format!("it has no body for {name}"));
            return report;
        }
        let parsed: std::result::Result<Vec<_>, _> =
            pattern.templates.iter().map(|t| template::parse(t)).collect();
        let templates: Vec<Template> = match parsed {
            Ok(all) => all.concat(),
            Err(fault) => {
                report.refused.push(fault);
                return report;
            }
        };
        // The fullest form is looked for everywhere first: a shorter one would match inside of it.
        let mut refused: Vec<(usize, String)> = Vec::new();
        for template in &templates {
            let mut anchor = 0;
            while let Some(found) = self.next(template, &mut anchor) {
                match self.replace(pattern, template, &found) {
                    Ok(()) => {
                        report.matched += 1;
                        // What a fuller form was refused for does not count where a shorter one was taken.
                        refused.retain(|(node, _)| !found.nodes.contains(node));
                    }
                    Err(reason) => refused.extend(found.nodes.last().map(|node| (*node, reason))),
                }
            }
        }
        self.drop_unread();
        for (_, reason) in refused {
            if !report.refused.contains(&reason) {
                report.refused.push(reason);
            }
        }
        if report.matched == 0 && report.refused.is_empty() {
            report.refused.push("nothing in this graph looks like it".to_owned());
        }
        report
    }

    /// Takes out nodes that nobody reads any more: shared ones, which every op that needs them has taken in.
    fn drop_unread(&mut self) {
        loop {
            let read: HashSet<usize> =
                self.nodes.iter().flatten().flat_map(|n| &n.inputs).map(|v| v.node).collect();
            let mut dropped = false;
            for (index, node) in self.nodes.iter_mut().enumerate() {
                if node.is_some() && !read.contains(&index) && index != self.output.node {
                    *node = None;
                    dropped = true;
                }
            }
            if !dropped {
                return;
            }
        }
    }

    /// The next match whose last node is at `anchor` or after it; moves `anchor` past it.
    fn next(&self, template: &Template, anchor: &mut usize) -> Option<Found> {
        let searched = Searched::new(&self.nodes, self.output);
        while *anchor < self.nodes.len() {
            let here = *anchor;
            *anchor += 1;
            let found = searched.find(template, here);
            if found.is_some() {
                return found;
            }
        }
        None
    }

    fn replace(
        &mut self,
        pattern: &'static Pattern,
        template: &Template,
        found: &Found,
    ) -> std::result::Result<(), String> {
        let inputs: Vec<String> = template.inputs().into_iter().cloned().collect();
        let mut nodes: HashMap<String, &Node> = HashMap::new();
        for (step, &index) in template.nodes.iter().zip(&found.nodes) {
            let node = self.nodes[index].as_ref().ok_or("a node went away")?;
            nodes.extend(step.outputs.iter().map(|name| (name.clone(), node)));
        }
        let producer = |name: &String| {
            let node = self.nodes[found.values.get(name)?.node].as_ref()?;
            Some((name.clone(), node))
        };
        let producers = inputs.iter().filter_map(producer).collect();
        let (graph, types, values, output) = (self.graph, &self.types, &found.values, self.output);
        let matched = Match { graph, types, nodes, inputs: inputs.clone(), values, producers, output };
        let body = (pattern.build)(&matched)?;
        let reference = self.reference(template, found, &inputs)?;
        let path = self.nodes[*found.nodes.last().ok_or("an empty template")?]
            .as_ref()
            .map_or_else(String::new, |n| n.path.clone());
        let outputs: Vec<Value> = template.outputs.iter().map(|n| found.values[n]).collect();
        let op = Fused { pattern: pattern.name, class: pattern.class, reference, body };
        let given = inputs.iter().map(|n| found.values[n]).collect();
        let index = self.nodes.len();
        for (step, &old) in template.nodes.iter().zip(&found.nodes) {
            if !step.shared && !step.witness {
                self.nodes[old] = None;
            }
        }
        self.nodes.push(Some(Node { op: Arc::new(op), inputs: given, path }));
        let made = outputs.iter().filter_map(|v| self.types.get(*v).cloned()).collect();
        self.types.push(made);
        for (output, old) in outputs.into_iter().enumerate() {
            self.rename(old, Value { node: index, output });
        }
        Ok(())
    }

    /// The matched nodes as a graph of their own.
    fn reference(
        &self,
        template: &Template,
        found: &Found,
        inputs: &[String],
    ) -> std::result::Result<Reference, String> {
        let mut known: HashMap<Value, Value> = HashMap::new();
        for (node, name) in inputs.iter().enumerate() {
            known.insert(found.values[name], Value { node, output: 0 });
        }
        // Nodes made by rewriting come last, whatever they depend on; so order by dependency.
        let all = template.nodes.iter().zip(&found.nodes);
        let mut left: Vec<usize> = all.filter(|(step, _)| !step.witness).map(|(_, &index)| index).collect();
        left.sort_unstable();
        let (mut nodes, mut types) = (Vec::new(), Vec::new());
        while !left.is_empty() {
            let ready = left.iter().position(|&i| {
                self.nodes[i].as_ref().is_some_and(|n| n.inputs.iter().all(|v| known.contains_key(v)))
            });
            let index = left.remove(ready.ok_or("the match is no graph of its own")?);
            let mut node = self.nodes[index].clone().ok_or("a node went away")?;
            node.inputs = node.inputs.iter().map(|v| known[v]).collect();
            for output in 0..node.op.outputs() {
                known.insert(
                    Value { node: index, output },
                    Value { node: inputs.len() + nodes.len(), output },
                );
            }
            nodes.push(node);
            types.push(self.types.node(index).to_vec());
        }
        let outputs = template.outputs.iter().map(|n| known[&found.values[n]]).collect();
        Ok(Reference { inputs: inputs.len(), nodes, types, outputs })
    }

    fn rename(&mut self, old: Value, new: Value) {
        for node in self.nodes.iter_mut().flatten() {
            node.inputs.iter_mut().filter(|v| **v == old).for_each(|v| *v = new);
        }
        if self.output == old {
            self.output = new;
        }
    }

    /// The graph without nodes that nobody reads, in an order that can be run.
    fn finish(self) -> Result<Graph> {
        let mut order: Vec<usize> = Vec::new();
        let mut state: Vec<u8> = vec![0; self.nodes.len()];
        let mut stack = vec![(self.output.node, false)];
        while let Some((index, done)) = stack.pop() {
            if done {
                order.push(index);
                continue;
            }
            if std::mem::replace(&mut state[index], 1) == 1 {
                continue;
            }
            stack.push((index, true));
            let inputs = self.nodes[index].iter().flat_map(|n| n.inputs.iter().rev());
            stack.extend(inputs.map(|v| (v.node, false)));
        }
        let numbers: HashMap<usize, usize> = order.iter().enumerate().map(|(new, old)| (*old, new)).collect();
        let moved = |v: Value| Value { node: numbers[&v.node], output: v.output };
        let nodes = order.iter().filter_map(|&old| self.nodes[old].clone()).map(|mut node| {
            node.inputs = node.inputs.into_iter().map(moved).collect();
            node
        });
        let (weights, slots) = (self.graph.weights.clone(), self.graph.slots.clone());
        let graph = Graph { nodes: nodes.collect(), weights, slots, output: moved(self.output) };
        graph.check()?;
        Ok(graph)
    }
}
