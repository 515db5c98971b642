use std::fmt::Write;

use super::groups;
use crate::error::Result;
use crate::graph::Graph;

/// A quoted string of DOT; `\n` in a label stays a line break.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

impl Graph {
    /// The graph in Graphviz's language: a box a node, an edge a value with its type, a frame a layer. Nodes that a
    /// pattern put there are filled.
    ///
    /// # Errors
    /// As [`Graph::infer`].
    pub fn dot(&self) -> Result<String> {
        let types = self.infer()?;
        let mut text =
            String::from("digraph model {\n  node [shape=box, fontname=monospace, fontsize=10];\n");
        text.push_str("  edge [fontname=monospace, fontsize=8];\n");
        // Writing to a String cannot fail.
        for (number, group) in groups::groups(self).iter().enumerate() {
            let _ = writeln!(text, "  subgraph cluster_{number} {{\n    label={};", quoted(&group.name));
            for &index in &group.nodes {
                let node = &self.nodes[index];
                let rest = groups::layer_of(&node.path).map_or(node.path.as_str(), |(_, rest)| rest);
                let mut label = format!("{}\n{rest}", node.op.name());
                let mut more = "";
                if let Some(pattern) = node.op.pattern() {
                    let _ = write!(label, "\n<{pattern}>");
                    more = ", style=filled, fillcolor=\"#ffd9a8\"";
                } else if !node.op.weights().is_empty() {
                    more = ", style=filled, fillcolor=\"#dbe9ff\"";
                } else if node.op.slot().is_some() {
                    more = ", style=filled, fillcolor=\"#d9f2dc\"";
                }
                let _ = writeln!(text, "    n{index} [label={}{more}];", quoted(label.trim_end()));
            }
            text.push_str("  }\n");
        }
        for (index, node) in self.nodes.iter().enumerate() {
            for input in &node.inputs {
                let label = types.get(*input).map_or_else(String::new, ToString::to_string);
                let _ = writeln!(text, "  n{} -> n{index} [label={}];", input.node, quoted(&label));
            }
        }
        let logits = types.get(self.output).map_or_else(String::new, ToString::to_string);
        let _ = writeln!(text, "  logits [shape=ellipse];");
        let _ = writeln!(text, "  n{} -> logits [label={}];\n}}", self.output.node, quoted(&logits));
        Ok(text)
    }
}
