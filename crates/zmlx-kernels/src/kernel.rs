//! A kernel as users hold it.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};

use zmlx_lang as lang;
use zmlx_lang::derive::{self, Jvp, Vjp, VjpOptions};
use zmlx_lang::{Const, InputDecl, Role, simplify};
use zmlx_mlx::Array;

use crate::cache::Cache;
use crate::dtype::{shape_of, to_lang, to_mlx};
use crate::launch::{self, Given, Prepared};
use crate::stats::{Counters, Stats};
use crate::{Error, Result};

/// A kernel: an expression that runs on any backend, on MLX arrays of any dtype, with derivatives.
///
/// Cheap to clone; clones share their caches and counts.
#[derive(Clone)]
pub struct Kernel(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    /// As written.
    pub written: lang::Kernel,
    /// As run: simplified.
    pub lang: lang::Kernel,
    /// A gradient of the author's: its expressions, and which input's each is.
    pub gradient: Option<(lang::Graph, Vec<(usize, lang::Id)>)>,
    pub hash: OnceLock<String>,
    pub prepared: Cache<Vec<lang::Dtype>, Arc<Prepared>>,
    vjps: Cache<VjpKey, Arc<Derivative<Vjp>>>,
    jvps: Cache<Vec<usize>, Arc<Derivative<Jvp>>>,
    pub counters: Counters,
}

/// Inputs to differentiate, and which outputs may be read back.
type VjpKey = (Vec<usize>, Vec<bool>);

/// A derivative's description, and its kernel unless it is 0 everywhere.
pub(crate) struct Derivative<T> {
    pub rule: T,
    pub kernel: Option<Kernel>,
}

/// Combinations of dtypes, and of inputs to differentiate, that a kernel remembers.
const PROGRAMS: usize = 32;

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kernel({})", self.0.written.to_text())
    }
}

impl Kernel {
    /// A kernel from its IR.
    ///
    /// # Errors
    /// What [`lang::Kernel::validate`] finds.
    pub fn from_ir(kernel: lang::Kernel) -> Result<Self> {
        Self::with_gradient(kernel, None)
    }

    /// A kernel from its IR as JSON.
    ///
    /// # Errors
    /// As [`Kernel::from_ir`], and for text that is not a kernel's.
    pub fn from_ir_json(json: &str) -> Result<Self> {
        Self::from_ir(lang::Kernel::from_json(json)?)
    }

    /// A kernel from its text, such as `softmax(x) = let e = exp(x - row_max(x)); e / row_sum(e)`, or a bare
    /// expression, whose free names are its inputs.
    ///
    /// # Errors
    /// [`lang::LangError::Syntax`] with the place and what was expected.
    pub fn new(text: &str) -> Result<Self> {
        Self::from_ir(lang::text::elementwise(None, text)?)
    }

    pub(crate) fn with_gradient(
        written: lang::Kernel,
        gradient: Option<(lang::Graph, Vec<(usize, lang::Id)>)>,
    ) -> Result<Self> {
        written.validate()?;
        let lang = simplify::simplify(&written);
        Ok(Self(Arc::new(Inner {
            written,
            lang,
            gradient,
            hash: OnceLock::new(),
            prepared: Cache::new(PROGRAMS),
            vjps: Cache::new(PROGRAMS),
            jvps: Cache::new(PROGRAMS),
            counters: Counters::default(),
        })))
    }

    /// The kernel's name.
    pub fn name(&self) -> &str {
        &self.0.written.name
    }

    /// The IR as written.
    pub fn ir(&self) -> &lang::Kernel {
        &self.0.written
    }

    /// The kernel's text.
    pub fn text(&self) -> String {
        self.0.written.to_text()
    }

    /// 16 hexadecimal digits that stand for what the kernel computes, equal on every machine.
    pub fn hash(&self) -> &str {
        self.0.hash.get_or_init(|| format!("{:016x}", self.0.lang.content_hash()))
    }

    /// Counts since the kernel was made.
    pub fn stats(&self) -> Stats {
        self.0.counters.read()
    }

    /// Turns the timing of CPU launches on or off.
    pub fn set_timing(&self, on: bool) {
        self.0.counters.timing.store(on, Relaxed);
    }

    /// Puts the kernel into the graph, on the current stream's device. Scalars with defaults may be left out.
    ///
    /// # Errors
    /// When arrays do not fit the kernel: number, dtypes, shapes.
    pub fn call(&self, inputs: &[&Array]) -> Result<Vec<Array>> {
        self.bind(inputs).run()
    }

    /// [`Kernel::call`] for a kernel with one output.
    ///
    /// # Errors
    /// As `call`; [`Error::Argument`] for a kernel with several outputs.
    pub fn call1(&self, inputs: &[&Array]) -> Result<Array> {
        self.bind(inputs).run1()
    }

