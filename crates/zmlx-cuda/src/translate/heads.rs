//! Heads of queries, keys and values, and attention over a cache.

use std::sync::Arc;

use zmlx_engine::program::Buffer;
use zmlx_engine::stages::{self, Finish as StageFinish, Rope};

use super::{Translator, made};
use crate::error::{CudaError, Result};
use crate::kernels::{
    Angles, Attend, AttendOperands, CacheOperands, Finish, Float, Growth, Heads, HeadsOperands, Qmv,
    QmvOperands, RawHeads,
};
use crate::plan::{CacheType, SlotAddress};

/// Rows of products that become heads, and what they go through.
struct Raw {
    heads: RawHeads,
    operands: HeadsOperands,
    /// The slot that keys and values go to.
    slot: usize,
    /// Where the queries go that attention does not finish on its way.
    queries: Buffer,
}

pub(super) fn float(kind: CacheType) -> Float {
    match kind {
        CacheType::F32 => Float::F32,
        CacheType::F16 => Float::F16,
        CacheType::Bf16 => Float::Bf16,
    }
}

impl Translator<'_> {
    /// Products of queries, keys and values as one launch; then attention that finishes heads on its way, if it comes next,
    /// else a launch that finishes them.
    pub(super) fn qkv(&mut self, stage: &stages::Qkv) -> Result<()> {
        let [q, k, v] = &stage.parts;
        let rows = [q.matrix.rows(), k.matrix.rows(), v.matrix.rows()];
        let all: usize = rows.iter().sum();
        let ((format, weights), (second, third)) =
            (self.matrix(&q.matrix)?, (self.matrix(&k.matrix)?, self.matrix(&v.matrix)?));
        super::products::alike("qkv + norm + rope + append", second.0 == format && third.0 == format)?;
        let (norm, norm_weight) = self.norm(stage.source.norm.as_ref())?;
        let out = self.memory.room(self.sequences() * all * size_of::<f32>())?;
        let bias = self.joined_bias([(&q.bias, rows[0]), (&k.bias, rows[1]), (&v.bias, rows[2])])?;
        let operands = QmvOperands {
            x: self.buffer(stage.source.buffer)?,
            norm: norm_weight,
            weights,
            second: Some(second.1),
            third: Some(third.1),
            bias: [bias, None],
            gate: None,
            residual: None,
            next: None,
            out,
        };
        let kernel = |tokens| Qmv {
            stacked: [rows[1], rows[2]],
            norm,
            bias: [bias.is_some(), false],
            ..Qmv::new(all, q.matrix.columns(), format, tokens)
        };
        self.rows_product("qkv", kernel, operands)?;
        let gated = stage.gate.is_some();
        let query_rows = rows[0] / if gated { 2 } else { 1 };
        let heads = RawHeads {
            heads: q.heads,
            kv_heads: k.heads,
            key_width: query_rows / q.heads,
            value_width: rows[2] / v.heads,
            finish: [finish(&q.finish), finish(&k.finish), finish(&v.finish)],
            strides: [all; 3],
            gates: gated,
        };
        let floats = |n: usize| (n * size_of::<f32>()) as u64;
        let raw = [out, out + floats(rows[0]), out + floats(rows[0] + rows[1])];
        let gates = self.optional_buffer(stage.gate)?;
        let operands = self.heads_operands(raw, [&q.finish, &k.finish, &v.finish], gates)?;
        self.finish_heads(Raw { heads, operands, slot: stage.slot, queries: stage.out })
    }

    /// Heads whose products are stages of their own.
    pub(super) fn qkv_rows(&mut self, stage: &stages::QkvRows) -> Result<()> {
        let [q, k, v] = &stage.parts;
        let heads = RawHeads {
            heads: q.heads,
            kv_heads: k.heads,
            key_width: q.width,
            value_width: v.width,
            finish: [finish(&q.finish), finish(&k.finish), finish(&v.finish)],
            strides: [q.heads * q.width, k.heads * k.width, v.heads * v.width],
            gates: false,
        };
        let raw = [self.buffer(q.buffer)?, self.buffer(k.buffer)?, self.buffer(v.buffer)?];
        let operands = self.heads_operands(raw, [&q.finish, &k.finish, &v.finish], None)?;
        self.finish_heads(Raw { heads, operands, slot: stage.slot, queries: stage.out })
    }

    fn finish_heads(&mut self, raw: Raw) -> Result<()> {
        let next: Option<&stages::Attend> = self.next_stage();
        if let Some(attend) = next.filter(|a| a.queries == raw.queries && a.slot == raw.slot) {
            self.skip_to_next();
            return self.attention(attend, raw.heads, raw.operands, true);
        }
        let (cache, kind) = self.cache(raw.slot)?;
        let queries = self.buffer(raw.queries)?;
        let kernel = Heads { raw: raw.heads, sequences: self.sequences(), length: 1, cache: float(kind) };
        let launch = kernel.launch(&raw.operands, &cache, queries);
        self.push("norm + rope + append", made(kernel.source(), launch)?);
        Ok(())
    }

    /// Attention over queries that are finished.
    pub(super) fn attend(&mut self, stage: &stages::Attend) -> Result<()> {
        let SlotAddress::Kv { heads, key_width, value_width, .. } = self.slot(stage.slot)? else {
            return Err(CudaError::Argument(format!("slot {} holds no keys and values", stage.slot)));
        };
        let raw = RawHeads {
            heads: stage.heads,
            kv_heads: heads,
            key_width,
            value_width,
            finish: [Finish::default(); 3],
            strides: [stage.heads * key_width, heads * key_width, heads * value_width],
            gates: false,
        };
        let queries = self.buffer(stage.queries)?;
        let operands = HeadsOperands { raw: [queries, 0, 0], ..HeadsOperands::default() };
        self.attention(stage, raw, operands, false)
    }

    fn attention(
        &mut self,
        stage: &stages::Attend,
        heads: RawHeads,
        operands: HeadsOperands,
        fresh: bool,
    ) -> Result<()> {
        let (cache, kind) = self.cache(stage.slot)?;
        let sinks = self.optional_constant(stage.sinks.as_ref())?;
        let kernel = Attend {
            fresh,
            window: stage.window,
            sinks: sinks.is_some(),
            ..Attend::new(heads, [self.sequences(), 1], float(kind), stage.scale)
        };
        let [scratch, arrived] = self.shared_room([kernel.scratch(), kernel.arrived()])?;
        let out = self.buffer(stage.out)?;
        let operands = AttendOperands { heads: operands, cache, sinks, scratch, arrived, out };
        let name = if fresh { "norm + rope + append + attention" } else { "attention" };
        self.push(name, made(kernel.source(), kernel.launch(&operands))?);
        Ok(())
    }

    pub(super) fn cache(&self, slot: usize) -> Result<(CacheOperands, CacheType)> {
        match self.slot(slot)? {
            SlotAddress::Kv { keys, values, capacity, kind, .. } => {
                let too_many = |_| CudaError::Argument(format!("{capacity} positions: beyond 31 bits"));
                let capacity = i32::try_from(capacity).map_err(too_many)?;
                let position = self.request.control.position;
                Ok((CacheOperands { position, capacity, keys, values }, kind))
            }
            SlotAddress::Rows { .. } => {
                Err(CudaError::Argument(format!("slot {slot} holds no keys and values")))
            }
        }
    }

    fn heads_operands(
        &mut self,
        raw: [u64; 3],
        finish: [&StageFinish; 3],
        gates: Option<u64>,
    ) -> Result<HeadsOperands> {
        let mut operands = HeadsOperands { raw, gates, ..HeadsOperands::default() };
        for (i, finish) in finish.into_iter().enumerate() {
            operands.norms[i] = match &finish.norm {
                Some(norm) => self.optional_constant(norm.weight.as_ref())?,
                None => None,
            };
            operands.angles[i] = finish.rope.as_ref().map(|rope| self.angles(rope)).transpose()?;
        }
        Ok(operands)
    }

    /// The table of a rotary embedding, one for all layers that share it.
    pub(super) fn angles(&mut self, rope: &Arc<Rope>) -> Result<u64> {
        let key = Arc::as_ptr(rope) as usize;
        if let Some(&address) = self.tables.get(&key) {
            return Ok(address);
        }
        let address = self.memory.table(&rope.table(self.request.capacity))?;
        self.tables.insert(key, address);
        Ok(address)
    }

    /// Biases of rows that follow one another; nothing if there are none.
    pub(super) fn joined_bias<'b>(
        &mut self,
        parts: impl IntoIterator<Item = (&'b Option<Vec<f32>>, usize), IntoIter: Clone>,
    ) -> Result<Option<u64>> {
        let parts = parts.into_iter();
        if parts.clone().all(|(bias, _)| bias.is_none()) {
            return Ok(None);
        }
        let joined: Vec<f32> =
            parts.flat_map(|(bias, rows)| bias.clone().unwrap_or_else(|| vec![0.0; rows])).collect();
        self.memory.constant(&joined).map(Some)
    }
}

/// What a head goes through, as kernels have it.
fn finish(finish: &StageFinish) -> Finish {
    Finish {
        norm: finish.norm.as_ref().map(|n| crate::kernels::Norm { eps: n.eps, weight: n.weight.is_some() }),
        rope: finish.rope.as_ref().map(|r| Angles {
            half: r.half(),
            traditional: r.is_traditional(),
            magnitude: r.magnitude(),
        }),
        growth: finish.growth.map(|g| Growth { beta: g.beta, original_context: g.original_context }),
    }
}
