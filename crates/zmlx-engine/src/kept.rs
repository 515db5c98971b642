//! What a slot holds, taken out and put back: to go on later, in this process or in another.

use std::ops::Range;

use half::f16;

use crate::cells::Cells;
use crate::program::Slot;
use crate::store::Store;

/// Numbers of a slot, in the type in which it holds them.
#[derive(Debug, Clone, PartialEq)]
pub enum Numbers {
    /// float32
    F32(Vec<f32>),
    /// IEEE half
    F16(Vec<f16>),
}

impl Numbers {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn is_half(&self) -> bool {
        matches!(self, Self::F16(_))
    }
}

impl From<Numbers> for Store {
    fn from(numbers: Numbers) -> Self {
        match numbers {
            Numbers::F32(v) => Self::F32(v.into()),
            Numbers::F16(v) => Self::F16(v.into()),
        }
    }
}

/// What a slot holds of the positions so far, without the room for others.
#[derive(Debug, Clone, PartialEq)]
pub enum Kept {
    /// Keys and values `[batch, heads, positions, width]` of the positions from `first` on: all, or those that the next
    /// position still sees.
    Kv {
        /// Keys.
        keys: Numbers,
        /// Values.
        values: Numbers,
        /// The first position.
        first: usize,
    },
    /// `[batch, keep, channels]`; empty at the start, which counts as zeros.
    Rows(Vec<f32>),
}

/// Why something kept cannot be put into a slot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotKept {
    /// Keys and values for a slot of rows, or the other way round.
    #[error("the slot is of another kind")]
    Kind,
    /// float32 for a slot of half precision, or the other way round.
    #[error("it holds {found} and the slot is of {expected}")]
    Precision {
        /// What it holds.
        found: &'static str,
        /// What the slot is of.
        expected: &'static str,
    },
    /// Another number of elements than the positions have.
    #[error("it has {found} numbers, not {expected}")]
    Count {
        /// How many it has.
        found: usize,
        /// How many there must be.
        expected: usize,
    },
    /// The positions that the next one sees begin before the first that is there.
    #[error("its first position is {found}, and the next one sees positions from {seen} on")]
    First {
        /// The first position.
        found: usize,
        /// The first position that must be there.
        seen: usize,
    },
}

fn precision(half: bool) -> &'static str {
    if half { "float16" } else { "float32" }
}

impl Store {
    fn is_half(&self) -> bool {
        matches!(self, Self::F16(_))
    }

    /// The same range of each of `parts` parts of `size` elements.
    fn gathered(&mut self, parts: usize, size: usize, range: Range<usize>) -> Numbers {
        fn gathered<T: Copy + Default>(
            cells: &mut Cells<T>,
            parts: usize,
            size: usize,
            range: Range<usize>,
        ) -> Vec<T> {
            let all = cells.as_mut_slice();
            (0..parts).flat_map(|p| &all[p * size..][range.clone()]).copied().collect()
        }
        match self {
            Self::F32(cells) => Numbers::F32(gathered(cells, parts, size, range)),
            Self::F16(cells) => Numbers::F16(gathered(cells, parts, size, range)),
        }
    }
}

/// The first position that the one after `position` others sees.
fn first_seen(window: Option<usize>, position: usize) -> usize {
    window.map_or(0, |w| (position + 1).saturating_sub(w))
}

impl Slot {
    /// What it holds after `position` positions of `batch` sequences, copied: as much as any later position sees.
    pub fn kept(&mut self, batch: usize, position: usize) -> Kept {
        match self {
            Self::Kv { keys, values, heads, key_width, value_width, capacity, window, dropped } => {
                let first = first_seen(*window, position);
                let places = first - (*dropped).min(first)..position - (*dropped).min(position);
                let part = |store: &mut Store, width: usize| {
                    let range = places.start * width..places.end * width;
                    store.gathered(batch * *heads, *capacity * width, range)
                };
                Kept::Kv { keys: part(keys, *key_width), values: part(values, *value_width), first }
            }
            Self::Rows { values, .. } => Kept::Rows(values.as_mut_slice().to_vec()),
        }
    }

