//! Runs emitted texts in the emulator, in both dialects, and compares them with the evaluator.
#![allow(dead_code)] // each test file uses a part

use zmlx_emulator::{Buffer, KernelText, Launch, Module};
use zmlx_lang::emit::{self, Dialect, Layout, Params, Plan, Source};
use zmlx_lang::eval::{self, Data, Rounding, Shapes, Tensor};
use zmlx_lang::{Dtype, Kernel, Program, shape, text};

pub const DIALECTS: [Dialect; 2] = [Dialect::Metal, Dialect::Cuda];

/// Parameters in the order threads, vec, rows a group, items.
pub fn params(threads: u32, vec: u32, rows_per_group: u32, items: u32) -> Params {
    Params { threads, vec, rows_per_group, items }
}

/// An input: its values are rounded to its dtype.
#[derive(Clone)]
pub struct Input {
    pub buffer: Buffer,
    pub dtype: Dtype,
}

/// An input from values.
pub fn input(dtype: Dtype, shape: &[usize], values: &[f64]) -> Input {
    let floats: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    let mut buffer = Buffer::from_f32(emulated(dtype), &floats, shape);
    if matches!(dtype, Dtype::I64 | Dtype::U64 | Dtype::I32 | Dtype::U32) {
        // Through integers, which f32 does not hold.
        buffer.data = values
            .iter()
            .flat_map(|v| match dtype {
                Dtype::I64 => (*v as i64).to_ne_bytes().to_vec(),
                Dtype::U64 => (*v as u64).to_ne_bytes().to_vec(),
                Dtype::I32 => (*v as i32).to_ne_bytes().to_vec(),
                _ => (*v as u32).to_ne_bytes().to_vec(),
            })
            .collect();
    }
    Input { buffer, dtype }
}

/// Values that look random, the same in every run: floats in -4..4, integers in a small range around 0.
pub fn random(dtype: Dtype, shape: &[usize], seed: u64) -> Input {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1u64 << 24) as f64
    };
    let count: usize = shape.iter().product();
    let values: Vec<f64> = (0..count)
        .map(|_| match dtype {
            Dtype::Bool => f64::from(u8::from(next() < 0.5)),
            d if d.is_float() => next() * 8.0 - 4.0,
            Dtype::U8 | Dtype::U16 | Dtype::U32 | Dtype::U64 => (next() * 100.0).floor(),
            _ => (next() * 200.0).floor() - 100.0,
        })
        .collect();
    input(dtype, shape, &values)
}

pub fn emulated(dtype: Dtype) -> zmlx_emulator::Dtype {
    use zmlx_emulator::Dtype as E;
    match dtype {
        Dtype::Bool => E::Bool,
        Dtype::U8 => E::U8,
        Dtype::U16 => E::U16,
        Dtype::U32 => E::U32,
        Dtype::U64 => E::U64,
        Dtype::I8 => E::I8,
        Dtype::I16 => E::I16,
        Dtype::I32 => E::I32,
        Dtype::I64 => E::I64,
        Dtype::F16 => E::F16,
        Dtype::Bf16 => E::Bf16,
        Dtype::F32 => E::F32,
    }
}

fn tensor(shape: &[usize], dtype: Dtype, buffer: &Buffer) -> Tensor {
    if dtype.is_float() {
        return Tensor::float(shape, dtype, buffer.to_f32().into_iter().map(f64::from).collect());
    }
    let wide = |v: i64| if dtype == Dtype::U64 { i128::from(v as u64) } else { i128::from(v) };
    Tensor::int(shape, dtype, buffer.to_i64().into_iter().map(wide).collect())
}

/// One launch of one kernel.
#[derive(Clone)]
pub struct Case {
    pub kernel: Kernel,
    pub inputs: Vec<Input>,
    pub call: Shapes,
    pub params: Params,
    pub index64: bool,
    /// Threads in all, if other than the text's own.
    pub grid: Option<[u32; 3]>,
    /// Reads all inputs through strides.
    pub strided: bool,
    /// Allowed distance, relative to the expected value and absolute; outputs of 16 bits get one unit more.
    pub tolerance: (f64, f64),
}

/// A case of a text with tolerance 1e-5 relative, 1e-6 absolute.
pub fn case(kernel: &str, inputs: &[Input], params: Params) -> Case {
    let kernel = text::elementwise(None, kernel).unwrap_or_else(|e| panic!("{e}"));
    Case {
        kernel,
        inputs: inputs.to_vec(),
        call: Shapes::default(),
        params,
        index64: false,
        grid: None,
        strided: false,
        tolerance: (1e-5, 1e-6),
    }
}

