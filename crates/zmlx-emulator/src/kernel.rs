//! A kernel as MLX takes it.

use crate::Dtype;

/// The language of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Metal's shading language.
    Metal,
    /// CUDA C++.
    Cuda,
}

/// An input of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Param {
    /// Its name in the body.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions. With 0 Metal gets a reference to the value, CUDA a pointer.
    pub ndim: usize,
}

/// An output of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its name in the body.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
}

/// A template argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TemplateArg {
    /// An integer constant.
    Int(i32),
    /// A boolean constant.
    Bool(bool),
    /// A type.
    Dtype(Dtype),
}

/// The text of a kernel and what MLX needs to know to write its signature.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelText {
    /// An identifier; it also names the text in error messages.
    pub name: String,
    /// Text before the kernel function.
    pub header: String,
    /// Body of the kernel function.
    pub body: String,
    /// Inputs, in order.
    pub inputs: Vec<Param>,
    /// Outputs, in order; at least one.
    pub outputs: Vec<Output>,
    /// Template arguments by name.
    pub template: Vec<(String, TemplateArg)>,
    /// Metal only: outputs are `atomic<T>`.
    pub atomic_outputs: bool,
}

impl KernelText {
    /// A kernel without inputs and outputs yet.
    pub fn new(name: &str, body: &str) -> Self {
        Self { name: name.into(), body: body.into(), ..Self::default() }
    }

    /// With this text before the function.
    pub fn header(mut self, text: &str) -> Self {
        self.header = text.into();
        self
    }

    /// With one more input.
    pub fn input(mut self, name: &str, dtype: Dtype, ndim: usize) -> Self {
        self.inputs.push(Param { name: name.into(), dtype, ndim });
        self
    }

    /// With one more output.
    pub fn output(mut self, name: &str, dtype: Dtype) -> Self {
        self.outputs.push(Output { name: name.into(), dtype });
        self
    }

    /// With one more template argument.
    pub fn template(mut self, name: &str, arg: TemplateArg) -> Self {
        self.template.push((name.into(), arg));
        self
    }

    /// With atomic outputs (Metal).
    pub fn atomic(mut self) -> Self {
        self.atomic_outputs = true;
        self
    }
}
