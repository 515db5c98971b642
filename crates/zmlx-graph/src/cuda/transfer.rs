//! State on its way between MLX's arrays and the caches of a decoder.

use std::sync::Arc;

use zmlx_cuda::CudaError;
use zmlx_cuda::memory::External;
use zmlx_cuda::plan::CacheType;
use zmlx_cuda::sequence::{Half, Sequence};
use zmlx_mlx::{Array, Dtype, ops};

use zmlx_cuda::kernels::MOMENTS;
use zmlx_cuda::plan::Step;

use super::{Decoded, Gpu, LaunchMoments, LaunchTime};
use crate::error::{GraphError, Result};
use crate::state::{KvCache, SlotId, SlotValue, State};

/// A sequence on the GPU, or a batch of them. Clones share it until one goes on, which takes a copy first.
#[derive(Debug, Clone)]
pub(crate) struct DeviceState(Arc<Sequence>);

impl From<CudaError> for GraphError {
    fn from(error: CudaError) -> Self {
        Self::Cuda(error.to_string())
    }
}

/// An error of MLX while state moves.
fn moving(source: zmlx_mlx::Error) -> GraphError {
    GraphError::Node { path: "state".to_owned(), op: "copy", source }
}

fn dtype(cache: CacheType) -> Dtype {
    match cache {
        CacheType::F32 => Dtype::Float32,
        CacheType::F16 => Dtype::Float16,
        CacheType::Bf16 => Dtype::Bfloat16,
    }
}