    /// Puts back what a slot of this kind held after `position` positions of `batch` sequences.
    ///
    /// # Errors
    /// [`NotKept`], if a slot of this kind cannot have held it; the slot stays as it was.
    pub fn restore(&mut self, batch: usize, position: usize, kept: Kept) -> Result<(), NotKept> {
        match (self, kept) {
            (
                Self::Kv { keys, values, heads, key_width, value_width, capacity, window, dropped },
                Kept::Kv { keys: new_keys, values: new_values, first },
            ) => {
                let seen = first_seen(*window, position);
                if first > seen {
                    return Err(NotKept::First { found: first, seen });
                }
                let room = position - first;
                for (store, numbers, width) in
                    [(&*keys, &new_keys, *key_width), (&*values, &new_values, *value_width)]
                {
                    if numbers.is_half() != store.is_half() {
                        let (found, expected) = (precision(numbers.is_half()), precision(store.is_half()));
                        return Err(NotKept::Precision { found, expected });
                    }
                    let expected = batch * *heads * room * width;
                    if numbers.len() != expected {
                        return Err(NotKept::Count { found: numbers.len(), expected });
                    }
                }
                (*keys, *values) = (new_keys.into(), new_values.into());
                (*capacity, *dropped) = (room, first);
            }
            (Self::Rows { values, keep, channels }, Kept::Rows(rows)) => {
                let expected = batch * *keep * *channels;
                if !rows.is_empty() && rows.len() != expected {
                    return Err(NotKept::Count { found: rows.len(), expected });
                }
                *values = rows.into();
            }
            _ => return Err(NotKept::Kind),
        }
        Ok(())
    }

    /// Whether it can go back to an earlier position by forgetting what came after it: keys and values can, unless a
    /// window has dropped what is seen from there; rows cannot.
    pub fn rewinds_to(&self, position: usize) -> bool {
        match self {
            Self::Kv { window, dropped, .. } => *dropped <= first_seen(*window, position),
            Self::Rows { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes `position` into the keys and `-position` into the values of positions `from..to`.
    fn write(slot: &mut Slot, from: usize, to: usize) {
        slot.reserve(1, from, to);
        let Slot::Kv { keys, values, capacity, dropped, .. } = slot else { panic!("not keys") };
        for head in 0..2 {
            for p in from..to {
                let at = (head * *capacity + p - *dropped) * 3;
                // SAFETY: nobody else has the slot.
                unsafe {
                    keys.write(at, &[(head * 1000 + p) as f32; 3]);
                    values.write(at, &[-((head * 1000 + p) as f32); 3]);
                }
            }
        }
    }

    #[test]
    fn what_is_kept_goes_on_as_the_slot_would_have() {
        for (window, half) in [(None, false), (None, true), (Some(5), false), (Some(300), true)] {
            let empty = Slot::kv(2, 3, 3).windowed(window);
            let empty = if half { empty.half() } else { empty };
            let mut slot = empty.clone();
            for (from, to) in [(0, 4), (4, 5), (5, 700)] {
                write(&mut slot, from, to);
                let kept = slot.kept(1, to);
                let mut other = empty.clone();
                other.restore(1, to, kept.clone()).unwrap();
                assert_eq!(other.kept(1, to), kept);
                // Both go on, the one in its room and the other in a new one.
                let mut one = slot.clone();
                write(&mut one, to, to + 40);
                write(&mut other, to, to + 40);
                assert_eq!(one.kept(1, to + 40), other.kept(1, to + 40), "{window:?} {from}..{to}");
                let Kept::Kv { keys, first, .. } = kept else { panic!("not keys") };
                assert_eq!(first, window.map_or(0, |w| (to + 1).saturating_sub(w)));
                assert_eq!(keys.len(), 2 * 3 * (to - first));
            }
        }
    }

    #[test]
    fn what_no_such_slot_held_is_refused() {
        let kept = |slot: &Slot, to| {
            let mut slot = slot.clone();
            write(&mut slot, 0, to);
            slot.kept(1, to)
        };
        let (all, window) = (Slot::kv(2, 3, 3), Slot::kv(2, 3, 3).windowed(Some(4)));
        let cases = [
            (
                &all,
                kept(&all.clone().half(), 9),
                NotKept::Precision { found: "float16", expected: "float32" },
            ),
            (&all, kept(&all, 8), NotKept::Count { found: 48, expected: 54 }),
            (&all, kept(&window, 9), NotKept::First { found: 6, seen: 0 }),
            (&window, kept(&window, 10), NotKept::First { found: 7, seen: 6 }),
            (&all, Kept::Rows(Vec::new()), NotKept::Kind),
            (&Slot::rows(2, 3), Kept::Rows(vec![0.0; 5]), NotKept::Count { found: 5, expected: 6 }),
        ];
        for (slot, kept, error) in cases {
            assert_eq!(slot.clone().restore(1, 9, kept), Err(error));
        }
    }

    #[test]
    fn a_window_rewinds_as_far_as_it_still_sees() {
        let mut slot = Slot::kv(2, 3, 3).windowed(Some(4));
        write(&mut slot, 0, 20);
        assert!(slot.rewinds_to(1), "nothing is dropped yet");
        write(&mut slot, 20, 2000);
        let Slot::Kv { dropped, .. } = &slot else { panic!("not keys") };
        assert_eq!(*dropped, 17);
        assert!(!slot.rewinds_to(19) && slot.rewinds_to(20) && slot.rewinds_to(1000));
        assert!(Slot::kv(2, 3, 3).rewinds_to(0) && !Slot::rows(2, 3).rewinds_to(5));
    }
}
