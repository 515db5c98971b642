//! States taken out of a model and put back: to go back to an earlier position, or to go on in another process.

use half::f16;
use zmlx_engine::kept::{Kept, NotKept, Numbers};
use zmlx_mlx::{Array, Dtype, ops};

use crate::error::GraphError;
use crate::exec::Executor;
use crate::infer::Types;
use crate::native::write_bytes;
use crate::quantized_cache::{Fetched, QuantizedKvCache};
use crate::shape::{Dim, DtypeSpec, Sizes, Type};
use crate::state::{KvCache, SlotId, SlotKind, SlotValue, State};

/// The names that arrays of slots have.
pub const ARRAY_NAMES: &[&str] = &[
    "keys",
    "values",
    "state",
    "keys.codes",
    "keys.scales",
    "keys.biases",
    "values.codes",
    "values.scales",
    "values.biases",
];

const PLAIN: [&str; 2] = ["keys", "values"];
const STATE: [&str; 1] = ["state"];
const PACKED: [&str; 6] =
    ["keys.codes", "keys.scales", "keys.biases", "values.codes", "values.scales", "values.biases"];

/// What one slot holds, in a form that says nothing of who held it.
#[derive(Debug, Clone)]
pub struct SavedSlot {
    /// The first position of keys and values; else 0.
    pub first: i32,
    /// The arrays by name: `keys` and `values` `[batch, kv_heads, positions, head_dim]`, or of each `codes`, `scales` and
    /// `biases`, or `state`. Empty if nothing is held yet.
    pub arrays: Vec<(&'static str, Array)>,
}

/// What a state holds of the positions so far, without the room for others.
///
/// It is the same whether the CPU's engine held it or MLX, so that what a patched model saved goes on in a stock one and
/// the other way round, as long as both keep it in the same dtype.
#[derive(Debug, Clone)]
pub struct SavedState {
    /// Positions seen.
    pub position: i32,
    /// The slots by number; `None` for one that was left out.
    pub slots: Vec<Option<SavedSlot>>,
}

impl SavedState {
    /// Bytes of its arrays.
    pub fn bytes(&self) -> usize {
        let arrays = self.slots.iter().flatten().flat_map(|slot| &slot.arrays);
        arrays.map(|(_, array)| array.nbytes()).sum()
    }
}

/// Which slots are taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// All, to go on from nothing else.
    All,
    /// Those that cannot go back to an earlier position by forgetting what came after: states of convolutions and delta
    /// nets, and keys and values of a sliding window.
    Unrewindable,
}

/// Why a saved state cannot be put into a model.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SavedError {
    /// Another number of slots.
    #[error("it has {found} slots and the model {expected}: it is of another model")]
    Slots {
        /// How many it has.
        found: usize,
        /// How many the model has.
        expected: usize,
    },
    /// A slot does not fit.
    #[error("slot {path}: {problem}")]
    Slot {
        /// Path of the module.
        path: String,
        /// What does not fit, and what would.
        problem: String,
    },
    /// It belongs to a later position than the state has, or a slot that cannot go back was left out.
    #[error("the state cannot go back to position {position}")]
    Rewind {
        /// Where to.
        position: i32,
    },
    /// The graph's types could not be found.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// MLX failed.
    #[error(transparent)]
    Mlx(#[from] zmlx_mlx::Error),
}

/// Sequences of a state that is saved. What generates has one.
const BATCH: usize = 1;

impl Executor {
    /// What a state of one sequence holds, copied.
    ///
    /// # Errors
    /// [`SavedError`], if the state is of another executor, or what MLX is to compute fails.
    pub fn save(&self, state: &mut State, keep: Keep) -> Result<SavedState, SavedError> {
        self.check_state(state)?;
        self.settle(state)?;
        let types = self.graph().infer()?;
        let mut slots = Vec::with_capacity(state.slots.len());
        for (index, declared) in self.graph().slots.iter().enumerate() {
            let left_out = keep == Keep::Unrewindable && declared.kind.rewinds();
            slots.push(if left_out { None } else { Some(save_slot(state, index, &types)?) });
        }
        Ok(SavedState { position: state.position, slots })
    }

    /// A state that goes on where a saved one was.
    ///
    /// # Errors
    /// [`SavedError`] with the slot that does not fit and why: another shape, dtype or precision, or positions that are not
    /// there.
    pub fn load(&self, saved: &SavedState) -> Result<State, SavedError> {
        let mut state = self.new_state();
        let found = saved.slots.iter().flatten().count();
        if saved.position < 0 {
            return Err(SavedError::Rewind { position: saved.position });
        }
        if found != state.slots.len() || found != saved.slots.len() {
            return Err(SavedError::Slots { found, expected: state.slots.len() });
        }
        self.put_back(&mut state, saved)?;
        Ok(state)
    }

