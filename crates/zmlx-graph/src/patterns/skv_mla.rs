use std::sync::Arc;

use zmlx_engine::program::{Buffer, SHARE_FROM};
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

/// What attention over latents needs, whichever positions it looks at.
#[derive(Debug)]
pub(super) struct Absorbed {
    pub(super) heads: usize,
    inputs: [usize; 3],
    pub(super) attention: MlaAttention,
    rope_width: usize,
    linear: Linear,
    residual: Option<usize>,
}

/// What the attention stages read and write.
pub(super) struct Operands {
    /// Queries in the latents' space.
    pub(super) queries: Buffer,
    /// Their rotary parts.
    pub(super) turned: Buffer,
    /// The cache.
    pub(super) slot: usize,
    /// Mixed latents.
    pub(super) out: Buffer,
    /// Width of a latent.
    pub(super) latent: usize,
}

impl Absorbed {
    /// From a match that has the names of the template above, `attention` being its op `a`.
    pub(super) fn read(m: &Match<'_>, attention: MlaAttention) -> Result<Self, String> {
        let cached = m.producer("latents").and_then(|n| n.op.fused()).filter(|f| f.pattern == "glm47_rope");
        cached.ok_or("its cache is not the engine's (glm47_rope is off or did not match)")?;
        m.matrix(attention.embed)?;
        m.matrix(attention.unembed)?;
        let rope_width = m.shape("pe").and_then(|s| s.last()?.constant()).ok_or("no rotary part")?;
        let linear = m.need::<Linear>("o")?.clone();
        m.matrix(linear.weight)?;
        let inputs = [m.input("q")?, m.input("pe")?, m.input("latents")?];
        let residual = m.residual("h", "o", "r")?;
        let heads = m.weight(attention.embed)?.shape.first().map_or(0, |h| *h as usize);
        Ok(Self { inputs, attention, heads, rope_width: rope_width as usize, linear, residual })
    }

    /// Stages that one token takes, one of which attends.
    pub(super) fn launches(&self) -> u64 {
        // The rows of many heads are packed once for all threads, before either product.
        if self.heads >= SHARE_FROM { 6 } else { 4 }
    }

    /// Writes the stages; `attend` those from queries to mixed latents.
    pub(super) fn lower(
        &self,
        l: &mut Lowering<'_>,
        attend: impl FnOnce(&mut Lowering<'_>, Operands) -> Result<(), LoweringError>,
    ) -> Result<(), LoweringError> {
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
        attend(l, Operands { queries, turned, slot, out: mixed, latent })?;
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

#[derive(Debug)]
struct Fused(Absorbed);

fn build(m: &Match<'_>) -> Result<Arc<dyn Body>, String> {
    Ok(Arc::new(Fused(Absorbed::read(m, *m.need::<MlaAttention>("a")?)?)))
}

impl Body for Fused {
    fn launches(&self) -> u64 {
        self.0.launches()
    }

    fn lower(&self, l: &mut Lowering<'_>) -> Result<(), LoweringError> {
        let (heads, scale) = (self.0.heads, self.0.attention.scale);
        self.0.lower(l, |l, Operands { queries, turned, slot, out, latent }| {
            let attend = LatentAttend { queries, turned, heads, slot, scale, out };
            let merge = attend.merge(latent);
            l.push(attend);
            l.push(merge);
            Ok(())
        })
    }
}
