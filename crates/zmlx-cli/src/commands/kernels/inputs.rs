//! Inputs for a kernel: shapes, types and values, from the cases that come with the catalogue.

use zmlx_kernels::catalogue::{Case, Domain, Entry, Input, Setting, Values};
use zmlx_kernels::lang::program::Program;
use zmlx_kernels::lang::{Dtype, InputDecl, Role, shape};
use zmlx_kernels::raw::Spec;
use zmlx_kernels::{Array, Kernel};
use zmlx_mlx::ops;

use super::Target;
use crate::args::{KernelDtype, KernelInputArgs};
use crate::failure::Failure;

/// Shape that kernels run over unless the user says another.
const SHAPE: [i32; 2] = [4096, 4096];
/// The same for choices among experts.
const GATE_SHAPE: [i32; 2] = [4096, 128];
/// Axes and elements of a shape at most.
const MAX_AXES: usize = 8;
const MAX_ELEMENTS: u64 = 1 << 40;
/// Bytes of all inputs and outputs of a call that is computed, at most.
const MAX_BYTES: u64 = 4 << 30;

/// The inputs of one call.
pub(super) struct Inputs {
    pub(super) given: Vec<Given>,
    /// Shapes and parameters that inputs do not decide.
    pub(super) setting: Setting,
    /// Said when the shapes are the catalogue's own and not the usual ones.
    pub(super) own_shapes: bool,
}

/// One input: `pattern` holds elements that are repeated in a mixed order.
#[derive(Clone)]
pub(super) struct Given {
    pub(super) name: String,
    pub(super) shape: Vec<i32>,
    pub(super) dtype: Dtype,
    pattern: Pattern,
}

#[derive(Clone)]
enum Pattern {
    Floats(Vec<f64>),
    Ints(Vec<i64>),
}

impl Given {
    /// `f32 [4096, 4096]`
    pub(super) fn ty(&self) -> String {
        format!("{} {:?}", self.dtype.name(), self.shape)
    }

    fn elements(&self) -> u64 {
        elements(&self.shape)
    }

    fn bytes(&self) -> u64 {
        self.elements() * self.dtype.size() as u64
    }

    fn array(&self) -> zmlx_kernels::Result<Array> {
        let count = usize::try_from(self.elements()).unwrap_or(0);
        let to = to_mlx(self.dtype);
        let array = match &self.pattern {
            Pattern::Floats(v) => {
                let values: Vec<f32> = (0..count).map(|i| v[place(i, v.len())] as f32).collect();
                Array::from_vec(values, &self.shape)?
            }
            Pattern::Ints(v) => {
                let values: Vec<i64> = (0..count).map(|i| v[place(i, v.len())]).collect();
                Array::from_vec(values, &self.shape)?
            }
        };
        let array = array.astype(to)?;
        // A value that a kernel wrote lies where results usually do, on the device that it will be read on.
        let array = if self.dtype.is_float() && count > 1 {
            Kernel::new("copy(x) = +x")?.call1(&[&array])?
        } else {
            array
        };
        array.eval()?;
        Ok(array)
    }
}

impl Inputs {
    /// Of what the user named, with the shape and type that were typed.
    pub(super) fn new(target: &Target, args: &KernelInputArgs) -> Result<Self, Failure> {
        let shape = args.shape.as_deref().map(parse_shape).transpose()?;
        match target {
            Target::Entry(entry) => Self::of_entry(entry, shape.as_deref(), args.dtype),
            Target::Expression(kernel) => Ok(Self::of_expression(kernel, shape.as_deref(), args.dtype)),
        }
    }

    /// An entry's own case, stretched to a shape. Without a shape and without a case that can be stretched, its largest
    /// case as it is.
    pub(super) fn of_entry(
        entry: &Entry,
        shape: Option<&[i32]>,
        dtype: KernelDtype,
    ) -> Result<Self, Failure> {
        let cases: Vec<Case> = (entry.cases)().into_iter().filter(|c| c.reference).collect();
        let names: Vec<String> = match entry.raw_kernel() {
            Some(_) => Vec::new(),
            None => {
                entry.kernel().map_err(Failure::runtime)?.ir().inputs.iter().map(|i| i.name.clone()).collect()
            }
        };
        let stretch = |to: &[i32]| cases.iter().find_map(|c| stretched(c, to));
        if let Some(to) = shape {
            let case = stretch(to).ok_or_else(|| no_such_shape(entry, &cases, to))?;
            return Ok(Self::of_case(case, &names, dtype, false));
        }
        let usual: &[i32] = if entry.domain == Domain::Gate { &GATE_SHAPE } else { &SHAPE };
        let flat = [usual.iter().product()];
        if let Some(case) = stretch(usual).or_else(|| stretch(&flat)) {
            return Ok(Self::of_case(case, &names, dtype, false));
        }
        let size = |c: &Case| c.inputs.iter().map(|i| elements(&i.shape)).sum::<u64>();
        let largest = cases.into_iter().max_by_key(size);
        let none =
            || Failure::runtime(anyhow::anyhow!("kernel {} has no case to take shapes from", entry.name));
        Ok(Self::of_case(largest.ok_or_else(none)?, &names, dtype, true))
    }

