//! Times products with 4-bit matrices on a GPU, as many plans as are worth comparing, at shapes of LFM2-8B-A1B and
//! Qwen3-30B-A3B, and checks rows of each against double precision. Takes some seconds:
//!
//! `cargo run --release -p zmlx-cuda --example products [-- part of a shape's name | --compile]`
//!
//! With `--compile` the kernels are compiled only, which takes no GPU.
//!
//! Each line: the shape and the plan, microseconds a launch in a graph of many launches on different matrices (so that the
//! second-level cache does not hold them), without and with overlap of neighbours, gigabytes a second of the latter,
//! registers, and the relative error.

use std::sync::Arc;

use half::bf16;
use zmlx_cuda::chain::Bench;
use zmlx_cuda::kernels::{
    Activation, ExpertsDown, ExpertsDownOperands, ExpertsUp, ExpertsUpOperands, Float, Format, KernelError,
    Launch, Norm, Plan, Qmv, QmvOperands, ShortConv, ShortConvOperands, Source, Weights,
};
use zmlx_cuda::memory::DeviceBuffer;
use zmlx_cuda::module::compile_all;
use zmlx_cuda::nvrtc::Nvrtc;
use zmlx_cuda::{Device, Result};

const FORMAT: Format = Format::Affine { bits: 4, group: 64, scales: Float::Bf16 };
const GROUP: usize = 64;
/// Bytes of random codes, and of scales and of biases.
const CODES: usize = 640 << 20;
const SCALES: usize = 40 << 20;
/// Floats of activations.
const FLOATS: usize = 1 << 18;
const EPS: f32 = 1e-5;

/// What is measured.
#[derive(Clone, Copy)]
enum Kind {
    /// A product with a norm before it.
    Normed,
    /// A product whose result is added to a residual.
    Residual,
    /// The product of a short convolution.
    Conv,
    /// Gate and up of `k` of so many experts.
    Up { experts: usize, k: usize },
    /// Down of them.
    Down { experts: usize, k: usize },
}

struct Shape {
    name: &'static str,
    kind: Kind,
    rows: usize,
    columns: usize,
}

const fn shape(name: &'static str, kind: Kind, rows: usize, columns: usize) -> Shape {
    Shape { name, kind, rows, columns }
}

const SHAPES: [Shape; 11] = [
    shape("lfm2 up", Kind::Up { experts: 32, k: 4 }, 1792, 2048),
    shape("lfm2 down", Kind::Down { experts: 32, k: 4 }, 2048, 1792),
    shape("lfm2 head", Kind::Normed, 65536, 2048),
    shape("lfm2 qkv", Kind::Normed, 3072, 2048),
    shape("lfm2 linear", Kind::Residual, 2048, 2048),
    shape("lfm2 conv", Kind::Conv, 2048, 2048),
    shape("qwen3 up", Kind::Up { experts: 128, k: 8 }, 768, 2048),
    shape("qwen3 down", Kind::Down { experts: 128, k: 8 }, 2048, 768),
    shape("qwen3 qkv", Kind::Normed, 5120, 2048),
    shape("qwen3 linear", Kind::Residual, 2048, 4096),
    shape("qwen3 head", Kind::Normed, 151936, 2048),
];

fn plan([lanes, rows, split, warps, depth, resident]: [usize; 6]) -> Plan {
    Plan { lanes, rows, split, warps, depth, resident, rehearsed: false }
}

/// Plans to compare with the default, which comes first: lanes, rows, split, warps, depth, resident.
fn plans(kind: Kind, default: Plan) -> Vec<Plan> {
    let others: &[[usize; 6]] = match kind {
        Kind::Up { .. } => &[
            [32, 4, 2, 16, 2, 2],
            [32, 4, 2, 8, 2, 2],
            [32, 4, 1, 8, 2, 2],
            [32, 2, 2, 8, 2, 4],
            [16, 4, 4, 16, 2, 1],
        ],
        Kind::Down { .. } => &[
            [8, 2, 8, 16, 4, 1],
            [8, 2, 7, 7, 4, 2],
            [8, 4, 7, 14, 2, 1],
            [16, 2, 8, 8, 2, 2],
            [32, 2, 8, 8, 1, 2],
        ],
        Kind::Conv => &[[32, 4, 2, 12, 2, 1], [32, 2, 2, 6, 2, 2], [16, 2, 4, 12, 2, 1]],
        Kind::Normed | Kind::Residual => &[
            [32, 4, 2, 16, 2, 1],
            [32, 4, 2, 8, 2, 2],
            [32, 2, 2, 8, 4, 2],
            [32, 8, 2, 8, 1, 2],
            [32, 4, 1, 8, 2, 2],
            [16, 4, 4, 8, 2, 2],
        ],
    };
    let mut all = vec![default];
    all.extend(others.iter().map(|p| plan(*p)).filter(|p| *p != default));
    all
}

