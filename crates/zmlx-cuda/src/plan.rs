//! What a step takes, a token of each of a few sequences: launches, in order, with the memory they work on.

use zmlx_engine::program::{Buffer, Program, Slot};
use zmlx_engine::store::Store;

use crate::error::Result;
use crate::kernels::{Launch, Source};

/// One launch of a step.
#[derive(Debug, Clone)]
pub struct Step {
    /// The stage of the program that it belongs to.
    pub stage: usize,
    /// What it does, in the field's terms.
    pub name: &'static str,
    /// Its kernel.
    pub source: Source,
    /// How it is launched.
    pub launch: Launch,
}

/// Where the parts of a weight are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WeightAddress {
    /// The codes, or the elements of a matrix that is not quantised.
    pub codes: u64,
    /// A scale a group; 0 if there are none.
    pub scales: u64,
    /// A bias a group; 0 if there are none.
    pub biases: u64,
}

/// How keys and values are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheType {
    /// float32
    F32,
    /// IEEE half
    F16,
    /// bfloat16
    Bf16,
}

impl CacheType {
    /// Bytes an element.
    pub fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// How a slot is held whose form is `store`: in half precision if that is, else like this.
    pub fn of(self, store: &Store) -> Self {
        match store {
            Store::F16(_) => Self::F16,
            Store::F32(_) => self,
        }
    }
}

/// Where what lasts from token to token is, that of each sequence behind the other's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotAddress {
    /// Keys and values `[sequences, heads, capacity, width]`.
    Kv {
        /// Keys.
        keys: u64,
        /// Values.
        values: u64,
        /// Key/value heads of a sequence.
        heads: usize,
        /// Width of a key.
        key_width: usize,
        /// Width of a value.
        value_width: usize,
        /// Positions there is room for.
        capacity: usize,
        /// How they are held.
        kind: CacheType,
    },
    /// Rows `[sequences, keep, channels]` of float32.
    Rows {
        /// The rows.
        values: u64,
        /// How many a sequence has.
        keep: usize,
        /// Width of a row.
        channels: usize,
    },
}

impl SlotAddress {
    /// A slot with room for `capacity` positions of so many sequences; keys and values as `kind`, unless its form says
    /// otherwise.
    ///
    /// # Errors
    /// Those of `memory`.
    pub fn in_room(
        memory: &mut dyn Memory,
        form: &Slot,
        kind: CacheType,
        [sequences, capacity]: [usize; 2],
    ) -> Result<Self> {
        match form {
            Slot::Kv { keys, heads, key_width, value_width, .. } => {
                let kind = kind.of(keys);
                let mut part =
                    |width: usize| memory.room(sequences * heads * capacity * width * kind.bytes());
                let (keys, values) = (part(*key_width)?, part(*value_width)?);
                let (heads, key_width, value_width) = (*heads, *key_width, *value_width);
                Ok(Self::Kv { keys, values, heads, key_width, value_width, capacity, kind })
            }
            Slot::Rows { keep, channels, .. } => {
                let values = memory.room(sequences * keep * channels * size_of::<f32>())?;
                Ok(Self::Rows { values, keep: *keep, channels: *channels })
            }
        }
    }
}

/// What tokens, one of each sequence, and their position are read from and written to, by the GPU itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Control {
    /// The tokens that come next, and are replaced by those chosen: 32 bits each.
    pub tokens: u64,
    /// The position of all of them, which grows by one: 32 bits.
    pub position: u64,
    /// How many steps have chosen: 32 bits.
    pub count: u64,
    /// Where a step's tokens are told to the host, by its number modulo [`Self::ring_len`].
    pub ring: u64,
    /// Steps of that ring.
    pub ring_len: usize,
    /// Where the host is told how many steps have chosen: 32 bits, after the ring.
    pub published: u64,
    /// A counter that is zero between launches: 32 bits.
    pub arrived: u64,
    /// The best logit of each sequence so far, zero between launches: 64 bits each.
    pub best: u64,
}

/// Sequences that are decoded together at most: rows that the products' kernels take.
pub const MOST_SEQUENCES: usize = 8;

/// Where the tokens are in what the GPU itself keeps of them and their position, behind position, count and counter.
const TOKENS_AT: usize = 16;
const BEST_AT: usize = TOKENS_AT + 4 * MOST_SEQUENCES;

/// Bytes of all that.
pub(crate) const CONTROL_BYTES: usize = BEST_AT + 8 * MOST_SEQUENCES;

/// Steps that the host may be behind.
pub(crate) const RING: usize = 64;

