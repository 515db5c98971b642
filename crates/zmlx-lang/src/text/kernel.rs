//! Headers and bodies to kernels.

use std::collections::HashMap;

use super::ast::{Body, ExprKind, Header, Out, ScatterAst, Span, Word};
use super::build::{Built, build};
use super::functions::find;
use super::parse;
use super::report::Problem;
use super::token::Token;
use super::{expression, header, run};
use crate::kernel::Scatter;
use crate::{Graph, Id, InputDecl, Kernel, OutputDecl, Role};

/// A whole kernel.
pub(super) fn kernel(tokens: &[Token<'_>]) -> Result<Kernel, Problem> {
    let (header, body) = run(tokens, |i| {
        let header = header::header(i)?;
        parse::body(i)?;
        Ok(header)
    })?;
    let inputs = inputs(&header)?;
    let outputs = outputs(&header, &body)?;
    let mut graph = Graph::default();
    let built = build(&mut graph, &body, &inputs, &[])?;
    let outputs = outputs.into_iter().zip(body.values.iter().map(|v| v.scatter.as_ref()));
    let outputs = outputs.map(|(out, scatter)| Ok((out, scatter.map(|s| like(s, &inputs)).transpose()?)));
    let outputs = outputs.collect::<Result<Vec<_>, Problem>>()?;
    Ok(assemble(header.name.text, header.strict, inputs, &graph, &built, outputs))
}

/// The number of the input whose shape the output has, with what happens outside.
type Place = (Option<u32>, crate::Bounds);

fn assemble(
    name: &str,
    strict: bool,
    inputs: Vec<InputDecl>,
    all: &Graph,
    built: &Built,
    outputs: Vec<(Out<'_>, Option<Place>)>,
) -> Kernel {
    // Only what outputs need, so that a let that nothing uses changes neither hash nor equality.
    let mut graph = Graph::default();
    let roots: Vec<Id> = built.values.iter().chain(built.places.iter().flatten()).copied().collect();
    let mut roots = graph.import(all, &roots, |_, _, _| None).into_iter();
    let values: Vec<Id> = roots.by_ref().take(built.values.len()).collect();
    let mut places = built.places.iter().map(|at| roots.by_ref().take(at.len()).collect::<Vec<Id>>());
    let output = |((out, place), value): ((Out<'_>, Option<Place>), Id)| {
        let at = places.next().unwrap_or_default();
        OutputDecl {
            name: out.name.text.to_owned(),
            value,
            dtype: out.dtype,
            keep_dims: out.keep,
            scatter: place.map(|(like, bounds)| Scatter { at, bounds, like }),
        }
    };
    let outputs = outputs.into_iter().zip(values).map(output).collect();
    Kernel { name: name.to_owned(), inputs, outputs, graph, strict }
}

fn inputs(header: &Header<'_>) -> Result<Vec<InputDecl>, Problem> {
    let mut seen = HashMap::new();
    for p in &header.params {
        if seen.insert(p.name.text, ()).is_some() {
            let title = format!("two inputs are named {}", p.name.text);
            return Err(Problem::new(p.name.span, title, "choose another name"));
        }
    }
    let decl =
        |p: &super::ast::Param<'_>| InputDecl { name: p.name.text.to_owned(), role: p.role, dtype: p.dtype };
    Ok(header.params.iter().map(decl).collect())
}

/// The outputs of the header, or `out`, or `out0`, `out1`, ...
fn outputs<'s>(header: &Header<'s>, body: &Body<'s>) -> Result<Vec<Out<'s>>, Problem> {
    const NAMES: [&str; 16] = [
        "out0", "out1", "out2", "out3", "out4", "out5", "out6", "out7", "out8", "out9", "out10", "out11",
        "out12", "out13", "out14", "out15",
    ];
    let span = header.name.span;
    let count = body.values.len();
    let outs: Vec<Out<'s>> = match &header.outs {
        Some(outs) if outs.len() == count => outs.clone(),
        Some(outs) => {
            let names = outs.iter().map(|o| o.name.text).collect::<Vec<_>>().join(", ");
            let at = outs.last().map_or(span, |o| o.name.span);
            let title = format!("{} named, {count} given", plural(outs.len(), "output"));
            return Err(Problem::new(at, title, format!("expected one value for each of {names}")));
        }
        None if count > NAMES.len() => {
            let title = format!("{count} values without names");
            return Err(Problem::new(span, title, "name the outputs: name(inputs) -> (a, b, ...) = ..."));
        }
        None => {
            let name = |n| if count == 1 { "out" } else { NAMES[n] };
            let out = |n| Out { name: Word { text: name(n), span }, dtype: None, keep: false };
            (0..count).map(out).collect()
        }
    };
    check_outputs(header, body, &outs)?;
    Ok(outs)
}

fn check_outputs(header: &Header<'_>, body: &Body<'_>, outs: &[Out<'_>]) -> Result<(), Problem> {
    let mut seen: HashMap<&str, &str> = header.params.iter().map(|p| (p.name.text, "an input")).collect();
    for out in outs {
        let Word { text, span } = out.name;
        if let Some(what) = seen.insert(text, "an output") {
            let label = if header.outs.is_some() { "choose another name" } else { "name the output: -> (y)" };
            return Err(Problem::new(span, format!("the output {text} has the name of {what}"), label));
        }
    }
    for (out, value) in outs.iter().zip(&body.values) {
        if let Some(s) = value.scatter.as_ref().filter(|s| s.output.text != out.name.text) {
            let title = format!("{} is not the output of this value", s.output.text);
            return Err(Problem::new(s.output.span, title, format!("expected {}", out.name.text)));
        }
    }
    Ok(())
}

fn like(s: &ScatterAst<'_>, inputs: &[InputDecl]) -> Result<Place, Problem> {
    let Some(Word { text, span }) = s.like else { return Ok((None, s.bounds)) };
    match inputs.iter().position(|i| i.name == text) {
        Some(n) => Ok((Some(n as u32), s.bounds)),
        None => {
            let label =
                parse::meant(text, inputs.iter().map(|i| i.name.as_str()), "expected the name of an input");
            Err(Problem::new(span, format!("unknown input {text}"), label))
        }
    }
}

fn plural(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// A kernel whose inputs are the free names of an expression. Its name is empty.
pub(super) fn from_expression(tokens: &[Token<'_>]) -> Result<Kernel, Problem> {
    let body = expression(tokens)?;
    let inputs = free_names(&body)?;
    let mut graph = Graph::default();
    let built = build(&mut graph, &body, &inputs, &[])?;
    let start = (0, 0);
    let header =
        Header { strict: false, name: Word { text: "", span: start }, params: Vec::new(), outs: None };
    let outs = outputs(&header, &body)?;
    if let Some(i) = inputs.iter().find(|i| outs.iter().any(|o| o.name.text == i.name)) {
        let span = uses(&body).into_iter().find(|u| u.name == i.name).map_or(start, |u| u.span);
        let title = format!("{} is the name of an output", i.name);
        return Err(Problem::new(span, title, "choose another name for the input"));
    }
    let outs = outs.into_iter().map(|o| (o, None)).collect();
    Ok(assemble("", false, inputs, &graph, &built, outs))
}

struct Use<'s> {
    name: &'s str,
    span: Span,
    /// Number of coordinates, when it is indexed.
    indexed: Option<usize>,
}

/// The uses of names, in the order of the text.
fn uses<'s>(body: &Body<'s>) -> Vec<Use<'s>> {
    let one = |e: &super::ast::Expr<'s>| match &e.kind {
        ExprKind::Name(name) => Some(Use { name, span: e.span, indexed: None }),
        ExprKind::Index(word, at, _) => {
            Some(Use { name: word.text, span: word.span, indexed: Some(at.len()) })
        }
        _ => None,
    };
    let mut uses: Vec<Use<'s>> = body.exprs.iter().filter_map(one).collect();
    uses.sort_by_key(|u| u.span.0);
    uses
}

fn free_names(body: &Body<'_>) -> Result<Vec<InputDecl>, Problem> {
    // A let is known after its own value, which ends before the next let or value begins.
    let mut lets: HashMap<&str, usize> = HashMap::new();
    for (n, item) in body.lets.iter().enumerate() {
        let next = body.lets.get(n + 1).map_or(usize::MAX, |l| l.name.span.0);
        let _ = lets.entry(item.name.text).or_insert_with(|| end_of(body, item.value).min(next));
    }
    let mut inputs: Vec<InputDecl> = Vec::new();
    for u in uses(body) {
        if lets.get(u.name).is_some_and(|&known_from| u.span.0 >= known_from) {
            continue;
        }
        if find(u.name).is_some() {
            let label = format!("write {}(...), or choose another name", u.name);
            return Err(Problem::new(u.span, format!("{} is a function", u.name), label));
        }
        let role = u.indexed.map_or(Role::Element, |rank| Role::Indexed(rank as u32));
        match inputs.iter().find(|i| i.name == u.name) {
            None => inputs.push(InputDecl { name: u.name.to_owned(), role, dtype: None }),
            Some(i) if i.role == role => {}
            Some(_) => {
                let title = format!("{} is used in two ways", u.name);
                return Err(Problem::new(
                    u.span,
                    title,
                    "expected it plain, or with as many coordinates everywhere",
                ));
            }
        }
    }
    Ok(inputs)
}

/// Where the last name of an expression ends.
fn end_of(body: &Body<'_>, value: usize) -> usize {
    body.exprs[value].span.1
}