    fn of_case(case: Case, names: &[String], dtype: KernelDtype, own_shapes: bool) -> Self {
        let given = case.inputs.into_iter().enumerate().map(|(n, input)| {
            let name = names.get(n).cloned().unwrap_or_else(|| format!("input{n}"));
            let (dtype, pattern) = match input.values {
                Values::Float(v) => (to_lang(dtype), Pattern::Floats(v)),
                Values::F32(v) => (Dtype::F32, Pattern::Floats(v)),
                Values::Int(dtype, v) => (dtype, Pattern::Ints(v)),
            };
            Given { name, shape: input.shape, dtype, pattern }
        });
        Self { given: given.collect(), setting: case.setting, own_shapes }
    }

    /// Floats in -2..2 and integers that are places of the last axis, by the roles of the inputs.
    fn of_expression(kernel: &Kernel, shape: Option<&[i32]>, dtype: KernelDtype) -> Self {
        let shape = shape.unwrap_or(&SHAPE);
        let one = |(n, input): (usize, &InputDecl)| {
            let shape = match input.role {
                Role::Element => shape.to_vec(),
                Role::Row => per_row(shape),
                Role::Scalar(_) => vec![1],
                Role::Indexed(rank) => {
                    let rank = rank as usize;
                    let missing = vec![1; rank.saturating_sub(shape.len())];
                    [&missing, &shape[shape.len().saturating_sub(rank)..]].concat()
                }
            };
            let dtype = match (input.dtype, input.role) {
                (Some(dtype), _) => dtype,
                (None, Role::Scalar(_)) => Dtype::F32,
                (None, _) => to_lang(dtype),
            };
            let last = i64::from(shape.last().copied().unwrap_or(1));
            let random = Input::random(&[997], 2.0, n as u64 + 1);
            let pattern = match (dtype.is_float(), random.values, input.role) {
                (true, _, Role::Scalar(Some(c))) => Pattern::Floats(vec![c.as_f64()]),
                (false, _, Role::Scalar(Some(c))) => Pattern::Ints(vec![c.as_f64() as i64]),
                (true, Values::Float(v) | Values::F32(v), _) => Pattern::Floats(v),
                (true, Values::Int(..), _) => Pattern::Floats(vec![1.0]),
                (false, ..) if dtype == Dtype::Bool => Pattern::Ints(vec![0, 1, 1]),
                (false, ..) => Pattern::Ints((0..997).map(|v| v % last.min(127)).collect()),
            };
            Given { name: input.name.clone(), shape, dtype, pattern }
        };
        let given = kernel.ir().inputs.iter().enumerate().map(one).collect();
        Self { given, setting: Setting::default(), own_shapes: false }
    }

    /// The gradient's kernel with respect to every input that has one, and its inputs.
    pub(super) fn of_gradient(&self, kernel: &Kernel) -> Result<(Kernel, Self), Failure> {
        let gradient = gradient(kernel)?;
        let program = self.program(kernel)?;
        let domain = self.domain(&program)?;
        let outputs = self.outputs(&program)?;
        let one = |input: &InputDecl| {
            if let Some(own) = self.given.iter().find(|g| g.name == input.name) {
                return own.clone();
            }
            // A cotangent, or an output that is read back.
            let of = input.name.strip_prefix("g_").unwrap_or(&input.name);
            let n = program.outputs.iter().position(|o| o.name == of || o.name == input.name).unwrap_or(0);
            let shape = match input.role {
                Role::Element => domain.clone(),
                Role::Row => per_row(&domain),
                Role::Scalar(_) => vec![1],
                Role::Indexed(_) => outputs[n].0.clone(),
            };
            let pattern = Pattern::Floats(vec![0.5, -1.0, 0.25]);
            Given { name: input.name.clone(), shape, dtype: outputs[n].1, pattern }
        };
        let given = gradient.ir().inputs.iter().map(one).collect();
        let setting = Setting { domain: Some(domain.clone()), ..Setting::default() };
        Ok((gradient, Self { given, setting, own_shapes: self.own_shapes }))
    }