/// Where things are on the GPU.
#[derive(Clone, Copy)]
struct Places {
    codes: u64,
    scales: u64,
    biases: u64,
    x: u64,
    norm: u64,
    /// States, zeros at first.
    state: u64,
    scores: u64,
    indices: u64,
    out: u64,
}

/// The factor of every expert.
const SCORE: f32 = 0.25;
/// Experts a launch has room for in the buffer of indices.
const SLOTS: usize = 16;
/// Launches of a chain at most.
const LAUNCHES: usize = 50;
/// Taps of the convolution.
const TAPS: usize = 3;

/// Experts of launch `n`.
fn chosen(n: usize, experts: usize, k: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..experts).collect();
    fastrand::Rng::with_seed(n as u64).shuffle(&mut all);
    all.truncate(k);
    all
}

/// Matrix `n`: byte offsets into codes, and into scales and biases.
fn matrix_at(n: usize, rows: usize, columns: usize) -> [usize; 2] {
    let at = |bytes: usize, all: usize| {
        let room = (all - bytes) / 256 + 1;
        n * bytes.div_ceil(256) % room * 256
    };
    [at(rows * columns / 2, CODES), at(rows * columns / GROUP * 2, SCALES)]
}

impl Places {
    fn weights(&self, [codes, scales]: [usize; 2]) -> Weights {
        let (codes, scales) = (codes as u64, scales as u64);
        Weights { codes: self.codes + codes, scales: self.scales + scales, biases: self.biases + scales }
    }
}

/// A kernel and its launches, each on other matrices.
struct Built {
    source: Source,
    launches: Vec<Launch>,
}

type Made<T> = std::result::Result<T, KernelError>;

/// The default plan where there is no other.
fn build(shape: &Shape, other: Option<Plan>, at: &Places) -> Made<(Built, Plan)> {
    let Shape { kind, rows, columns, .. } = *shape;
    let norm = Some(Norm { eps: EPS, weight: true });
    let weights = |n: usize, count: usize| at.weights(matrix_at(n, count * rows, columns));
    let indices = |n: usize| at.indices + (4 * SLOTS * n) as u64;
    let all = |launch: &dyn Fn(usize) -> Made<Launch>| -> Made<Vec<Launch>> {
        let bytes = launch(0)?.bytes as usize;
        (0..(600_000_000 / bytes).clamp(6, LAUNCHES)).map(launch).collect()
    };
    let (source, launches, plan) = match kind {
        Kind::Normed | Kind::Residual => {
            let normed = matches!(kind, Kind::Normed);
            let mut kernel = Qmv::new(rows, columns, FORMAT, 1);
            kernel = Qmv { norm: norm.filter(|_| normed), residual: !normed, ..kernel };
            kernel.plan = other.unwrap_or(kernel.plan);
            let launches = all(&|n| {
                kernel.launch(&QmvOperands {
                    x: at.x,
                    norm: normed.then_some(at.norm),
                    weights: weights(n, 1),
                    residual: (!normed).then_some(at.norm),
                    out: at.out,
                    ..Default::default()
                })
            })?;
            (kernel.source()?, launches, kernel.plan)
        }
        Kind::Conv => {
            let mut kernel = ShortConv { norm, ..ShortConv::new(rows, columns, FORMAT, [1, 1], TAPS) };
            kernel.plan = other.unwrap_or(kernel.plan);
            let launches = all(&|n| {
                kernel.launch(&ShortConvOperands {
                    x: at.x,
                    norm: Some(at.norm),
                    matrix: weights(n, 3),
                    kernel: at.norm,
                    state: at.state,
                    out: at.out,
                    ..Default::default()
                })
            })?;
            (kernel.source()?, launches, kernel.plan)
        }
        Kind::Up { experts, k } => {
            let plain = ExpertsUp::new([experts, k], [rows, columns], FORMAT, 1, Activation::Silu);
            let kernel = ExpertsUp { norm, plan: other.unwrap_or(plain.plan), ..plain };
            let launches = all(&|n| {
                kernel.launch(&ExpertsUpOperands {
                    x: at.x,
                    norm: Some(at.norm),
                    indices: indices(n),
                    gate: weights(2 * n, experts),
                    up: weights(2 * n + 1, experts),
                    bias: [None; 2],
                    out: at.out,
                    ..ExpertsUpOperands::default()
                })
            })?;
            (kernel.source()?, launches, kernel.plan)
        }
        Kind::Down { experts, k } => {
            let plain = ExpertsDown::new([experts, k], [rows, columns], FORMAT, 1);
            let kernel = ExpertsDown { residuals: 1, plan: other.unwrap_or(plain.plan), ..plain };
            let launches = all(&|n| {
                kernel.launch(&ExpertsDownOperands {
                    x: at.x,
                    indices: indices(n),
                    scores: at.scores,
                    down: weights(n, experts),
                    bias: None,
                    residuals: vec![at.norm],
                    out: at.out,
                })
            })?;
            (kernel.source()?, launches, kernel.plan)
        }
    };
    Ok((Built { source, launches }, plan))
}

