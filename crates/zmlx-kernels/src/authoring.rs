//! Ways to write a kernel down: one line of text of a stated kind, or a builder.

use zmlx_lang::graph::Const;
use zmlx_lang::{Dtype, Graph, Id, InputDecl, LangError, Node, OutputDecl, Role, text};

use crate::{Error, Kernel, Result};

fn parsed(what: &str, text: &str, fits: impl Fn(&zmlx_lang::Kernel) -> Option<String>) -> Result<Kernel> {
    let kernel = text::elementwise(None, text)?;
    match fits(&kernel) {
        None => Kernel::from_ir(kernel),
        Some(why) => Err(Error::Argument { kernel: kernel.name, what: format!("it is no {what}: {why}") }),
    }
}

fn has(kernel: &zmlx_lang::Kernel, wanted: impl Fn(&Node) -> bool) -> bool {
    let needed = kernel.graph.reachable(&kernel.roots());
    kernel.graph.nodes().iter().zip(needed).any(|(n, needed)| needed && wanted(n))
}

/// An elementwise kernel: `elementwise("x * tanh(log(1 + exp(x)))")`. Free names are inputs, in order of appearance; the
/// form `name(a, b: f16, eps = 1e-5) = ...` declares them.
///
/// # Errors
/// [`LangError::Syntax`] with the place; [`Error::Argument`] for a text with reductions or scans over the row.
pub fn elementwise(text: &str) -> Result<Kernel> {
    parsed("elementwise kernel", text, |k| {
        k.has_rows().then(|| "it reduces or scans the row; use reduce, map_reduce or scan".to_owned())
    })
}

/// A reduction of the last axis to one value: `reduce("sqrt(row_sum(x * x))")`.
///
/// # Errors
/// As [`elementwise`]; [`Error::Argument`] when an output is not one value a row.
pub fn reduce(text: &str) -> Result<Kernel> {
    parsed("reduction", text, |k| {
        let uniform = k.row_uniform();
        let all = k.has_rows() && k.outputs.iter().all(|o| uniform[o.value.index()] && o.scatter.is_none());
        (!all).then(|| "every output must be one value a row, such as row_sum(x)".to_owned())
    })
}

/// A map over the row that uses reductions of it, in as many passes as they depend on each other:
/// `map_reduce("let e = exp(x - row_max(x)); e / row_sum(e)")`.
///
/// # Errors
/// As [`elementwise`]; [`Error::Argument`] when there is no reduction.
pub fn map_reduce(text: &str) -> Result<Kernel> {
    parsed("map-reduce", text, |k| {
        let reduces = has(k, |n| matches!(n, Node::Reduce(..)));
        (!reduces).then(|| "nothing is reduced; use elementwise".to_owned())
    })
}

/// A running reduction along the last axis: `scan("cumsum(x)")`, `scan("cumprod_exclusive(x)")`.
///
/// # Errors
/// As [`elementwise`]; [`Error::Argument`] when there is no scan.
pub fn scan(text: &str) -> Result<Kernel> {
    parsed("scan", text, |k| {
        let scans = has(k, |n| matches!(n, Node::Scan { .. }));
        (!scans).then(|| "there is no cumsum, cumprod, cummax or cummin in it".to_owned())
    })
}

/// Parts of a kernel that is put together: [`Kernel::builder`].
#[derive(Debug, Clone)]
pub struct Builder {
    name: String,
    inputs: Vec<InputDecl>,
    outputs: Vec<(String, String, Option<Dtype>, bool)>,
    gradients: Vec<(String, String)>,
    strict: bool,
}

impl Kernel {
    /// Starts a kernel with named parts, when one line does not say enough: dtypes, roles, several outputs, a gradient of
    /// the author's own.
    pub fn builder(name: &str) -> Builder {
        Builder {
            name: name.to_owned(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            gradients: Vec::new(),
            strict: false,
        }
    }
}

impl Builder {
    fn with(mut self, name: &str, role: Role, dtype: Option<Dtype>) -> Self {
        self.inputs.push(InputDecl { name: name.to_owned(), role, dtype });
        self
    }

    /// An input with one value an element, of any dtype.
    pub fn input(self, name: &str) -> Self {
        self.with(name, Role::Element, None)
    }

    /// An input with one value an element, of this dtype.
    pub fn input_of(self, name: &str, dtype: Dtype) -> Self {
        self.with(name, Role::Element, Some(dtype))
    }

    /// An input with one value a row, of this dtype or any.
    pub fn row(self, name: &str, dtype: Option<Dtype>) -> Self {
        self.with(name, Role::Row, dtype)
    }

