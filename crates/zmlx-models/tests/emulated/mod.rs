//! Decode steps of a model in the emulator: what a GPU would run, launch by launch.

#[path = "../../../zmlx-cuda/tests/support/emulated.rs"]
mod launches;

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use launches::{Addressed, dtype};
use zmlx_cuda::kernels::{Param, Source};
use zmlx_cuda::plan::{Memory, Plan, Step, WeightAddress};
use zmlx_emulator::{Buffer, Module};
use zmlx_graph::Executor;
use zmlx_graph::cuda::Extent;
use zmlx_graph::native::write_bytes;
use zmlx_models::{DeviceChoice, DtypeChoice, LoadOptions, Model, PatchOptions};

/// Memory by address: blocks of bytes, far apart.
struct Bytes<'a> {
    executor: &'a Executor,
    blocks: Vec<Vec<u8>>,
    weights: HashMap<usize, WeightAddress>,
}

/// Bytes from the address of one block to that of the next.
const APART: u64 = 1 << 32;

impl<'a> Bytes<'a> {
    fn new(executor: &'a Executor) -> Self {
        let mut bytes = Self { executor, blocks: Vec::new(), weights: HashMap::new() };
        for (number, bound) in executor.weights().iter().enumerate() {
            let mut at = [0; 3];
            for (at, array) in at.iter_mut().zip(bound.iter().flat_map(|b| b.arrays())) {
                let mut data = Vec::new();
                write_bytes(array, &mut data).unwrap();
                *at = bytes.put(data);
            }
            let [codes, scales, biases] = at;
            bytes.weights.insert(number, WeightAddress { codes, scales, biases });
        }
        bytes
    }

    fn put(&mut self, data: Vec<u8>) -> u64 {
        self.blocks.push(data);
        self.blocks.len() as u64 * APART
    }

    /// What is at an address and after it, to the end of its block.
    fn at(&mut self, address: u64) -> &mut [u8] {
        &mut self.blocks[(address / APART - 1) as usize][(address % APART) as usize..]
    }

    fn seen(&self, address: u64) -> &[u8] {
        &self.blocks[(address / APART - 1) as usize][(address % APART) as usize..]
    }

    fn word(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.seen(address)[..4].try_into().unwrap())
    }
}

impl Memory for Bytes<'_> {
    fn room(&mut self, bytes: usize) -> zmlx_cuda::Result<u64> {
        Ok(self.put(vec![0; bytes]))
    }

    fn constant(&mut self, floats: &[f32]) -> zmlx_cuda::Result<u64> {
        Ok(self.put(floats.iter().flat_map(|f| f.to_le_bytes()).collect()))
    }

    fn table(&mut self, floats: &[f32]) -> zmlx_cuda::Result<u64> {
        self.constant(floats)
    }

    fn weight(&self, number: usize) -> zmlx_cuda::Result<WeightAddress> {
        assert!(self.executor.weights()[number].is_some());
        Ok(self.weights[&number])
    }
}

impl Addressed for Bytes<'_> {
    fn held(&self, address: u64, param: &Param) -> (Buffer, bool) {
        let (data, dtype) = (self.seen(address), dtype(param.ty));
        let count = data.len() / dtype.size();
        (Buffer::from_bytes(dtype, data[..count * dtype.size()].to_vec(), &[count]), true)
    }

    /// Memory that several parameters point into: only what a launch changed goes back.
    fn left(&mut self, address: u64, before: &Buffer, after: Buffer) {
        for (i, (new, old)) in after.data.iter().zip(&before.data).enumerate() {
            if new != old {
                self.at(address)[i] = *new;
            }
        }
    }
}

/// Runs a launch of a step; each kernel is compiled once.
fn launch(
    memory: &mut Bytes<'_>,
    modules: &mut HashMap<Source, Module>,
    Step { source, launch, .. }: &Step,
) -> Result<(), zmlx_emulator::Error> {
    let module = match modules.entry(source.clone()) {
        Entry::Occupied(e) => e.into_mut(),
        Entry::Vacant(e) => e.insert(launches::module(source)?),
    };
    launches::run(memory, module, source, launch, |call| call.step_limit(1 << 34))
}

/// A model in float32 and its fused graph, as the default preset makes it.
pub fn load(dir: &std::path::Path) -> Result<(Model, Executor), String> {
    let options =
        LoadOptions { dtype: DtypeChoice::F32, device: DeviceChoice::Cpu, ..LoadOptions::default() };
    let model = Model::load(dir, &options, &mut |_| {}).map_err(|e| e.to_string())?;
    let preset = PatchOptions { environment: false, ..PatchOptions::default() };
    let (fused, _) = model.both_ways(&preset).map_err(|e| e.to_string())?;
    Ok((model, fused))
}

/// Sequences that are decoded together.
pub struct Emulated<'a> {
    memory: Bytes<'a>,
    plan: Plan,
    modules: HashMap<Source, Module>,
    vocabulary: usize,
    sequences: usize,
}

impl<'a> Emulated<'a> {
    /// Empty ones.
    pub fn new(executor: &'a Executor, vocabulary: usize, extent: Extent) -> Result<Self, String> {
        let mut memory = Bytes::new(executor);
        let plan = zmlx_graph::cuda::plan(executor, extent, &mut memory)?;
        Ok(Self { memory, plan, modules: HashMap::new(), vocabulary, sequences: extent.sequences })
    }

    /// Launches of a step.
    pub fn launches(&self) -> usize {
        self.plan.steps.len()
    }

    /// Says which tokens, one of each sequence, come next instead of those that were chosen.
    pub fn feed(&mut self, tokens: &[u32]) {
        assert_eq!(tokens.len(), self.sequences);
        let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        self.memory.at(self.plan.control.tokens)[..bytes.len()].copy_from_slice(&bytes);
    }

    /// One token of each sequence: those that are chosen after it. Position, count and ring must be told too.
    pub fn step(&mut self) -> Vec<u32> {
        let control = self.plan.control;
        let before = self.memory.word(control.count);
        for step in &self.plan.steps {
            if let Err(error) = launch(&mut self.memory, &mut self.modules, step) {
                panic!("{}: {error}", step.name);
            }
        }
        let after = before + 1;
        let words =
            |at: u64| (0..self.sequences as u64).map(|i| self.memory.word(at + 4 * i)).collect::<Vec<_>>();
        let tokens = words(control.tokens);
        let row = u64::from(before) % control.ring_len as u64;
        let told = words(control.ring + 4 * row * self.sequences as u64);
        assert_eq!(
            [control.position, control.count, control.published].map(|at| self.memory.word(at)),
            [after; 3]
        );
        assert_eq!(told, tokens);
        tokens
    }

    /// The last step's logits, those of one sequence behind the other's.
    pub fn logits(&mut self) -> Vec<f32> {
        let bytes = &self.memory.at(self.plan.logits)[..4 * self.sequences * self.vocabulary];
        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}
