//! Stands in for the runtime: the same methods, over the reference evaluator.
#![allow(dead_code)] // each test file uses its part

use zmlx_lang::eval::{Rounding, Shapes, Tensor, evaluate_with};
use zmlx_lang::{Const, Dtype, LangError, Role};

/// An array of the evaluator.
pub type Array = Tensor;

/// What goes wrong.
#[derive(Debug)]
pub enum Error {
    Lang(LangError),
    Argument { kernel: String, what: String },
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lang(e) => e.fmt(f),
            Self::Argument { kernel, what } => write!(f, "kernel {kernel}: {what}"),
        }
    }
}

impl From<LangError> for Error {
    fn from(e: LangError) -> Self {
        Self::Lang(e)
    }
}

/// A result of the runtime.
pub type Result<T> = std::result::Result<T, Error>;

/// A kernel that runs in the evaluator, rounding to `f32` after each operation as Rust does.
pub struct Kernel {
    pub ir: zmlx_lang::Kernel,
}

/// A scalar argument.
#[derive(Clone, Copy)]
pub struct Scalar(Wide);

macro_rules! scalars {
    ($($t:ty)*) => {$(
        impl From<$t> for Scalar {
            fn from(v: $t) -> Self { Self(v.to_wide()) }
        }
    )*};
}

// Those of the runtime.
scalars! { f32 i32 i64 u32 u64 }

/// A call under way.
pub struct Call<'a> {
    kernel: &'a Kernel,
    arrays: Vec<&'a Array>,
    scalars: Vec<(&'a str, Scalar)>,
}

impl<'a> Call<'a> {
    pub fn scalar(mut self, name: &'a str, value: impl Into<Scalar>) -> Self {
        self.scalars.push((name, value.into()));
        self
    }

    /// Arrays in order, scalars by name, defaults.
    fn inputs(&self) -> Result<Vec<Array>> {
        let mut arrays = self.arrays.iter();
        let mut all = Vec::new();
        for decl in &self.kernel.ir.inputs {
            let named = self.scalars.iter().find(|(n, _)| *n == decl.name).map(|(_, s)| s.0);
            let dtype = decl.dtype.unwrap_or(Dtype::F32);
            let scalar = |v| match v {
                Wide::Float(v) => Tensor::float(&[], dtype, vec![v]),
                Wide::Int(v) => Tensor::int(&[], dtype, vec![v]),
            };
            let array = match (decl.role, named) {
                (Role::Scalar(_), Some(v)) => Some(scalar(v)),
                (Role::Scalar(Some(Const::Float(v))), None) => Some(scalar(Wide::Float(f64::from_bits(v)))),
                (Role::Scalar(Some(Const::Int(v))), None) => Some(scalar(Wide::Int(v.into()))),
                (Role::Scalar(Some(Const::Bool(v))), None) => Some(scalar(Wide::Int(v.into()))),
                _ => arrays.next().map(|a| (*a).clone()),
            };
            let missing = || Error::Argument { kernel: self.kernel.ir.name.clone(), what: decl.name.clone() };
            all.push(array.ok_or_else(missing)?);
        }
        Ok(all)
    }

    pub fn run(self) -> Result<Vec<Array>> {
        let call = Shapes::default();
        Ok(evaluate_with(&self.kernel.ir, &self.inputs()?, &call, Rounding::EachOperation)?)
    }

    pub fn run1(self) -> Result<Array> {
        let mut outputs = self.run()?;
        assert_eq!(outputs.len(), 1);
        Ok(outputs.remove(0))
    }
}

impl Kernel {
    pub fn from_ir_json(json: &str) -> Result<Self> {
        Ok(Self { ir: zmlx_lang::Kernel::from_json(json)? })
    }

    pub fn bind<'a>(&'a self, arrays: &[&'a Array]) -> Call<'a> {
        Call { kernel: self, arrays: arrays.to_vec(), scalars: Vec::new() }
    }

    pub fn call(&self, arrays: &[&Array]) -> Result<Vec<Array>> {
        self.bind(arrays).run()
    }

    pub fn call1(&self, arrays: &[&Array]) -> Result<Array> {
        self.bind(arrays).run1()
    }
}

/// A Rust type with its dtype.
pub trait Element: Copy + std::fmt::Debug {
    const DTYPE: Dtype;
    fn to_wide(self) -> Wide;
    fn from_wide(v: Wide) -> Self;
}

/// One element of an evaluator's array.
#[derive(Clone, Copy)]
pub enum Wide {
    Float(f64),
    Int(i128),
}

macro_rules! integers {
    ($($t:ident $d:ident)*) => {$(
        impl Element for $t {
            const DTYPE: Dtype = Dtype::$d;
            fn to_wide(self) -> Wide { Wide::Int(self.into()) }
            fn from_wide(v: Wide) -> Self {
                match v {
                    Wide::Int(v) => v.try_into().expect("a value of the dtype"),
                    Wide::Float(_) => panic!("a float where {} was expected", stringify!($t)),
                }
            }
        }
    )*};
}

integers! { i8 I8 i16 I16 i32 I32 i64 I64 u8 U8 u16 U16 u32 U32 u64 U64 }

impl Element for bool {
    const DTYPE: Dtype = Dtype::Bool;
    fn to_wide(self) -> Wide {
        Wide::Int(self.into())
    }
    fn from_wide(v: Wide) -> Self {
        matches!(v, Wide::Int(1))
    }
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
    fn to_wide(self) -> Wide {
        Wide::Float(self.into())
    }
    fn from_wide(v: Wide) -> Self {
        match v {
            Wide::Float(v) => v as f32,
            Wide::Int(_) => panic!("an integer where f32 was expected"),
        }
    }
}

/// An array of one axis.
pub fn array<T: Element>(values: impl IntoIterator<Item = T>) -> Array {
    let wide: Vec<Wide> = values.into_iter().map(T::to_wide).collect();
    let n = wide.len();
    let float = |w: &Wide| match w {
        Wide::Float(v) => *v,
        Wide::Int(v) => *v as f64,
    };
    let int = |w: &Wide| match w {
        Wide::Int(v) => *v,
        Wide::Float(v) => *v as i128,
    };
    match T::DTYPE {
        Dtype::F32 => Tensor::float(&[n], T::DTYPE, wide.iter().map(float).collect()),
        _ => Tensor::int(&[n], T::DTYPE, wide.iter().map(int).collect()),
    }
}

/// The elements of an array of one axis, which must have `T`'s dtype.
pub fn elements<T: Element>(a: &Array) -> Vec<T> {
    assert_eq!(a.dtype, T::DTYPE);
    match &a.data {
        zmlx_lang::eval::Data::Float(v) => v.iter().map(|v| T::from_wide(Wide::Float(*v))).collect(),
        zmlx_lang::eval::Data::Int(v) => v.iter().map(|v| T::from_wide(Wide::Int(*v))).collect(),
    }
}
