use std::sync::Arc;

use zmlx_engine::program::Slot;
use zmlx_engine::stages::{Columns, ConvSilu, DeltaHeads, Unit};
use zmlx_mlx::Dtype;

use super::NormOf;
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::ops::{
    Cast, Concatenate, ConvStep, DeltaGate, DepthwiseConv1d, GatedDelta, SplitAt, SplitHeads, UnitNorm,
};
use crate::pattern::{Match, Pattern};
use crate::state::SlotId;

/// What both templates end with.
macro_rules! after_products {
    ($before:literal) => {
        concat!(
            $before,
            "
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
    "
        )
    };
}

/// The gated delta net of Qwen3-Next and Qwen3.5, from its input products to its output product.
///
/// The input products give queries, keys and values in one row, in this order, or all that a key head has one after
/// another: its query, its key, and values and gates of the heads that share them.
pub static PATTERN: Pattern = Pattern {
    name: "deltanet",
    summary: "convolution, SiLU, norms, gates, delta rule and gated norm as two stages",
    class: Fidelity::TokenIdentical,
    templates: &[
        after_products!(
            "
        qkvz = split_heads(mixed)
        qi, ki, vi, zi = split_at(qkvz)
        qf = flatten_heads(qi)
        kf = flatten_heads(ki)
        vf = flatten_heads(vi)
        z = flatten_heads(zi)
        x = concatenate(qf, kf, vf)
        ba = split_heads(gates)
        bi, ai = split_at(ba)
        b = flatten_heads(bi)
        a = flatten_heads(ai)
    "
        ),
        after_products!(""),
    ],
    build,
};

/// Where a thing lies in the row of an input, piece by piece.
#[derive(Debug, Clone)]
struct Place {
    input: usize,
    width: usize,
    pieces: Vec<(usize, usize)>,
}

impl Place {
    /// `count` pieces of `len`, one after another, in a row of its own.
    fn whole(input: usize, count: usize, len: usize) -> Self {
        let pieces = (0..count).map(|i| (i * len, len)).collect();
        Self { input, width: count * len, pieces }
    }

    fn columns(&self, l: &mut Lowering<'_>) -> Result<Columns, LoweringError> {
        let buffer = l.input(self.input, Form::Flat { width: self.width })?;
        Ok(Columns { buffer, width: self.width, pieces: self.pieces.clone() })
    }
}

/// Sizes of a delta net.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    key_heads: usize,
    heads: usize,
    key: usize,
    value: usize,
}

impl Sizes {
    fn channels(&self) -> usize {
        2 * self.key_heads * self.key + self.heads * self.value
    }
}

#[derive(Debug)]
struct Fused {
    /// Channels, `a`, `b` and `z`.
    places: [Place; 4],
    conv: DepthwiseConv1d,
    taps: usize,
    conv_slot: SlotId,
    sizes: Sizes,
    units: [Unit; 2],
    gate: DeltaGate,
    norm: NormOf,
    slot: SlotId,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let step = m.need::<ConvStep>("s")?;
    let conv = m.need::<DepthwiseConv1d>("c0")?.clone();
    let taps = m.weight(conv.weight)?.shape.get(1).copied().unwrap_or(0);
    if taps < 1 || step.keep != taps - 1 {
        return Err(format!("{taps} taps with {} kept inputs", step.keep));
    }
    let sizes = sizes(m)?;
    casts(m)?;
    let unit = |name: &str| {
        let &UnitNorm { scale, eps } = m.need::<UnitNorm>(name)?;
        Ok::<_, String>(Unit { scale: scale as f32, eps })
    };
    Ok(Arc::new(Fused {
        places: if m.node("qkvz").is_some() { by_key_head(m, sizes)? } else { apart(m, sizes)? },
        conv,
        taps: taps as usize,
        conv_slot: step.slot,
        sizes,
        units: [unit("q")?, unit("k")?],
        gate: *m.need::<DeltaGate>("g")?,
        norm: m.norm("n"),
        slot: m.need::<GatedDelta>("y")?.slot,
    }))
}

/// The sizes, which splits and heads must agree on.
fn sizes(m: &Match<'_>) -> Result<Sizes, String> {
    let channels = m.row_width("x")?;
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
    Ok(Sizes { key_heads, heads, key, value })
}

