//! The GPU texts of every entry that is an expression, and of its gradient, run in the emulator in both dialects.

mod catalogue_support;
// The emulator's side: emitting, launching, comparing with the evaluator.
#[path = "../../zmlx-lang/tests/emit_support/mod.rs"]
mod emit_support;

use catalogue_support::{noise, shapes, tensors};
use emit_support::{Case as Emulated, DIALECTS, Input, check, input, params};
use zmlx_kernels::catalogue::{Case, Domain, Entry, Gradient, entries};
use zmlx_kernels::lang::emit::{self, Dialect};
use zmlx_kernels::lang::eval::{self, Rounding, Shapes, Tensor};
use zmlx_kernels::lang::{Dtype, Kernel, LangError, shape};

/// Elements of a case that is small enough to be emulated many times, and large enough to have rows.
const WANTED: usize = 100;

/// Gradients that a GPU text can't hold: they run along the row from both ends. A launch reports it.
const UNSUPPORTED: [&str; 12] = [
    "cumprod gradient",
    "cummax gradient",
    "cummin gradient",
    "cumprod_exclusive gradient",
    "cummax_exclusive gradient",
    "cummin_exclusive gradient",
    "cumprod_reverse gradient",
    "cummax_reverse gradient",
    "cummin_reverse gradient",
    "cumprod_exclusive_reverse gradient",
    "cummax_exclusive_reverse gradient",
    "cummin_exclusive_reverse gradient",
];

fn small_case(entry: &Entry) -> Case {
    let size = |c: &Case| {
        let largest = c.inputs.iter().map(|i| i.shape.iter().product::<i32>()).max();
        largest.unwrap_or_default() as usize
    };
    let cases = (entry.cases)().into_iter().filter(|c| c.differences || entry.gradient != Gradient::Derived);
    cases.min_by_key(|c| size(c).abs_diff(WANTED)).unwrap_or_else(|| panic!("{} has no case", entry.name))
}

fn buffers(tensors: &[Tensor]) -> Vec<Input> {
    tensors.iter().map(|t| input(t.dtype, &t.shape, &t.to_f64())).collect()
}

/// A kernel by the plan that the launch layer takes first, and by one that reads rows anew in every pass.
fn plans(kernel: &Kernel, tensors: &[Tensor], call: &Shapes) -> Vec<Emulated> {
    let dtypes: Vec<Dtype> = tensors.iter().map(|t| t.dtype).collect();
    let program = kernel.program(&dtypes).unwrap_or_else(|e| panic!("{e}"));
    let found: Vec<Vec<usize>> = tensors.iter().map(|t| t.shape.clone()).collect();
    let domain = shape::domain(&program, &found, call.domain.as_deref()).unwrap_or_else(|e| panic!("{e}"));
    let first = emit::candidates(&program, Dialect::Metal, domain.rows as u64, domain.cols as u64)[0];
    let looped = params(64, 2, if program.has_rows { 2 } else { 1 }, 0);
    let case = |params| Emulated {
        kernel: kernel.clone(),
        inputs: buffers(tensors),
        call: call.clone(),
        params,
        index64: false,
        strided: false,
        grid: None,
        tolerance: (3e-5, 2e-5),
    };
    vec![case(first), case(looped)]
}