impl Control {
    /// Tokens of so many sequences, position and ring at the next addresses.
    ///
    /// # Errors
    /// Those of `memory`.
    pub fn in_room(memory: &mut dyn Memory, sequences: usize) -> Result<Self> {
        Ok(Self::at(memory.room(CONTROL_BYTES)?, memory.room(4 * Self::ring_words(sequences))?, sequences))
    }

    /// Words of the ring, and of what is told after it.
    pub(crate) fn ring_words(sequences: usize) -> usize {
        RING * sequences + 1
    }

    /// In [`CONTROL_BYTES`] at `at`, and [`Self::ring_words`] at `ring`.
    pub(crate) fn at(at: u64, ring: u64, sequences: usize) -> Self {
        Self {
            position: at,
            count: at + 4,
            arrived: at + 8,
            tokens: at + TOKENS_AT as u64,
            best: at + BEST_AT as u64,
            ring,
            ring_len: RING,
            published: ring + (4 * RING * sequences) as u64,
        }
    }

    /// What the GPU keeps before a step of these tokens at this position, from its first byte on.
    pub(crate) fn words(tokens: &[u32], position: u32) -> Vec<u8> {
        let mut words = vec![position];
        words.resize(TOKENS_AT / size_of::<u32>(), 0);
        words.extend(tokens);
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }
}

/// Hands out the memory that launches work on. The same requests in the same order get the same memory again, so that a
/// program can be translated anew when its caches have moved.
pub trait Memory {
    /// So many bytes, zeros when they are first handed out.
    ///
    /// # Errors
    /// [`crate::CudaError::OutOfMemory`].
    fn room(&mut self, bytes: usize) -> Result<u64>;

    /// Floats that never change, one copy for all sequences.
    ///
    /// # Errors
    /// [`crate::CudaError::OutOfMemory`].
    fn constant(&mut self, floats: &[f32]) -> Result<u64>;

    /// Floats that change only when the program is translated anew, such as a table that grows with the positions.
    ///
    /// # Errors
    /// [`crate::CudaError::OutOfMemory`].
    fn table(&mut self, floats: &[f32]) -> Result<u64>;

    /// A weight, by the number that its outline has.
    ///
    /// # Errors
    /// [`crate::CudaError::Argument`] if there is none.
    fn weight(&self, number: usize) -> Result<WeightAddress>;
}

/// What is translated, and what for.
#[derive(Debug)]
pub struct Request<'a> {
    /// The program.
    pub program: &'a Program,
    /// How many sequences are decoded together, a token of each; [`MOST_SEQUENCES`] at most.
    pub sequences: usize,
    /// The program's slots.
    pub slots: &'a [SlotAddress],
    /// Where tokens and position are.
    pub control: Control,
    /// The buffer of logits.
    pub logits: Buffer,
    /// How many there are of a sequence.
    pub vocabulary: usize,
    /// Positions that caches have room for.
    pub capacity: usize,
    /// Streaming multiprocessors of the GPU.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block may have there.
    pub shared_memory: usize,
}

/// A step's launches.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The launches, in order.
    pub steps: Vec<Step>,
    /// Where tokens and position are.
    pub control: Control,
    /// Where the logits `[sequences, vocabulary]` are when they are done.
    pub logits: u64,
}

impl Plan {
    /// Bytes that all launches read, as far as they do not depend on the position.
    pub fn bytes(&self) -> u64 {
        self.steps.iter().map(|s| s.launch.bytes).sum()
    }
}

/// Memory that is nowhere: to count launches and bytes without a GPU.
#[derive(Debug, Default)]
pub struct Imagined {
    next: u64,
}

impl Imagined {
    /// An address that nobody else has.
    fn address(&mut self, bytes: usize) -> u64 {
        let at = self.next + 4096;
        self.next = (at + bytes as u64).next_multiple_of(256);
        at
    }
}

impl Memory for Imagined {
    fn room(&mut self, bytes: usize) -> Result<u64> {
        Ok(self.address(bytes))
    }

    fn constant(&mut self, floats: &[f32]) -> Result<u64> {
        Ok(self.address(size_of_val(floats)))
    }

    fn table(&mut self, floats: &[f32]) -> Result<u64> {
        Ok(self.address(size_of_val(floats)))
    }

    /// Addresses that no other weight has, and that nothing is behind.
    fn weight(&self, number: usize) -> Result<WeightAddress> {
        let codes = (number as u64 + 1) << 40;
        Ok(WeightAddress { codes, scales: codes + (1 << 38), biases: codes + (2 << 38) })
    }
}
