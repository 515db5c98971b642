//! A function or closure to a kernel.

use quote::ToTokens;
use syn::{Expr, ExprClosure, ItemFn, Result};
use zmlx_lang::kernel::is_identifier;
use zmlx_lang::{Dtype, Graph, InputDecl, Kernel, OutputDecl, Ty};

use crate::body::Body;
use crate::env::Meaning;
use crate::signature::{self, Parameter, Results};
use crate::value::{Scalar, Type, Value, error};

/// What an attribute or the head of `elementwise!` says.
#[derive(Default)]
pub struct Options {
    pub name: Option<String>,
    pub strict: bool,
    pub keep_dims: bool,
    /// Where `Kernel`, `Array`, `Result` and `Error` are found.
    pub runtime: Option<syn::Path>,
}

/// A compiled kernel with what its Rust function needs.
pub struct Compiled {
    pub kernel: Kernel,
    pub parameters: Vec<Parameter>,
    /// Whether the result is a tuple, of one output too.
    pub tuple: bool,
}

/// Compiles `#[kernel] fn ...`.
pub fn function(f: &ItemFn, options: &Options) -> Result<Compiled> {
    let parameters = signature::parameters(&f.sig)?;
    let results = signature::results(&f.sig.output)?;
    if matches!(results, Results::Inferred) {
        return Err(error(&f.sig, "a kernel gives a value: write `-> f32`"));
    }
    let name = options.name.clone().unwrap_or_else(|| signature::name(&f.sig.ident));
    if !is_identifier(&name) {
        return Err(error(&f.sig.ident, "the name of a kernel is ASCII letters, digits and _, 128 at most"));
    }
    let mut body = Body::new(true);
    declare(&mut body, &parameters);
    let value = body.function(&f.block)?;
    let at: &dyn ToTokens = match f.block.stmts.last() {
        Some(last) => last,
        None => &f.block,
    };
    finish(body, name, parameters, results, value, options, at)
}

/// Compiles `elementwise!(|x| ...)`. Without a name it is called after a hash of its content.
pub fn closure(c: &ExprClosure, options: &Options) -> Result<Compiled> {
    let parameters = signature::closure_parameters(c)?;
    let results = signature::results(&c.output)?;
    let mut body = Body::new(false);
    declare(&mut body, &parameters);
    let value = match &*c.body {
        Expr::Block(b) if b.label.is_none() => body.function(&b.block)?,
        other => body.expr(other)?,
    };
    let name = options.name.clone().unwrap_or_else(|| "ew".to_owned());
    let mut compiled = finish(body, name, parameters, results, value, options, &c.body)?;
    if options.name.is_none() {
        compiled.kernel.name = format!("ew_{:016x}", compiled.kernel.content_hash());
    }
    Ok(compiled)
}

fn declare(body: &mut Body, parameters: &[Parameter]) {
    for (i, p) in parameters.iter().enumerate() {
        let value = Some(p.value(i as u32, body));
        body.env.add(p.decl.name.clone(), Meaning::Variable { value, mutable: p.mutable, shape: None });
    }
}

fn finish(
    mut body: Body,
    name: String,
    parameters: Vec<Parameter>,
    results: Results,
    value: Value,
    options: &Options,
    at: &dyn ToTokens,
) -> Result<Compiled> {
    let (values, tuple) = match value {
        Value::Tuple(values) => (values, true),
        one => (vec![one], false),
    };
    let stored = match (results, tuple) {
        (Results::Inferred, _) => vec![None; values.len()],
        (Results::One(d), false) => vec![Some(d)],
        (Results::Tuple(d), true) if d.len() == values.len() => d.into_iter().map(Some).collect(),
        (Results::One(d), true) => {
            return Err(error(at, format!("expected {d}, found a tuple of {}", values.len())));
        }
        (Results::Tuple(d), _) => {
            let found = if tuple { format!("a tuple of {}", values.len()) } else { values[0].name() };
            return Err(error(at, format!("expected a tuple of {}, found {found}", d.len())));
        }
    };
    let count = values.len();
    let mut outputs = Vec::with_capacity(count);
    for (i, (value, stored)) in values.into_iter().zip(stored).enumerate() {
        let s = typed(&mut body, value.scalar(at)?, stored, at)?;
        let name = if tuple { format!("out{i}") } else { "out".to_owned() };
        if let Some(p) = parameters.iter().find(|p| p.decl.name == name) {
            return Err(error(&p.ident, format!("{name} is the name of an output; rename this parameter")));
        }
        // An f32 result is stored as the inputs are.
        let dtype = match (stored, s.ty) {
            (Some(d), _) => Some(d),
            (None, Type::Known(d)) => Some(d),
            (None, Type::Integer) => None,
        };
        let dtype = dtype.filter(|d| *d != Dtype::F32);
        let value = body.emit.output(s);
        outputs.push(OutputDecl { name, value, dtype, keep_dims: options.keep_dims, scatter: None });
    }
    let inputs: Vec<InputDecl> = parameters.iter().map(|p| p.decl.clone()).collect();
    let mut graph = Graph::default();
    let roots: Vec<_> = outputs.iter().map(|o| o.value).collect();
    let moved = graph.import(&body.emit.graph, &roots, |_, _, _| None);
    outputs.iter_mut().zip(moved).for_each(|(o, id)| o.value = id);
    let kernel = Kernel { name, inputs, outputs, graph, strict: options.strict };
    verify(&kernel, at)?;
    Ok(Compiled { kernel, parameters, tuple })
}

