use std::sync::Arc;

use zmlx_engine::stages::{Attend, Linear as LinearStage, SigmoidGate, Source};

use super::residual;
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::op::Op;
use crate::ops::{Attention, Linear, WindowAttention};
use crate::pattern::{Match, Pattern};
use crate::shape::Dim;
use crate::weights::WeightId;

/// Attention over the engine's cache, with what follows it.
pub static PATTERN: Pattern = Pattern {
    name: "attention_out",
    summary: "attention over the cache, output product and residual",
    class: Fidelity::TokenIdentical,
    templates: &[
        "
        a = attention|window_attention(q, keys, values)
        m = merge_heads(a)
        o = linear(m)
        h = add?(o, r)
        return h
    ",
        // The result is multiplied with the sigmoid of a gate.
        "
        a = attention|window_attention(q, keys, values)
        m = merge_heads(a)
        s = sigmoid(gate)
        g = multiply(m, s)
        o = linear(g)
        h = add?(o, r)
        return h
    ",
    ],
    build,
};

#[derive(Debug)]
struct Fused {
    scale: f32,
    window: Option<usize>,
    sinks: Option<WeightId>,
    linear: Linear,
    heads: usize,
    width: usize,
    columns: usize,
    value_width: usize,
    inputs: [usize; 2],
    gate: Option<usize>,
    residual: Option<usize>,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let cached = m.producer("keys").and_then(|n| n.op.fused()).filter(|f| f.pattern == "qkv_rope_append");
    let cached = cached.ok_or("its cache is not the engine's (qkv_rope_append is off or did not match)")?;
    let constant = |d: &Dim| d.constant().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
    let (heads, width) = match m.shape("q").map(|s| s.0.as_slice()) {
        Some([_, heads, _, width]) => constant(heads).zip(constant(width)).ok_or("heads of no fixed size")?,
        _ => return Err("its queries are not heads".to_owned()),
    };
    let linear = m.need::<Linear>("o")?.clone();
    let (_, columns) = m.matrix(linear.weight)?;
    let (scale, window, sinks) = match m.op::<Attention>("a") {
        Some(a) => (a.scale, None, None),
        None => {
            let a = m.need::<WindowAttention>("a")?;
            (a.scale, a.window, a.sinks)
        }
    };
    // A cache that keeps too little is not the same in one call as in several.
    let kept = cached.slot().map(|s| m.slot(s)).transpose()?.and_then(|s| s.kind.window());
    if let Some(kept) = kept.filter(|kept| window.is_none_or(|w| w > *kept)) {
        return Err(format!("its cache keeps {kept} positions, and it sees more"));
    }
    let window = window.map(|w| w.max(1) as usize);
    let inputs = [m.input("q")?, m.input("keys")?];
    let gate = match m.node("g") {
        Some(_) if m.row_width("gate")? != columns => return Err("its gate has another width".to_owned()),
        Some(_) => Some(m.input("gate")?),
        None => None,
    };
    let residual = m.residual("h", "o", "r")?;
    Ok(Arc::new(Fused {
        scale,
        window,
        sinks,
        linear,
        heads,
        width,
        columns,
        value_width: columns / heads,
        inputs,
        gate,
        residual,
    }))
}

impl Body for Fused {
    fn launches(&self) -> u64 {
        2 + u64::from(self.gate.is_some())
    }

    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let queries = l.input(self.inputs[0], Form::Heads { heads: self.heads, width: self.width })?;
        let slot = l.cache(self.inputs[1])?;
        let attended = l.temporary(self.heads * self.value_width);
        let (heads, scale, window) = (self.heads, self.scale, self.window);
        let sinks = l.bias(self.sinks)?;
        let attend = Attend { queries, heads, slot, scale, window, sinks, out: attended };
        let merge = attend.merge(self.value_width);
        l.push(attend);
        l.push(merge);
        if let Some(gate) = self.gate {
            let width = self.columns;
            let gate = l.input(gate, Form::Flat { width })?;
            l.push(SigmoidGate { x: attended, gate, width });
        }
        let matrix = l.matrix(self.linear.weight)?;
        if matrix.columns() != self.columns {
            return Err(LoweringError::Pattern("the output product has another width".to_owned()));
        }
        let source = Source::new(attended, None, &matrix);
        l.push(source.pack());
        let residual = residual(l, self.residual, matrix.rows())?;
        let bias = l.bias(self.linear.bias)?;
        let out = l.output(0, Form::Flat { width: matrix.rows() });
        l.push(LinearStage { source, matrix, bias, gate: None, residual, out, wanted_only: false });
        Ok(())
    }
}