/// The gradient with respect to all float inputs, with cotangents and saved outputs, which it knows by their names.
fn gradient(entry: &Entry, tensors: &[Tensor], call: &Shapes) -> Option<Emulated> {
    let kernel = entry.kernel().unwrap_or_else(|e| panic!("{e}"));
    let ir = kernel.ir();
    let floats = ir.inputs.iter().zip(tensors).filter(|(_, t)| t.dtype.is_float());
    let wrt: Vec<&str> = floats.map(|(i, _)| i.name.as_str()).collect();
    let gradient = kernel.gradient(&wrt).unwrap_or_else(|e| panic!("{}: {e}", entry.name))?;
    let dtypes: Vec<Dtype> = tensors.iter().map(|t| t.dtype).collect();
    let program = ir.program(&dtypes).unwrap_or_else(|e| panic!("{e}"));
    let found: Vec<Vec<usize>> = tensors.iter().map(|t| t.shape.clone()).collect();
    let domain = shape::domain(&program, &found, call.domain.as_deref()).unwrap_or_else(|e| panic!("{e}"));
    let outputs = eval::evaluate_with(ir, tensors, call, Rounding::Storage).unwrap_or_else(|e| panic!("{e}"));
    let one = |name: &str| {
        if let Some(n) = ir.input(name) {
            return tensors[n].clone();
        }
        let (cotangent, output) = name.strip_prefix("g_").map_or((false, name), |o| (true, o));
        let n = ir.outputs.iter().position(|o| o.name == output);
        let n = n.unwrap_or_else(|| panic!("{}: the gradient has an input {name}", entry.name));
        let mut t = outputs[n].clone();
        if cotangent {
            t = Tensor::float(&t.shape, t.dtype, noise(t.len(), 50 + n as u64));
        }
        if program.outputs[n].per_row && !program.outputs[n].keep_dims {
            t.shape.push(1);
        }
        t
    };
    let inputs: Vec<Tensor> = gradient.ir().inputs.iter().map(|i| one(&i.name)).collect();
    let call = Shapes { domain: Some(domain.shape), outputs: Vec::new() };
    plans(gradient.ir(), &inputs, &call).into_iter().next()
}

/// Whether both dialects can express it.
fn supported(case: &Emulated) -> bool {
    let program = case.program();
    let plan = case.plan(&program);
    DIALECTS.iter().all(|dialect| match emit::emit(&program, *dialect, &plan) {
        Ok(_) => true,
        Err(LangError::Unsupported { .. }) => false,
        Err(e) => panic!("{} on {dialect:?}: {e}", case.kernel.name),
    })
}

/// The texts of a domain with what they are of.
fn texts(domain: Domain) -> Vec<(String, Emulated)> {
    let mut all = Vec::new();
    for entry in entries().iter().filter(|e| e.domain == domain && e.raw_kernel().is_none()) {
        let case = small_case(entry);
        let (tensors, call) = (tensors(&case, Dtype::F32), shapes(&case.setting));
        let kernel = entry.kernel().unwrap_or_else(|e| panic!("{e}")).ir();
        all.extend(plans(kernel, &tensors, &call).into_iter().map(|c| (entry.name.to_string(), c)));
        if entry.gradient == Gradient::Derived {
            all.extend(gradient(entry, &tensors, &call).map(|c| (format!("{} gradient", entry.name), c)));
        }
        // The texts of images differ by a load, which other domains have too, and take long to compile.
        let halves = if domain == Domain::Image { &[][..] } else { &[Dtype::F16, Dtype::Bf16] };
        for &dtype in halves {
            let half = plans(kernel, &catalogue_support::tensors(&case, dtype), &call).into_iter().next();
            all.extend(half.map(|c| (entry.name.to_string(), c)));
        }
    }
    all
}

#[test]
fn nothing_else_is_unsupported() {
    let all = DOMAINS.iter().flat_map(|d| texts(*d));
    let found: Vec<String> = all.filter(|(_, c)| !supported(c)).map(|(name, _)| name).collect();
    assert_eq!(found, UNSUPPORTED);
}

fn check_domain(domain: Domain) {
    let cases: Vec<Emulated> = texts(domain).into_iter().map(|(_, c)| c).filter(supported).collect();
    println!("{}: {} texts in each dialect", domain.name(), cases.len());
    check(&cases);
}

macro_rules! domains {
    ($($test:ident = $domain:ident;)*) => {
        const DOMAINS: &[Domain] = &[$(Domain::$domain),*];

        $(
            #[test]
            fn $test() {
                check_domain(Domain::$domain);
            }
        )*
    };
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
}
