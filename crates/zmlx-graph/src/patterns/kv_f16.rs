use std::sync::Arc;

use zmlx_mlx::Dtype;

use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::graph::Value;
use crate::native::{Lowering, LoweringError};
use crate::pattern::{Match, Pattern};

/// A cache of the engine in half precision: half the bytes that attention reads and half the memory.
///
/// Each key and value is rounded to 11 significant bits, off by 2^-11 of itself at most (by 2^-25 where it is below 2^-14),
/// so a score moves by at most `2^-11 * scale * sum(|q * k|)`. Beyond 65,504 a number becomes infinite, which shows in the
/// logits.
pub static PATTERN: Pattern = Pattern {
    name: "kv_f16",
    summary: "the engine's keys and values (or latents) in half precision",
    class: Fidelity::Bounded,
    templates: &[
        "
        q, keys, values = @qkv_rope_append(x)
        return q, keys, values
    ",
        "
        q, keys, values, gate = @qkv_rope_append(x)
        return q, keys, values, gate
    ",
        "
        latents, keys = @glm47_rope(kv)
        return latents, keys
    ",
    ],
    build,
};

/// A body whose cache is held in half precision.
#[derive(Debug)]
struct Half {
    body: Arc<dyn Body>,
    /// Which of its outputs are the cache.
    caches: Vec<usize>,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let fused = m.node("keys").and_then(|n| n.op.fused()).ok_or("no fused op keeps the cache")?;
    let reference = &fused.reference;
    let kept = |value: &Value| {
        let node = value.node.checked_sub(reference.inputs).and_then(|at| reference.nodes.get(at));
        node.is_some_and(|n| n.op.name() == "kv_append")
    };
    let caches: Vec<usize> =
        reference.outputs.iter().enumerate().filter(|(_, v)| kept(v)).map(|(output, _)| output).collect();
    if caches.is_empty() {
        return Err("the queries' part keeps nothing".to_owned());
    }
    Ok(Arc::new(Half { body: Arc::clone(&fused.body), caches }))
}

impl Body for Half {
    fn launches(&self) -> u64 {
        self.body.launches()
    }

    fn held_in(&self, output: usize) -> Option<Dtype> {
        self.caches.contains(&output).then_some(Dtype::Float16)
    }

    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        l.with_half_caches(|l| self.body.lower(l))
    }
}
