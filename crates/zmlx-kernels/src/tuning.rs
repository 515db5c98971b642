//! Launch parameters: defaults, choices on disk, and the tuner that makes them.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use zmlx_lang::Dtype;
use zmlx_lang::emit::{self, Dialect, Params};
use zmlx_mlx::{Array, transforms};
use zmlx_tune::{Candidate, Key, Sample, Store};
pub use zmlx_tune::{Decision, Settings};

use crate::cpu::{self, Buffers, Options, OutputBuffer};
use crate::dtype::{shape_of, to_mlx};
use crate::launch::{self, Given, Prepared, Shapes, gpu};
use crate::{Error, Kernel, Result};

/// Folder of the stored choices; by default `tune` in the project's cache folder.
pub const DIRECTORY_VARIABLE: &str = "ZMLX_TUNE_DIR";
/// `off` keeps launches from reading stored choices.
pub const TUNE_VARIABLE: &str = "ZMLX_TUNE";

/// Choices that come with this version, measured on the devices they name.
const SHIPPED: &str = include_str!("tuned.json");

/// Where choices are kept and read; `None` when `ZMLX_TUNE` is `off` or there is no cache folder.
pub fn directory() -> Option<PathBuf> {
    if std::env::var(TUNE_VARIABLE).is_ok_and(|v| v == "off") {
        return None;
    }
    match std::env::var_os(DIRECTORY_VARIABLE) {
        Some(dir) => Some(dir.into()),
        None => Some(zmlx_mlx::locate::cache_dir().ok()?.join("tune")),
    }
}

fn store() -> Option<&'static Store> {
    static STORE: OnceLock<Option<Store>> = OnceLock::new();
    let open = || Store::open(directory()?).with_defaults(SHIPPED).ok();
    STORE.get_or_init(open).as_ref()
}

/// The device and its library, as choices are filed.
fn place(dialect: Option<Dialect>) -> (String, String) {
    static GPU: OnceLock<String> = OnceLock::new();
    let version = zmlx_mlx::locate::MLX_VERSION;
    match dialect {
        None => {
            let threads = rayon::current_num_threads();
            (
                format!("cpu {} {threads} threads", zmlx_simd::isa_name()),
                format!("zmlx {}", env!("CARGO_PKG_VERSION")),
            )
        }
        Some(dialect) => {
            let name =
                GPU.get_or_init(|| zmlx_mlx::runtime::device_name().unwrap_or_else(|_| "gpu".to_owned()));
            (name.clone(), format!("mlx {version} {}", dialect.name().to_lowercase()))
        }
    }
}

/// Shapes that share a choice: dtypes, and rows and columns up to the next power of two.
fn class(prepared: &Prepared, shapes: &Shapes) -> String {
    let dtypes: Vec<&str> = prepared.dtypes().iter().map(|d| d.name()).collect();
    let (rows, cols) = (shapes.domain.rows.max(1), shapes.domain.cols.max(1));
    format!("{} rows<={} cols<={}", dtypes.join(","), rows.next_power_of_two(), cols.next_power_of_two())
}

fn key(kernel: &Kernel, prepared: &Prepared, shapes: &Shapes, dialect: Option<Dialect>) -> Key {
    let (device, library) = place(dialect);
    Key::new(device, library, kernel.name(), kernel.hash(), class(prepared, shapes))
}

/// The stored choice for a launch, looked up once for each class of shapes. An unreadable store counts as empty here:
/// defaults are right everywhere, and tuning reports what is wrong with it.
fn stored(
    kernel: &Kernel,
    prepared: &Prepared,
    shapes: &Shapes,
    dialect: Option<Dialect>,
) -> Option<Candidate> {
    let store = store()?;
    let at = format!("{dialect:?} {}", class(prepared, shapes));
    let found: std::result::Result<_, std::convert::Infallible> = prepared.tuned.get(at, |_| {
        let found = store.get(&key(kernel, prepared, shapes, dialect)).ok().flatten();
        Ok(found.map(|f| f.decision.choice.clone()))
    });
    found.unwrap_or(None)
}

/// 0 is the engine's own choice, by how many slots the kernel needs.
const BLOCKS: [i64; 7] = [0, 128, 256, 512, 1024, 2048, 4096];