/// The value in the type that its storage is computed in.
fn typed(body: &mut Body, s: Scalar, stored: Option<Dtype>, at: &dyn ToTokens) -> Result<Scalar> {
    match stored {
        None => body.emit.settle(s, at),
        Some(d) => body.emit.coerce(s, if d.is_float() { Dtype::F32 } else { d }, at),
    }
}

/// Checks the finished kernel as the runtime will, with every dtype that a free input may have standing for its kind.
fn verify(kernel: &Kernel, at: &dyn ToTokens) -> Result<()> {
    let wrong = |what: &dyn std::fmt::Display| error(at, format!("the kernel does not hold: {what}"));
    kernel.validate().map_err(|e| wrong(&e))?;
    for free in [Dtype::F32, Dtype::Bf16, Dtype::I32, Dtype::U64, Dtype::Bool] {
        let dtype = |i: &InputDecl| {
            i.dtype.unwrap_or(if matches!(i.role, zmlx_lang::Role::Scalar(_)) { Dtype::F32 } else { free })
        };
        let dtypes: Vec<Dtype> = kernel.inputs.iter().map(dtype).collect();
        let program = kernel.program(&dtypes).map_err(|e| wrong(&e))?;
        for (decl, output) in kernel.outputs.iter().zip(&program.outputs) {
            let expected = decl.dtype.map_or(Ty::F32, Dtype::compute);
            if output.dtype.compute() != expected {
                return Err(wrong(&format!("output {} is {}, not {expected}", decl.name, output.dtype)));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Options, function};

    /// The message of a body that must not compile, or the number of nodes of one that does.
    fn compile(body: &str) -> std::result::Result<usize, String> {
        let f = syn::parse_str(&format!("fn f(x: f32) -> f32 {{ {body} }}")).map_err(|e| e.to_string())?;
        function(&f, &Options::default()).map(|c| c.kernel.graph.nodes().len()).map_err(|e| e.to_string())
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_an_overflow_of_the_stack() {
        let run = || {
            let parens = |n: usize| format!("{}x{}", "-(".repeat(n), ")".repeat(n));
            assert_eq!(compile(&parens(60)), Ok(62));
            assert!(compile(&parens(70)).unwrap_err().contains("more than 128 deep"));
            let calls = |n: usize| format!("x{}", ".exp()".repeat(n));
            assert_eq!(compile(&calls(120)), Ok(122));
            assert!(compile(&calls(130)).unwrap_err().contains("more than 128 deep"));
            let blocks =
                |n: usize| format!("{}x{}", "if x > 0.0 { x.exp() } else { ".repeat(n), "}".repeat(n));
            assert!(compile(&blocks(50)).is_ok());
            assert!(compile(&blocks(130)).unwrap_err().contains("more than 128 deep"));
            // A chain is no nesting.
            assert_eq!(compile(&vec!["x"; 1000].join(" + ")), Ok(1001));
        };
        // The compiler's threads have 8 MiB; half of it is for others.
        let thread = std::thread::Builder::new().stack_size(4 << 20).spawn(run);
        thread.expect("a thread").join().expect("no panic");
    }

    #[test]
    fn sizes_are_bounded() {
        let doubling = |n: usize| {
            let lets = (0..n).map(|i| format!("let t{} = (t{i}, t{i});", i + 1)).collect::<String>();
            format!("let t0 = x; {lets} x")
        };
        assert_eq!(compile(&doubling(10)), Ok(2));
        assert!(compile(&doubling(60)).unwrap_err().contains("values in one tuple or array"));
        assert!(compile("let a = [[[0.0; 4000]; 4000]; 4000]; x").unwrap_err().contains("small integer"));
        let calls = "fn a(v: f32) -> f32 { v } fn b(v: f32) -> f32 { a(a(v)) } fn c(v: f32) -> f32 { b(b(v)) } c(c(x))";
        assert_eq!(compile(calls), Ok(2));
    }

    #[test]
    fn attributes_that_decide_what_is_compiled_are_rejected() {
        for body in ["#[cfg(any())] let y = 1.0; x", "#[cfg(any())] fn f() {} x", "#[cfg(any())] { } x"] {
            assert!(compile(body).unwrap_err().contains("this attribute"), "{body}");
        }
        assert_eq!(compile("#[allow(unused)] let y = 1.0; x"), Ok(2));
    }
}