    /// Whether [`Self::rewind`] can go back to `position`.
    pub fn rewinds_to(&self, state: &State, position: i32) -> bool {
        (0..=state.position).contains(&position)
            && state.slots.iter().all(|slot| slot_rewinds(slot, state, position))
    }

    /// Whether there are slots that may be unable to go back, so that checkpoints ([`Keep::Unrewindable`]) are of use.
    pub fn needs_checkpoints(&self) -> bool {
        self.graph().slots.iter().any(|slot| !slot.kind.rewinds())
    }

    /// Goes back to an earlier position by forgetting what came after it; false, with the state as it was, if a slot cannot.
    ///
    /// # Errors
    /// [`SavedError::Graph`] if the state is of another executor.
    pub fn rewind(&self, state: &mut State, position: i32) -> Result<bool, SavedError> {
        self.check_state(state)?;
        if !self.rewinds_to(state, position) {
            return Ok(false);
        }
        self.settle(state)?;
        state.slots.iter_mut().for_each(|slot| rewind_slot(slot, position));
        state.position = position;
        Ok(true)
    }

    /// Goes back to where a checkpoint was made: a state saved earlier from this one, with [`Keep::Unrewindable`].
    ///
    /// # Errors
    /// [`SavedError`]; the state is then of no more use.
    pub fn restore(&self, state: &mut State, checkpoint: &SavedState) -> Result<(), SavedError> {
        self.check_state(state)?;
        self.settle(state)?;
        let position = checkpoint.position;
        let goes_back = |(slot, saved): (&SlotValue, &Option<SavedSlot>)| {
            saved.is_some() || slot_rewinds(slot, state, position)
        };
        let fits = checkpoint.slots.len() == state.slots.len() && position <= state.position;
        if !fits || !state.slots.iter().zip(&checkpoint.slots).all(goes_back) {
            return Err(SavedError::Rewind { position });
        }
        for (slot, _) in state.slots.iter_mut().zip(&checkpoint.slots).filter(|(_, s)| s.is_none()) {
            rewind_slot(slot, position);
        }
        self.put_back(state, checkpoint)
    }

    /// Whether [`Self::restore`] can use a checkpoint that comes from elsewhere, for states that have seen as much.
    ///
    /// # Errors
    /// [`SavedError`], which says why not.
    pub fn check_checkpoint(&self, checkpoint: &SavedState) -> Result<(), SavedError> {
        let (found, expected) = (checkpoint.slots.len(), self.graph().slots.len());
        if found != expected {
            return Err(SavedError::Slots { found, expected });
        }
        let declared = self.graph().slots.iter();
        if declared.zip(&checkpoint.slots).any(|(slot, saved)| saved.is_none() && !slot.kind.rewinds()) {
            return Err(SavedError::Rewind { position: checkpoint.position });
        }
        self.put_back(&mut self.new_state(), checkpoint)
    }

    fn put_back(&self, state: &mut State, saved: &SavedState) -> Result<(), SavedError> {
        let types = self.graph().infer()?;
        for (index, slot) in saved.slots.iter().enumerate() {
            let Some(slot) = slot else { continue };
            let declared = &self.graph().slots[index];
            let fail = |problem: String| SavedError::Slot { path: declared.path.clone(), problem };
            check_slot(declared.kind, types.slot(SlotId(index)), slot, saved.position).map_err(fail)?;
            match state.slots[index] {
                SlotValue::Engine(at) => {
                    let kept = to_engine(declared.kind, slot).map_err(|e| fail(e.to_string()))?;
                    let put = state.engine[at].restore(BATCH, saved.position as usize, kept);
                    put.map_err(|e| fail(explained(&e)))?;
                }
                _ => state.slots[index] = to_mlx(declared.kind, slot, saved.position),
            }
        }
        state.position = saved.position;
        state.batch = Some(BATCH as i32);
        Ok(())
    }
}

/// What a user can do about it, where there is something.
fn explained(error: &NotKept) -> String {
    match error {
        NotKept::Precision { .. } => {
            format!("{error}: patch the model as it was patched when this was saved")
        }
        _ => error.to_string(),
    }
}