/// Random weights and activations.
struct Pool {
    codes: Vec<u8>,
    scales: Vec<u8>,
    biases: Vec<u8>,
    x: Vec<f32>,
    norm: Vec<f32>,
}

fn bytes(floats: &[f32]) -> Vec<u8> {
    floats.iter().flat_map(|f| f.to_ne_bytes()).collect()
}

impl Pool {
    fn new() -> Self {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut codes = vec![0u8; CODES];
        rng.fill(&mut codes);
        // bfloat16 with random mantissas: scales of 1/128 to 1/64, biases of -1/16 to -1/8.
        let mut floats = |top: u8, low: u8| {
            let mut v = vec![0u8; SCALES];
            rng.fill(&mut v);
            for pair in v.chunks_exact_mut(2) {
                pair.copy_from_slice(&[pair[0] & 0x7f | low, top]);
            }
            v
        };
        let (scales, biases) = (floats(0x3c, 0x00), floats(0xbd, 0x80));
        let x = (0..FLOATS).map(|_| rng.f32() - 0.4).collect();
        let norm = (0..FLOATS).map(|_| rng.f32() + 0.5).collect();
        Self { codes, scales, biases, x, norm }
    }

    /// `w[row] . x` in double precision.
    fn dot(&self, [codes, scales]: [usize; 2], row: usize, x: &[f64]) -> f64 {
        let float = |v: &[u8], group: usize| {
            let at = scales + 2 * group;
            f64::from(bf16::from_le_bytes([v[at], v[at + 1]]).to_f32())
        };
        let value = |i: usize| {
            let at = row * x.len() + i;
            let code = self.codes[codes + at / 2] >> (4 * (at % 2)) & 15;
            float(&self.scales, at / GROUP) * f64::from(code) + float(&self.biases, at / GROUP)
        };
        x.iter().enumerate().map(|(i, x)| value(i) * x).sum()
    }

