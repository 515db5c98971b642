use std::sync::Arc;

use zmlx_engine::program::Slot;
use zmlx_engine::stages::{ConvSilu, DeltaHeads, Unit};

use super::NormOf;
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::ops::{ConvStep, DeltaGate, DepthwiseConv1d, GatedDelta, SplitAt, SplitHeads, UnitNorm};
use crate::pattern::{Match, Pattern};
use crate::state::SlotId;

/// The gated delta net of Qwen3-Next and Qwen3.5, from its input products to its output product.
///
/// The input products give queries, keys and values in one row, in this order; a checkpoint that has them head by head
/// needs its rows in order when it is loaded.
pub static PATTERN: Pattern = Pattern {
    name: "deltanet",
    summary: "convolution, SiLU, norms, gates, delta rule and gated norm as two stages",
    class: Fidelity::TokenIdentical,
    templates: &["
        s = conv_step(x)
        c0 = depthwise_conv1d(s)
        c = silu(c0)
        q0, k0, v0 = split_at(c)
        q1 = split_heads(q0)
        q = unit_norm(q1)
        k1 = split_heads(k0)
        k = unit_norm(k1)
        v = split_heads(v0)
        g = delta_gate(a)
        beta = sigmoid(b)
        y = gated_delta(q, k, v, g, beta)
        n = rms_norm(y)
        z1 = split_heads(z)
        zw = cast?(z1)
        nw = cast?(n)
        o = swiglu(zw, nw)
        on = cast?(o, y)
        f = flatten_heads(on)
        return f
    "],
    build,
};

#[derive(Debug)]
struct Fused {
    /// `x`, `a`, `b`, `z`.
    inputs: [usize; 4],
    conv: DepthwiseConv1d,
    taps: usize,
    conv_slot: SlotId,
    channels: usize,
    key_heads: usize,
    heads: usize,
    key: usize,
    value: usize,
    units: [Unit; 2],
    gate: DeltaGate,
    norm: NormOf,
    slot: SlotId,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let channels = m.row_width("x")?;
    let step = m.need::<ConvStep>("s")?;
    let conv = m.need::<DepthwiseConv1d>("c0")?.clone();
    let taps = m.weight(conv.weight)?.shape.get(1).copied().unwrap_or(0);
    if step.keep != taps - 1 {
        return Err(format!("{taps} taps with {} kept inputs", step.keep));
    }
    let heads_of = |name: &str| Ok::<_, String>(m.need::<SplitHeads>(name)?.heads.max(1) as usize);
    let (key_heads, heads) = (heads_of("q1")?, heads_of("v")?);
    if heads_of("k1")? != key_heads || heads_of("z1")? != heads {
        return Err("keys have other heads than queries, or gates than values".to_owned());
    }
    let &[first, second] = m.need::<SplitAt>("q0")?.at.as_slice() else {
        return Err("its channels are not queries, keys and values".to_owned());
    };
    let (key, value) = (first as usize / key_heads, channels.saturating_sub(second as usize) / heads);
    if second != 2 * first || m.row_width("z")? != heads * value {
        return Err("keys are wider than queries, or gates than values".to_owned());
    }
    let unit = |name: &str| {
        let &UnitNorm { scale, eps } = m.need::<UnitNorm>(name)?;
        Ok::<_, String>(Unit { scale: scale as f32, eps })
    };
    Ok(Arc::new(Fused {
        inputs: [m.rows("x")?, m.rows("a")?, m.rows("b")?, m.rows("z")?],
        conv,
        taps: taps as usize,
        conv_slot: step.slot,
        channels,
        key_heads,
        heads,
        key,
        value,
        units: [unit("q")?, unit("k")?],
        gate: *m.need::<DeltaGate>("g")?,
        norm: m.norm("n"),
        slot: m.need::<GatedDelta>("y")?.slot,
    }))
}

impl Body for Fused {
    fn launches(&self) -> u64 {
        2
    }

    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let &Self { channels, taps, key_heads, heads, key, value, .. } = self;
        let [x, a, b, z] = self.inputs;
        let x = l.input(x, Form::Flat { width: channels })?;
        let (kernel, bias) = (l.vector(self.conv.weight)?, l.bias(self.conv.bias)?);
        let slot = l.slot(self.conv_slot, Slot::rows(taps - 1, channels));
        let mixed = l.temporary(channels);
        l.push(ConvSilu { x, channels, kernel, taps, bias, slot, out: mixed });

        let of_heads = Form::Flat { width: heads };
        let (a, b) = (l.input(a, of_heads)?, l.input(b, of_heads)?);
        let z = l.input(z, Form::Flat { width: heads * value })?;
        let (a_log, dt_bias) = (l.vector(self.gate.a_log)?, l.vector(self.gate.dt_bias)?);
        let norm = l.norm(self.norm)?.ok_or_else(|| LoweringError::Pattern("no norm".to_owned()))?;
        let slot = l.slot(self.slot, Slot::rows(heads * value, key));
        let out = l.output(0, Form::Flat { width: heads * value });
        l.push(DeltaHeads {
            mixed,
            a,
            b,
            z,
            key_heads,
            heads,
            key,
            value,
            units: self.units,
            a_log,
            dt_bias,
            norm,
            slot,
            out,
        });
        Ok(())
    }
}
