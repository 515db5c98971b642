//! Runs kernels in the emulator and compiles them with NVRTC.
#![allow(dead_code)]

pub mod attention;
mod emulated;

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use emulated::{Addressed, dtype};
use half::{bf16, f16};
use zmlx_cuda::kernels::{Float, Format, Launch, Param, Source, Type, Weights};
use zmlx_emulator::nvrtc::Nvrtc;
use zmlx_emulator::{Buffer, Dtype, Module};

/// Device memory: buffers by addresses that stand for them.
#[derive(Default)]
pub struct Memory {
    buffers: HashMap<u64, (Buffer, bool)>,
    next: u64,
}

impl Memory {
    fn put(&mut self, buffer: Buffer, filled: bool) -> u64 {
        self.next += 1 << 20;
        self.buffers.insert(self.next, (buffer, filled));
        self.next
    }

    pub fn bytes(&mut self, ty: Type, data: Vec<u8>) -> u64 {
        let n = data.len() / dtype(ty).size();
        self.put(Buffer::from_bytes(dtype(ty), data, &[n]), true)
    }

    pub fn f32(&mut self, values: &[f32]) -> u64 {
        self.put(Buffer::from_f32(Dtype::F32, values, &[values.len()]), true)
    }

    pub fn i32(&mut self, values: &[i32]) -> u64 {
        self.put(Buffer::from_i32(values, &[values.len()]), true)
    }

    /// Memory that nothing was written to yet: reading it is an error, and so is leaving any of it unwritten.
    pub fn fresh(&mut self, ty: Type, n: usize) -> u64 {
        self.put(Buffer::from_bytes(dtype(ty), vec![0xa5; n * dtype(ty).size()], &[n]), false)
    }

    pub fn get(&self, address: u64) -> &Buffer {
        &self.buffers[&address].0
    }

    pub fn read(&self, address: u64) -> Vec<f32> {
        self.get(address).to_f32()
    }

    /// Floats of a type.
    pub fn floats(&mut self, float: Float, values: &[f32]) -> u64 {
        match float {
            Float::F32 => self.f32(values),
            Float::F16 => {
                self.bytes(Type::U16, values.iter().flat_map(|v| f16::from_f32(*v).to_ne_bytes()).collect())
            }
            Float::Bf16 => {
                self.bytes(Type::U16, values.iter().flat_map(|v| bf16::from_f32(*v).to_ne_bytes()).collect())
            }
        }
    }
}

impl Addressed for Memory {
    fn held(&self, address: u64, param: &Param) -> (Buffer, bool) {
        let (buffer, filled) = &self.buffers[&address];
        assert_eq!(buffer.dtype, dtype(param.ty), "{}", param.name);
        (buffer.clone(), *filled)
    }

    fn left(&mut self, address: u64, _: &Buffer, after: Buffer) {
        self.buffers.insert(address, (after, true));
    }
}

/// Kernels that are compiled, by their texts.
#[derive(Default)]
pub struct Device {
    modules: HashMap<String, Module>,
    pub memory: Memory,
    pub seed: u64,
}

impl Device {
    /// Runs a launch; what it writes is in memory afterwards.
    pub fn run(&mut self, source: &Source, launch: &Launch) {
        if let Err(e) = self.try_run(source, launch) {
            panic!("{}: {e}", source.name);
        }
    }

    pub fn try_run(&mut self, source: &Source, launch: &Launch) -> Result<(), zmlx_emulator::Error> {
        let module = match self.modules.entry(source.text()) {
            Entry::Occupied(e) => e.into_mut(),
            Entry::Vacant(e) => e.insert(emulated::module(source)?),
        };
        self.seed += 1;
        emulated::run(&mut self.memory, module, source, launch, |call| call.seed(self.seed))
    }
}

/// A matrix in memory, and its values.
pub struct Matrix {
    pub weights: Weights,
    /// Row-major.
    pub values: Vec<f64>,
}

fn round(float: Float, v: f32) -> f32 {
    match float {
        Float::F32 => v,
        Float::F16 => f16::from_f32(v).to_f32(),
        Float::Bf16 => bf16::from_f32(v).to_f32(),
    }
}

