//! Attention in the space of latents.

use super::heads::{Angles, CACHE, CacheOperands, cache_constants};
use super::product::Float;
use super::{
    KernelError, Launch, MULTIPROCESSORS, Norm, Operands, Prelude, SHARED_MOST, Source, Type, aligned,
    finite, given, size,
};

const NAME: &str = "zmlx_latent_attend";
const TEXT: &str = include_str!("latent.cu");

/// Rows of queries of a block, and positions that a warp takes at once, as the text has them.
const ROWS: usize = 4;

/// `softmax(scale * (q . c + turn(q_pe) . k_pe)) @ c` over cached latents `c` and rotary keys `k_pe`, causal, which all
/// heads share; latents `norm(c)` and keys `turn(k_pe)` of the call are appended on the way.
///
/// Positions are cut in parts, each of which leaves sums, their largest score and the sum of its exponentials:
/// [`super::HeadProducts::of_parts`] adds them up as it reads them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentAttend {
    /// Query heads.
    pub heads: usize,
    /// Width of a latent.
    pub latent: usize,
    /// Width of a rotary key.
    pub rope: usize,
    /// How rotary parts are turned.
    pub angles: Angles,
    /// Norm of the latents.
    pub norm: Norm,
    /// Sequences.
    pub sequences: usize,
    /// Tokens of each.
    pub length: usize,
    /// Type of the cache.
    pub cache: Float,
    /// Multiplies the scores.
    pub scale: f32,
    /// Floats from token to token and from head to head of the queries' rotary parts.
    pub turned_strides: [usize; 2],
    /// Floats from token to token of the call's latents with their rotary keys.
    pub compressed_stride: usize,
    /// Parts that positions are cut in at most.
    pub splits: usize,
    /// Positions that a part has at least.
    pub least: usize,
    /// Warps of a block.
    pub warps: usize,
}

/// Addresses for [`LatentAttend`].
#[derive(Debug, Clone, Copy, Default)]
pub struct LatentOperands {
    /// Queries in the latents' space, `[tokens, heads * latent]` of float32, aligned to 16 bytes.
    pub queries: u64,
    /// Their rotary parts as the product leaves them, float32: that of the first head.
    pub turned: u64,
    /// `[latent | rotary key]` rows as the product leaves them, float32.
    pub compressed: u64,
    /// Weights of the latents' norm, float32.
    pub norm: Option<u64>,
    /// Tables of angles of queries and of keys.
    pub angles: [u64; 2],
    /// The cache of one head: latents as keys, rotary keys as values.
    pub cache: CacheOperands,
    /// [`LatentAttend::parts`] floats, aligned to 16 bytes: the result.
    pub parts: u64,
    /// [`LatentAttend::stats`] floats, aligned to 16 bytes: what the parts count.
    pub stats: u64,
}

impl LatentAttend {
    /// With a norm that has weights, and rows that follow one another.
    pub fn new(heads: usize, [latent, rope]: [usize; 2], [sequences, length]: [usize; 2]) -> Self {
        let blocks = (heads * length).div_ceil(ROWS).max(1) * sequences.max(1);
        Self {
            heads,
            latent,
            rope,
            angles: Angles { half: rope / 2, traditional: true, magnitude: 1.0 },
            norm: Norm { eps: 1e-6, weight: true },
            sequences,
            length,
            cache: Float::Bf16,
            scale: 1.0,
            turned_strides: [heads * rope, rope],
            compressed_stride: latent + rope,
            splits: (MULTIPROCESSORS as usize / blocks).clamp(1, 64),
            least: 16,
            warps: 8,
        }
    }

    /// Floats of the result's parts, `[tokens, heads, splits, latent]`.
    pub fn parts(&self) -> usize {
        self.stats() / 2 * self.latent
    }

    /// Floats of what they count, `[tokens, heads, splits, 2]`.
    pub fn stats(&self) -> usize {
        2 * self.sequences * self.length * self.heads * self.splits
    }

    /// Bytes of latents and keys of a position, of all sequences.
    pub fn bytes_a_position(&self) -> u64 {
        (self.sequences * (self.latent + self.rope) * self.cache.size()) as u64
    }

    fn pieces(&self) -> usize {
        (self.heads * self.length).div_ceil(ROWS)
    }