    /// A scalar `f32` input with a default.
    pub fn scalar(self, name: &str, default: f64) -> Self {
        self.with(name, Role::Scalar(Some(Const::float(default))), None)
    }

    /// A scalar input of a dtype, without a default.
    pub fn scalar_of(self, name: &str, dtype: Dtype) -> Self {
        self.with(name, Role::Scalar(None), Some(dtype))
    }

    /// An input of `rank` axes that is read at computed places only, as `name[i, j]`.
    pub fn indexed(self, name: &str, rank: u32, dtype: Option<Dtype>) -> Self {
        self.with(name, Role::Indexed(rank), dtype)
    }

    /// An output, stored in the dtype that follows from the inputs.
    pub fn output(mut self, name: &str, expression: &str) -> Self {
        self.outputs.push((name.to_owned(), expression.to_owned(), None, false));
        self
    }

    /// An output of this dtype.
    pub fn output_of(mut self, name: &str, expression: &str, dtype: Dtype) -> Self {
        self.outputs.push((name.to_owned(), expression.to_owned(), Some(dtype), false));
        self
    }

    /// Keeps the last axis of outputs that are one value a row, as 1.
    pub fn keep_dims(mut self) -> Self {
        self.outputs.iter_mut().for_each(|o| o.3 = true);
        self
    }

    /// Every operation rounds on its own: for kernels that must be bit-exact.
    pub fn strict(mut self) -> Self {
        self.strict = true;
        self
    }

    /// The gradient of an input, in place of the derived one. Besides the inputs, the expression may use the outputs by
    /// their names, and their cotangents: `g`, or `g_<output>` when there are several.
    pub fn gradient(mut self, input: &str, expression: &str) -> Self {
        self.gradients.push((input.to_owned(), expression.to_owned()));
        self
    }

    /// The kernel.
    ///
    /// # Errors
    /// [`LangError::Syntax`] in an expression; [`Error::Argument`] for unknown names; what validation finds.
    pub fn build(self) -> Result<Kernel> {
        let mut graph = Graph::default();
        let mut outputs = Vec::new();
        for (name, expression, dtype, keep_dims) in &self.outputs {
            let value = one(text::parse_expr_into(&mut graph, expression, &self.inputs, &[])?, &self.name)?;
            let (name, dtype, keep_dims) = (name.clone(), *dtype, *keep_dims);
            outputs.push(OutputDecl { name, value, dtype, keep_dims, scatter: None });
        }
        let (name, inputs, strict) = (self.name.clone(), self.inputs.clone(), self.strict);
        let kernel = zmlx_lang::Kernel { name, inputs, outputs, graph, strict };
        kernel.validate()?;
        let gradient = if self.gradients.is_empty() { None } else { Some(self.parse_gradients(&kernel)?) };
        Kernel::with_gradient(kernel, gradient)
    }

    fn parse_gradients(&self, kernel: &zmlx_lang::Kernel) -> Result<(Graph, Vec<(usize, Id)>)> {
        let mut graph = Graph::default();
        // As `custom_vjp` numbers them: inputs, then outputs, then cotangents.
        let several = kernel.outputs.len() > 1;
        let cotangent = |o: &OutputDecl| if several { format!("g_{}", o.name) } else { "g".to_owned() };
        let extra: Vec<String> = kernel
            .outputs
            .iter()
            .map(|o| o.name.clone())
            .chain(kernel.outputs.iter().map(cotangent))
            .collect();
        let first = kernel.inputs.len();
        let ids: Vec<Id> = (0..extra.len()).map(|k| graph.input(first + k)).collect();
        let names: Vec<(&str, Id)> = extra.iter().map(String::as_str).zip(ids).collect();
        let mut gradients = Vec::new();
        for (input, expression) in &self.gradients {
            let number = kernel.input(input).ok_or_else(|| Error::Argument {
                kernel: self.name.clone(),
                what: format!("a gradient for {input}, which is no input"),
            })?;
            let value =
                one(text::parse_expr_into(&mut graph, expression, &kernel.inputs, &names)?, &self.name)?;
            gradients.push((number, value));
        }
        Ok((graph, gradients))
    }
}

fn one(values: Vec<Id>, kernel: &str) -> Result<Id> {
    match values.as_slice() {
        [value] => Ok(*value),
        _ => Err(Error::Lang(LangError::Kernel {
            kernel: kernel.to_owned(),
            what: format!("an expression of {} values where one is wanted", values.len()),
        })),
    }
}
