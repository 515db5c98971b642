//! Decode steps of a model in the emulator: what a GPU would run, launch by launch.

use std::collections::HashMap;

use zmlx_cuda::kernels::{Arg, Param, Source, Type};
use zmlx_cuda::plan::{Memory, Plan, Step, WeightAddress};
use zmlx_emulator::{Buffer, Dialect, Dtype, KernelText, Launch, Module};
use zmlx_graph::Executor;
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

    fn word(&mut self, address: u64) -> u32 {
        u32::from_le_bytes(self.at(address)[..4].try_into().unwrap())
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

fn dtype(ty: Type) -> Dtype {
    match ty {
        Type::U8 => Dtype::U8,
        Type::U16 => Dtype::U16,
        Type::U32 => Dtype::U32,
        Type::I32 => Dtype::I32,
        Type::U64 => Dtype::U64,
        Type::F32 => Dtype::F32,
    }
}

/// A kernel for the emulator, which knows pointers only: numbers are read from one.
fn module(step: &Step) -> Module {
    let source = &step.source;
    let values = source.params.iter().filter(|p| p.by_value);
    let values: String = values.map(|p| format!("const int {0} = {0}_at[0]; ", p.name)).collect();
    let mut kernel = KernelText::new(source.name, &format!("{values}{}", source.body)).header(&source.device);
    for p in &source.params {
        kernel = match p {
            Param { by_value: true, name, .. } => kernel.input(&format!("{name}_at"), Dtype::I32, 1),
            Param { written: true, name, ty, .. } => kernel.output(name, dtype(*ty)),
            Param { name, ty, .. } => kernel.input(name, dtype(*ty), 1),
        };
    }
    Module::build(Dialect::Cuda, &[kernel]).unwrap_or_else(|e| panic!("{}: {e}", step.name))
}

fn run(memory: &mut Bytes<'_>, module: &Module, step: &Step) {
    let buffer = |data: &[u8], ty: Type| {
        let count = data.len() / dtype(ty).size();
        Buffer::from_bytes(dtype(ty), data[..count * dtype(ty).size()].to_vec(), &[count])
    };
    let (mut inputs, mut initial, mut shapes, mut places) = (vec![], vec![], vec![], vec![]);
    for (p, arg) in step.source.params.iter().zip(&step.launch.args) {
        match *arg {
            Arg::I32(number) => inputs.push(Buffer::from_i32(&[number], &[1])),
            Arg::Ptr(address) => {
                let held = buffer(memory.at(address), p.ty);
                if p.written {
                    shapes.push(held.shape.clone());
                    initial.push(Some(held));
                    places.push(address);
                } else {
                    inputs.push(held);
                }
            }
        }
    }
    let threads = [0, 1, 2].map(|i| step.launch.grid[i] * step.launch.block[i]);
    let launch = Launch::new(&inputs, &shapes, threads, step.launch.block)
        .initial(&initial)
        .shared_memory(step.launch.shared as usize)
        .step_limit(1 << 34);
    let made = module.run(0, &launch).unwrap_or_else(|e| panic!("{}: {e}", step.name));
    // Memory that several parameters point into: only what a launch changed goes back.
    for ((address, after), before) in places.into_iter().zip(made).zip(initial) {
        let before = before.unwrap();
        for (i, (new, old)) in after.data.iter().zip(&before.data).enumerate() {
            if new != old {
                memory.at(address)[i] = *new;
            }
        }
    }
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

/// A sequence that is decoded.
pub struct Emulated<'a> {
    memory: Bytes<'a>,
    plan: Plan,
    modules: HashMap<Source, Module>,
    vocabulary: usize,
}

impl<'a> Emulated<'a> {
    /// An empty one, with room for `capacity` positions.
    pub fn new(executor: &'a Executor, vocabulary: usize, capacity: usize) -> Result<Self, String> {
        let mut memory = Bytes::new(executor);
        let plan = zmlx_graph::cuda::plan(executor, capacity, &mut memory)?;
        Ok(Self { memory, plan, modules: HashMap::new(), vocabulary })
    }

    /// Says which token comes next instead of the one that was chosen.
    pub fn feed(&mut self, token: u32) {
        self.memory.at(self.plan.control.token)[..4].copy_from_slice(&token.to_le_bytes());
    }

    /// One token: the one that is chosen after it. Position, count and ring must be told too.
    pub fn step(&mut self) -> u32 {
        let control = self.plan.control;
        let before = self.memory.word(control.count);
        for step in &self.plan.steps {
            let module = self.modules.entry(step.source.clone()).or_insert_with(|| module(step));
            run(&mut self.memory, module, step);
        }
        let after = before + 1;
        let token = self.memory.word(control.token);
        let told = self.memory.word(control.ring + 4 * u64::from(before) % (4 * control.ring_len as u64));
        assert_eq!(
            [control.position, control.count, control.published].map(|at| self.memory.word(at)),
            [after; 3]
        );
        assert_eq!(told, token);
        token
    }

    /// The last token's logits.
    pub fn logits(&mut self) -> Vec<f32> {
        let bytes = &self.memory.at(self.plan.logits)[..4 * self.vocabulary];
        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}
