//! The text form of kernels: parser, printer and short constructors.
//!
//! ```
//! use zmlx_lang::text;
//! let softmax = text::parse_kernel("softmax(x) = let m = row_max(x); let e = exp(x - m); e / row_sum(e)")?;
//! assert_eq!(text::parse_kernel(&softmax.to_text())?, softmax);
//! let mish = text::elementwise(None, "x * tanh(log(1 + exp(x)))")?;
//! assert_eq!(mish.inputs[0].name, "x");
//! let error = text::elementwise(None, "x * tahn(x)").unwrap_err();
//! assert!(error.to_string().contains("did you mean tanh?"));
//! # Ok::<(), zmlx_lang::LangError>(())
//! ```
//!
//! The language itself is described in `docs/language.md`. A text is never trusted: its length, the depth of its
//! brackets and the number of its operations are limited, and every error is a [`LangError::Syntax`](crate::LangError)
//! with a report that shows the line, the column and what was expected.

mod ast;
mod build;
mod functions;
mod header;
mod kernel;
mod parse;
mod print;
mod report;
mod token;

use winnow::stream::{Stateful, TokenSlice};

pub use functions::{Function, functions};

use crate::error::Result;
use crate::{Graph, Id, InputDecl, Kernel, LangError};
use ast::Body;
use parse::{Parsed, State};
use report::Problem;
use token::Token;

/// Bytes of a text at most.
pub const MAX_TEXT: usize = 64 * 1024;

/// A comma list of values over these inputs, with `let`s before it: `"let d = x - y; d * d, abs(d)"`.
///
/// # Errors
/// [`LangError::Syntax`] when the text is not in the language or uses names that are not there.
pub fn parse_expr(text: &str, inputs: &[InputDecl]) -> Result<(Graph, Vec<Id>)> {
    let mut all = Graph::default();
    let values = parse_expr_into(&mut all, text, inputs, &[])?;
    let mut graph = Graph::default();
    let values = graph.import(&all, &values, |_, _, _| None);
    Ok((graph, values))
}

/// As [`parse_expr`], into a graph that is there already. `names` stand for values of it.
///
/// After an error the graph may hold new nodes that nothing uses.
///
/// # Errors
/// As [`parse_expr`], and [`LangError::Kernel`] when a value of `names` is not in the graph.
pub fn parse_expr_into(
    graph: &mut Graph,
    text: &str,
    inputs: &[InputDecl],
    names: &[(&str, Id)],
) -> Result<Vec<Id>> {
    if let Some((name, _)) = names.iter().find(|(_, id)| id.index() >= graph.nodes().len()) {
        let what = format!("{name} stands for a value that is not in the graph");
        return Err(LangError::Kernel { kernel: "expression".to_owned(), what });
    }
    let mut build = |text: &str| {
        let body = expression(&tokens(text)?)?;
        build::build(graph, &body, inputs, names)
    };
    build(text).map(|built| built.values).map_err(|p| draw(p, text))
}

/// A kernel from its text: `"softmax(x) = let e = exp(x - row_max(x)); e / row_sum(e)"`.
///
/// # Errors
/// [`LangError::Syntax`].
pub fn parse_kernel(text: &str) -> Result<Kernel> {
    tokens(text).and_then(|t| kernel::kernel(&t)).map_err(|p| draw(p, text))
}

/// A kernel from an expression whose free names are its inputs, in order of first appearance: `"x * sigmoid(x)"`. A
/// name that is indexed (`t[i, j]`) is an array of that many axes. A whole kernel's text is taken too.
///
/// Without a name it is called `ew_` and the hash of its content (a whole kernel keeps the name of its text).
///
/// # Errors
/// [`LangError::Syntax`], and [`LangError::Kernel`] when `name` is not an identifier.
pub fn elementwise(name: Option<&str>, text: &str) -> Result<Kernel> {
    let read = |text: &str| {
        let tokens = tokens(text)?;
        if header::is_kernel(&tokens) { kernel::kernel(&tokens) } else { kernel::from_expression(&tokens) }
    };
    let mut kernel = read(text).map_err(|p| draw(p, text))?;
    match name {
        Some(name) => name.clone_into(&mut kernel.name),
        None if kernel.name.is_empty() => kernel.name = format!("ew_{:016x}", kernel.content_hash()),
        None => {}
    }
    kernel.validate()?;
    Ok(kernel)
}

fn tokens(text: &str) -> std::result::Result<Vec<Token<'_>>, Problem> {
    if text.len() > MAX_TEXT {
        let title = format!("a text of {} bytes", text.len());
        return Err(Problem::new((MAX_TEXT, MAX_TEXT), title, format!("expected at most {MAX_TEXT}")));
    }
    token::tokens(text)
}

/// A body without scatters.
fn expression<'s>(tokens: &[Token<'s>]) -> std::result::Result<Body<'s>, Problem> {
    let (_, body) = run(tokens, parse::body)?;
    match body.values.iter().find_map(|v| v.scatter.as_ref()) {
        None => Ok(body),
        Some(s) => {
            let label = "write the whole kernel: name(inputs) -> (output) = output[i] += value";
            Err(Problem::new(s.output.span, "an expression has no outputs to add to", label))
        }
    }
}

/// Runs a parser over all tokens.
fn run<'t, 's, T>(
    tokens: &'t [Token<'s>],
    mut parser: impl FnMut(&mut parse::Input<'t, 's>) -> Parsed<T>,
) -> std::result::Result<(T, Body<'s>), Problem> {
    let mut input = Stateful { input: TokenSlice::new(tokens), state: State::default() };
    let end = tokens.last().map_or((0, 0), |t| t.span);
    let value = parser(&mut input).map_err(|e| {
        e.into_inner().unwrap_or_else(|_| Problem::new(end, "the text ends too early", "expected more"))
    })?;
    Ok((value, input.state.body))
}

fn draw(problem: Problem, text: &str) -> LangError {
    if text.len() <= MAX_TEXT {
        return problem.draw(text);
    }
    // Too long to draw.
    LangError::Syntax { message: format!("error: {}: {}", problem.title, problem.label), offset: MAX_TEXT }
}
