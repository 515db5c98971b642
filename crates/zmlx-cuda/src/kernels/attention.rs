//! Attention of a few tokens over a cache.

use super::heads::{CACHE, CacheOperands, HEADS, HeadsOperands, RawHeads, cache_constants};
use super::product::Float;
use super::{
    KernelError, Launch, MULTIPROCESSORS, Operands, Prelude, SHARED_MOST, Source, Type, aligned, finite,
    given, size,
};

const NAME: &str = "zmlx_attend";
const SHARED: &str = include_str!("attention.cuh");
const PLAIN: &str = include_str!("attention_plain.cuh");
const MMA: &str = include_str!("attention_mma.cuh");
const TEXT: &str = include_str!("attention.cu");

/// `softmax(scale * q @ k.T) @ v`, causal; query heads in groups that share a key/value head. One launch: positions are cut
/// in parts, and the last block of a head adds them up.
///
/// Where the cache has 16 bits and widths suit ([`Attend::on_tensor_cores`]) products are tensor cores': queries and weights
/// in two parts of the cache's type (16 bits of mantissa in bf16, 22 in f16), sums in float32. Else all is float32.
///
/// With `fresh` queries, keys and values are rows of products: heads are finished on the way, and keys and values of the
/// call appended to the cache. Without, queries are `[tokens, heads * key_width]` and the cache holds the call's keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attend {
    /// The heads. Without `fresh` only their numbers and widths count.
    pub heads: RawHeads,
    /// Whether heads are finished on the way.
    pub fresh: bool,
    /// Sequences.
    pub sequences: usize,
    /// Tokens of each.
    pub length: usize,
    /// Type of the cache.
    pub cache: Float,
    /// Multiplies the scores.
    pub scale: f32,
    /// Only so many positions back, the own one included.
    pub window: Option<usize>,
    /// Whether heads have a score that takes part in their softmax and has no value.
    pub sinks: bool,
    /// Parts that positions are cut in at most.
    pub splits: usize,
    /// Positions that a part has at least.
    pub least: usize,
    /// Warps of a block.
    pub warps: usize,
    /// Positions that a stream of lanes asks for at once. Tensor cores have a number of their own.
    pub unroll: usize,
}

/// Addresses for [`Attend`].
#[derive(Debug, Clone, Copy, Default)]
pub struct AttendOperands {
    /// Rows of products and what they need; without `fresh` `raw[0]` alone counts: the queries.
    pub heads: HeadsOperands,
    /// The cache.
    pub cache: CacheOperands,
    /// A score a head, float32.
    pub sinks: Option<u64>,
    /// [`Attend::scratch`] floats, aligned to 16 bytes, of no meaning between launches.
    pub scratch: u64,
    /// [`Attend::arrived`] 32-bit counters that are zero before the first launch; each launch leaves them so. Launches that may
    /// run at the same time need their own.
    pub arrived: u64,
    /// The result, `[tokens, heads * value_width]`.
    pub out: u64,
}

impl Attend {
    /// Over finished queries and a cache.
    pub fn new(heads: RawHeads, [sequences, length]: [usize; 2], cache: Float, scale: f32) -> Self {
        let pieces = (heads.heads / heads.kv_heads.max(1) * length).div_ceil(8).max(1);
        let blocks = (heads.kv_heads * sequences * pieces).max(1);
        let splits = (MULTIPROCESSORS as usize / blocks).clamp(1, 64);
        Self {
            heads,
            fresh: false,
            sequences,
            length,
            cache,
            scale,
            window: None,
            sinks: false,
            splits,
            // Two parts and more cost a meeting of blocks.
            least: 256,
            warps: 8,
            unroll: 2,
        }
    }

    /// Query rows of a block.
    fn rows(&self) -> usize {
        (self.heads.heads / self.heads.kv_heads * self.length).min(8)
    }

    fn pieces(&self) -> usize {
        (self.heads.heads / self.heads.kv_heads * self.length).div_ceil(self.rows())
    }

    /// Lanes that share a position.
    fn lanes(&self) -> usize {
        let units = self.heads.key_width.max(self.heads.value_width) * self.cache.size() / 16;
        units.next_power_of_two().clamp(4, 32)
    }

    /// Floats of scratch.
    pub fn scratch(&self) -> usize {
        let blocks = self.sequences * self.pieces() * self.heads.kv_heads * self.splits;
        blocks * self.rows() * (self.heads.value_width + 2)
    }

    /// Counters.
    pub fn arrived(&self) -> usize {
        self.sequences * self.pieces() * self.heads.kv_heads
    }

    fn check(&self) -> Result<(), KernelError> {
        self.heads.check(NAME)?;
        let step = 16 / self.cache.size();
        for width in [self.heads.key_width, self.heads.value_width] {
            let good = width.is_multiple_of(step) && width.is_multiple_of(4) && width <= 1024;
            size(NAME, "width of a head", width, good, format!("a multiple of {step} up to 1024"))?;
        }
        finite(NAME, "the scale", self.scale)?;
        size(NAME, "tokens of a sequence", self.length, (1..=8).contains(&self.length), "1 to 8")?;
        size(NAME, "sequences", self.sequences, (1..=4096).contains(&self.sequences), "1 to 4096")?;
        size(NAME, "window", self.window.unwrap_or(1), self.window != Some(0), "1 or more")?;
        size(NAME, "parts", self.splits, (1..=256).contains(&self.splits), "1 to 256")?;
        size(NAME, "positions of a part", self.least, self.least > 0, "1 or more")?;
        size(NAME, "warps", self.warps, (1..=32).contains(&self.warps), "1 to 32")?;
        size(NAME, "unrolled positions", self.unroll, (1..=8).contains(&self.unroll), "1 to 8")
    }