fn slot_rewinds(slot: &SlotValue, state: &State, position: i32) -> bool {
    let here = position == state.position;
    match slot {
        // What is on a GPU comes back as far as the next position sees.
        SlotValue::Kv(cache) if state.device.is_some() => here || cache.window.is_none(),
        SlotValue::Kv(cache) => cache.rewinds_to(position),
        SlotValue::Quantized(cache) => position <= cache.len(),
        SlotValue::Conv(_) | SlotValue::Delta(_) => here,
        SlotValue::Engine(at) => here || state.engine[*at].rewinds_to(position as usize),
    }
}

/// What is left of a slot that goes back; the engine finds its place by the position of the call.
fn rewind_slot(slot: &mut SlotValue, position: i32) {
    match slot {
        SlotValue::Kv(cache) => cache.rewind(position),
        SlotValue::Quantized(cache) => cache.rewind(position),
        SlotValue::Conv(_) | SlotValue::Delta(_) | SlotValue::Engine(_) => {}
    }
}

/// An array of its own. A view, even one that lies in one piece, would keep all that it is a view of in memory.
fn copied(array: &Array) -> zmlx_mlx::Result<Array> {
    if array.size() == 0 {
        return ops::zeros(array.shape(), array.dtype());
    }
    let mut bytes = Vec::new();
    write_bytes(array, &mut bytes)?;
    let flat = Array::from_slice(&bytes, &[bytes.len() as i32])?;
    flat.view(array.dtype())?.reshape(array.shape())
}

fn save_slot(state: &mut State, index: usize, types: &Types) -> Result<SavedSlot, SavedError> {
    let held = |first: i32, names: &[&'static str], arrays: &[&Array]| -> Result<SavedSlot, SavedError> {
        let arrays = names.iter().zip(arrays).map(|(name, a)| Ok((*name, copied(a)?)));
        Ok(SavedSlot { first, arrays: arrays.collect::<zmlx_mlx::Result<_>>()? })
    };
    match &state.slots[index] {
        SlotValue::Kv(cache) => match cache.kept()? {
            Some((k, v, first)) => held(first, &PLAIN, &[&k, &v]),
            None => held(0, &[], &[]),
        },
        SlotValue::Quantized(cache) => match cache.kept()? {
            Some(Fetched::Plain(k, v)) => held(0, &PLAIN, &[&k, &v]),
            Some(Fetched::Quantized(k, v)) => held(0, &PACKED, &k.iter().chain(&v).collect::<Vec<_>>()),
            None => held(0, &[], &[]),
        },
        SlotValue::Conv(state) | SlotValue::Delta(state) => {
            held(0, &STATE, &state.iter().collect::<Vec<_>>())
        }
        SlotValue::Engine(at) => {
            let kept = state.engine[*at].kept(BATCH, state.position as usize);
            from_engine(kept, types.slot(SlotId(index)), state.position)
        }
    }
}

fn from_engine(kept: Kept, types: &[Type], position: i32) -> Result<SavedSlot, SavedError> {
    // Of these types only the number of positions is not a constant.
    let shape = |t: &Type, seen: i32| -> Vec<i32> {
        t.shape.0.iter().map(|d| extent(d, seen.into()) as i32).collect()
    };
    let array = |numbers: Numbers, shape: &[i32]| match numbers {
        Numbers::F32(v) => Array::from_vec(v, shape),
        Numbers::F16(v) => Array::from_vec(v, shape),
    };
    let made = match (kept, types) {
        (Kept::Kv { .. }, _) if position == 0 => SavedSlot { first: 0, arrays: Vec::new() },
        (Kept::Kv { keys, values, first }, [k, v]) => {
            let first = first as i32;
            let arrays = vec![
                ("keys", array(keys, &shape(k, position - first))?),
                ("values", array(values, &shape(v, position - first))?),
            ];
            SavedSlot { first, arrays }
        }
        (Kept::Rows(rows), [_]) if rows.is_empty() => SavedSlot { first: 0, arrays: Vec::new() },
        (Kept::Rows(rows), [t]) => {
            SavedSlot { first: 0, arrays: vec![("state", Array::from_vec(rows, &shape(t, position))?)] }
        }
        _ => return Err(GraphError::WrongState.into()),
    };
    Ok(made)
}

