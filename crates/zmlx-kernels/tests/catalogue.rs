//! Every entry of the catalogue, in every dtype, on every case: values against the evaluator in double precision and
//! against the reference in MLX ops, gradients against finite differences of the evaluator and MLX's own.

mod catalogue_support;

use catalogue_support::*;
use zmlx_kernels::Array;
use zmlx_kernels::catalogue::{Case, Domain, Entry, Gradient, entries};
use zmlx_kernels::lang::Dtype;
use zmlx_kernels::lang::eval::{self, Rounding, Tensor};
use zmlx_mlx::transforms;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// Relative and absolute error of f32 results: against the evaluator, the reference, and of gradients.
const FORWARD: f64 = 5e-6;
const REFERENCE: f64 = 2e-5;
const GRADIENT: f64 = 1e-4;

struct Run<'a> {
    entry: &'a Entry,
    case: &'a Case,
    dtype: Dtype,
    tensors: Vec<Tensor>,
    arrays: Vec<Array>,
}

impl<'a> Run<'a> {
    fn new(entry: &'a Entry, case: &'a Case, dtype: Dtype) -> Fallible<Self> {
        let tensors = tensors(case, dtype);
        let arrays = tensors.iter().map(array).collect::<zmlx_mlx::Result<_>>()?;
        Ok(Self { entry, case, dtype, tensors, arrays })
    }

    fn call(&self, arrays: &[Array]) -> zmlx_mlx::Result<Vec<Array>> {
        Ok(self.entry.call(&arrays.iter().collect::<Vec<_>>(), &self.case.setting)?)
    }

    /// The inputs as the reference takes them: floats in f32.
    fn wide(&self) -> zmlx_mlx::Result<Vec<Array>> {
        let wide = |(a, t): (&Array, &Tensor)| {
            if t.dtype.is_float() { a.astype(zmlx_mlx::Dtype::Float32) } else { Ok(a.clone()) }
        };
        self.arrays.iter().zip(&self.tensors).map(wide).collect()
    }

    fn oracle(&self, tensors: &[Tensor]) -> Fallible<Vec<Vec<f64>>> {
        let shapes = shapes(&self.case.setting);
        let kernel = self.entry.kernel()?.ir();
        let out = eval::evaluate_with(kernel, tensors, &shapes, Rounding::Exact)?;
        Ok(out.iter().map(Tensor::to_f64).collect())
    }

    /// All that is wrong.
    fn check(&self) -> Fallible<Vec<String>> {
        let mut wrong = Vec::new();
        let found = self.call(&self.arrays)?;
        let slack = self.case.slack;
        if self.entry.raw_kernel().is_none() {
            for (n, (f, e)) in found.iter().zip(self.oracle(&self.tensors)?).enumerate() {
                let relative = FORWARD * slack + unit(f.dtype());
                let diff = difference(&values(f)?, &in_range(e, f.dtype()), relative, FORWARD * slack);
                wrong.extend(diff.map(|d| format!("output {n} against the evaluator: {d}")));
            }
        }
        if self.case.reference {
            let expected = (self.entry.reference)(&self.wide()?, &self.case.setting)?;
            if expected.len() != found.len() {
                wrong.push(format!("{} outputs, the reference has {}", found.len(), expected.len()));
            }
            for (n, (f, e)) in found.iter().zip(&expected).enumerate() {
                if f.shape() != e.shape() {
                    wrong.push(format!(
                        "output {n} has shape {:?}, the reference {:?}",
                        f.shape(),
                        e.shape()
                    ));
                    continue;
                }
                let relative = REFERENCE * slack + unit(f.dtype());
                let e = in_range(values(e)?, f.dtype());
                let diff = difference(&values(f)?, &e, relative, REFERENCE * slack);
                wrong.extend(diff.map(|d| format!("output {n} against the reference: {d}")));
            }
        }
        self.check_layouts(&found, &mut wrong)?;
        if self.entry.gradient == Gradient::Derived && (self.case.autograd || self.case.differences) {
            self.check_gradients(&found, &mut wrong)?;
        }
        Ok(wrong)
    }