    /// A call to which scalars, a domain or shapes of outputs are added.
    pub fn bind<'a>(&'a self, inputs: &[&'a Array]) -> Call<'a> {
        Call {
            kernel: self,
            arrays: inputs.to_vec(),
            scalars: Vec::new(),
            given: Given::default(),
            error: None,
        }
    }

    pub(crate) fn prepare(&self, dtypes: Vec<lang::Dtype>) -> Result<Arc<Prepared>> {
        self.0.prepared.get(dtypes, |dtypes| {
            self.0.counters.add(&self.0.counters.programs, 1);
            Ok(Arc::new(Prepared::new(self.0.lang.program(dtypes)?)))
        })
    }

    /// The gradient with respect to inputs, where outputs marked in `saved` may be read back.
    pub(crate) fn vjp(&self, wrt: Vec<usize>, saved: Vec<bool>) -> Result<Arc<Derivative<Vjp>>> {
        self.0.vjps.get((wrt, saved), |(wrt, saved)| {
            let rule = match &self.0.gradient {
                None => derive::vjp(&self.0.lang, wrt, &VjpOptions { allow_saved: saved.clone() })?,
                Some((graph, gradients)) => {
                    let chosen = wrt.iter().map(|n| {
                        gradients.iter().copied().find(|(input, _)| input == n).ok_or_else(|| {
                            Error::Argument {
                                kernel: self.name().to_owned(),
                                what: format!(
                                    "its given gradient has none for {}",
                                    self.0.lang.inputs[*n].name
                                ),
                            }
                        })
                    });
                    let chosen = chosen.collect::<Result<Vec<_>>>()?;
                    derive::custom_vjp(&self.0.lang, graph, &chosen)?
                }
            };
            Ok(Arc::new(Derivative { kernel: runnable(&rule.kernel)?, rule }))
        })
    }

    pub(crate) fn jvp(&self, wrt: Vec<usize>) -> Result<Arc<Derivative<Jvp>>> {
        self.0.jvps.get(wrt, |wrt| {
            if self.0.gradient.is_some() {
                let what = "its gradient is given, which says nothing of forward mode (jvp)".to_owned();
                return Err(Error::Argument { kernel: self.name().to_owned(), what });
            }
            let rule = derive::jvp(&self.0.lang, wrt)?;
            Ok(Arc::new(Derivative { kernel: runnable(&rule.kernel)?, rule }))
        })
    }

    /// The gradient's kernel with respect to inputs by name, for reading: its text, its sources.
    ///
    /// # Errors
    /// [`lang::LangError::NoDerivative`] when there is none; [`Error::Argument`] for unknown names.
    pub fn gradient(&self, inputs: &[&str]) -> Result<Option<Self>> {
        let number = |name: &&str| {
            self.0.lang.input(name).ok_or_else(|| Error::Argument {
                kernel: self.name().to_owned(),
                what: format!("no input {name}; there are {}", names(&self.0.lang.inputs)),
            })
        };
        let wrt = inputs.iter().map(number).collect::<Result<Vec<_>>>()?;
        let saved = vec![true; self.0.lang.outputs.len()];
        Ok(self.vjp(wrt, saved)?.kernel.clone())
    }

    /// Forgets everything that can be made again: typed programs, derivatives, GPU texts.
    pub fn clear_caches(&self) {
        self.0.prepared.clear();
        self.0.vjps.clear();
        self.0.jvps.clear();
    }

    /// Typed programs in the cache.
    pub fn cached_programs(&self) -> usize {
        self.0.prepared.len()
    }
}

fn runnable(kernel: &lang::Kernel) -> Result<Option<Kernel>> {
    if kernel.outputs.is_empty() { Ok(None) } else { Kernel::from_ir(kernel.clone()).map(Some) }
}

fn names(inputs: &[InputDecl]) -> String {
    let one = |i: &InputDecl| match i.role {
        Role::Scalar(Some(c)) => format!("{} = {}", i.name, c.as_f64()),
        _ => i.name.clone(),
    };
    inputs.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// A scalar argument.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scalar {
    /// A float.
    Float(f64),
    /// An integer, sign included.
    Int(i64),
    /// A large unsigned integer, such as a seed.
    Uint(u64),
}

macro_rules! scalar_from {
    ($($t:ty => $variant:ident as $as:ty),*) => {
        $(impl From<$t> for Scalar {
            fn from(v: $t) -> Self {
                Self::$variant(v as $as)
            }
        })*
    };
}
scalar_from!(f64 => Float as f64, f32 => Float as f64, i32 => Int as i64, i64 => Int as i64, u32 => Int as i64, u64 => Uint as u64);

impl Scalar {
    /// The scalar as an array of one element.
    fn array(self, dtype: lang::Dtype) -> Result<Array> {
        let to = to_mlx(dtype);
        Ok(match self {
            Self::Float(v) => Array::from_slice(&[v as f32], &[1])?.astype(to)?,
            Self::Int(v) => match (dtype, u32::try_from(v), i32::try_from(v)) {
                (lang::Dtype::U32, Ok(v), _) => Array::from_slice(&[v], &[1])?,
                (lang::Dtype::I32, _, Ok(v)) => Array::from_slice(&[v], &[1])?,
                (d, ..) if d.is_float() => Array::from_slice(&[v as f32], &[1])?.astype(to)?,
                _ => Array::from_slice(&[v], &[1])?.astype(to)?,
            },
            Self::Uint(v) => Array::from_slice(&[v], &[1])?.astype(to)?,
        })
    }
}

/// A call under way: [`Kernel::bind`].
pub struct Call<'a> {
    kernel: &'a Kernel,
    arrays: Vec<&'a Array>,
    scalars: Vec<(usize, Scalar)>,
    given: Given,
    error: Option<Error>,
}

