//! Caches and states of sequences in the memory of the GPU.

use zmlx_engine::program::Slot;

use crate::decoder::Decoder;
use crate::error::{CudaError, Result};
use crate::memory::{DeviceBuffer, Rows, copy_rows};
use crate::plan::{CacheType, SlotAddress};
use crate::stream::Stream;

/// What a slot holds. Heads and rows are those of all sequences.
#[derive(Debug)]
pub(crate) enum DeviceSlot {
    Kv { keys: DeviceBuffer, values: DeviceBuffer, heads: usize, widths: [usize; 2], kind: CacheType },
    Rows { values: DeviceBuffer, keep: usize, channels: usize },
}

impl DeviceSlot {
    pub(crate) fn new(decoder: &Decoder, template: &Slot, [sequences, capacity]: [usize; 2]) -> Result<Self> {
        let device = decoder.device();
        match template {
            Slot::Kv { keys, heads, key_width, value_width, .. } => {
                let (kind, heads) = (decoder.parts.cache.of(keys), sequences * heads);
                let make = |width: usize| {
                    DeviceBuffer::new(device, heads * capacity * width * kind.bytes(), "keys and values")
                };
                let (keys, values) = (make(*key_width)?, make(*value_width)?);
                Ok(Self::Kv { keys, values, heads, widths: [*key_width, *value_width], kind })
            }
            Slot::Rows { keep, channels, .. } => {
                let keep = sequences * keep;
                let values = DeviceBuffer::new(device, keep * channels * size_of::<f32>(), "states")?;
                Ok(Self::Rows { values, keep, channels: *channels })
            }
        }
    }

    pub(crate) fn address(&self, [sequences, capacity]: [usize; 2]) -> SlotAddress {
        match self {
            Self::Kv { keys, values, heads, widths: [key_width, value_width], kind } => SlotAddress::Kv {
                keys: keys.address(),
                values: values.address(),
                heads: heads / sequences,
                key_width: *key_width,
                value_width: *value_width,
                capacity,
                kind: *kind,
            },
            Self::Rows { values, keep, channels } => {
                SlotAddress::Rows { values: values.address(), keep: keep / sequences, channels: *channels }
            }
        }
    }

    /// Takes over what another slot of the same form holds; `capacities` of the other and of this.
    pub(crate) fn copy_from(&self, stream: &Stream, other: &Self, capacities: [usize; 2]) -> Result<()> {
        match (other, self) {
            (
                Self::Kv { keys, values, heads, widths, kind },
                Self::Kv { keys: to_keys, values: to_values, .. },
            ) => {
                for ((from, to), width) in [(keys, to_keys), (values, to_values)].iter().zip(widths) {
                    let [old, new] = capacities.map(|c| c * width * kind.bytes());
                    let (from, to) = (
                        Rows { address: from.address(), pitch: old },
                        Rows { address: to.address(), pitch: new },
                    );
                    // SAFETY: both live as long as their slots, which the caller keeps until the stream is done.
                    unsafe { copy_rows(stream, from, to, old.min(new), *heads) }?;
                }
                Ok(())
            }
            (Self::Rows { values, .. }, Self::Rows { values: to, .. }) => {
                let rows = |buffer: &DeviceBuffer| Rows { address: buffer.address(), pitch: buffer.len() };
                // SAFETY: as above.
                unsafe { copy_rows(stream, rows(values), rows(to), values.len().min(to.len()), 1) }
            }
            _ => Err(CudaError::Argument("slots of different forms".to_owned())),
        }
    }
}
