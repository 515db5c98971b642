//! What lasts from one call of a model to the next.

use zmlx_mlx::{Array, Result, ops};

use crate::cuda::DeviceState;
use crate::quantized_cache::{KvQuantization, QuantizedKvCache};

/// Number of a state slot in its graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SlotId(pub(crate) usize);

/// What a slot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotKind {
    /// Keys and values of all positions so far.
    KvCache,
    /// The same in few bits.
    QuantizedKvCache(KvQuantization),
    /// Keys and values of the last positions, for attention with a sliding window.
    WindowCache {
        /// How many positions a query sees, the own one included.
        window: i32,
    },
    /// The last inputs of a causal convolution.
    ConvState {
        /// How many positions are kept.
        keep: i32,
    },
    /// What a delta net remembers: a matrix a head.
    DeltaState,
}

impl SlotKind {
    /// Its name in files and in printed graphs.
    pub fn word(self) -> &'static str {
        match self {
            Self::KvCache => "kv_cache",
            Self::QuantizedKvCache(_) => "quantized_kv_cache",
            Self::WindowCache { .. } => "window_cache",
            Self::ConvState { .. } => "conv_state",
            Self::DeltaState => "delta_state",
        }
    }

    /// Whether it can always go back to an earlier position by forgetting what came after it.
    pub fn rewinds(self) -> bool {
        matches!(self, Self::KvCache | Self::QuantizedKvCache(_))
    }

    /// Whether it holds keys and values, in the model's dtype.
    pub fn holds_keys(self) -> bool {
        matches!(self, Self::KvCache | Self::WindowCache { .. })
    }

    /// How many positions a cache keeps for a query, if not all.
    pub fn window(self) -> Option<i32> {
        match self {
            Self::WindowCache { window } => Some(window),
            _ => None,
        }
    }
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

/// Keys and values `[batch, kv_heads, capacity, head_dim]` of the last positions, in their order: of all positions, or of
/// those that a sliding window may still look at.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    pub(crate) buffers: Option<(Array, Array)>,
    /// The positions that have been appended.
    pub(crate) len: i32,
    /// Of those, how many at the start the buffers no longer hold.
    pub(crate) dropped: i32,
    /// How many positions a query sees, the own one included.
    pub(crate) window: Option<i32>,
}

impl KvCache {
    /// A cache for attention that sees `window` positions, the own one included. What lies further back is dropped, so that
    /// its buffers stay small however long the sequence.
    ///
    /// A query of a call sees what [`Self::append`] gave for that call: the same positions as in mlx-lm's rotating cache,
    /// which has them in another order once it has turned.
    pub fn windowed(window: i32) -> Self {
        Self { window: Some(window.max(1)), ..Self::default() }
    }

    /// Appends `[batch, kv_heads, L, head_dim]` and gives keys and values of all positions; with a window, of those that the
    /// first of the new positions sees and all after it. The buffers grow in steps of [`KV_STEP`]; between steps MLX writes
    /// in place, since nobody else refers to them.
    pub fn append(&mut self, keys: &Array, values: &Array) -> Result<(Array, Array)> {
        let added = keys.dim(2)?;
        let end = self.len + added;
        // The first position that is needed.
        let first = self.first_seen(self.len);
        let fits = |capacity: i32| {
            let roomy = self.window.is_some() && capacity > end - first + 2 * KV_STEP;
            capacity >= end - self.dropped && !roomy
        };
        let (mut k, mut v) = match self.buffers.take() {
            Some((k, v)) if fits(k.dim(2)?) => (k, v),
            old => {
                let kept = self.len - first;
                let from = first - self.dropped;
                let grow = |old: Option<&Array>, new: &Array| -> Result<Array> {
                    let mut shape = new.shape().to_vec();
                    shape[2] = (added + KV_STEP - 1) / KV_STEP * KV_STEP;
                    let zeros = ops::zeros(&shape, new.dtype())?;
                    match old {
                        Some(old) => ops::concatenate(&[&old.slice_axis(2, from, from + kept)?, &zeros], 2),
                        None => Ok(zeros),
                    }
                };
                let grown =
                    (grow(old.as_ref().map(|o| &o.0), keys)?, grow(old.as_ref().map(|o| &o.1), values)?);
                self.dropped = first;
                grown
            }
        };
        let place = self.len - self.dropped;
        for (buffer, new) in [(&mut k, keys), (&mut v, values)] {
            let mut stop = new.shape().to_vec();
            stop[2] = place + added;
            *buffer = ops::slice_update(buffer, new, &[0, 0, place, 0], &stop, &[1, 1, 1, 1])?;
        }
        self.len = end;
        let (from, to) = (first - self.dropped, end - self.dropped);
        let used = (k.slice_axis(2, from, to)?, v.slice_axis(2, from, to)?);
        self.buffers = Some((k, v));
        Ok(used)
    }