    /// The same call again, and with inputs that are not contiguous, gives the same bits (sums at places: nearly).
    fn check_layouts(&self, found: &[Array], wrong: &mut Vec<String>) -> Fallible<()> {
        let views = self.arrays.iter().map(strided).collect::<zmlx_mlx::Result<Vec<_>>>()?;
        for (what, arrays) in [("again", &self.arrays), ("with strided inputs", &views)] {
            for (n, (a, b)) in found.iter().zip(self.call(arrays)?).enumerate() {
                let diff = difference(&values(&b)?, &values(a)?, self.looseness(), self.looseness());
                wrong.extend(diff.map(|d| format!("output {n} {what}: {d}")));
            }
        }
        Ok(())
    }

    fn looseness(&self) -> f64 {
        let scatters = |k: &zmlx_kernels::Kernel| k.ir().outputs.iter().any(|o| o.scatter.is_some());
        if self.entry.kernel().is_ok_and(scatters) { 1e-6 } else { 0.0 }
    }

    fn check_gradients(&self, found: &[Array], wrong: &mut Vec<String>) -> Fallible<()> {
        let smooth: Vec<usize> =
            (0..self.tensors.len()).filter(|n| self.tensors[*n].dtype.is_float()).collect();
        let is_float = |a: &Array| unit(a.dtype()) > 0.0 || a.dtype() == zmlx_mlx::Dtype::Float32;
        let float: Vec<usize> = (0..found.len()).filter(|n| is_float(&found[*n])).collect();
        let primals: Vec<&Array> = smooth.iter().map(|n| &self.arrays[*n]).collect();
        let mut cotangents = Vec::new();
        for n in &float {
            let f = &found[*n];
            let c: Vec<f32> = noise(f.size(), 900 + *n as u64).into_iter().map(|v| v as f32).collect();
            cotangents.push(Array::from_vec(c, f.shape())?.astype(f.dtype())?);
        }
        let given: Vec<&Array> = cotangents.iter().collect();
        let pick = |all: Vec<Array>| float.iter().map(|n| all[*n].clone()).collect::<Vec<_>>();
        let with = |base: &[Array], a: &[Array]| {
            let mut all = base.to_vec();
            smooth.iter().zip(a).for_each(|(n, a)| all[*n] = a.clone());
            all
        };
        let (_, ours) = transforms::vjp(|a| Ok(pick(self.call(&with(&self.arrays, a))?)), &primals, &given)?;
        if self.case.autograd && self.case.reference {
            let wide = self.wide()?;
            let primals: Vec<&Array> = smooth.iter().map(|n| &wide[*n]).collect();
            let reference =
                |a: &[Array]| Ok(pick((self.entry.reference)(&with(&wide, a), &self.case.setting)?));
            let given = cotangents
                .iter()
                .map(|c| c.astype(zmlx_mlx::Dtype::Float32))
                .collect::<Result<Vec<_>, _>>()?;
            let (_, theirs) = transforms::vjp(reference, &primals, &given.iter().collect::<Vec<_>>())?;
            for ((n, o), t) in smooth.iter().zip(&ours).zip(&theirs) {
                let expected = values(t)?;
                let size =
                    expected.iter().fold(1.0f64, |m, v| if v.is_finite() { m.max(v.abs()) } else { m });
                let tolerance = GRADIENT * self.case.slack + unit(o.dtype());
                let diff = difference(&values(o)?, &expected, tolerance, tolerance * size);
                wrong.extend(diff.map(|d| format!("gradient of input {n} against MLX's: {d}")));
            }
        }
        if self.case.differences && self.dtype == Dtype::F32 && self.entry.raw_kernel().is_none() {
            self.check_differences(&smooth, &float, &cotangents, &ours, wrong)?;
        }
        Ok(())
    }

