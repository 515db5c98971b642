use std::sync::Arc;

use zmlx_engine::program::Slot;
use zmlx_engine::stages::{LatentAppend, SplitRope};

use super::{NormOf, turn};
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError, Turn};
use crate::ops::{KvAppend, SplitAt, SplitHeads, Transpose};
use crate::pattern::{Match, Pattern};
use crate::state::SlotId;

/// Queries and keys of multi-head latent attention (GLM-4.7, DeepSeek-V3): the part without and the part with a rotary
/// embedding, and the latent with its norm, to where attention reads them. Queries are one op and keys another, since
/// nothing but attention connects them.
///
/// The parts are kept apart (latents and rotary keys are two planes of one cache) and not concatenated: a sum over both
/// is the same.
pub static PATTERN: Pattern = Pattern {
    name: "glm47_rope",
    summary: "split and rope of latent attention's queries; split, latent norm, rope and append of its keys",
    class: Fidelity::TokenIdentical,
    templates: &[
        "
        q1 = split_heads(q0)
        q2 = transpose(q1)
        q, q3 = split_at(q2)
        pe = rope|rope_frequencies(q3)
        return q, pe
    ",
        "
        c0, k0 = split_at(kv)
        c1 = rms_norm(c0)
        c2 = split_heads(c1)
        c3 = transpose(c2)
        k1 = split_heads(k0)
        k2 = transpose(k1)
        k3 = rope|rope_frequencies(k2)
        latents, keys = kv_append(c3, k3)
        return latents, keys
    ",
    ],
    build,
};

#[derive(Debug)]
struct Queries {
    input: usize,
    heads: usize,
    nope: usize,
    rope_width: usize,
    turn: Turn,
}

#[derive(Debug)]
struct Keys {
    input: usize,
    latent: usize,
    rope_width: usize,
    norm: NormOf,
    turn: Turn,
    slot: SlotId,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    if m.node("q1").is_some() { queries(m) } else { keys(m) }
}

/// Where the first of two parts ends.
fn cut(m: &Match<'_>, name: &str) -> Result<usize, String> {
    match m.need::<SplitAt>(name)?.at.as_slice() {
        &[at] => usize::try_from(at).map_err(|e| e.to_string()),
        at => Err(format!("split at {at:?} and not in two")),
    }
}

/// Whether these bring heads in front of the length.
fn heads_first(m: &Match<'_>, names: &[&str]) -> Result<(), String> {
    for name in names {
        if m.need::<Transpose>(name)?.0 != [0, 2, 1, 3] {
            return Err("heads are brought to another place than in front of the length".to_owned());
        }
    }
    Ok(())
}

fn queries(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let (width, nope) = (m.row_width("q0")?, cut(m, "q")?);
    let heads = m.need::<SplitHeads>("q1")?.heads.max(1) as usize;
    heads_first(m, &["q2"])?;
    let rope_width = (width / heads).saturating_sub(nope);
    let turn = turn(m, "pe")?.ok_or("no rope")?;
    Ok(Arc::new(Queries { input: m.input("q0")?, heads, nope, rope_width, turn }))
}

fn keys(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let (width, latent) = (m.row_width("kv")?, cut(m, "c0")?);
    if m.need::<SplitHeads>("c2")?.heads != 1 || m.need::<SplitHeads>("k1")?.heads != 1 {
        return Err("latents have more than one head".to_owned());
    }
    heads_first(m, &["c3", "k2"])?;
    let (turn, norm, slot) =
        (turn(m, "k3")?.ok_or("no rope")?, m.norm("c1"), m.need::<KvAppend>("latents")?.slot);
    let rope_width = width.saturating_sub(latent);
    Ok(Arc::new(Keys { input: m.input("kv")?, latent, rope_width, norm, turn, slot }))
}

impl Body for Queries {
    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let &Self { heads, nope, rope_width, .. } = self;
        let queries = l.input(self.input, Form::Flat { width: heads * (nope + rope_width) })?;
        let rope = l.rope(&self.turn);
        let out = l.output(0, Form::Heads { heads, width: nope });
        let turned = l.output(1, Form::Heads { heads, width: rope_width });
        l.push(SplitRope { queries, heads, nope, rope_width, rope, out, turned });
        Ok(())
    }
}

impl Body for Keys {
    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let &Self { latent, rope_width, .. } = self;
        let compressed = l.input(self.input, Form::Flat { width: latent + rope_width })?;
        let norm = l.norm(self.norm)?.ok_or_else(|| LoweringError::Pattern("no norm".to_owned()))?;
        let rope = l.rope(&self.turn);
        let slot = l.slot(self.slot, Slot::kv(1, latent, rope_width));
        l.output_cache(0, slot, false);
        l.output_cache(1, slot, true);
        l.push(LatentAppend { compressed, latent, rope_width, norm, rope, slot });
        Ok(())
    }
}
