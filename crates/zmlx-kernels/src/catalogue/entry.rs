//! What the catalogue says of an op.

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use zmlx_lang::derive::{self, VjpOptions};
use zmlx_lang::{InputDecl, Role, text};
use zmlx_mlx::{Array, transforms};

use super::argument;
use super::case::{Case, Setting};
use crate::raw::RawKernel;
use crate::{Kernel, Result};

/// What an op is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names say it
pub enum Domain {
    Activation,
    Softmax,
    Norm,
    Reduce,
    Loss,
    Glu,
    Dropout,
    Scan,
    Rope,
    Index,
    Bits,
    Image,
    Optim,
    Gate,
}

impl Domain {
    /// The name in lists.
    pub fn name(self) -> &'static str {
        match self {
            Self::Activation => "activation",
            Self::Softmax => "softmax",
            Self::Norm => "norm",
            Self::Reduce => "reduce",
            Self::Loss => "loss",
            Self::Glu => "glu",
            Self::Dropout => "dropout",
            Self::Scan => "scan",
            Self::Rope => "rope",
            Self::Index => "index",
            Self::Bits => "bits",
            Self::Image => "image",
            Self::Optim => "optim",
            Self::Gate => "gate",
        }
    }
}

/// How an entry is computed.
pub enum Body {
    /// A text of the kernel language.
    Text(Cow<'static, str>),
    /// A text with gradients of its own, as pairs of an input and an expression. In it stand the inputs, the outputs by
    /// their names, and their cotangents as `g_` and the output's name.
    WithGradient(Cow<'static, str>, &'static [(&'static str, &'static str)]),
    /// The derived gradient of another entry with respect to one of its inputs: it takes the entry's inputs, then the
    /// cotangent.
    GradientOf {
        /// The other entry's text.
        text: Cow<'static, str>,
        /// The input's name.
        input: &'static str,
    },
    /// Bodies written by hand.
    Raw(fn() -> &'static RawKernel),
}

/// Whether an op has a gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gradient {
    /// Derived from the text (or given beside it).
    Derived,
    /// It has none, because of this.
    None(&'static str),
}

/// The op in plain MLX ops, for all of the kernel's inputs in order, scalars included.
pub type Reference = Arc<dyn Fn(&[Array], &Setting) -> zmlx_mlx::Result<Vec<Array>> + Send + Sync>;

/// An op of the catalogue.
pub struct Entry {
    /// Name, an identifier: of the entry, of the function beside it and of the kernel.
    pub name: Cow<'static, str>,
    /// Other names for the same op.
    pub aliases: &'static [&'static str],
    /// What it is for.
    pub domain: Domain,
    /// What it computes, in a line.
    pub formula: Cow<'static, str>,
    /// Dtypes that it takes, in a few words.
    pub dtypes: &'static str,
    /// Accumulation, rules for ties and edges, sources.
    pub notes: &'static str,
    /// How it is computed.
    pub body: Body,
    /// Its gradient.
    pub gradient: Gradient,
    /// The same in MLX ops.
    pub reference: Reference,
    /// Inputs to test it with.
    pub cases: Arc<dyn Fn() -> Vec<Case> + Send + Sync>,
    kernel: OnceLock<Result<Kernel>>,
}

impl Entry {
    /// An entry of a kernel's text, which also gives the name.
    pub(super) fn text(
        domain: Domain,
        text: impl Into<Cow<'static, str>>,
        formula: impl Into<Cow<'static, str>>,
        cases: impl Fn() -> Vec<Case> + Send + Sync + 'static,
        reference: impl Fn(&[Array], &Setting) -> zmlx_mlx::Result<Vec<Array>> + Send + Sync + 'static,
    ) -> Self {
        let text = text.into();
        let name = Cow::Owned(name_of(&text).to_owned());
        Self::new(domain, name, Body::Text(text), formula.into(), Arc::new(cases), Arc::new(reference))
    }