    /// Whether products are tensor cores': a cache of 16 bits, keys of a multiple of 32 and values of a multiple of 64, both
    /// up to 256 wide.
    pub fn on_tensor_cores(&self) -> bool {
        let (k, v) = (self.heads.key_width, self.heads.value_width);
        self.cache.size() == 2 && k.is_multiple_of(32) && v.is_multiple_of(64) && k.max(v) <= 256
    }

    /// Blocks that a multiprocessor should hold: on tensor cores the registers are capped, so that a block begins while blocks
    /// of the launch before are still there. Wide heads and more than a token need more of them.
    fn resident(&self) -> u32 {
        let widest = self.heads.key_width.max(self.heads.value_width);
        let capped = self.fresh && self.length == 1 && self.on_tensor_cores() && widest <= 128;
        if capped { (16 / self.warps as u32).max(1) } else { 1 }
    }

    fn shared(&self) -> Result<u32, KernelError> {
        let (k, v, rows) = (self.heads.key_width, self.heads.value_width, self.rows());
        let tensor = self.on_tensor_cores();
        // Rows of queries are padded where their length would send lanes to the same banks.
        let queries = rows * if tensor && k.is_multiple_of(64) { k + 32 } else { k };
        let fresh = if self.fresh { self.length * (k + v) } else { 0 };
        let parts = self.warps * rows * (v + 10);
        let floats = queries + if tensor { fresh / 2 } else { fresh } + parts;
        let bytes = 4 * floats.max(2 * self.splits * rows);
        if bytes > SHARED_MOST {
            return Err(KernelError::Shared { kernel: NAME, got: bytes, most: SHARED_MOST });
        }
        Ok(bytes as u32)
    }

    fn operands(&self, o: &AttendOperands) -> (Operands, String) {
        let mut to = Operands::default();
        to.read("raw_q", Type::F32, o.heads.raw[0]);
        let mut data = ["HeadData{}", "HeadData{}", "HeadData{}"].map(str::to_owned);
        if self.fresh {
            to.read("raw_k", Type::F32, o.heads.raw[1]).read("raw_v", Type::F32, o.heads.raw[2]);
            data = self.heads.operands(&mut to, &o.heads);
        }
        to.read("position", Type::I32, o.cache.position).number("capacity", o.cache.capacity);
        if self.sinks {
            to.read("sinks", Type::F32, o.sinks.unwrap_or(0));
        }
        let ty = self.cache.ty();
        if self.fresh {
            to.write("keys", ty, o.cache.keys).write("values", ty, o.cache.values);
            if self.heads.gates {
                to.write("gates", Type::F32, o.heads.gates.unwrap_or(0));
            }
        } else {
            to.read("keys", ty, o.cache.keys).read("values", ty, o.cache.values);
        }
        to.write("scratch", Type::F32, o.scratch).write("arrived", Type::U32, o.arrived);
        to.write("out", Type::F32, o.out);
        let [q, k, v] = data;
        let n = |name| to.name(name);
        let body = format!(
            "attend(Call{{raw_q, {}, {}, {q}, {k}, {v}, position, capacity, {}, const_cast<CACHE*>(keys), \
             const_cast<CACHE*>(values), {}, scratch, out, arrived}});",
            n("raw_k"),
            n("raw_v"),
            n("sinks"),
            n("gates")
        );
        (to, body)
    }

    /// The text.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        self.heads.constants(&mut prelude);
        cache_constants(self.cache, &mut prelude);
        prelude.int("LENGTH", self.length).int("SEQUENCES", self.sequences).flag("FRESH", self.fresh);
        prelude
            .float("SCORE_SCALE", self.scale)
            .int("WINDOW", self.window.unwrap_or(0))
            .flag("SINKS", self.sinks);
        prelude.int("SPLITS", self.splits).int("LEAST", self.least).int("WARPS", self.warps);
        prelude.int("UNROLL", self.unroll).int("LANES", self.lanes()).int("QUERY_ROWS", self.rows());
        let (operands, body) = self.operands(&AttendOperands::default());
        Ok(Source {
            name: NAME,
            params: operands.params,
            device: prelude.with(&[
                HEADS,
                CACHE,
                SHARED,
                if self.on_tensor_cores() { MMA } else { PLAIN },
                TEXT,
            ]),
            body,
            bounds: [32 * self.warps as u32, self.resident()],
        })
    }

    /// A launch.
    ///
    /// Errors: [`KernelError`] for operands that are missing, too many or misaligned.
    pub fn launch(&self, o: &AttendOperands) -> Result<Launch, KernelError> {
        self.check()?;
        if self.fresh {
            self.heads.check_operands(NAME, &o.heads)?;
        }
        given(NAME, "the sinks", self.sinks, &o.sinks)?;
        for (what, address) in [("keys", o.cache.keys), ("values", o.cache.values), ("scratch", o.scratch)] {
            aligned(NAME, what, address, 16)?;
        }
        Ok(Launch {
            grid: [self.splits as u32, self.heads.kv_heads as u32, (self.sequences * self.pieces()) as u32],
            block: [32 * self.warps as u32, 1, 1],
            shared: self.shared()?,
            args: self.operands(o).0.args,
            // What is read depends on the position: `positions * bytes_a_position()`.
            bytes: 0,
        })
    }

    /// Bytes of keys and values of a position, of all sequences.
    pub fn bytes_a_position(&self) -> u64 {
        let RawHeads { kv_heads, key_width, value_width, .. } = self.heads;
        (self.sequences * kv_heads * (key_width + value_width) * self.cache.size()) as u64
    }
}
