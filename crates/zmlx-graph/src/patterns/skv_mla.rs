use std::sync::Arc;

use zmlx_engine::program::SHARE_FROM;
use zmlx_engine::stages::{HeadProducts, LatentAttend, Linear as LinearStage, Source};

use super::residual;
use crate::fidelity::Fidelity;
use crate::fused::Body;
use crate::native::{Form, Lowering, LoweringError};
use crate::ops::{Linear, MlaAttention};
use crate::pattern::{Match, Pattern};

/// Multi-head latent attention over the engine's latent cache, with what follows it.
///
/// Queries are brought to the space of the latents, and mixed latents back to values, at every length of a call. This is
/// exact: the original's pattern of this name projects latents to fewer dimensions (a PCA of rank 128 or so, quantised),
/// which loses what lies outside of them. Here the cache holds whole latents in float32, so the class is that of the
/// other ops, and nothing needs to be calibrated.
pub static PATTERN: Pattern = Pattern {
    name: "skv_mla",
    summary: "absorbed queries, attention over latents, products with the heads' values, output product and residual",
    class: Fidelity::TokenIdentical,
    templates: &["
        a = mla_attention(q, pe, latents, keys)
        m = merge_heads(a)
        o = linear(m)
        h = add?(o, r)
        return h
    "],
    build,
};

#[derive(Debug)]
struct Fused {
    heads: usize,
    inputs: [usize; 3],
    attention: MlaAttention,
    rope_width: usize,
    linear: Linear,
    residual: Option<usize>,
}

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    let cached = m.producer("latents").and_then(|n| n.op.fused()).filter(|f| f.pattern == "glm47_rope");
    cached.ok_or("its cache is not the engine's (glm47_rope is off or did not match)")?;
    let attention = *m.need::<MlaAttention>("a")?;
    m.matrix(attention.embed)?;
    m.matrix(attention.unembed)?;
    let rope_width = m.shape("pe").and_then(|s| s.last()?.constant()).ok_or("no rotary part")?;
    let linear = m.need::<Linear>("o")?.clone();
    m.matrix(linear.weight)?;
    let inputs = [m.input("q")?, m.input("pe")?, m.input("latents")?];
    let residual = m.residual("h", "o", "r")?;
    let heads = m.weight(attention.embed)?.shape.first().map_or(0, |h| *h as usize);
    Ok(Arc::new(Fused { inputs, attention, heads, rope_width: rope_width as usize, linear, residual }))
}

impl Body for Fused {
    fn launches(&self) -> u64 {
        // The rows of many heads are packed once for all threads, before either product.
        if self.heads >= SHARE_FROM { 6 } else { 4 }
    }

    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let (embed, unembed) = (l.matrix(self.attention.embed)?, l.matrix(self.attention.unembed)?);
        let (heads, latent, value) = (embed.experts(), embed.rows(), unembed.rows());
        let plain = l.input(self.inputs[0], Form::Heads { heads, width: embed.columns() })?;
        let turned = l.input(self.inputs[1], Form::Heads { heads, width: self.rope_width })?;
        let slot = l.cache(self.inputs[2])?;

        let of_heads = |buffer, matrix: &_| Source { per_token: heads, ..Source::new(buffer, None, matrix) };
        let queries = l.temporary(heads * latent);
        let source = of_heads(plain, &embed);
        l.push(source.pack());
        l.push(HeadProducts { source, matrix: embed, out: queries });
        let mixed = l.temporary(heads * latent);
        let attend = LatentAttend { queries, turned, heads, slot, scale: self.attention.scale, out: mixed };
        let merge = attend.merge(latent);
        l.push(attend);
        l.push(merge);
        let values = l.temporary(heads * value);
        let source = of_heads(mixed, &unembed);
        l.push(source.pack());
        l.push(HeadProducts { source, matrix: unembed, out: values });

        let matrix = l.matrix(self.linear.weight)?;
        let source = Source::new(values, None, &matrix);
        l.push(source.pack());
        let residual = residual(l, self.residual, matrix.rows())?;
        let bias = l.bias(self.linear.bias)?;
        let out = l.output(0, Form::Flat { width: matrix.rows() });
        l.push(LinearStage { source, matrix, bias, gate: None, residual, out, wanted_only: false });
        Ok(())
    }
}
