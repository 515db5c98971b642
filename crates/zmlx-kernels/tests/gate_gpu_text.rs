//! The GPU text of selection and gating: in the emulator, in both dialects, and through NVRTC.

use zmlx_emulator::nvrtc::Nvrtc;
use zmlx_emulator::{Buffer, Dialect, Dtype, KernelText, Launch, Module, TemplateArg};
use zmlx_kernels::catalogue::{top_k_gating_bias_kernel, top_k_gating_kernel, top_k_kernel};
use zmlx_kernels::lang::emit;
use zmlx_kernels::raw::{self, GpuLaunch, RawKernel, Spec};

/// One kernel, launched for one shape.
struct Trial {
    kernel: &'static RawKernel,
    parameters: Vec<i64>,
    shape: Vec<usize>,
    dtype: Dtype,
    x: Vec<f32>,
    bias: Option<Vec<f32>>,
}

fn mlx(dtype: Dtype) -> zmlx_mlx::Dtype {
    match dtype {
        Dtype::F16 => zmlx_mlx::Dtype::Float16,
        Dtype::Bf16 => zmlx_mlx::Dtype::Bfloat16,
        _ => zmlx_mlx::Dtype::Float32,
    }
}

impl Trial {
    fn k(&self) -> usize {
        self.parameters[0] as usize
    }

    fn cols(&self) -> usize {
        *self.shape.last().unwrap()
    }

    fn launch(&self) -> GpuLaunch {
        let dims: Vec<i32> = self.shape.iter().map(|d| *d as i32).collect();
        let mut specs = vec![Spec::new(&dims, mlx(self.dtype))];
        specs.extend(self.bias.as_ref().map(|b| Spec::new(&[b.len() as i32], zmlx_mlx::Dtype::Float32)));
        self.kernel.gpu_launch(&specs, &self.parameters).unwrap()
    }

    fn text(&self, dialect: Dialect) -> KernelText {
        let of = match dialect {
            Dialect::Metal => emit::Dialect::Metal,
            Dialect::Cuda => emit::Dialect::Cuda,
        };
        let text = self.kernel.text(of).unwrap();
        let mut kernel = KernelText::new(self.kernel.name(), &text.body).header(&text.header).input(
            "x",
            self.dtype,
            self.shape.len(),
        );
        if self.bias.is_some() {
            kernel = kernel.input("bias", Dtype::F32, 1);
        }
        let first = match self.kernel.name() {
            "top_k" => ("values", self.dtype),
            _ => ("weights", Dtype::F32),
        };
        kernel = kernel.output(first.0, first.1).output("indices", Dtype::U32);
        self.launch().template.into_iter().fold(kernel, |kernel, (name, arg)| {
            let arg = match arg {
                raw::TemplateArg::Int(v) => TemplateArg::Int(v),
                raw::TemplateArg::Bool(v) => TemplateArg::Bool(v),
                raw::TemplateArg::Dtype(_) => panic!("no dtype is a template argument here"),
            };
            kernel.template(&name, arg)
        })
    }

    /// Runs it under one order of threads: the first output, and places.
    fn run(&self, module: &Module, number: usize, seed: u64) -> (Vec<f32>, Vec<u32>) {
        let mut inputs = vec![Buffer::from_f32(self.dtype, &self.x, &self.shape)];
        inputs.extend(self.bias.as_ref().map(|b| Buffer::from_f32(Dtype::F32, b, &[b.len()])));
        let mut shape = self.shape.clone();
        *shape.last_mut().unwrap() = self.k();
        let (shapes, launch) = ([shape.clone(), shape], self.launch());
        let [grid, group] = [launch.grid, launch.threadgroup].map(|n| n.map(|v| v as u32));
        let launch = Launch::new(&inputs, &shapes, grid, group).seed(seed);
        let out = module.run(number, &launch).unwrap_or_else(|e| panic!("{self}: {e}"));
        (out[0].to_f32(), out[1].to_u32())
    }

    fn check(&self, (first, places): &(Vec<f32>, Vec<u32>)) {
        let (cols, k) = (self.cols(), self.k());
        let x = Buffer::from_f32(self.dtype, &self.x, &self.shape).to_f32();
        for (r, row) in x.chunks(cols).enumerate() {
            let (first, places) = (&first[r * k..][..k], &places[r * k..][..k]);
            let scores = scores(row, self.bias.as_deref());
            let want = reference(&scores, k);
            assert_eq!(places, want, "{self}, row {r}");
            let chosen: Vec<f64> = want.iter().map(|p| scores[*p as usize]).collect();
            if self.parameters.len() == 1 {
                let same = first
                    .iter()
                    .zip(&want)
                    .all(|(f, p)| f.to_bits() == row[*p as usize].to_bits() || f.is_nan());
                assert!(same, "{self}, row {r}: {first:?}");
                continue;
            }
            for (j, w) in first.iter().enumerate() {
                let want = weight(&chosen, &scores, j, self.bias.is_some(), self.parameters[1] == 1);
                let error = (f64::from(*w) - want).abs();
                assert!(error <= 2e-6 * want, "{self}, row {r}, weight {j}: {w} is not {want}");
            }
        }
    }
}

impl std::fmt::Display for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} of {:?} {:?}", self.kernel.name(), self.parameters, self.dtype, self.shape)
    }
}

/// What is chosen by, in f64.
fn scores(row: &[f32], bias: Option<&[f32]>) -> Vec<f64> {
    let Some(bias) = bias else { return row.iter().map(|x| f64::from(*x)).collect() };
    let most = row.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let e: Vec<f64> = row.iter().map(|x| f64::from(x - most).exp()).collect();
    let all: f64 = e.iter().sum();
    e.iter().zip(bias).map(|(e, b)| e / all + f64::from(*b)).collect()
}