    pub(super) fn dtypes(&self) -> Vec<Dtype> {
        self.given.iter().map(|g| g.dtype).collect()
    }

    pub(super) fn shapes(&self) -> Vec<Vec<usize>> {
        self.given.iter().map(|g| unsigned(&g.shape)).collect()
    }

    pub(super) fn specs(&self) -> Vec<Spec> {
        self.given.iter().map(|g| Spec::new(&g.shape, to_mlx(g.dtype))).collect()
    }

    /// `x f32 [4, 5], eps f32 [1]`
    pub(super) fn describe(&self) -> String {
        self.given.iter().map(|g| format!("{} {}", g.name, g.ty())).collect::<Vec<_>>().join(", ")
    }

    /// Whether the call needs more than its inputs to be put together.
    pub(super) fn needs_setting(&self) -> bool {
        self.setting.domain.is_some() || !self.setting.outputs.is_empty()
    }

    fn program(&self, kernel: &Kernel) -> Result<Program, Failure> {
        kernel.ir().program(&self.dtypes()).map_err(Failure::bad_input)
    }

    fn domain(&self, program: &Program) -> Result<Vec<i32>, Failure> {
        Ok(signed(&self.lang_domain(program)?.shape))
    }

    fn lang_domain(&self, program: &Program) -> Result<shape::Domain, Failure> {
        let given = self.setting.domain.as_deref().map(unsigned);
        shape::domain(program, &self.shapes(), given.as_deref()).map_err(Failure::bad_input)
    }

    /// Shapes and dtypes of the outputs.
    fn outputs(&self, program: &Program) -> Result<Vec<(Vec<i32>, Dtype)>, Failure> {
        let domain = self.lang_domain(program)?;
        let given: Vec<_> = self.setting.outputs.iter().map(|s| s.as_deref().map(unsigned)).collect();
        let shapes =
            shape::output_shapes(program, &domain, &self.shapes(), &given).map_err(Failure::bad_input)?;
        Ok(shapes.iter().map(|s| signed(s)).zip(program.outputs.iter().map(|o| o.dtype)).collect())
    }

    /// Bytes that a call must move: every used input once, every output once.
    pub(super) fn traffic(&self, target: &Target) -> Result<u64, Failure> {
        if let Target::Entry(entry) = target
            && let Some(raw) = entry.raw_kernel()
        {
            let outputs = raw.outputs(&self.specs(), &self.setting.parameters).map_err(Failure::bad_input)?;
            let written = outputs.iter().map(|o| elements(&o.shape) * o.dtype.size() as u64).sum::<u64>();
            return Ok(self.given.iter().map(Given::bytes).sum::<u64>() + written);
        }
        let Some(kernel) = target.kernel()? else { return Ok(0) };
        let program = self.program(kernel)?;
        let used = self.given.iter().zip(&program.inputs).filter(|(_, i)| i.used);
        let written = self.outputs(&program)?.iter().map(|(s, d)| elements(s) * d.size() as u64).sum::<u64>();
        Ok(used.map(|(g, _)| g.bytes()).sum::<u64>() + written)
    }

    /// Arrays of the right shapes and types that are never computed.
    pub(super) fn placeholders(&self) -> Result<Vec<Array>, Failure> {
        let zeros = |g: &Given| ops::zeros(&g.shape, to_mlx(g.dtype)).map_err(Failure::runtime);
        self.given.iter().map(zeros).collect()
    }

    /// Refuses calls that move more than a machine should be asked for by a slip of the finger.
    pub(super) fn check_size(&self, traffic: u64) -> Result<(), Failure> {
        let bytes = traffic.max(self.given.iter().map(Given::bytes).sum());
        if bytes <= MAX_BYTES {
            return Ok(());
        }
        Err(Failure::usage(format_args!(
            "inputs and outputs of this shape take {}, more than the {} that are allowed: give a smaller --shape",
            crate::output::bytes(bytes),
            crate::output::bytes(MAX_BYTES)
        )))
    }

    /// The arrays, computed.
    pub(super) fn arrays(&self) -> Result<Vec<Array>, Failure> {
        self.given.iter().map(|g| g.array().map_err(Failure::runtime)).collect()
    }
}

