//! What heads go through between their products and the cache.

use super::product::Float;
use super::{KernelError, Launch, Norm, Operands, Prelude, Source, Type, finite, given, size};

pub(super) const HEADS: &str = include_str!("heads.cuh");
pub(super) const CACHE: &str = include_str!("cache.cuh");
const TEXT: &str = include_str!("heads.cu");
const NAME: &str = "zmlx_heads";

/// Growth of queries with their position: `1 + beta * ln(1 + floor(position / original_context))`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Growth {
    /// How fast.
    pub beta: f32,
    /// Positions below which nothing changes.
    pub original_context: f32,
}

/// Rotary embedding of the leading part of a head. The angles are a table in device memory: for each position all
/// cosines, then all sines, float32, `[positions, 2 * half]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Angles {
    /// Pairs that are turned.
    pub half: usize,
    /// Neighbours are pairs, not halves.
    pub traditional: bool,
    /// Multiplies what is turned, first.
    pub magnitude: f32,
}

/// What a head goes through: norm over it, rotary embedding, growth.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Finish {
    /// Norm over the head.
    pub norm: Option<Norm>,
    /// How it is turned.
    pub rope: Option<Angles>,
    /// How it grows after that.
    pub growth: Option<Growth>,
}

impl Finish {
    fn check(&self, kernel: &'static str, width: usize) -> Result<(), KernelError> {
        if let Some(norm) = self.norm {
            finite(kernel, "eps of a head's norm", norm.eps)?;
        }
        if let Some(rope) = self.rope {
            let good = rope.half > 0 && 2 * rope.half <= width;
            size(kernel, "pairs that are turned", rope.half, good, format!("1 to {}", width / 2))?;
            finite(kernel, "magnitude", rope.magnitude)?;
        }
        if let Some(growth) = self.growth {
            finite(kernel, "beta", growth.beta)?;
            finite(kernel, "original context", growth.original_context)?;
        }
        Ok(())
    }

    fn constants(&self, which: usize, width: usize, stride: usize, to: &mut Prelude) {
        let Self { norm, rope, growth } = *self;
        let name = |what: &str| format!("{what}_{which}");
        to.flag(&name("NORM"), norm.is_some());
        to.flag(&name("WEIGHTED"), norm.is_some_and(|n| n.weight));
        to.float(&name("EPS"), norm.map_or(0.0, |n| n.eps));
        to.int(&name("HALF"), rope.map_or(0, |r| r.half));
        to.flag(&name("TRADITIONAL"), rope.is_some_and(|r| r.traditional));
        to.float(&name("MAGNITUDE"), rope.map_or(1.0, |r| r.magnitude));
        to.flag(&name("GROWS"), growth.is_some());
        to.float(&name("BETA"), growth.map_or(0.0, |g| g.beta));
        to.float(&name("CONTEXT"), growth.map_or(1.0, |g| g.original_context));
        to.int(&name("WIDTH"), width).int(&name("STRIDE"), stride);
    }
}

/// Heads of queries, keys and values, and the rows of products that they lie in.
///
/// Rows are float32, `tokens = sequences * length` of them; row `t` of queries begins at `raw + t * stride`. Heads follow one
/// another in a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RawHeads {
    /// Query heads, a multiple of the others.
    pub heads: usize,
    /// Heads of keys and of values.
    pub kv_heads: usize,
    /// Width of a head of queries and keys.
    pub key_width: usize,
    /// Width of a head of values.
    pub value_width: usize,
    /// What queries, keys and values go through.
    pub finish: [Finish; 3],
    /// Floats from row to row.
    pub strides: [usize; 3],
    /// Each query head is followed by a gate as wide as it.
    pub gates: bool,
}

impl RawHeads {
    pub(super) fn check(&self, kernel: &'static str) -> Result<(), KernelError> {
        let Self { heads, kv_heads, key_width, value_width, .. } = *self;
        let good = kv_heads > 0 && heads.is_multiple_of(kv_heads) && heads > 0;
        size(kernel, "query heads", heads, good, format!("a multiple of {kv_heads} key heads"))?;
        for (finish, width) in self.finish.iter().zip([key_width, key_width, value_width]) {
            size(kernel, "width of a head", width, (1..=1024).contains(&width), "1 to 1024")?;
            finish.check(kernel, width)?;
        }
        Ok(())
    }

    pub(super) fn constants(&self, to: &mut Prelude) {
        let widths = [self.key_width, self.key_width, self.value_width];
        for (i, ((finish, width), stride)) in self.finish.iter().zip(widths).zip(self.strides).enumerate() {
            finish.constants(i, width, stride, to);
        }
        to.int("HEADS", self.heads).int("KV_HEADS", self.kv_heads).flag("GATES", self.gates);
    }

