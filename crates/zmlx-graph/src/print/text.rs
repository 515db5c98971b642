use std::fmt::Write;

use super::format_words;
use crate::error::Result;
use crate::graph::Graph;
use crate::shape::{Shape, Type};

fn list(types: &[Type]) -> String {
    types.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl Graph {
    /// The graph as text with all that is known of it: weights `@n` with shape and format, state slots `$n` with what
    /// they hold, and one line a node:
    ///
    /// `%12 = linear(%11, @5) : [B, L, 2048] activation [model.layers.0.conv.in_proj]`
    ///
    /// `activation` is the dtype that the model is run in; B, L and S are explained at [`Dim`](crate::shape::Dim). The
    /// node of a pattern ends with `<pattern>`.
    ///
    /// # Errors
    /// As [`Graph::infer`].
    pub fn describe(&self) -> Result<String> {
        let types = self.infer()?;
        let mut text = String::new();
        // Writing to a String cannot fail.
        for (index, weight) in self.weights.iter().enumerate() {
            let shape = Shape::from(weight.shape.as_slice());
            let _ = writeln!(text, "@{index} = weight : {shape} {} [{}]", format_words(weight), weight.path);
        }
        for (slot, id) in self.slots.iter().zip(self.slot_ids()) {
            let held = list(types.slot(id));
            let _ = writeln!(text, "${} = {} : {held} [{}]", id.0, slot.kind.word(), slot.path);
        }
        for (index, node) in self.nodes.iter().enumerate() {
            let values = node.inputs.iter().map(ToString::to_string);
            let weights = node.op.weights().into_iter().map(|w| format!("@{}", w.0));
            let slot = node.op.slot().into_iter().map(|s| format!("${}", s.0));
            let arguments: Vec<String> = values.chain(weights).chain(slot).collect();
            let _ = write!(text, "%{index} = {}({})", node.op.name(), arguments.join(", "));
            for (name, value) in node.op.attributes() {
                let _ = write!(text, " {name}={value}");
            }
            let _ = write!(text, " : {} [{}]", list(types.node(index)), node.path);
            if let Some(pattern) = node.op.pattern() {
                let _ = write!(text, " <{pattern}>");
            }
            text.push('\n');
        }
        let _ = writeln!(text, "return {}", self.output);
        Ok(text)
    }
}