impl Case {
    pub fn tolerance(mut self, relative: f64, absolute: f64) -> Self {
        self.tolerance = (relative, absolute);
        self
    }

    pub fn domain(mut self, shape: &[usize]) -> Self {
        self.call.domain = Some(shape.to_vec());
        self
    }

    /// The shape of a scattered first output.
    pub fn output(mut self, shape: &[usize]) -> Self {
        self.call.outputs = vec![Some(shape.to_vec())];
        self
    }

    pub fn wide(mut self) -> Self {
        self.index64 = true;
        self
    }

    pub fn strided(mut self) -> Self {
        self.strided = true;
        self
    }

    /// Starts every input one element after an aligned address.
    pub fn misaligned(mut self) -> Self {
        self.inputs.iter_mut().for_each(|i| i.buffer.offset = 1);
        self
    }

    fn shapes(&self) -> Vec<Vec<usize>> {
        self.inputs.iter().map(|i| i.buffer.shape.clone()).collect()
    }

    pub fn program(&self) -> Program {
        let dtypes: Vec<Dtype> = self.inputs.iter().map(|i| i.dtype).collect();
        self.kernel.program(&dtypes).unwrap_or_else(|e| panic!("{e}"))
    }

    pub fn plan(&self, program: &Program) -> Plan {
        let domain = shape::domain(program, &self.shapes(), self.call.domain.as_deref()).unwrap();
        let layout = |(decl, shape): (&zmlx_lang::program::ProgramInput, &Vec<usize>)| match Layout::of(
            decl.role,
            shape,
            &domain.shape,
        ) {
            Layout::Indexed => Layout::Indexed,
            _ if self.strided => Layout::Strided,
            layout => layout,
        };
        let layouts = program.inputs.iter().zip(&self.shapes()).map(layout).collect();
        Plan::new(layouts, domain.shape.len(), self.index64, self.params)
    }
}

pub fn kernel_text(source: &Source, program: &Program, plan: &Plan) -> KernelText {
    let used = program.inputs.iter().filter(|i| i.used).map(|i| emulated(i.dtype));
    let meta = if plan.index64 { zmlx_emulator::Dtype::I64 } else { zmlx_emulator::Dtype::I32 };
    let mut text = KernelText::new(&source.name, &source.body).header(&source.header);
    for (name, dtype) in source.inputs.iter().zip(used.chain([meta])) {
        text = text.input(name, dtype, 1);
    }
    for (name, output) in source.outputs.iter().zip(&program.outputs) {
        text = text.output(name, emulated(output.dtype));
    }
    if source.atomic_outputs { text.atomic() } else { text }
}

/// Runs all cases in both dialects, twice with other orders of threads, and compares.
pub fn check(cases: &[Case]) {
    let mut wrong = Vec::new();
    for dialect in DIALECTS {
        wrong.extend(check_in(dialect, cases));
    }
    let count = wrong.len();
    wrong.truncate(8);
    assert!(wrong.is_empty(), "{count} failures, of them:\n{}", wrong.join("\n\n"));
}

/// What one case gives, in both dialects.
pub fn outputs(case: &Case) -> Vec<Vec<Buffer>> {
    DIALECTS
        .iter()
        .map(|&dialect| {
            let (module, made) = build(dialect, std::slice::from_ref(case));
            made[0].run(case, &module, 1).unwrap_or_else(|e| panic!("{e}"))
        })
        .collect()
}

/// An emitted case.
struct Made {
    program: Program,
    plan: Plan,
    source: Source,
    /// The kernel's number in the module.
    index: usize,
}

/// Emits all cases and compiles their texts together.
fn build(dialect: Dialect, cases: &[Case]) -> (Module, Vec<Made>) {
    let mut texts: Vec<KernelText> = Vec::new();
    let mut made = Vec::new();
    for case in cases {
        let program = case.program();
        let plan = case.plan(&program);
        let source = emit::emit(&program, dialect, &plan).unwrap_or_else(|e| panic!("{e}"));
        let text = kernel_text(&source, &program, &plan);
        let index = texts.iter().position(|t| t.name == text.name).unwrap_or_else(|| {
            texts.push(text);
            texts.len() - 1
        });
        made.push(Made { program, plan, source, index });
    }
    let to = match dialect {
        Dialect::Metal => zmlx_emulator::Dialect::Metal,
        Dialect::Cuda => zmlx_emulator::Dialect::Cuda,
    };
    (Module::build(to, &texts).unwrap_or_else(|e| panic!("{dialect:?}: {e}")), made)
}