    /// Adds norm weights and angles; the texts of the three `HeadData`.
    pub(super) fn operands(&self, to: &mut Operands, o: &HeadsOperands) -> [String; 3] {
        let weights = ["weight_q", "weight_k", "weight_v"];
        let angles = ["angles_q", "angles_k", "angles_v"];
        [0, 1, 2].map(|i| {
            let Finish { norm, rope, .. } = self.finish[i];
            if norm.is_some_and(|n| n.weight) {
                to.read(weights[i], Type::F32, o.norms[i].unwrap_or(0));
            }
            if rope.is_some() {
                to.read(angles[i], Type::F32, o.angles[i].unwrap_or(0));
            }
            format!("HeadData{{{}, {}}}", to.name(weights[i]), to.name(angles[i]))
        })
    }

    pub(super) fn check_operands(&self, kernel: &'static str, o: &HeadsOperands) -> Result<(), KernelError> {
        for i in 0..3 {
            let Finish { norm, rope, .. } = self.finish[i];
            given(kernel, "the weights of a head's norm", norm.is_some_and(|n| n.weight), &o.norms[i])?;
            given(kernel, "the angles", rope.is_some(), &o.angles[i])?;
        }
        given(kernel, "the gates", self.gates, &o.gates)
    }
}

/// Addresses of rows of heads and what they need.
#[derive(Debug, Clone, Copy, Default)]
pub struct HeadsOperands {
    /// Rows of queries, keys and values.
    pub raw: [u64; 3],
    /// Weights of the norms.
    pub norms: [Option<u64>; 3],
    /// Tables of angles.
    pub angles: [Option<u64>; 3],
    /// Where gates go, `[tokens, heads * key_width]`.
    pub gates: Option<u64>,
}

/// Addresses of a cache.
#[derive(Debug, Clone, Copy, Default)]
pub struct CacheOperands {
    /// The position of the first token of the call, one int32.
    pub position: u64,
    /// Positions that a head has room for.
    pub capacity: i32,
    /// `[sequences, kv_heads, capacity, key_width]`.
    pub keys: u64,
    /// `[sequences, kv_heads, capacity, value_width]`.
    pub values: u64,
}

/// Rows of products to queries `[tokens, heads * key_width]` and a cache, as a launch of its own ([`super::Attend`] can do
/// the same on its way).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// The heads.
    pub raw: RawHeads,
    /// Sequences.
    pub sequences: usize,
    /// Tokens of each.
    pub length: usize,
    /// Type of the cache.
    pub cache: Float,
}

impl Heads {
    fn check(&self) -> Result<(), KernelError> {
        self.raw.check(NAME)?;
        let tokens = self.sequences * self.length;
        size(NAME, "rows", tokens, (1..=65535).contains(&tokens), "1 to 65535")
    }

    fn operands(&self, o: &HeadsOperands, c: &CacheOperands, queries: u64) -> (Operands, String) {
        let mut to = Operands::default();
        for (name, address) in ["raw_q", "raw_k", "raw_v"].into_iter().zip(o.raw) {
            to.read(name, Type::F32, address);
        }
        let [q, k, v] = self.raw.operands(&mut to, o);
        to.read("position", Type::I32, c.position).number("capacity", c.capacity);
        to.write("queries", Type::F32, queries);
        if self.raw.gates {
            to.write("gates", Type::F32, o.gates.unwrap_or(0));
        }
        to.write("keys", self.cache.ty(), c.keys).write("values", self.cache.ty(), c.values);
        let gates = to.name("gates");
        let body = format!(
            "heads(raw_q, raw_k, raw_v, {q}, {k}, {v}, position, capacity, queries, {gates}, keys, values);"
        );
        (to, body)
    }

    /// The text.
    ///
    /// Errors: [`KernelError`] for shapes that it is not made for.
    pub fn source(&self) -> Result<Source, KernelError> {
        self.check()?;
        let mut prelude = Prelude::default();
        self.raw.constants(&mut prelude);
        cache_constants(self.cache, &mut prelude);
        prelude.int("LENGTH", self.length);
        let (operands, body) = self.operands(&HeadsOperands::default(), &CacheOperands::default(), 0);
        let device = prelude.with(&[HEADS, TEXT]);
        Ok(Source { name: NAME, params: operands.params, device, body, bounds: [32, 1] })
    }

    /// A launch; `queries` is where they go.
    ///
    /// Errors: [`KernelError`] for operands that are missing or too many.
    pub fn launch(&self, o: &HeadsOperands, c: &CacheOperands, queries: u64) -> Result<Launch, KernelError> {
        self.check()?;
        self.raw.check_operands(NAME, o)?;
        Ok(Launch {
            grid: [(self.raw.heads + 2 * self.raw.kv_heads) as u32, (self.sequences * self.length) as u32, 1],
            block: [32, 1, 1],
            shared: 0,
            args: self.operands(o, c, queries).0.args,
            bytes: 0,
        })
    }
}

pub(super) fn cache_constants(cache: Float, to: &mut Prelude) {
    to.line(format_args!("using CACHE = {};", cache.ty().cuda())).int("CACHE_KIND", cache.kind());
}