impl Gpu {
    /// The state's sequences, for this state alone: brought from MLX's arrays if they are not on the GPU.
    pub(crate) fn sequence<'s>(&self, state: &'s mut State) -> Result<&'s mut Sequence> {
        let held = match state.device.take() {
            Some(DeviceState(held)) if Arc::strong_count(&held) == 1 => held,
            Some(DeviceState(shared)) => Arc::new(shared.duplicate()?),
            None => Arc::new(self.load(state)?),
        };
        let DeviceState(held) = state.device.insert(DeviceState(held));
        let shared = || GraphError::Malformed("a sequence on the GPU is shared".to_owned());
        Arc::get_mut(held).ok_or_else(shared)
    }

    fn external(&self, array: &Array) -> Result<External> {
        let address = array.device_address().map_err(moving)?;
        let bytes = array.nbytes();
        Ok(External::new(self.decoder.device(), "state", address, bytes, Arc::new(array.clone()))?)
    }

    /// An array as it is copied: of that dtype, in one piece.
    fn as_copied(array: &Array, dtype: Dtype) -> Result<Array> {
        let array =
            if array.dtype() == dtype { array.clone() } else { array.astype(dtype).map_err(moving)? };
        ops::contiguous(&array).map_err(moving)
    }

    /// A sequence that goes on where MLX's arrays end, which are given back.
    fn load(&self, state: &mut State) -> Result<Sequence> {
        let position = usize::try_from(state.position).unwrap_or(0);
        // What was not said before the first call is one.
        let sequences = usize::try_from(state.batch.unwrap_or(1)).unwrap_or(0);
        let mut sequence = Sequence::new(&self.decoder, sequences, position + 1)?;
        for (SlotId(id), &slot) in &self.slots {
            match state.slots.get(*id) {
                Some(SlotValue::Kv(cache)) => {
                    let Some((keys, values)) = &cache.buffers else { continue };
                    let Some(kind) = sequence.cache_type(slot) else { return Err(GraphError::WrongState) };
                    let first = usize::try_from(cache.dropped).unwrap_or(0);
                    let count = usize::try_from(cache.len - cache.dropped).unwrap_or(0);
                    for (half, array) in [(Half::Keys, keys), (Half::Values, values)] {
                        let array = Self::as_copied(array, dtype(kind))?;
                        sequence.load_cache(slot, half, &self.external(&array)?, first, count)?;
                    }
                }
                Some(SlotValue::Conv(Some(array)) | SlotValue::Delta(Some(array))) => {
                    let array = Self::as_copied(array, Dtype::Float32)?;
                    sequence.load_rows(slot, &self.external(&array)?)?;
                }
                // Nothing yet: zeros, as a new sequence has them.
                Some(SlotValue::Conv(None) | SlotValue::Delta(None)) => {}
                Some(SlotValue::Engine(_) | SlotValue::Quantized(_)) | None => {
                    return Err(GraphError::WrongState);
                }
            }
        }
        for slot in &mut state.slots {
            match slot {
                SlotValue::Kv(cache) => cache.buffers = None,
                SlotValue::Conv(array) | SlotValue::Delta(array) => *array = None,
                SlotValue::Engine(_) | SlotValue::Quantized(_) => {}
            }
        }
        Ok(sequence)
    }

    /// Brings the state back to MLX's arrays, if it is on the GPU.
    pub(crate) fn settle(&self, state: &mut State) -> Result<()> {
        let Some(DeviceState(sequence)) = state.device.take() else { return Ok(()) };
        let position = state.position;
        for (SlotId(id), &slot) in &self.slots {
            match state.slots.get_mut(*id) {
                Some(SlotValue::Kv(cache)) => self.settle_cache(&sequence, slot, cache, position)?,
                Some(SlotValue::Conv(array) | SlotValue::Delta(array)) => {
                    let mut shape = self.shapes.get(&SlotId(*id)).ok_or(GraphError::WrongState)?.clone();
                    shape[0] = sequence.sequences() as i32;
                    let rows = fresh(&shape, Dtype::Float32)?;
                    sequence.store_rows(slot, &self.external(&rows)?)?;
                    *array = Some(rows);
                }
                Some(SlotValue::Engine(_) | SlotValue::Quantized(_)) | None => {
                    return Err(GraphError::WrongState);
                }
            }
            if let Some(SlotValue::Conv(Some(array))) = state.slots.get_mut(*id) {
                *array = array.astype(self.activation).map_err(moving)?;
            }
        }
        Ok(())
    }

    fn settle_cache(
        &self,
        sequence: &Sequence,
        slot: usize,
        cache: &mut KvCache,
        position: i32,
    ) -> Result<()> {
        let Some(kind) = sequence.cache_type(slot) else { return Err(GraphError::WrongState) };
        // What a window no longer shows is not brought back.
        let first = cache.window.map_or(0, |w| (position - (w - 1)).max(0));
        let count = position - first;
        let half = |half: Half| -> Result<Array> {
            let part = sequence.cache_part(slot, half)?;
            let (sequences, width) = (sequence.sequences(), part.row / kind.bytes());
            let shape = [sequences, part.heads / sequences, count as usize, width].map(|n| n as i32);
            let rows = fresh(&shape, dtype(kind))?;
            if count > 0 {
                let target = self.external(&rows)?;
                sequence.store_cache(slot, half, &target, first as usize, count as usize)?;
            }
            rows.astype(self.activation).map_err(moving)
        };
        let (keys, values) = (half(Half::Keys)?, half(Half::Values)?);
        (cache.len, cache.dropped) = (position, first);
        cache.buffers = (count > 0).then_some((keys, values));
        Ok(())
    }

    /// An array for the logits of a step, `[sequences, 1, vocabulary]`.
    fn logits(&self, sequence: &Sequence) -> Result<Array> {
        let shape = [sequence.sequences(), 1, self.decoder.vocabulary()].map(|n| n as i32);
        fresh(&shape, Dtype::Float32)
    }

    /// A token of each sequence to logits `[sequences, 1, vocabulary]`, float32.
    pub(crate) fn step(&self, tokens: &[u32], state: &mut State) -> Result<Array> {
        let position = usize::try_from(state.position).unwrap_or(0);
        let sequence = self.sequence(state)?;
        sequence.set(tokens, position)?;
        sequence.submit()?;
        let logits = self.logits(sequence)?;
        let target = self.external(&logits)?;
        sequence.read()?;
        sequence.store_logits(&target)?;
        state.position += 1;
        Ok(logits)
    }

    /// Goes on from `tokens`, one of each sequence, with the likeliest ones, `count` of each at most; those of a step are told
    /// to `tell` as they are known; the next step is under way by then. Ends early when `tell` says so.
    pub(crate) fn decode<E: From<GraphError>>(
        &self,
        tokens: &[u32],
        state: &mut State,
        count: usize,
        mut tell: impl FnMut(&[u32]) -> std::result::Result<bool, E>,
    ) -> std::result::Result<Decoded, E> {
        let cuda = |error: CudaError| E::from(GraphError::from(error));
        let position = usize::try_from(state.position).unwrap_or(0);
        if count == 0 {
            return Ok(Decoded { fed: 0, finite: true });
        }
        let sequence = self.sequence(state)?;
        sequence.set(tokens, position).map_err(cuda)?;
        let mut fed = 0;
        for n in 1..=count {
            while fed < count.min(n + 1) {
                sequence.submit().map_err(cuda)?;
                fed += 1;
            }
            if !tell(&sequence.read().map_err(cuda)?)? {
                break;
            }
        }
        // What is not a number stays in the caches: the last logits show it.
        let finite = sequence.read_logits().map_err(cuda)?.iter().all(|v| !v.is_nan());
        state.position += fed as i32;
        Ok(Decoded { fed, finite })
    }

    /// The moments of the launches of one step.
    pub(crate) fn noted_step(&self, tokens: &[u32], state: &mut State) -> Result<Vec<LaunchMoments>> {
        let position = usize::try_from(state.position).unwrap_or(0);
        let sequence = self.sequence(state)?;
        sequence.set(tokens, position)?;
        let noted = sequence.submit_noted()?;
        let owners = self.decoder.program().owners();
        let launch = |(step, moments): (&Step, [[u64; 2]; MOMENTS])| LaunchMoments {
            name: step.name,
            node: owners[step.stage],
            bytes: step.launch.bytes,
            blocks: step.launch.blocks(),
            moments,
        };
        let moments = sequence.plan().steps.iter().zip(noted).map(launch).collect();
        state.position += 1;
        Ok(moments)
    }

    /// The launches of one step, timed; with its logits.
    pub(crate) fn timed_step(&self, tokens: &[u32], state: &mut State) -> Result<(Array, Vec<LaunchTime>)> {
        let position = usize::try_from(state.position).unwrap_or(0);
        let sequence = self.sequence(state)?;
        sequence.set(tokens, position)?;
        let seconds = sequence.submit_timed()?;
        let owners = self.decoder.program().owners();
        let registers = sequence.registers()?;
        let timed = sequence.plan().steps.iter().zip(seconds).zip(registers);
        let times = timed.map(|((step, seconds), (registers, spilled))| LaunchTime {
            name: step.name,
            node: owners[step.stage],
            seconds,
            bytes: step.launch.bytes,
            registers,
            spilled,
        });
        let times = times.collect();
        let logits = self.logits(sequence)?;
        sequence.store_logits(&self.external(&logits)?)?;
        state.position += 1;
        Ok((logits, times))
    }
}

/// An array of its own memory, to be written past MLX.
fn fresh(shape: &[i32], dtype: Dtype) -> Result<Array> {
    let array = ops::zeros(shape, dtype).map_err(moving)?;
    array.eval().map_err(moving)?;
    Ok(array)
}