fn check_in(dialect: Dialect, cases: &[Case]) -> Vec<String> {
    let (module, made) = build(dialect, cases);
    let mut wrong = Vec::new();
    for (case, made) in cases.iter().zip(&made) {
        if let Err(e) = made.check(case, &module) {
            let inputs: Vec<String> =
                case.inputs.iter().map(|i| format!("{} {:?}", i.dtype, i.buffer.shape)).collect();
            let (kernel, plan, body) = (case.kernel.to_text(), &made.plan, &made.source.body);
            wrong.push(format!("{dialect:?} {kernel} with {} by {plan:?}\n{e}\n{body}", inputs.join(", ")));
        }
    }
    wrong
}

impl Made {
    fn check(&self, case: &Case, module: &Module) -> Result<(), String> {
        let tensors: Vec<Tensor> =
            case.inputs.iter().map(|i| tensor(&i.buffer.shape, i.dtype, &i.buffer)).collect();
        let rounding = if case.kernel.strict { Rounding::EachOperation } else { Rounding::Storage };
        let expected =
            eval::evaluate_with(&case.kernel, &tensors, &case.call, rounding).map_err(|e| e.to_string())?;
        for seed in [1, 7] {
            let found = self.run(case, module, seed).map_err(|e| format!("seed {seed}: {e}"))?;
            for ((found, expected), decl) in found.iter().zip(&expected).zip(&self.program.outputs) {
                compare(found, expected, decl.dtype, case.tolerance)
                    .map_err(|e| format!("output {}: {e}", decl.name))?;
            }
        }
        Ok(())
    }

    /// The outputs; none where there is nothing to launch.
    fn run(&self, case: &Case, module: &Module, seed: u64) -> Result<Vec<Buffer>, String> {
        let (program, plan, shapes) = (&self.program, &self.plan, case.shapes());
        let text = |e: zmlx_lang::LangError| e.to_string();
        let domain = shape::domain(program, &shapes, case.call.domain.as_deref()).map_err(text)?;
        let outputs = shape::output_shapes(program, &domain, &shapes, &case.call.outputs).map_err(text)?;
        let sizes = emit::meta(program, plan, &domain.shape, &shapes, &outputs).map_err(text)?;
        let used = case.inputs.iter().zip(&program.inputs).filter(|(_, decl)| decl.used);
        let mut buffers: Vec<Buffer> = used.map(|(i, _)| flat(i.buffer.clone())).collect();
        let dtype = if plan.index64 { Dtype::I64 } else { Dtype::I32 };
        let sizes: Vec<f64> = sizes.iter().map(|n| *n as f64).collect();
        buffers.push(input(dtype, &[sizes.len()], &sizes).buffer);
        let Some(grid) = self.source.grid.grid(domain.rows as u64, domain.cols as u64) else {
            return if domain.is_empty() { Ok(Vec::new()) } else { Err("no grid".to_owned()) };
        };
        let grid = case.grid.unwrap_or(grid);
        let mut launch = Launch::new(&buffers, &outputs, grid, self.source.grid.threadgroup()).seed(seed);
        if program.outputs.iter().any(|o| o.scatter.is_some()) {
            launch = launch.init_value(0.0);
        }
        module.run(self.index, &launch).map_err(|e| e.to_string())
    }
}

/// Texts see elements in row-major order; only whether there are axes at all would change a signature.
fn flat(mut buffer: Buffer) -> Buffer {
    buffer.shape = vec![buffer.len()];
    buffer
}

fn compare(found: &Buffer, expected: &Tensor, dtype: Dtype, tolerance: (f64, f64)) -> Result<(), String> {
    if let Data::Int(want) = &expected.data {
        let got = tensor(&expected.shape, dtype, found);
        let Data::Int(got) = got.data else { return Err("it is not of integers".to_owned()) };
        return match got.iter().zip(want).position(|(g, w)| g != w) {
            Some(i) => Err(format!("element {i} is {}, expected {}", got[i], want[i])),
            None => Ok(()),
        };
    }
    let unit = match dtype {
        Dtype::F16 => 1.0 / 1024.0,
        Dtype::Bf16 => 1.0 / 128.0,
        _ => 0.0,
    };
    let got = found.to_f32();
    let want = expected.to_f64();
    if got.len() != want.len() {
        return Err(format!("{} elements, expected {}", got.len(), want.len()));
    }
    let close = |g: f64, w: f64| {
        if tolerance == (0.0, 0.0) {
            return g == w || g.is_nan() && w.is_nan();
        }
        let allowed = tolerance.1 + w.abs() * (tolerance.0 + unit);
        g == w || g.is_nan() && w.is_nan() || (g - w).abs() <= allowed
    };
    match got.iter().zip(&want).position(|(g, w)| !close(f64::from(*g), *w)) {
        Some(i) => Err(format!("element {i} is {:e}, expected {:e}", got[i], want[i])),
        None => Ok(()),
    }
}