impl Call<'_> {
    /// Sets a scalar input by name. An unknown name is an error of [`Call::run`].
    pub fn scalar(mut self, name: &str, value: impl Into<Scalar>) -> Self {
        let inputs = &self.kernel.0.lang.inputs;
        match inputs.iter().position(|i| i.name == name && matches!(i.role, Role::Scalar(_))) {
            Some(n) => self.scalars.push((n, value.into())),
            None => {
                let what = format!("no scalar input {name}; its inputs are {}", names(inputs));
                self.error = Some(Error::Argument { kernel: self.kernel.name().to_owned(), what });
            }
        }
        self
    }

    /// Sets the shape the expressions run over, when inputs do not decide it.
    pub fn domain(mut self, shape: &[i32]) -> Self {
        self.given.domain = Some(shape_of(shape));
        self
    }

    /// Sets the shape of a scattered output.
    pub fn output_shape(mut self, name: &str, shape: &[i32]) -> Self {
        let outputs = &self.kernel.0.lang.outputs;
        match outputs.iter().position(|o| o.name == name) {
            Some(n) => {
                self.given.outputs.resize(outputs.len(), None);
                self.given.outputs[n] = Some(shape_of(shape));
            }
            None => {
                let what = format!("no output {name}");
                self.error = Some(Error::Argument { kernel: self.kernel.name().to_owned(), what });
            }
        }
        self
    }

    /// One array for each input.
    pub(crate) fn arrays(&self) -> Result<Vec<Array>> {
        self.kernel.arrange(&self.arrays, &self.scalars)
    }

    /// Puts the call into the graph.
    ///
    /// # Errors
    /// When arguments do not fit the kernel.
    pub fn run(self) -> Result<Vec<Array>> {
        if let Some(error) = self.error {
            return Err(error);
        }
        let arrays = self.arrays()?;
        self.kernel.0.counters.add(&self.kernel.0.counters.calls, 1);
        launch::launch(self.kernel, arrays, &self.given)
    }

    /// [`Call::run`] for a kernel with one output.
    ///
    /// # Errors
    /// As `run`; [`Error::Argument`] for a kernel with several outputs.
    pub fn run1(self) -> Result<Array> {
        let (kernel, outputs) = (self.kernel.name().to_owned(), self.kernel.0.lang.outputs.len());
        let mut all = self.run()?;
        match (all.pop(), outputs) {
            (Some(one), 1) => Ok(one),
            _ => Err(Error::Argument { kernel, what: format!("it has {outputs} outputs, not one") }),
        }
    }
}

impl Kernel {
    /// One array for each input: given ones in order, scalars by name, defaults.
    fn arrange(&self, arrays: &[&Array], scalars: &[(usize, Scalar)]) -> Result<Vec<Array>> {
        let inputs = &self.0.lang.inputs;
        let all = arrays.len() == inputs.len() && scalars.is_empty();
        let mut given = arrays.iter();
        let mut out = Vec::with_capacity(inputs.len());
        let arity = || Error::Arity {
            kernel: self.name().to_owned(),
            expected: if inputs.is_empty() { "no arrays".to_owned() } else { names(inputs) },
            found: arrays.len(),
        };
        for (n, input) in inputs.iter().enumerate() {
            let dtype = input.dtype.unwrap_or(lang::Dtype::F32);
            let named = scalars.iter().rev().find(|(at, _)| *at == n).map(|(_, s)| *s);
            out.push(match (input.role, named) {
                (Role::Scalar(_), Some(s)) => s.array(dtype)?,
                (Role::Scalar(Some(c)), None) if !all => match c {
                    Const::Int(v) => Scalar::Int(v).array(dtype)?,
                    c => Scalar::Float(c.as_f64()).array(dtype)?,
                },
                (Role::Scalar(_), None) => {
                    let a = *given.next().ok_or_else(arity)?;
                    // A scalar is converted to the dtype it is declared with; other inputs are taken as they are.
                    if a.dtype() == to_mlx(dtype) { a.clone() } else { a.astype(to_mlx(dtype))? }
                }
                _ => (*given.next().ok_or_else(arity)?).clone(),
            });
        }
        if given.next().is_some() {
            return Err(arity());
        }
        Ok(out)
    }

    /// The dtypes of arrays, as the language knows them.
    pub(crate) fn dtypes(&self, arrays: &[Array]) -> Result<Vec<lang::Dtype>> {
        let one = |(array, input): (&Array, &InputDecl)| {
            let found = array.dtype();
            to_lang(found).ok_or_else(|| Error::Dtype {
                kernel: self.name().to_owned(),
                input: input.name.clone(),
                found,
            })
        };
        arrays.iter().zip(&self.0.lang.inputs).map(one).collect()
    }
}