    /// An entry of bodies written by hand.
    pub(super) fn raw(
        domain: Domain,
        name: &'static str,
        kernel: fn() -> &'static RawKernel,
        formula: &'static str,
        cases: impl Fn() -> Vec<Case> + Send + Sync + 'static,
        reference: impl Fn(&[Array], &Setting) -> zmlx_mlx::Result<Vec<Array>> + Send + Sync + 'static,
    ) -> Self {
        Self::new(
            domain,
            name.into(),
            Body::Raw(kernel),
            formula.into(),
            Arc::new(cases),
            Arc::new(reference),
        )
    }

    fn new(
        domain: Domain,
        name: Cow<'static, str>,
        body: Body,
        formula: Cow<'static, str>,
        cases: Arc<dyn Fn() -> Vec<Case> + Send + Sync>,
        reference: Reference,
    ) -> Self {
        Self {
            name,
            aliases: &[],
            domain,
            formula,
            dtypes: "f32, f16, bf16",
            notes: "",
            body,
            gradient: Gradient::Derived,
            reference,
            cases,
            kernel: OnceLock::new(),
        }
    }

    /// An entry for the gradient of this one with respect to an input; one output only.
    pub(super) fn gradient_entry(
        &self,
        name: &'static str,
        input: &'static str,
        formula: &'static str,
    ) -> Self {
        let text = match &self.body {
            Body::Text(text) | Body::WithGradient(text, _) | Body::GradientOf { text, .. } => text.clone(),
            // No text: making the kernel reports that.
            Body::Raw(_) => Cow::Borrowed(""),
        };
        let wrt = parse(&text).ok().and_then(|k| k.input(input)).unwrap_or_default();
        let (reference, cases) = (Arc::clone(&self.reference), Arc::clone(&self.cases));
        let gradient = move |all: &[Array], setting: &Setting| {
            let Some((cotangent, inputs)) = all.split_last() else { return Ok(Vec::new()) };
            let (reference, setting) = (Arc::clone(&reference), setting.clone());
            let rest = inputs.to_vec();
            let of_one = move |a: &[Array]| {
                let mut inputs = rest.clone();
                inputs[wrt] = a[0].clone();
                reference(&inputs, &setting)
            };
            Ok(transforms::vjp(of_one, &[&inputs[wrt]], &[cotangent])?.1)
        };
        let with_cotangent = move || cases().into_iter().map(|c| c.with_cotangent(wrt)).collect();
        Self::new(
            self.domain,
            name.into(),
            Body::GradientOf { text, input },
            formula.into(),
            Arc::new(with_cotangent),
            Arc::new(gradient),
        )
    }

    pub(super) fn notes(mut self, notes: &'static str) -> Self {
        self.notes = notes;
        self
    }

    pub(super) fn dtypes(mut self, dtypes: &'static str) -> Self {
        self.dtypes = dtypes;
        self
    }

    pub(super) fn aliases(mut self, aliases: &'static [&'static str]) -> Self {
        self.aliases = aliases;
        self
    }

    pub(super) fn no_gradient(mut self, because: &'static str) -> Self {
        self.gradient = Gradient::None(because);
        self
    }

    /// Gives the gradient instead of having it derived; see [`Body::WithGradient`].
    pub(super) fn given_gradient(mut self, gradients: &'static [(&'static str, &'static str)]) -> Self {
        if let Body::Text(text) = self.body {
            self.body = Body::WithGradient(text, gradients);
        }
        self
    }

    /// The kernel, made on first use.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] for an entry written by hand: see [`Entry::raw_kernel`].
    pub fn kernel(&self) -> Result<&Kernel> {
        self.kernel.get_or_init(|| self.make()).as_ref().map_err(Clone::clone)
    }