    /// Elements of the result of the first launch, by their places.
    fn wanted(&self, shape: &Shape) -> Vec<(usize, f64)> {
        let Shape { kind, rows, columns, .. } = *shape;
        let wide = |v: &[f32]| v.iter().map(|f| f64::from(*f)).collect::<Vec<f64>>();
        let x = wide(&self.x[..columns]);
        let mean = x.iter().map(|v| v * v).sum::<f64>() / columns as f64;
        let factor = 1.0 / (mean + f64::from(EPS)).sqrt();
        let normed: Vec<f64> = x.iter().zip(&self.norm).map(|(x, w)| x * factor * f64::from(*w)).collect();
        let at = |n: usize, count: usize| matrix_at(n, count * rows, columns);
        let some = (0..12).map(|i| i * (rows - 1) / 11);
        some.map(|r| match kind {
            Kind::Normed => (r, self.dot(at(0, 1), r, &normed)),
            Kind::Residual => (r, self.dot(at(0, 1), r, &x) + f64::from(self.norm[r])),
            Kind::Conv => {
                let [b, c, x] = [0, 1, 2].map(|part| self.dot(at(0, 3), part * rows + r, &normed));
                (r, c * f64::from(self.norm[r * TAPS + TAPS - 1]) * b * x)
            }
            Kind::Up { experts, k } => {
                let slot = r % k;
                let row = chosen(0, experts, k)[slot] * rows + r;
                let [gate, up] = [0, 1].map(|n| self.dot(at(n, experts), row, &normed));
                (slot * rows + r, gate / (1.0 + (-gate).exp()) * up)
            }
            Kind::Down { experts, k } => {
                let slots = chosen(0, experts, k).into_iter().enumerate();
                let products = slots.map(|(slot, expert)| {
                    let x = wide(&self.x[slot * columns..][..columns]);
                    f64::from(SCORE) * self.dot(at(0, experts), expert * rows + r, &x)
                });
                (r, products.sum::<f64>() + f64::from(self.norm[r]))
            }
        })
        .collect()
    }
}

/// What lies on the GPU.
struct OnGpu {
    weights: [DeviceBuffer; 3],
    activations: [DeviceBuffer; 3],
    state: DeviceBuffer,
    indices: DeviceBuffer,
    out: DeviceBuffer,
}

/// Bytes of results.
const RESULTS: usize = 1 << 20;

impl OnGpu {
    fn new(device: &Arc<Device>, pool: &Pool) -> Result<Self> {
        let put = |bytes: &[u8]| DeviceBuffer::of(device, bytes, "random weights");
        Ok(Self {
            weights: [put(&pool.codes)?, put(&pool.scales)?, put(&pool.biases)?],
            activations: [put(&bytes(&pool.x))?, put(&bytes(&pool.norm))?, put(&bytes(&[SCORE; SLOTS]))?],
            state: DeviceBuffer::new(device, RESULTS, "states")?,
            indices: DeviceBuffer::new(device, 4 * SLOTS * LAUNCHES, "indices")?,
            out: DeviceBuffer::new(device, RESULTS, "results")?,
        })
    }

    fn places(&self) -> Places {
        let [codes, scales, biases] = self.weights.each_ref().map(DeviceBuffer::address);
        let [x, norm, scores] = self.activations.each_ref().map(DeviceBuffer::address);
        let [state, indices, out] = [&self.state, &self.indices, &self.out].map(DeviceBuffer::address);
        Places { codes, scales, biases, x, norm, state, scores, indices, out }
    }

    /// The experts of a shape's launches.
    fn choose(&self, shape: &Shape) -> Result<()> {
        if let Kind::Up { experts, k } | Kind::Down { experts, k } = shape.kind {
            let slots = |n| {
                let mut slots = chosen(n, experts, k);
                slots.resize(SLOTS, 0);
                slots
            };
            let all = (0..LAUNCHES).flat_map(slots).flat_map(|e| (e as i32).to_ne_bytes());
            self.indices.fill(&all.collect::<Vec<u8>>())?;
        }
        Ok(())
    }

    /// The relative error of the first launch.
    fn error(&self, bench: &Bench, built: &Built, wanted: &[(usize, f64)]) -> Result<f64> {
        self.state.fill(&vec![0; RESULTS])?;
        // NaN where nothing is written.
        self.out.fill(&vec![0xff; RESULTS])?;
        // SAFETY: the buffers are as large as the shapes ask for, and live on.
        unsafe { bench.chain(&[(&built.source, built.launches[0].clone())], false)?.seconds() }?;
        let mut got = vec![0u8; RESULTS];
        self.out.read(bench.stream(), &mut got)?;
        let float = |i: usize| {
            let four = [got[4 * i], got[4 * i + 1], got[4 * i + 2], got[4 * i + 3]];
            f64::from(f32::from_ne_bytes(four))
        };
        let off: f64 = wanted.iter().map(|(i, w)| (float(*i) - w).powi(2)).sum();
        let all: f64 = wanted.iter().map(|(_, w)| w.powi(2)).sum();
        Ok((off / all).sqrt())
    }
}