/// Whether a slot of these types can have held this after `position` positions.
fn check_slot(kind: SlotKind, types: &[Type], slot: &SavedSlot, position: i32) -> Result<(), String> {
    let found: Vec<&str> = slot.arrays.iter().map(|(name, _)| *name).collect();
    if found.is_empty() {
        // Nothing seen: that is how every slot begins.
        return if position == 0 {
            Ok(())
        } else {
            Err(format!("nothing is there after {position} positions"))
        };
    }
    let plain;
    let (names, types): (&[&str], &[Type]) = match (kind, types) {
        (SlotKind::KvCache | SlotKind::WindowCache { .. }, types) => (&PLAIN, types),
        (SlotKind::ConvState { .. } | SlotKind::DeltaState, types) => (&STATE, types),
        // Before it is quantised, the types of the scales tell those of what will be.
        (SlotKind::QuantizedKvCache(q), [_, keys, _, _, values, _]) if found == PLAIN => {
            let wide = |t: &Type| {
                let groups = t.shape.last().cloned().unwrap_or_default();
                Type { shape: t.shape.with_last(groups * Dim::from(q.group_size)), dtype: t.dtype }
            };
            plain = [wide(keys), wide(values)];
            (&PLAIN, &plain)
        }
        (SlotKind::QuantizedKvCache(_), types) => (&PACKED, types),
    };
    if found != names || types.len() != names.len() {
        return Err(format!("it has {}, and the model's has {}", found.join(", "), names.join(", ")));
    }
    let seen = kind.window().map_or(0, |w| (position - (w - 1)).max(0));
    if slot.first < 0 || slot.first > seen {
        return Err(format!("it begins at position {}, and the next one sees {seen}", slot.first));
    }
    let positions = i64::from(position) - i64::from(slot.first);
    let mut float = None;
    for ((name, array), t) in slot.arrays.iter().zip(types) {
        let expected: Vec<i64> = t.shape.0.iter().map(|d| extent(d, positions)).collect();
        let shape: Vec<i64> = array.shape().iter().map(|d| i64::from(*d)).collect();
        if shape != expected {
            return Err(format!("{name} of shape {shape:?}, and the model's have {expected:?}"));
        }
        // All that is of the model's dtype is of one.
        let dtype = match t.dtype {
            DtypeSpec::Fixed(dtype) => dtype,
            DtypeSpec::Activation => *float.get_or_insert(array.dtype()),
        };
        let known = !t.dtype.is_float() || matches!(dtype, Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16);
        if array.dtype() != dtype || !known {
            return Err(format!("{name} of dtype {}, and the model's are {}", array.dtype(), t.dtype));
        }
    }
    Ok(())
}

/// A dimension of a slot's type, of one sequence and that many positions.
fn extent(dim: &Dim, positions: i64) -> i64 {
    dim.at(Sizes { batch: BATCH as i64, length: 0, position: positions })
}

fn to_engine(kind: SlotKind, slot: &SavedSlot) -> Result<Kept, zmlx_mlx::Error> {
    let numbers = |array: &Array| -> zmlx_mlx::Result<Numbers> {
        Ok(match array.dtype() {
            Dtype::Float16 => Numbers::F16(array.to_vec::<f16>()?),
            // Another dtype than these two is an error of MLX, with both names.
            _ => Numbers::F32(array.to_vec::<f32>()?),
        })
    };
    Ok(match slot.arrays.as_slice() {
        [(_, keys), (_, values)] => {
            Kept::Kv { keys: numbers(keys)?, values: numbers(values)?, first: slot.first as usize }
        }
        [(_, state)] => Kept::Rows(state.to_vec::<f32>()?),
        _ if kind.holds_keys() => {
            let none = || Numbers::F32(Vec::new());
            Kept::Kv { keys: none(), values: none(), first: 0 }
        }
        _ => Kept::Rows(Vec::new()),
    })
}

/// `slot` has passed [`check_slot`].
fn to_mlx(kind: SlotKind, slot: &SavedSlot, position: i32) -> SlotValue {
    let held: Vec<Array> = slot.arrays.iter().map(|(_, array)| array.clone()).collect();
    match (kind, held.as_slice()) {
        (SlotKind::KvCache | SlotKind::WindowCache { .. }, [k, v]) => {
            SlotValue::Kv(KvCache::of((k.clone(), v.clone()), position, slot.first, kind.window()))
        }
        (SlotKind::QuantizedKvCache(with), [k, v]) => {
            let held = Fetched::Plain(k.clone(), v.clone());
            SlotValue::Quantized(QuantizedKvCache::of(with, held, position))
        }
        (SlotKind::QuantizedKvCache(with), [a, b, c, d, e, f]) => {
            let packed = |a: &Array, b: &Array, c: &Array| [a.clone(), b.clone(), c.clone()];
            let held = Fetched::Quantized(packed(a, b, c), packed(d, e, f));
            SlotValue::Quantized(QuantizedKvCache::of(with, held, position))
        }
        (SlotKind::ConvState { .. }, _) => SlotValue::Conv(held.into_iter().next()),
        (SlotKind::DeltaState, _) => SlotValue::Delta(held.into_iter().next()),
        _ => SlotValue::new(kind),
    }
}