    /// The arrays it holds, with their room for more positions.
    pub fn arrays(&self) -> Vec<&Array> {
        self.buffers.iter().flat_map(|(k, v)| [k, v]).collect()
    }

    /// The first position that the one after `position` others sees.
    fn first_seen(&self, position: i32) -> i32 {
        self.window.map_or(0, |w| (position - (w - 1)).max(0))
    }

    /// Keys and values `[batch, kv_heads, positions, head_dim]` of as many of the last positions as any later one sees, and
    /// the first of these positions. `None` if nothing was appended.
    pub fn kept(&self) -> Result<Option<(Array, Array, i32)>> {
        let Some((k, v)) = &self.buffers else { return Ok(None) };
        let first = self.first_seen(self.len);
        let (from, to) = (first - self.dropped, self.len - self.dropped);
        Ok(Some((k.slice_axis(2, from, to)?, v.slice_axis(2, from, to)?, first)))
    }

    /// A cache that goes on after `len` positions, of which it has those from `first` on.
    pub(crate) fn of(buffers: (Array, Array), len: i32, first: i32, window: Option<i32>) -> Self {
        Self { buffers: Some(buffers), len, dropped: first, window }
    }

    /// Whether `rewind` can go back to `position`: a window drops what no later position sees.
    pub fn rewinds_to(&self, position: i32) -> bool {
        position <= self.len && self.dropped <= self.first_seen(position)
    }

    /// Forgets what was appended after `position` positions.
    pub(crate) fn rewind(&mut self, position: i32) {
        self.len = self.len.min(position);
    }

    /// Number of positions that have been appended.
    pub fn len(&self) -> i32 {
        self.len
    }

    /// Whether nothing has been appended.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many positions a query sees, if not all.
    pub fn window(&self) -> Option<i32> {
        self.window
    }
}

/// What a slot holds.
#[derive(Debug, Clone)]
pub enum SlotValue {
    /// Keys and values.
    Kv(KvCache),
    /// Keys and values in few bits.
    Quantized(QuantizedKvCache),
    /// Last inputs `[batch, keep, channels]`; `None` at the start, which counts as zeros.
    Conv(Option<Array>),
    /// Matrices `[batch, heads, value, key]` in float32; `None` at the start, which counts as zeros.
    Delta(Option<Array>),
    /// A slot of the CPU's engine, by number.
    Engine(usize),
}

impl SlotValue {
    pub(crate) fn new(kind: SlotKind) -> Self {
        match kind {
            SlotKind::KvCache => Self::Kv(KvCache::default()),
            SlotKind::QuantizedKvCache(with) => Self::Quantized(QuantizedKvCache::new(with)),
            SlotKind::WindowCache { window } => Self::Kv(KvCache::windowed(window)),
            SlotKind::ConvState { .. } => Self::Conv(None),
            SlotKind::DeltaState => Self::Delta(None),
        }
    }
}

impl SlotValue {
    /// The arrays it holds.
    pub fn arrays(&self) -> Vec<&Array> {
        match self {
            Self::Kv(cache) => cache.arrays(),
            Self::Quantized(cache) => cache.arrays(),
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
    /// How many sequences it is of; not known before the first call.
    pub(crate) batch: Option<i32>,
    /// What decodes past MLX, once it does: then the slots hold no arrays.
    pub(crate) device: Option<DeviceState>,
}

impl State {
    pub(crate) fn new(slots: &[Slot]) -> Self {
        let slots = slots.iter().map(|s| SlotValue::new(s.kind)).collect();
        Self { slots, engine: Vec::new(), position: 0, batch: None, device: None }
    }

    /// Number of positions seen.
    pub fn position(&self) -> i32 {
        self.position
    }

    /// Whether it is in the caches of a GPU's decoder and not in arrays.
    pub fn is_on_device(&self) -> bool {
        self.device.is_some()
    }

    /// The arrays it holds, to evaluate them together.
    pub fn arrays(&self) -> Vec<&Array> {
        let mut arrays = Vec::new();
        self.slots.iter().for_each(|slot| arrays.extend(slot.arrays()));
        arrays
    }
}
