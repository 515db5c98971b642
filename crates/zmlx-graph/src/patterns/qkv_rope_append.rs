use std::sync::Arc;

use zmlx_engine::program::Slot;
use zmlx_engine::stages::{Heads, Qkv};

use super::{NormOf, alike, source, turn};
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError, Turn};
use crate::ops::{KvAppend, Linear, Split, SplitHeads, Transpose};
use crate::pattern::{Match, Pattern};
use crate::state::SlotId;

/// Queries, keys and values of one token in one pass over their matrices.
pub static PATTERN: Pattern = Pattern {
    name: "qkv_rope_append",
    summary: "norm, q/k/v products, norms of heads, rope and cache append as one op",
    class: Fidelity::TokenIdentical,
    templates: &[
        "
        n ~ rms_norm?(x)
        q0 = linear(n)
        k0 = linear(n)
        v0 = linear(n)
        q1 = split_heads(q0)
        q2 = rms_norm?(q1)
        q3 = transpose(q2)
        q4 = rope|rope_frequencies?(q3)
        k1 = split_heads(k0)
        k2 = rms_norm?(k1)
        k3 = transpose(k2)
        k4 = rope|rope_frequencies?(k3)
        v1 = split_heads(v0)
        v2 = transpose(v1)
        keys, values = kv_append(k4, v2)
        return q4, keys, values
    ",
        // Half of the columns of a query head are a gate of what attention gives.
        "
        n ~ rms_norm?(x)
        q0 = linear(n)
        k0 = linear(n)
        v0 = linear(n)
        q1 = split_heads(q0)
        qs, gs = split(q1)
        gate = flatten_heads(gs)
        q2 = rms_norm?(qs)
        q3 = transpose(q2)
        q4 = rope|rope_frequencies?(q3)
        k1 = split_heads(k0)
        k2 = rms_norm?(k1)
        k3 = transpose(k2)
        k4 = rope|rope_frequencies?(k3)
        v1 = split_heads(v0)
        v2 = transpose(v1)
        keys, values = kv_append(k4, v2)
        return q4, keys, values, gate
    ",
    ],
    build,
};

#[derive(Debug)]
struct Part {
    linear: Linear,
    heads: usize,
    width: usize,
    norm: NormOf,
    turn: Option<Turn>,
}

#[derive(Debug)]
struct Fused {
    input: usize,
    norm: NormOf,
    parts: [Part; 3],
    /// Whether the product for the queries gives gates too.
    gated: bool,
    slot: SlotId,
    window: Option<usize>,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let gated = match m.op::<Split>("qs") {
        Some(split) if split.parts != 2 => return Err(format!("heads are split in {}", split.parts)),
        split => split.is_some(),
    };
    let part = |letter: &str| -> Result<Part, String> {
        let name = |n: u8| format!("{letter}{n}");
        let linear = m.need::<Linear>(&name(0))?.clone();
        let heads = m.need::<SplitHeads>(&name(1))?.heads.max(1) as usize;
        let (rows, _) = m.matrix(linear.weight)?;
        let all = if gated && letter == "q" { 2 * heads } else { heads };
        if !rows.is_multiple_of(all) || !(rows / all).is_multiple_of(8) {
            return Err(format!("{heads} heads in {rows} rows: heads of a multiple of 8 are supported"));
        }
        let turned = if letter == "v" { name(2) } else { name(3) };
        if m.need::<Transpose>(&turned)?.0 != [0, 2, 1, 3] {
            return Err("heads are brought to another place than in front of the length".to_owned());
        }
        let turn = turn(m, &name(4))?;
        Ok(Part { linear, heads, width: rows / all, norm: m.norm(&name(2)), turn })
    };
    let parts = [part("q")?, part("k")?, part("v")?];
    if parts[1].heads != parts[2].heads {
        return Err("keys and values have different numbers of heads".to_owned());
    }
    m.alike(&[parts[0].linear.weight, parts[1].linear.weight, parts[2].linear.weight])?;
    let slot = m.need::<KvAppend>("keys")?.slot;
    let window = m.slot(slot)?.kind.window().map(|w| w.max(1) as usize);
    let input = m.rows("x")?;
    Ok(Arc::new(Fused { input, norm: m.norm("n"), parts, gated, slot, window }))
}

impl Body for Fused {
    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let mut parts = Vec::new();
        for part in &self.parts {
            parts.push(Heads {
                matrix: l.matrix(part.linear.weight)?,
                bias: l.bias(part.linear.bias)?,
                heads: part.heads,
                norm: l.norm(part.norm)?,
                rope: part.turn.as_ref().map(|t| l.rope(t)),
            });
        }
        let [q, k, v] =
            <[Heads; 3]>::try_from(parts).map_err(|_| LoweringError::Pattern("three parts".to_owned()))?;
        if q.matrix.layout() != k.matrix.layout() || k.matrix.layout() != v.matrix.layout() {
            return Err(LoweringError::Pattern("q, k and v are stored differently".to_owned()));
        }
        alike(&k.matrix, &v.matrix)
            .or_else(|e| if self.parts[1].width == self.parts[2].width { Err(e) } else { Ok(()) })?;
        let source = source(l, self.input, self.norm, &q.matrix)?;
        let empty = Slot::kv(self.parts[1].heads, self.parts[1].width, self.parts[2].width);
        let empty = empty.windowed(self.window);
        let slot = l.slot(self.slot, empty);
        let out = l.output(0, Form::Heads { heads: self.parts[0].heads, width: self.parts[0].width });
        l.output_cache(1, slot, false);
        l.output_cache(2, slot, true);
        let gate_form = Form::Flat { width: self.parts[0].heads * self.parts[0].width };
        let gate = self.gated.then(|| l.output(3, gate_form));
        l.push(Qkv { source, parts: [q, k, v], slot, out, gate });
        Ok(())
    }
}