/// The kernel of the gradient with respect to every float input that is no scalar and has one.
pub(super) fn gradient(kernel: &Kernel) -> Result<Kernel, Failure> {
    let float = |i: &&InputDecl| i.dtype.is_none_or(Dtype::is_float) && !matches!(i.role, Role::Scalar(_));
    let names: Vec<&str> = kernel.ir().inputs.iter().filter(float).map(|i| i.name.as_str()).collect();
    let mut why = None;
    let mut has = |name: &&str| match kernel.gradient(&[name]) {
        Ok(found) => found.is_some(),
        Err(error) => {
            why.get_or_insert(error);
            false
        }
    };
    let with: Vec<&str> = names.into_iter().filter(|name| has(name)).collect();
    match (with.is_empty(), why) {
        (true, Some(error)) => return Err(Failure::runtime(error)),
        (true, None) => {}
        (false, _) => {
            if let Some(gradient) = kernel.gradient(&with).map_err(Failure::runtime)? {
                return Ok(gradient);
            }
        }
    }
    Err(Failure::runtime(anyhow::anyhow!("kernel {}: its gradient is 0 everywhere", kernel.name())))
}

/// The case with the axes of what it runs over replaced. `None` unless every axis of every input is one of those, a
/// small multiple of the last, or 1.
fn stretched(case: &Case, to: &[i32]) -> Option<Case> {
    let base = case.setting.domain.clone().or_else(|| case.inputs.first().map(|i| i.shape.clone()))?;
    let distinct = base.iter().enumerate().all(|(n, d)| *d > 1 && !base[..n].contains(d));
    // One element that is read at computed places says nothing of how many there must be.
    let says_size = case.inputs.first()?.shape.iter().any(|d| *d > 1);
    if base.len() != to.len() || !distinct || !says_size {
        return None;
    }
    let (last, new_last) = (*base.last()?, *to.last()?);
    let axis = |d: i32| match base.iter().position(|b| *b == d) {
        _ if d == 1 => Some(1),
        Some(n) => Some(to[n]),
        None if d % last == 0 && (2..=8).contains(&(d / last)) => new_last.checked_mul(d / last),
        None => None,
    };
    let shape = |s: &[i32]| s.iter().map(|d| axis(*d)).collect::<Option<Vec<i32>>>();
    let mut case = case.clone();
    for input in &mut case.inputs {
        let is_scalar = input.shape.iter().all(|d| *d == 1);
        input.shape = shape(&input.shape)?;
        if let Values::Int(dtype, values) = &mut input.values {
            // A scalar that repeats a size would no longer be that size.
            if is_scalar && values.iter().any(|v| base.iter().any(|d| i64::from(*d) == *v)) {
                return None;
            }
            // Integers can be places in a row.
            if !is_scalar && *dtype != Dtype::Bool {
                values
                    .iter_mut()
                    .filter(|v| **v >= i64::from(new_last))
                    .for_each(|v| *v %= i64::from(new_last));
            }
        }
    }
    case.setting.domain = case.setting.domain.as_ref().map(|_| to.to_vec());
    for output in case.setting.outputs.iter_mut().flatten() {
        *output = shape(output)?;
    }
    Some(case)
}

fn no_such_shape(entry: &Entry, cases: &[Case], to: &[i32]) -> Failure {
    let mut ranks: Vec<usize> =
        (1..=4).filter(|n| cases.iter().any(|c| stretched(c, &vec![8; *n]).is_some())).collect();
    ranks.dedup();
    let words: Vec<String> = ranks.iter().map(usize::to_string).collect();
    let tip = match words.as_slice() {
        [] => "its inputs' shapes depend on each other: leave --shape out to take the catalogue's own"
            .to_owned(),
        some => format!("give {} axes", some.join(" or ")),
    };
    Failure::usage(format_args!(
        "kernel {} does not run over a shape of {} axes: {tip}",
        entry.name,
        to.len()
    ))
}

/// `4096x4096`, with at most eight axes of 1 or more.
pub(super) fn parse_shape(text: &str) -> Result<Vec<i32>, Failure> {
    let bad = |why: &str| Failure::usage(format_args!("--shape must be {why}, not '{text}'"));
    let axis = |part: &str| part.trim().parse::<i32>().ok().filter(|d| *d >= 1);
    let axes: Option<Vec<i32>> = text.split(['x', 'X', ',']).map(axis).collect();
    let axes = axes
        .filter(|a| a.len() <= MAX_AXES)
        .ok_or_else(|| bad("up to eight whole numbers from 1 to 2147483647 such as 4096x4096"))?;
    let count = axes.iter().try_fold(1u64, |n, d| n.checked_mul(d.unsigned_abs().into()));
    match count {
        Some(n) if n <= MAX_ELEMENTS => Ok(axes),
        _ => Err(bad("of at most 2^40 elements")),
    }
}