/// Microseconds a launch: the median of some replays.
fn time(bench: &Bench, built: &Built, overlap: bool) -> Result<f64> {
    let launches: Vec<_> = built.launches.iter().map(|l| (&built.source, l.clone())).collect();
    let mut times = Vec::new();
    // SAFETY: as above.
    unsafe {
        let mut chain = bench.chain(&launches, overlap)?;
        for _ in 0..2 {
            chain.seconds()?;
        }
        for _ in 0..7 {
            times.push(chain.seconds()? * 1e6 / launches.len() as f64);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn measure(on_gpu: &OnGpu, bench: &Bench, built: &Built, wanted: &[(usize, f64)]) -> Result<String> {
    let error = on_gpu.error(bench, built, wanted)?;
    let (alone, overlapping) = (time(bench, built, false)?, time(bench, built, true)?);
    let launch = &built.launches[0];
    let (registers, spilled) = bench.registers(&built.source)?.unwrap_or((0, 0));
    let mark = if error <= 1e-4 { "" } else { " WRONG" };
    Ok(format!(
        "{alone:7.2} us {overlapping:7.2} us {:6.0} GB/s {registers:4} regs {spilled:3} spilled {:4} blocks {:6} B shared, \
         error {error:.1e}{mark}",
        launch.bytes as f64 / overlapping / 1e3,
        launch.grid[0],
        launch.shared,
    ))
}

/// All plans of the shapes whose names contain `filter`.
fn cases(filter: &str, places: &Places) -> Made<Vec<(&'static Shape, Plan, Built)>> {
    let mut cases = Vec::new();
    for shape in SHAPES.iter().filter(|s| s.name.contains(filter)) {
        for plan in plans(shape.kind, build(shape, None, places)?.1) {
            match build(shape, Some(plan), places) {
                Ok((built, _)) => cases.push((shape, plan, built)),
                Err(error) => println!("{:13} {plan:?}: {error}", shape.name),
            }
        }
    }
    Ok(cases)
}

/// Compiles all kernels, which takes no GPU.
fn compile() -> Result<()> {
    let [codes, scales, biases, x, norm, state, scores, indices, out] =
        [1, 2, 3, 4, 5, 6, 7, 8, 9].map(|i| i << 32);
    let cases = cases("", &Places { codes, scales, biases, x, norm, state, scores, indices, out })?;
    let sources: Vec<&Source> = cases.iter().map(|(_, _, built)| &built.source).collect();
    let made = compile_all(&Nvrtc::find(None)?, "sm_90", None, &sources)?;
    println!("{} kernels compile for sm_90", made.len());
    Ok(())
}

fn main() -> Result<()> {
    let filter = std::env::args().nth(1).unwrap_or_default();
    if filter == "--compile" {
        return compile();
    }
    let device = Device::open(0, None)?;
    println!("{:?}", device.info());
    let pool = Pool::new();
    let on_gpu = OnGpu::new(&device, &pool)?;
    let cases = cases(&filter, &on_gpu.places())?;
    let sources: Vec<&Source> = cases.iter().map(|(_, _, built)| &built.source).collect();
    let (bench, failed) = Bench::new(&device, &sources)?;
    for (_, error) in failed {
        println!("{error}");
    }
    println!("lanes, rows, split, warps, depth, resident: alone, overlapping (the default plan comes first)");
    let mut last = "";
    let mut wanted = Vec::new();
    for (shape, plan, built) in &cases {
        if shape.name != last {
            last = shape.name;
            wanted = pool.wanted(shape);
            on_gpu.choose(shape)?;
        }
        let Plan { lanes, rows, split, warps, depth, resident, .. } = plan;
        let said = match measure(&on_gpu, &bench, built, &wanted) {
            Ok(line) => line,
            Err(error) => error.to_string(),
        };
        println!("{:12} {lanes:2} {rows} {split:2} {warps:2} {depth} {resident}: {said}", shape.name);
    }
    Ok(())
}
