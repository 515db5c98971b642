//! Keys and values in few bits.

use zmlx_mlx::{Array, Error, Result, ops};

use crate::state::{KV_STEP, KvCache};

/// How a cache holds keys and values in few bits: as MLX's affine quantisation does, in groups of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvQuantization {
    /// Bits an element: 4 or 8.
    pub bits: i32,
    /// Elements that share a scale: 32, 64 or 128, and a divisor of the width of a head.
    pub group_size: i32,
    /// Calls that begin after so many positions find all positions quantised; those before, none. The first call is never
    /// quantised.
    pub start: i32,
}

/// MLX's affine quantisation of an array: codes (uint32), scales and biases, with its axes but for the last.
pub type Packed = [Array; 3];

impl KvQuantization {
    /// Elements that a 32-bit word holds.
    pub(crate) fn per_word(self) -> i32 {
        32 / self.bits
    }

    fn quantize(self, array: &Array) -> Result<Packed> {
        let made = ops::quantize(array, Some(self.group_size), Some(self.bits), "affine", None)?;
        made.try_into().map_err(|_| Error::Argument("quantize gives codes, scales and biases".to_owned()))
    }
}

/// What attention reads.
#[derive(Debug)]
pub enum Fetched {
    /// Keys and values as they came.
    Plain(Array, Array),
    /// Keys and values in few bits.
    Quantized(Packed, Packed),
}

/// Keys and values `[batch, kv_heads, positions, head_dim]` of all positions, in few bits from some position on: then those
/// before it are quantised too, once, as mlx-lm's `QuantizedKVCache` does it.
#[derive(Debug, Clone)]
pub struct QuantizedKvCache {
    settings: KvQuantization,
    /// As long as nothing is quantised.
    plain: KvCache,
    /// Keys and values with room for more positions.
    packed: Option<(Packed, Packed)>,
    len: i32,
}

impl QuantizedKvCache {
    /// An empty cache.
    pub fn new(settings: KvQuantization) -> Self {
        Self { settings, plain: KvCache::default(), packed: None, len: 0 }
    }

    /// Appends `[batch, kv_heads, L, head_dim]` and gives keys and values of all positions.
    pub fn append(&mut self, keys: &Array, values: &Array) -> Result<Fetched> {
        if self.packed.is_none() && self.len > 0 && self.len >= self.settings.start {
            let plain = std::mem::take(&mut self.plain);
            if let Some((k, v, _)) = plain.kept()? {
                self.packed = Some((self.settings.quantize(&k)?, self.settings.quantize(&v)?));
            }
        }
        let (place, end) = (self.len, self.len + keys.dim(2)?);
        self.len = end;
        let Some((k, v)) = self.packed.take() else {
            let (k, v) = self.plain.append(keys, values)?;
            return Ok(Fetched::Plain(k, v));
        };
        let k = put(k, self.settings.quantize(keys)?, place)?;
        let v = put(v, self.settings.quantize(values)?, place)?;
        let fetched = Fetched::Quantized(leading(&k, end)?, leading(&v, end)?);
        self.packed = Some((k, v));
        Ok(fetched)
    }

    /// Number of positions that have been appended.
    pub fn len(&self) -> i32 {
        self.len
    }

    /// Whether nothing has been appended.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How it quantises.
    pub fn settings(&self) -> KvQuantization {
        self.settings
    }

    /// The arrays it holds, with their room for more positions.
    pub fn arrays(&self) -> Vec<&Array> {
        let packed = self.packed.iter().flat_map(|(k, v)| k.iter().chain(v));
        self.plain.arrays().into_iter().chain(packed).collect()
    }

    /// What it holds of the positions so far; `None` if nothing was appended.
    pub fn kept(&self) -> Result<Option<Fetched>> {
        if let Some((k, v)) = &self.packed {
            return Ok(Some(Fetched::Quantized(leading(k, self.len)?, leading(v, self.len)?)));
        }
        Ok(self.plain.kept()?.map(|(k, v, _)| Fetched::Plain(k, v)))
    }

    /// A cache that goes on after the `len` positions that are held so.
    pub(crate) fn of(settings: KvQuantization, held: Fetched, len: i32) -> Self {
        let (plain, packed) = match held {
            Fetched::Plain(k, v) => (KvCache::of((k, v), len, 0, None), None),
            Fetched::Quantized(k, v) => (KvCache::default(), Some((k, v))),
        };
        Self { settings, plain, packed, len }
    }

    /// Forgets what was appended after `position` positions. What is quantised stays so.
    pub(crate) fn rewind(&mut self, position: i32) {
        self.len = self.len.min(position);
        self.plain.rewind(position);
    }
}

/// The first `end` positions.
fn leading(packed: &Packed, end: i32) -> Result<Packed> {
    let [codes, scales, biases] = packed;
    Ok([codes.slice_axis(2, 0, end)?, scales.slice_axis(2, 0, end)?, biases.slice_axis(2, 0, end)?])
}

/// Writes positions from `place` on; buffers grow in steps of [`KV_STEP`].
fn put(buffers: Packed, new: Packed, place: i32) -> Result<Packed> {
    let one = |buffer: Array, new: &Array| -> Result<Array> {
        let (added, capacity) = (new.dim(2)?, buffer.dim(2)?);
        let mut stop = new.shape().to_vec();
        let buffer = if place + added > capacity {
            stop[2] = (added + KV_STEP - 1) / KV_STEP * KV_STEP;
            let room = ops::zeros(&stop, new.dtype())?;
            ops::concatenate(&[&buffer.slice_axis(2, 0, place)?, &room], 2)?
        } else {
            buffer
        };
        stop[2] = place + added;
        ops::slice_update(&buffer, new, &[0, 0, place, 0], &stop, &[1, 1, 1, 1])
    };
    let [codes, scales, biases] = buffers;
    Ok([one(codes, &new[0])?, one(scales, &new[1])?, one(biases, &new[2])?])
}