    /// The kernel written by hand, if the entry is one.
    pub fn raw_kernel(&self) -> Option<&'static RawKernel> {
        match self.body {
            Body::Raw(make) => Some(make()),
            _ => None,
        }
    }

    fn make(&self) -> Result<Kernel> {
        match &self.body {
            Body::Text(text) => Kernel::from_ir(parse(text)?),
            Body::WithGradient(text, gradients) => with_gradient(parse(text)?, gradients),
            Body::GradientOf { text, input } => gradient_kernel(&self.name, &parse(text)?, input),
            Body::Raw(_) => Err(argument(&self.name, "it is written by hand; use raw_kernel")),
        }
    }

    /// Puts the op into the graph, with one array for each input, scalars included.
    ///
    /// # Errors
    /// When arrays do not fit the op.
    pub fn call(&self, inputs: &[&Array], setting: &Setting) -> Result<Vec<Array>> {
        if let Some(raw) = self.raw_kernel() {
            return raw.call(inputs, &setting.parameters);
        }
        let kernel = self.kernel()?;
        let mut call = kernel.bind(inputs);
        if let Some(domain) = &setting.domain {
            call = call.domain(domain);
        }
        let shapes = kernel.ir().outputs.iter().zip(&setting.outputs);
        for (output, shape) in shapes.filter_map(|(o, s)| Some((o, s.as_ref()?))) {
            call = call.output_shape(&output.name, shape);
        }
        call.run()
    }
}

/// `name` of `strict name(...`.
fn name_of(text: &str) -> &str {
    let text = text.trim_start();
    let text = text.strip_prefix("strict ").unwrap_or(text).trim_start();
    text.split('(').next().unwrap_or(text).trim_end()
}

fn parse(source: &str) -> Result<zmlx_lang::Kernel> {
    Ok(text::parse_kernel(source)?)
}

fn with_gradient(kernel: zmlx_lang::Kernel, gradients: &[(&str, &str)]) -> Result<Kernel> {
    let (uniform, has_rows) = (kernel.row_uniform(), kernel.has_rows());
    let role = |o: &zmlx_lang::OutputDecl| {
        if has_rows && uniform[o.value.index()] { Role::Row } else { Role::Element }
    };
    let mut inputs = kernel.inputs.clone();
    for prefix in ["", "g_"] {
        let of = |o| InputDecl { name: format!("{prefix}{}", o_name(o)), role: role(o), dtype: None };
        inputs.extend(kernel.outputs.iter().map(of));
    }
    let mut graph = zmlx_lang::Graph::default();
    let mut chosen = Vec::new();
    for (input, expression) in gradients {
        let n = kernel.input(input).ok_or_else(|| argument(&kernel.name, format!("no input {input}")))?;
        let values = text::parse_expr_into(&mut graph, expression, &inputs, &[])?;
        chosen.extend(values.first().map(|id| (n, *id)));
    }
    Kernel::with_gradient(kernel, Some((graph, chosen)))
}

fn o_name(output: &zmlx_lang::OutputDecl) -> &str {
    &output.name
}

/// The derivative's kernel, with all of the other kernel's inputs and the cotangent, used or not, so that its
/// signature says what it is the gradient of.
fn gradient_kernel(name: &str, of: &zmlx_lang::Kernel, input: &str) -> Result<Kernel> {
    let wrt = of.input(input).ok_or_else(|| argument(name, format!("no input {input}")))?;
    let rule = derive::vjp(of, &[wrt], &VjpOptions::default())?;
    let mut kernel = rule.kernel;
    let used: Vec<u32> = rule.primals.iter().map(|n| *n as u32).collect();
    let cotangent = of.inputs.len() as u32;
    let number = |n: u32| used.get(n as usize).copied().unwrap_or(cotangent);
    let nodes = kernel.graph.nodes().iter().map(|node| match node {
        zmlx_lang::Node::Input(n) => zmlx_lang::Node::Input(number(*n)),
        zmlx_lang::Node::Load { input, at, bounds } => {
            zmlx_lang::Node::Load { input: number(*input), at: at.clone(), bounds: *bounds }
        }
        other => other.clone(),
    });
    kernel.graph = zmlx_lang::Graph::from(nodes.collect::<Vec<_>>());
    let given = kernel.inputs.iter().skip(used.len()).find(|i| i.name.starts_with("g_"));
    let role = given.map_or(Role::Element, |g| g.role);
    kernel.inputs = of.inputs.clone();
    kernel.inputs.push(InputDecl { name: "g".to_owned(), role, dtype: None });
    name.clone_into(&mut kernel.name);
    for output in &mut kernel.outputs {
        "out".clone_into(&mut output.name);
    }
    Kernel::from_ir(kernel)
}
