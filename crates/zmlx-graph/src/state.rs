//! What lasts from one call of a model to the next.

use zmlx_mlx::{Array, Result, ops};

/// Number of a state slot in its graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SlotId(pub(crate) usize);

/// What a slot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotKind {
    /// Keys and values of all positions so far.
    KvCache,
    /// The last inputs of a causal convolution.
    ConvState {
        /// How many positions are kept.
        keep: i32,
    },
    /// What a delta net remembers: a matrix a head.
    DeltaState,
}

/// A declared slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Path of the module that owns it.
    pub path: String,
    /// What it is for.
    pub kind: SlotKind,
}

/// Positions by which a key/value cache grows.
pub const KV_STEP: i32 = 256;

/// Keys and values `[batch, kv_heads, capacity, head_dim]`, of which the first `len` positions are used.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    buffers: Option<(Array, Array)>,
    len: i32,
}

impl KvCache {
    /// Appends `[batch, kv_heads, L, head_dim]` and gives keys and values of all positions. The buffers grow in steps of
    /// [`KV_STEP`]; between steps MLX writes in place, since nobody else refers to them.
    pub fn append(&mut self, keys: &Array, values: &Array) -> Result<(Array, Array)> {
        let added = keys.dim(2)?;
        let end = self.len + added;
        let (mut k, mut v) = match self.buffers.take() {
            Some((k, v)) if k.dim(2)? >= end => (k, v),
            old => {
                let steps = (KV_STEP + added - 1) / KV_STEP;
                let grow = |old: Option<&Array>, new: &Array| -> Result<Array> {
                    let mut shape = new.shape().to_vec();
                    shape[2] = steps * KV_STEP;
                    let zeros = ops::zeros(&shape, new.dtype())?;
                    match old {
                        Some(old) => ops::concatenate(&[&old.slice_axis(2, 0, self.len)?, &zeros], 2),
                        None => Ok(zeros),
                    }
                };
                (grow(old.as_ref().map(|o| &o.0), keys)?, grow(old.as_ref().map(|o| &o.1), values)?)
            }
        };
        for (buffer, new) in [(&mut k, keys), (&mut v, values)] {
            let mut stop = new.shape().to_vec();
            stop[2] = end;
            *buffer = ops::slice_update(buffer, new, &[0, 0, self.len, 0], &stop, &[1, 1, 1, 1])?;
        }
        self.len = end;
        let used = (k.slice_axis(2, 0, end)?, v.slice_axis(2, 0, end)?);
        self.buffers = Some((k, v));
        Ok(used)
    }

    /// Number of positions.
    pub fn len(&self) -> i32 {
        self.len
    }

    /// Whether nothing has been appended.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// What a slot holds.
#[derive(Debug, Clone)]
pub enum SlotValue {
    /// Keys and values.
    Kv(KvCache),
    /// Last inputs `[batch, keep, channels]`; `None` at the start, which counts as zeros.
    Conv(Option<Array>),
    /// Matrices `[batch, heads, value, key]` in float32; `None` at the start, which counts as zeros.
    Delta(Option<Array>),
    /// A slot of the CPU's engine, by number.
    Engine(usize),
}

impl SlotValue {
    fn new(kind: SlotKind) -> Self {
        match kind {
            SlotKind::KvCache => Self::Kv(KvCache::default()),
            SlotKind::ConvState { .. } => Self::Conv(None),
            SlotKind::DeltaState => Self::Delta(None),
        }
    }
}

impl SlotValue {
    /// The arrays it holds.
    pub fn arrays(&self) -> Vec<&Array> {
        match self {
            Self::Kv(cache) => cache.buffers.iter().flat_map(|(k, v)| [k, v]).collect(),
            Self::Conv(state) | Self::Delta(state) => state.iter().collect(),
            Self::Engine(_) => Vec::new(),
        }
    }
}

/// The state of one sequence (or one batch of equally long ones).
#[derive(Debug, Clone)]
pub struct State {
    pub(crate) slots: Vec<SlotValue>,
    pub(crate) engine: Vec<zmlx_engine::program::Slot>,
    pub(crate) position: i32,
}

impl State {
    pub(crate) fn new(slots: &[Slot]) -> Self {
        let slots = slots.iter().map(|s| SlotValue::new(s.kind)).collect();
        Self { slots, engine: Vec::new(), position: 0 }
    }

    /// Number of positions seen.
    pub fn position(&self) -> i32 {
        self.position
    }

    /// The arrays it holds, to evaluate them together.
    pub fn arrays(&self) -> Vec<&Array> {
        let mut arrays = Vec::new();
        self.slots.iter().for_each(|slot| arrays.extend(slot.arrays()));
        arrays
    }
}