    /// Along two random directions of each input.
    fn check_differences(
        &self,
        smooth: &[usize],
        float: &[usize],
        cotangents: &[Array],
        ours: &[Array],
        wrong: &mut Vec<String>,
    ) -> Fallible<()> {
        let cotangents = cotangents.iter().map(values).collect::<zmlx_mlx::Result<Vec<_>>>()?;
        let loss = |tensors: &[Tensor]| -> Fallible<f64> {
            let out = self.oracle(tensors)?;
            // An infinity that does not move has no part in it.
            let finite =
                |v: &[f64]| v.iter().map(|v| if v.is_finite() { *v } else { 0.0 }).collect::<Vec<_>>();
            Ok(float.iter().zip(&cotangents).map(|(n, c)| dot(&finite(&out[*n]), c)).sum())
        };
        for (k, n) in smooth.iter().enumerate() {
            let gradient = values(&ours[k])?;
            for seed in [1, 2] {
                let direction = noise(gradient.len(), 7000 + seed * 31 + k as u64);
                let at = self.tensors[*n].to_f64();
                let size = at.iter().fold(0.0f64, |m, v| m.max(v.abs()));
                let step = if size > 0.0 { size * 1e-6 } else { 1e-6 };
                let moved = |sign: f64| {
                    let mut tensors = self.tensors.clone();
                    let values = at.iter().zip(&direction).map(|(v, d)| v + sign * step * d).collect();
                    tensors[*n] = Tensor::float(&tensors[*n].shape, Dtype::F32, values);
                    loss(&tensors)
                };
                let expected = (moved(1.0)? - moved(-1.0)?) / (2.0 * step);
                let found = dot(&gradient, &direction);
                let scale: f64 = gradient.iter().zip(&direction).map(|(g, d)| (g * d).abs()).sum();
                // The difference itself has an error by cancellation, of about the loss times 1e-16 over the step.
                let noise = loss(&self.tensors)?.abs() * 1e-13 / step;
                let off = (found - expected).abs();
                if off.is_nan() || off > 2e-4 * self.case.slack * (1.0 + scale) + noise {
                    wrong.push(format!(
                        "gradient of input {n}: {found:e} along a direction, differences {expected:e}"
                    ));
                }
            }
        }
        Ok(())
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The same values in another layout: transposed in memory, or every other element of a longer array.
fn strided(a: &Array) -> zmlx_mlx::Result<Array> {
    let rank = a.ndim() as i32;
    if rank >= 2 {
        return a.swapaxes(0, rank - 1)?.contiguous()?.swapaxes(0, rank - 1);
    }
    if rank == 0 {
        return Ok(a.clone());
    }
    let n = a.shape()[0];
    a.repeat(2, 0)?.slice(&[0], &[2 * n], &[2])
}

/// Runs all cases of a domain and fails with everything that is wrong.
fn check_domain(domain: Domain) {
    let mut wrong = Vec::new();
    let mut checked = 0;
    for entry in entries().iter().filter(|e| e.domain == domain) {
        for case in (entry.cases)() {
            for dtype in FLOATS {
                checked += 1;
                let found = Run::new(entry, &case, dtype).and_then(|r| r.check());
                let messages = found.unwrap_or_else(|e| vec![e.to_string()]);
                wrong.extend(messages.iter().map(|m| format!("{} {dtype}, {}: {m}", entry.name, case.label)));
            }
        }
    }
    println!("{}: {checked} calls", domain.name());
    assert!(checked > 0);
    assert!(wrong.is_empty(), "{} failures\n{}", wrong.len(), wrong.join("\n"));
}

macro_rules! domains {
    ($($test:ident = $domain:ident;)*) => {$(
        #[test]
        fn $test() {
            check_domain(Domain::$domain);
        }
    )*};
}

domains! {
    activations = Activation;
    softmaxes = Softmax;
    norms = Norm;
    reductions = Reduce;
    losses = Loss;
    gated_units = Glu;
    dropouts = Dropout;
    scans = Scan;
    ropes = Rope;
    indexing = Index;
    bits = Bits;
    images = Image;
    optimisers = Optim;
    gates = Gate;
}

#[test]
fn names_are_unique_and_kernels_have_them() {
    let mut seen = std::collections::HashSet::new();
    for entry in entries() {
        for name in std::iter::once(entry.name.as_ref()).chain(entry.aliases.iter().copied()) {
            assert!(seen.insert(name), "two entries are called {name}");
        }
        if entry.raw_kernel().is_none() {
            let kernel = entry.kernel().unwrap_or_else(|e| panic!("{}: {e}", entry.name));
            assert_eq!(kernel.name(), entry.name);
        }
        assert!(!(entry.cases)().is_empty(), "{} has no case", entry.name);
    }
}