/// Elements of a block on the CPU.
pub(crate) fn cpu_block(kernel: &Kernel, prepared: &Prepared, inputs: &[Vec<usize>], given: &Given) -> usize {
    let default = Options::default().block;
    let Ok(shapes) = Shapes::new(&prepared.program, inputs.to_vec(), given) else { return default };
    // Blocks of small calls are as long as their rows anyway.
    if shapes.domain.len() < 4096 {
        return default;
    }
    let chosen = stored(kernel, prepared, &shapes, None).and_then(|c| c.get("block"));
    chosen
        .and_then(|b| usize::try_from(b).ok())
        .filter(|b| *b == 0 || (64..=65536).contains(b))
        .unwrap_or(default)
}

/// Threads, vector width, rows a group and elements a thread on a GPU.
pub(crate) fn gpu_params(
    kernel: &Kernel,
    prepared: &Prepared,
    dialect: Dialect,
    shapes: &Shapes,
) -> Result<Params> {
    let (rows, cols) = (shapes.domain.rows as u64, shapes.domain.cols as u64);
    let candidates = emit::candidates(&prepared.program, dialect, rows, cols);
    let chosen = stored(kernel, prepared, shapes, Some(dialect)).and_then(|c| params(&c));
    if let Some(p) = chosen.filter(|p| candidates.contains(p)) {
        return Ok(p);
    }
    candidates.first().copied().ok_or_else(|| Error::Tune {
        kernel: kernel.name().to_owned(),
        what: "the emitter proposes no launch parameters".to_owned(),
    })
}

fn params(c: &Candidate) -> Option<Params> {
    let get = |name: &str| u32::try_from(c.get(name)?).ok();
    Some(Params {
        threads: get("threads")?,
        vec: get("vec")?,
        rows_per_group: get("rows_per_group")?,
        items: get("items")?,
    })
}

fn candidate(p: &Params) -> Candidate {
    Candidate::from([
        ("threads", i64::from(p.threads)),
        ("vec", i64::from(p.vec)),
        ("rows_per_group", i64::from(p.rows_per_group)),
        ("items", i64::from(p.items)),
    ])
}

/// A sample on a GPU lasts at least this long.
const GPU_SAMPLE: Duration = Duration::from_millis(4);

/// Candidates tried on a GPU at most: each is a text of its own, and compiling one takes about a second on CUDA.
const MOST_TEXTS: usize = 12;

/// The first and others at even distances, `most` in all.
fn spread<T: Copy>(all: &[T], most: usize) -> Vec<T> {
    let n = all.len().min(most);
    (0..n).map(|k| all[k * all.len() / n]).collect()
}

impl Kernel {
    /// Measures launch parameters for arrays like these on the current device, stores the choice with its evidence, and
    /// uses it from then on in this process and in later ones.
    ///
    /// # Errors
    /// When the kernel can't be launched, the default fails, or the store can't be written.
    pub fn tune(&self, inputs: &[&Array], settings: &Settings) -> Result<Decision> {
        let failed = |what: String| Error::Tune { kernel: self.name().to_owned(), what };
        let arrays = self.bind(inputs).arrays()?;
        let prepared = self.prepare(self.dtypes(&arrays)?)?;
        let shapes = Shapes::new(
            &prepared.program,
            arrays.iter().map(|a| shape_of(a.shape())).collect(),
            &Given::default(),
        )?;
        let on_gpu = zmlx_mlx::stream::current_device()? == zmlx_mlx::stream::Device::Gpu;
        let dialect = if on_gpu { launch::dialect()? } else { None };
        let key = key(self, &prepared, &shapes, dialect);
        let decision = match dialect {
            Some(dialect) => {
                let (rows, cols) = (shapes.domain.rows as u64, shapes.domain.cols as u64);
                let proposed = emit::candidates(&prepared.program, dialect, rows, cols);
                let all: Vec<Candidate> = spread(&proposed, MOST_TEXTS).iter().map(candidate).collect();
                let Some((default, others)) = all.split_first() else {
                    return Err(failed("the emitter proposes no launch parameters".to_owned()));
                };
                let mut backend = OnGpu {
                    kernel: self,
                    prepared: &prepared,
                    dialect,
                    arrays: &arrays,
                    shapes: &shapes,
                    reference: None,
                };
                // Launches of a GPU overlap: a few of them show how long one waits to start, not how long it takes.
                let settings =
                    Settings { min_sample: settings.min_sample.max(GPU_SAMPLE), ..settings.clone() };
                zmlx_tune::tune(&key, default, others, None, &settings, &mut backend)
            }
            None => {
                let all = BLOCKS.map(|b| Candidate::from([("block", b)]));
                let bytes = arrays.iter().map(bytes_of).collect::<Result<Vec<_>>>()?;
                let mut backend = OnCpu::new(&prepared, &shapes, bytes);
                zmlx_tune::tune(&key, &all[0], &all[1..], None, settings, &mut backend)
            }
        };
        let decision = decision.map_err(|e| failed(e.to_string()))?;
        if let Some(store) = store() {
            store.put(&decision).map_err(|e| failed(e.to_string()))?;
        }
        prepared.tuned.clear();
        Ok(decision)
    }
}