const E2M1: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// A random matrix of `rows` rows.
pub fn matrix(
    memory: &mut Memory,
    rng: &mut fastrand::Rng,
    format: Format,
    rows: usize,
    columns: usize,
) -> Matrix {
    let n = rows * columns;
    let mut weights = Weights::default();
    let values = match format {
        Format::Affine { bits, group, scales } => {
            let codes: Vec<u32> = (0..n).map(|_| rng.u32(0..1 << bits)).collect();
            let per = 32 / bits as usize;
            let pack = |c: &[u32]| c.iter().enumerate().fold(0, |w, (i, c)| w | c << (bits as usize * i));
            let words = codes.chunks(per).flat_map(|c| pack(c).to_ne_bytes()).collect();
            let top = (1 << bits) as f32;
            let s: Vec<f32> = (0..n / group).map(|_| round(scales, (rng.f32() - 0.4) / top)).collect();
            let b: Vec<f32> = (0..n / group).map(|_| round(scales, rng.f32() - 0.6)).collect();
            weights.codes = memory.bytes(Type::U32, words);
            weights.scales = memory.floats(scales, &s);
            weights.biases = memory.floats(scales, &b);
            let value =
                |(i, c): (usize, &u32)| f64::from(s[i / group]) * f64::from(*c) + f64::from(b[i / group]);
            codes.iter().enumerate().map(value).collect()
        }
        Format::Mxfp4 => {
            let codes: Vec<u32> = (0..n).map(|_| rng.u32(0..16)).collect();
            let pack = |c: &[u32]| c.iter().enumerate().fold(0, |w, (i, c)| w | c << (4 * i));
            let words = codes.chunks(8).flat_map(|c| pack(c).to_ne_bytes()).collect();
            let scales: Vec<u8> = (0..n / 32).map(|_| rng.u8(120..130)).collect();
            weights.codes = memory.bytes(Type::U32, words);
            weights.scales = memory.bytes(Type::U8, scales.clone());
            let value = |(i, c): (usize, &u32)| {
                let sign = if c & 8 != 0 { -1.0 } else { 1.0 };
                sign * E2M1[(c & 7) as usize] * 2f64.powi(i32::from(scales[i / 32]) - 127)
            };
            codes.iter().enumerate().map(value).collect()
        }
        Format::Dense(float) => {
            let values: Vec<f32> = (0..n).map(|_| round(float, rng.f32() - 0.5)).collect();
            let address = memory.floats(float, &values);
            // Words of 32 bits, as all matrices are read.
            let data = memory.get(address).data.clone();
            weights.codes = memory.bytes(Type::U32, data);
            values.into_iter().map(f64::from).collect()
        }
    };
    Matrix { weights, values }
}

/// Random floats around zero, some of them large.
pub fn floats(rng: &mut fastrand::Rng, n: usize) -> Vec<f32> {
    (0..n).map(|i| (rng.f32() - 0.4) * if i % 37 == 5 { 20.0 } else { 1.0 }).collect()
}

/// `w[row] . x`
pub fn dot(values: &[f64], row: usize, x: &[f64]) -> f64 {
    values[row * x.len()..][..x.len()].iter().zip(x).map(|(w, x)| w * x).sum()
}

/// RMS norm in double precision.
pub fn rms_norm(x: &[f32], weight: Option<&[f32]>, eps: f32) -> Vec<f64> {
    let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / x.len() as f64;
    let inverse = 1.0 / (mean + f64::from(eps)).sqrt();
    let weight = |i: usize| weight.map_or(1.0, |w| f64::from(w[i]));
    x.iter().enumerate().map(|(i, v)| f64::from(*v) * inverse * weight(i)).collect()
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

/// Fails unless `||got - want|| / ||want||` is at most `most` and nothing is NaN.
pub fn close(what: &str, got: &[f32], want: &[f64], most: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let norm = want.iter().map(|w| w * w).sum::<f64>().sqrt();
    let error = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum::<f64>().sqrt();
    let worst = (0..got.len()).max_by(|a, b| {
        let d = |i: usize| (f64::from(got[i]) - want[i]).abs();
        d(*a).total_cmp(&d(*b))
    });
    let worst = worst.map(|i| (i, got[i], want[i]));
    assert!(norm > 0.0 && error / norm <= most, "{what}: error {:e}, worst {worst:?}", error / norm);
}

pub fn nvrtc() -> Option<Nvrtc> {
    match Nvrtc::find() {
        Ok(nvrtc) => Some(nvrtc),
        Err(e) => {
            assert!(std::env::var_os("ZMLX_REQUIRE_NVRTC").is_none(), "{e}");
            eprintln!("skipped: {e}");
            None
        }
    }
}

/// Compiles for sm_90, prints registers, and fails where any are spilled to memory.
pub fn compile(nvrtc: &Nvrtc, what: &str, source: &Source) {
    let (cubin, log) =
        nvrtc.compile_unit(source.name, &source.text(), "sm_90").unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_eq!(&cubin[..4], b"\x7fELF", "{what}");
    let said: Vec<&str> = log.lines().filter(|l| l.contains("registers") || l.contains("spill")).collect();
    println!("{what}: {}", said.join(" | "));
    assert!(log.is_empty() || log.contains(", 0 bytes spill stores"), "{what}: {log}");
}