    fn check(&self) -> Result<(), KernelError> {
        let step = 16 / self.cache.size();
        let good = (1..=512).contains(&self.latent) && self.latent.is_multiple_of(step);
        size(NAME, "width of a latent", self.latent, good, format!("a multiple of {step} up to 512"))?;
        let good = (2..=128).contains(&self.rope) && self.rope.is_multiple_of(2);
        size(NAME, "width of a rotary key", self.rope, good, "even, up to 128")?;
        let good = (1..=self.rope / 2).contains(&self.angles.half);
        size(NAME, "pairs that are turned", self.angles.half, good, format!("1 to {}", self.rope / 2))?;
        finite(NAME, "magnitude", self.angles.magnitude)?;
        finite(NAME, "the norm's eps", self.norm.eps)?;
        finite(NAME, "the scale", self.scale)?;
        size(NAME, "query heads", self.heads, (1..=1 << 16).contains(&self.heads), "1 to 65536")?;
        size(NAME, "tokens of a sequence", self.length, (1..=8).contains(&self.length), "1 to 8")?;
        size(NAME, "sequences", self.sequences, (1..=4096).contains(&self.sequences), "1 to 4096")?;
        size(NAME, "parts", self.splits, (1..=256).contains(&self.splits), "1 to 256")?;
        size(NAME, "positions of a part", self.least, (1..=1 << 20).contains(&self.least), "1 to 2^20")?;
        size(NAME, "warps", self.warps, (1..=8).contains(&self.warps), "1 to 8")
    }

    fn shared(&self) -> Result<u32, KernelError> {
        let elements = 16 / self.cache.size();
        let columns = (self.latent / elements).div_ceil(32) * 32 * elements;
        let bytes = 4 * self.warps * ROWS * (columns + 2);
        if bytes > SHARED_MOST {
            return Err(KernelError::Shared { kernel: NAME, got: bytes, most: SHARED_MOST });
        }
        Ok(bytes as u32)
    }

    fn operands(&self, o: &LatentOperands) -> (Operands, String) {
        let mut to = Operands::default();
        to.read("queries", Type::F32, o.queries).read("pe", Type::F32, o.turned);
        to.read("compressed", Type::F32, o.compressed);
        if self.norm.weight {
            to.read("norm", Type::F32, o.norm.unwrap_or(0));
        }
        to.read("angles_q", Type::F32, o.angles[0]).read("angles_k", Type::F32, o.angles[1]);
        to.read("position", Type::I32, o.cache.position).number("capacity", o.cache.capacity);
        let ty = self.cache.ty();
        to.write("latents", ty, o.cache.keys).write("keys", ty, o.cache.values);
        to.write("parts", Type::F32, o.parts).write("stats", Type::F32, o.stats);
        let body = format!(
            "latent_attend(Call{{queries, pe, compressed, {}, angles_q, angles_k, position, capacity, latents, \
             keys, parts, stats}});",
            to.name("norm")
        );
        (to, body)
    }

    /// The text.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        cache_constants(self.cache, &mut prelude);
        prelude.int("HEADS", self.heads).int("LATENT", self.latent).int("ROPE", self.rope);
        prelude.int("HALF", self.angles.half).flag("TRADITIONAL", self.angles.traditional);
        prelude.float("MAGNITUDE", self.angles.magnitude).float("SCORE_SCALE", self.scale);
        prelude.float("EPS", self.norm.eps).flag("WEIGHTED", self.norm.weight).int("LENGTH", self.length);
        prelude.int("PE_TOKEN", self.turned_strides[0]).int("PE_HEAD", self.turned_strides[1]);
        prelude.int("COMPRESSED", self.compressed_stride);
        prelude.int("SPLITS", self.splits).int("LEAST", self.least).int("WARPS", self.warps);
        let (operands, body) = self.operands(&LatentOperands::default());
        let device = prelude.with(&[CACHE, TEXT]);
        let bounds = [32 * self.warps as u32, 1];
        Ok(Source { name: NAME, params: operands.params, device, body, bounds })
    }

    /// A launch.
    ///
    /// Errors: [`KernelError`] for operands that are missing, too many or misaligned.
    pub fn launch(&self, o: &LatentOperands) -> Result<Launch, KernelError> {
        self.check()?;
        given(NAME, "the weights of the latents' norm", self.norm.weight, &o.norm)?;
        for (what, address) in [
            ("queries", o.queries),
            ("latents of the cache", o.cache.keys),
            ("keys of the cache", o.cache.values),
            ("parts", o.parts),
            ("what the parts count", o.stats),
        ] {
            aligned(NAME, what, address, 16)?;
        }
        Ok(Launch {
            grid: [self.splits as u32, self.pieces() as u32, self.sequences as u32],
            block: [32 * self.warps as u32, 1, 1],
            shared: self.shared()?,
            args: self.operands(o).0.args,
            // What is read depends on the position: `positions * bytes_a_position()`.
            bytes: 0,
        })
    }
}