fn bytes_of(array: &Array) -> Result<Vec<u8>> {
    macro_rules! plain {
        ($t:ty) => {
            array.to_vec::<$t>()?.iter().flat_map(|v| v.to_ne_bytes()).collect()
        };
    }
    use zmlx_mlx::Dtype::*;
    Ok(match array.dtype() {
        Bool => array.to_vec::<bool>()?.into_iter().map(u8::from).collect(),
        Uint8 => array.to_vec::<u8>()?,
        Int8 => plain!(i8),
        Uint16 => plain!(u16),
        Int16 => plain!(i16),
        Float16 => array.to_vec::<half::f16>()?.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        Bfloat16 => array.to_vec::<half::bf16>()?.iter().flat_map(|v| v.to_ne_bytes()).collect(),
        Uint32 => plain!(u32),
        Int32 => plain!(i32),
        Uint64 => plain!(u64),
        Int64 => plain!(i64),
        _ => {
            array.astype(to_mlx(Dtype::F32))?.to_vec::<f32>()?.iter().flat_map(|v| v.to_ne_bytes()).collect()
        }
    })
}

/// Runs the engine on plain buffers, which are reused: no graph, no allocation in what is timed.
struct OnCpu<'a> {
    prepared: &'a Arc<Prepared>,
    shapes: &'a Shapes,
    inputs: Vec<Vec<u8>>,
    outputs: Mutex<Vec<Vec<u8>>>,
    reference: Option<Vec<Vec<u8>>>,
}

impl<'a> OnCpu<'a> {
    fn new(prepared: &'a Arc<Prepared>, shapes: &'a Shapes, inputs: Vec<Vec<u8>>) -> Self {
        let sizes = prepared.program.outputs.iter().zip(&shapes.outputs);
        let outputs = sizes.map(|(o, s)| vec![0; s.iter().product::<usize>() * o.dtype.size()]).collect();
        Self { prepared, shapes, inputs, outputs: Mutex::new(outputs), reference: None }
    }

    fn once(&self, c: &Candidate) -> std::result::Result<(), String> {
        let block =
            c.get("block").and_then(|b| usize::try_from(b).ok()).ok_or("a candidate without a block")?;
        let keeping = self.prepared.code(Options { block, keep: true });
        let lean = self.prepared.code(Options { block, keep: false });
        let inputs: Vec<&[u8]> = self.inputs.iter().map(Vec::as_slice).collect();
        let mut outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
        let buffers = outputs.iter_mut().zip(&self.shapes.outputs);
        let outputs = buffers.map(|(bytes, shape)| OutputBuffer { bytes, shape: shape.clone() }).collect();
        let (domain, shapes) = (&self.shapes.domain, &self.shapes.inputs);
        cpu::run(&keeping, &lean, Buffers { domain, inputs: &inputs, shapes, outputs })
    }
}

impl zmlx_tune::Backend for OnCpu<'_> {
    type Error = String;

    fn run(&mut self, c: &Candidate, iterations: u32) -> std::result::Result<Sample, String> {
        let start = Instant::now();
        for _ in 0..iterations {
            self.once(c)?;
        }
        Ok(Sample { seconds: start.elapsed().as_secs_f64() })
    }

    /// Blocks change the order of sums only: outputs may differ in the last bits, not more.
    fn check(&mut self, c: &Candidate) -> std::result::Result<bool, String> {
        self.once(c)?;
        let found = self.outputs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(reference) = &self.reference else {
            self.reference = Some(found);
            return Ok(true);
        };
        let same = |(n, (a, b)): (usize, (&Vec<u8>, &Vec<u8>))| {
            let dtype = self.prepared.program.outputs[n].dtype;
            a == b || dtype.is_float() && close(&floats(a, dtype), &floats(b, dtype), tolerance(dtype))
        };
        Ok(reference.iter().zip(&found).enumerate().all(same))
    }
}