/// Elements of a shape; shapes that were checked do not overflow.
pub(super) fn elements(shape: &[i32]) -> u64 {
    shape.iter().fold(1u64, |n, d| n.saturating_mul(u64::try_from(*d).unwrap_or(0)))
}

/// The shape of one value a row.
fn per_row(shape: &[i32]) -> Vec<i32> {
    let mut shape = shape.to_vec();
    if let Some(last) = shape.last_mut() {
        *last = 1;
    }
    shape
}

/// A place of `0..len` for element `i`, in a mixed order (Fibonacci hashing).
fn place(i: usize, len: usize) -> usize {
    let mixed = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (mixed as usize) % len.max(1)
}

fn unsigned(shape: &[i32]) -> Vec<usize> {
    shape.iter().map(|d| usize::try_from(*d).unwrap_or(0)).collect()
}

fn signed(shape: &[usize]) -> Vec<i32> {
    shape.iter().map(|d| i32::try_from(*d).unwrap_or(i32::MAX)).collect()
}

fn to_lang(dtype: KernelDtype) -> Dtype {
    match dtype {
        KernelDtype::F32 => Dtype::F32,
        KernelDtype::F16 => Dtype::F16,
        KernelDtype::Bf16 => Dtype::Bf16,
    }
}

fn to_mlx(dtype: Dtype) -> zmlx_mlx::Dtype {
    use zmlx_mlx::Dtype as Mlx;
    match dtype {
        Dtype::Bool => Mlx::Bool,
        Dtype::U8 => Mlx::Uint8,
        Dtype::U16 => Mlx::Uint16,
        Dtype::U32 => Mlx::Uint32,
        Dtype::U64 => Mlx::Uint64,
        Dtype::I8 => Mlx::Int8,
        Dtype::I16 => Mlx::Int16,
        Dtype::I32 => Mlx::Int32,
        Dtype::I64 => Mlx::Int64,
        Dtype::F16 => Mlx::Float16,
        Dtype::Bf16 => Mlx::Bfloat16,
        Dtype::F32 => Mlx::Float32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_read_or_refused() {
        assert_eq!(parse_shape("4096x128").ok(), Some(vec![4096, 128]));
        assert_eq!(parse_shape("2, 3 ,4").ok(), Some(vec![2, 3, 4]));
        assert_eq!(parse_shape("7").ok(), Some(vec![7]));
        for bad in [
            "",
            "0x4",
            "4x0",
            "-1x4",
            "4x",
            "axb",
            "99999999999",
            "2147483647x2147483647",
            "1x1x1x1x1x1x1x1x1",
        ] {
            let failure = parse_shape(bad).err();
            assert_eq!(failure.map(|f| f.code()), Some(2), "{bad}");
        }
    }

    #[test]
    fn cases_are_stretched_by_their_axes() {
        let case = |inputs: Vec<Input>| Case {
            label: String::new(),
            inputs,
            setting: Setting::default(),
            autograd: true,
            differences: true,
            reference: true,
            slack: 1.0,
        };
        let ints = |shape: &[i32], v: i64| Input::ints(Dtype::I32, shape, |_| v);
        let logits = Input::random(&[5, 33], 1.0, 1);
        let mut wide = case(vec![Input::random(&[5, 66], 1.0, 1)]);
        wide.setting.domain = Some(vec![5, 33]);
        let mut one = case(vec![ints(&[1], 3)]);
        one.setting.domain = Some(vec![5, 33]);
        let cases: [(Case, Option<Vec<Vec<i32>>>); 7] = [
            (
                case(vec![logits.clone(), Input::random(&[33], 1.0, 2), Input::scalar(1e-5)]),
                Some(vec![vec![2, 3], vec![3], vec![1]]),
            ),
            (case(vec![logits.clone(), ints(&[5, 1], 30)]), Some(vec![vec![2, 3], vec![2, 1]])),
            (wide, Some(vec![vec![2, 6]])),
            (one, None),
            (case(vec![logits.clone(), Input::random(&[7, 33], 1.0, 2)]), None),
            (case(vec![logits.clone(), ints(&[1], 33)]), None),
            (case(vec![logits, Input::random(&[0, 33], 1.0, 2)]), None),
        ];
        for (given, expected) in cases {
            let found = stretched(&given, &[2, 3]);
            let shapes = found.as_ref().map(|c| c.inputs.iter().map(|i| i.shape.clone()).collect());
            assert_eq!(shapes, expected, "{given:?}");
            for input in found.iter().flat_map(|c| &c.inputs) {
                if let Values::Int(_, v) = &input.values {
                    assert!(v.iter().all(|v| *v < 3), "{v:?}");
                }
            }
        }
    }
}