fn weight(chosen: &[f64], scores: &[f64], j: usize, bias: bool, norm: bool) -> f64 {
    let e = |s: &f64| if bias { *s } else { (s - chosen[0]).exp() };
    let sum: f64 = match (bias, norm) {
        (_, true) => chosen.iter().map(e).sum(),
        (true, false) => 1.0,
        (false, false) => scores.iter().map(e).sum(),
    };
    e(&chosen[j]) / sum
}

fn reference(scores: &[f64], k: usize) -> Vec<u32> {
    let mut places: Vec<u32> = (0..scores.len() as u32).collect();
    let key = |p: &u32| {
        let s = scores[*p as usize];
        if s.is_nan() { (true, 0.0) } else { (false, s) }
    };
    places.sort_by(|a, b| key(b).partial_cmp(&key(a)).unwrap().then(a.cmp(b)));
    places.truncate(k);
    places
}

/// Floats that look random; `ties` of a few values, `special` with infinities, zeros of both signs and NaN among them.
fn values(n: usize, seed: u64, kind: &str) -> Vec<f32> {
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN, 3.5, -3.5];
    let one = |i: usize| {
        let z = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ seed << 17);
        let z = (z ^ (z >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = z ^ (z >> 32);
        match kind {
            "ties" => (z % 4) as f32 - 1.0,
            "special" if z.is_multiple_of(3) => special[(z / 3 % 8) as usize],
            _ => (z >> 40) as f32 / (1 << 21) as f32 - 4.0,
        }
    };
    (0..n).map(one).collect()
}

fn trials() -> Vec<Trial> {
    let shapes: [(&[usize], i64); 12] = [
        (&[1], 1),
        (&[1, 5], 5),
        (&[9, 31], 2),
        (&[2, 3, 32], 8),
        (&[5, 33], 33),
        (&[6, 64], 6),
        (&[3, 128], 8),
        (&[2, 257], 40),
        (&[1, 1000], 4),
        (&[2, 1024], 65),
        (&[1, 1100], 7),
        (&[2, 2500], 34),
    ];
    let dtypes = [Dtype::F32, Dtype::F16, Dtype::Bf16];
    let mut all = Vec::new();
    for (n, (shape, k)) in shapes.into_iter().enumerate() {
        let (count, cols) = (shape.iter().product(), *shape.last().unwrap());
        let one = |kernel, parameters, dtype, kind, bias| {
            let x = values(count, n as u64, kind);
            Trial { kernel, parameters, shape: shape.to_vec(), dtype, x, bias }
        };
        let kind = ["special", "ties"][n % 2];
        all.push(one(top_k_kernel(), vec![k], dtypes[n % 3], kind, None));
        // f32 for random values, since rounding to 16 bits would only add ties.
        let (dtype, kind) = [(Dtype::F32, "random"), (Dtype::F16, "ties"), (Dtype::Bf16, "random")][n % 3];
        all.push(one(top_k_gating_kernel(), vec![k, (n / 2 % 2) as i64], dtype, kind, None));
        if n % 2 == 0 {
            // Different values (37 divides no length here): rounding decides no order.
            let bias = (0..cols).map(|i| ((i * 37 + 3) % cols + 1) as f32 / cols as f32).collect();
            all.push(one(
                top_k_gating_bias_kernel(),
                vec![k, (n / 2 % 2) as i64],
                Dtype::F32,
                "random",
                Some(bias),
            ));
        }
    }
    all
}

fn in_the_emulator(dialect: Dialect) {
    let trials = trials();
    let texts: Vec<KernelText> = trials.iter().map(|t| t.text(dialect)).collect();
    let module = Module::build(dialect, &texts).unwrap_or_else(|e| panic!("{e}"));
    for (number, trial) in trials.iter().enumerate() {
        let first = trial.run(&module, number, 1);
        trial.check(&first);
        for seed in 2..5 {
            let again = trial.run(&module, number, seed);
            assert_eq!(again.1, first.1, "{trial}, seed {seed}");
            let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&again.0), bits(&first.0), "{trial}, seed {seed}");
        }
    }
    println!("{} launches", 4 * trials.len());
}

#[test]
fn metal_text_in_the_emulator() {
    in_the_emulator(Dialect::Metal);
}

#[test]
fn cuda_text_in_the_emulator() {
    in_the_emulator(Dialect::Cuda);
}

/// Skipped, with the reason, only where NVRTC can be neither found nor fetched; `ZMLX_REQUIRE_NVRTC=1` makes that a
/// failure.
#[test]
fn cuda_text_compiles_with_nvrtc() {
    let nvrtc = match Nvrtc::find() {
        Ok(nvrtc) => nvrtc,
        Err(e) => {
            assert!(std::env::var_os("ZMLX_REQUIRE_NVRTC").is_none(), "{e}");
            eprintln!("skipped: {e}");
            return;
        }
    };
    let mut texts: Vec<KernelText> = trials().iter().map(|t| t.text(Dialect::Cuda)).collect();
    texts.iter_mut().enumerate().for_each(|(n, t)| t.name = format!("{}_{n}", t.name));
    for arch in ["sm_90", "compute_75"] {
        let made = nvrtc.compile_all(&texts, arch).unwrap_or_else(|e| panic!("{arch}: {e}"));
        assert!(!made.is_empty());
    }
}

#[test]
fn too_many_rows_are_refused() {
    let spec = Spec::new(&[1 << 20, 100, 8], zmlx_mlx::Dtype::Float32);
    let error = top_k_kernel().gpu_launch(&[spec], &[2]).unwrap_err().to_string();
    assert!(error.contains("requested 104857600, allowed 67108863"), "{error}");
}