fn floats(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    let half = |b: &[u8]| u16::from_ne_bytes([b[0], b[1]]);
    match dtype {
        Dtype::F16 => bytes.chunks_exact(2).map(|b| half::f16::from_bits(half(b)).to_f32()).collect(),
        Dtype::Bf16 => bytes.chunks_exact(2).map(|b| half::bf16::from_bits(half(b)).to_f32()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

/// What another order of sums may change of an output: a few units of its last place.
fn tolerance(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F16 => 4e-3,
        Dtype::Bf16 => 3e-2,
        _ => 1e-4,
    }
}

/// Whether two results differ by rounding only. Sums that nearly cancel keep the error of their terms, so the allowance
/// has a part that goes with the largest number of the output.
fn close(a: &[f32], b: &[f32], tolerance: f32) -> bool {
    let largest = a.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(0.0, f32::max);
    let one = |(x, y): (&f32, &f32)| {
        x == y
            || x.is_nan() && y.is_nan()
            || x.is_finite() && (x - y).abs() <= tolerance * x.abs() + 1e-2 * tolerance * largest
    };
    a.iter().zip(b).all(one)
}

/// Launches through MLX; the time is the wall clock of a batch that is waited for at its end.
struct OnGpu<'a> {
    kernel: &'a Kernel,
    prepared: &'a Arc<Prepared>,
    dialect: Dialect,
    arrays: &'a [Array],
    shapes: &'a Shapes,
    reference: Option<Vec<Vec<f32>>>,
}

impl OnGpu<'_> {
    fn launch(&self, c: &Candidate) -> Result<Vec<Array>> {
        let params = params(c).ok_or_else(|| Error::Tune {
            kernel: self.kernel.name().to_owned(),
            what: format!("candidate {c} lacks a parameter"),
        })?;
        Ok(gpu::launch_with(self.kernel, self.prepared, self.dialect, self.arrays, self.shapes, params)?.0)
    }
}

impl zmlx_tune::Backend for OnGpu<'_> {
    type Error = Error;

    fn run(&mut self, c: &Candidate, iterations: u32) -> Result<Sample> {
        let start = Instant::now();
        let mut all = Vec::new();
        for _ in 0..iterations {
            all.extend(self.launch(c)?);
            if all.len() > 64 {
                transforms::async_eval(&all.iter().collect::<Vec<_>>())?;
                all.clear();
            }
        }
        transforms::eval(&all.iter().collect::<Vec<_>>())?;
        zmlx_mlx::stream::synchronize()?;
        Ok(Sample { seconds: start.elapsed().as_secs_f64() })
    }

    fn check(&mut self, c: &Candidate) -> Result<bool> {
        let read = |a: &Array| Ok(a.astype(zmlx_mlx::Dtype::Float32)?.to_vec::<f32>()?);
        let found = self.launch(c)?.iter().map(read).collect::<Result<Vec<_>>>()?;
        let Some(reference) = &self.reference else {
            self.reference = Some(found);
            return Ok(true);
        };
        let outputs = self.prepared.program.outputs.iter().zip(reference).zip(&found);
        Ok(outputs.fold(true, |same, ((o, a), b)| same && close(a, b, tolerance(o.dtype))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_choices_can_be_read() {
        let store = Store::open(std::env::temp_dir().join("zmlx-no-such-folder")).with_defaults(SHIPPED);
        assert!(store.is_ok(), "{:?}", store.err());
    }

    #[test]
    fn rounding_is_told_from_a_wrong_result() {
        let sums: Vec<f32> = (0..1000).map(|i| (i as f32 - 500.0) * 0.3).collect();
        let with = |at: usize, by: f32| {
            let mut v = sums.clone();
            v[at] += by;
            v
        };
        assert!(close(&sums, &with(500, 5e-5), 1e-4), "a sum that cancels keeps its terms' error");
        assert!(!close(&sums, &with(500, 1e-2), 1e-4));
        assert!(close(&sums, &with(0, 1e-2), 1e-4));
        assert!(!close(&sums, &with(0, 1.0), 1e-4), "an element left out");
        assert!(!close(&sums, &with(3, f32::NAN), 1e-4));
        assert!(!close(&with(3, f32::INFINITY), &sums, 1e-4));
    }

    #[test]
    fn spread_keeps_the_first_and_the_number() {
        assert_eq!(spread(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 4), [0, 2, 5, 7]);
        assert_eq!(spread(&[3, 1], 12), [3, 1]);
    }
}
