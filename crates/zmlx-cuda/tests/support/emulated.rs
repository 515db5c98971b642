//! Kernels and their launches in the emulator, whatever stands for device memory. Also compiled into tests of other crates.

use zmlx_cuda::kernels::{Arg, Launch, Param, Source, Type};
use zmlx_emulator::{Buffer, Dialect, Dtype, Error, KernelText, Module};

/// The emulator's name for a type.
pub fn dtype(ty: Type) -> Dtype {
    match ty {
        Type::U8 => Dtype::U8,
        Type::U16 => Dtype::U16,
        Type::U32 => Dtype::U32,
        Type::I32 => Dtype::I32,
        Type::U64 => Dtype::U64,
        Type::F32 => Dtype::F32,
    }
}

/// A kernel for the emulator, which knows pointers only: what is passed by value is read from one.
pub fn module(source: &Source) -> Result<Module, Error> {
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
    Module::build(Dialect::Cuda, &[kernel])
}

/// Device memory.
pub trait Addressed {
    /// What a parameter points to, and whether anything was written there yet.
    fn held(&self, address: u64, param: &Param) -> (Buffer, bool);

    /// Takes what a launch left there.
    fn left(&mut self, address: u64, before: &Buffer, after: Buffer);
}

/// Runs a launch; `more` says what else the emulator is told.
pub fn run(
    memory: &mut impl Addressed,
    module: &Module,
    source: &Source,
    launch: &Launch,
    more: impl for<'a> FnOnce(zmlx_emulator::Launch<'a>) -> zmlx_emulator::Launch<'a>,
) -> Result<(), Error> {
    assert_eq!(source.params.len(), launch.args.len(), "{}", source.name);
    let (mut inputs, mut shapes, mut initial, mut written) = (vec![], vec![], vec![], vec![]);
    for (p, arg) in source.params.iter().zip(&launch.args) {
        let address = match *arg {
            Arg::Ptr(address) => address,
            Arg::I32(value) => {
                assert!(p.by_value, "{}", p.name);
                inputs.push(Buffer::from_i32(&[value], &[1]));
                continue;
            }
        };
        let (buffer, filled) = memory.held(address, p);
        if p.written {
            shapes.push(buffer.shape.clone());
            initial.push(filled.then(|| buffer.clone()));
            written.push((address, buffer));
        } else {
            assert!(filled, "{} was never written", p.name);
            inputs.push(buffer);
        }
    }
    let threads = [0, 1, 2].map(|i| launch.grid[i] * launch.block[i]);
    let call = zmlx_emulator::Launch::new(&inputs, &shapes, threads, launch.block)
        .shared_memory(launch.shared as usize)
        .initial(&initial);
    for ((address, before), after) in written.into_iter().zip(module.run(0, &more(call))?) {
        memory.left(address, &before, after);
    }
    Ok(())
}