/// The gated norm is computed in float32 here, whatever is asked for.
fn casts(m: &Match<'_>) -> Result<(), String> {
    let narrow = |name: &str| m.op::<Cast>(name).is_some_and(|c| c.0.is_some_and(|d| d != Dtype::Float32));
    match ["zw", "nw", "on"].into_iter().find(|name| narrow(name)) {
        Some(name) => Err(format!("{name} is cast to another dtype than float32")),
        None => Ok(()),
    }
}

/// All of a thing in a row of its own.
fn apart(m: &Match<'_>, sizes: Sizes) -> Result<[Place; 4], String> {
    let Sizes { heads, value, .. } = sizes;
    let whole = |name, count, len| Ok::<_, String>(Place::whole(m.rows(name)?, count, len));
    Ok([
        whole("x", 1, sizes.channels())?,
        whole("a", heads, 1)?,
        whole("b", heads, 1)?,
        whole("z", heads, value)?,
    ])
}

/// All that a key head has in one piece of a row.
fn by_key_head(m: &Match<'_>, sizes: Sizes) -> Result<[Place; 4], String> {
    let Sizes { key_heads, heads, key, value } = sizes;
    let shared = heads / key_heads;
    let cut = |whole: &str, part: &str, ends: &[usize]| -> Result<bool, String> {
        let at = &m.need::<SplitAt>(part)?.at;
        let by_head = m.need::<SplitHeads>(whole)?.heads == key_heads as i32;
        Ok(by_head && at.iter().map(|&a| a as usize).eq(ends.iter().copied()))
    };
    let ends = [key, 2 * key, 2 * key + shared * value];
    if !cut("qkvz", "qi", &ends)? || !cut("ba", "bi", &[shared])? {
        return Err("what a key head has is not its query, key, values and gates".to_owned());
    }
    if !matches!(m.need::<Concatenate>("x")?.axis, -1 | 2) {
        return Err("queries, keys and values are joined along another axis".to_owned());
    }
    let (mixed, gates) = (m.rows("mixed")?, m.rows("gates")?);
    let per_head = 2 * (key + shared * value);
    if m.row_width("mixed")? != key_heads * per_head || m.row_width("gates")? != 2 * heads {
        return Err("its products are wider than what its heads need".to_owned());
    }
    let every = |start: usize, len: usize| (0..key_heads).map(move |g| (g * per_head + start, len));
    let channels = every(0, key).chain(every(key, key)).chain(every(2 * key, shared * value)).collect();
    // Value head `h` is number `h % shared` of those that share key head `h / shared`.
    let z_of = |h: usize| h / shared * per_head + 2 * key + (shared + h % shared) * value;
    let gate_of = |first: usize| (0..heads).map(move |h| (h / shared * 2 * shared + first + h % shared, 1));
    let of_gates = |first| Place { input: gates, width: 2 * heads, pieces: gate_of(first).collect() };
    let of_mixed = |pieces| Place { input: mixed, width: key_heads * per_head, pieces };
    Ok([
        of_mixed(channels),
        of_gates(shared),
        of_gates(0),
        of_mixed((0..heads).map(|h| (z_of(h), value)).collect()),
    ])
}

impl Body for Fused {
    fn launches(&self) -> u64 {
        2
    }

    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let Sizes { key_heads, heads, key, value } = self.sizes;
        let (channels, taps) = (self.sizes.channels(), self.taps);
        let [x, a, b, z] = &self.places;
        let (x, a, b, z) = (x.columns(l)?, a.columns(l)?, b.columns(l)?, z.columns(l)?);
        let (kernel, bias) = (l.vector(self.conv.weight)?, l.bias(self.conv.bias)?);
        // The stage wants the weights of one tap side by side.
        let kernel = (0..taps).flat_map(|tap| kernel.iter().skip(tap).step_by(taps).copied()).collect();
        let slot = l.slot(self.conv_slot, Slot::rows(taps - 1, channels));
        let mixed = l.temporary(channels);
        l.push(ConvSilu { x, channels, kernel, taps, bias, slot, out: mixed });

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
