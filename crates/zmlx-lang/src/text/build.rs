//! Names looked up: expressions to a graph.

use std::collections::HashMap;

use super::ast::{Body, Expr, ExprId, ExprKind, Let, Span, Word};
use super::functions::{Callable, find, names};
use super::parse::meant;
use super::report::{Problem, suggest};
use crate::kernel::MAX_NODES;
use crate::{Graph, Id, InputDecl, Node, Role};

/// The values of a body, and where each is scattered.
pub(super) struct Built {
    pub values: Vec<Id>,
    pub places: Vec<Vec<Id>>,
}

/// Adds a body's expressions to a graph. `names` stand for values that are there already.
pub(super) fn build(
    graph: &mut Graph,
    body: &Body<'_>,
    inputs: &[InputDecl],
    names: &[(&str, Id)],
) -> Result<Built, Problem> {
    let names = names.iter().map(|(n, id)| ((*n).to_owned(), *id)).collect();
    let mut builder = Builder { graph, exprs: &body.exprs, inputs, names, ids: Vec::new() };
    for item in &body.lets {
        builder.up_to(item.value)?;
        builder.bind(item)?;
    }
    let (mut values, mut places) = (Vec::new(), Vec::new());
    for value in &body.values {
        builder.up_to(value.value)?;
        values.push(builder.get(value.value)?);
        let at = value.scatter.iter().flat_map(|s| &s.at);
        places.push(at.map(|&e| builder.get(e)).collect::<Result<Vec<_>, _>>()?);
    }
    Ok(Built { values, places })
}

struct Builder<'a, 's> {
    graph: &'a mut Graph,
    exprs: &'a [Expr<'s>],
    inputs: &'a [InputDecl],
    /// Lets so far, and the caller's names.
    names: HashMap<String, Id>,
    /// The values of `exprs` so far; literals become nodes when something uses them.
    ids: Vec<Option<Id>>,
}

impl Builder<'_, '_> {
    /// Builds the expressions up to this one.
    fn up_to(&mut self, last: ExprId) -> Result<(), Problem> {
        while self.ids.len() <= last {
            let expr = &self.exprs[self.ids.len()];
            let literal = matches!(expr.kind, ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Bool(_));
            let id = if literal { None } else { Some(self.value(expr)?) };
            self.ids.push(id);
            if self.graph.nodes().len() > MAX_NODES {
                let title = format!("more than {MAX_NODES} operations in a kernel");
                return Err(Problem::new(expr.span, title, "split it into several kernels"));
            }
        }
        Ok(())
    }

    fn get(&mut self, expr: ExprId) -> Result<Id, Problem> {
        if let Some(id) = self.ids[expr] {
            return Ok(id);
        }
        let Expr { kind, span } = &self.exprs[expr];
        let Some(literal) = kind.literal() else {
            let label = "larger ones: u64(high) << 32 | u64(low)";
            return Err(Problem::new(*span, "an integer literal that does not fit in i64", label));
        };
        let id = self.graph.add(Node::Const(literal));
        self.ids[expr] = Some(id);
        Ok(id)
    }

    fn all(&mut self, exprs: &[ExprId]) -> Result<Vec<Id>, Problem> {
        exprs.iter().map(|&e| self.get(e)).collect()
    }

    fn bind(&mut self, item: &Let<'_>) -> Result<(), Problem> {
        let Word { text, span } = item.name;
        let taken = |title: String| Err(Problem::new(span, title, "choose another name"));
        if find(text).is_some() {
            return taken(format!("{text} is a function of the language"));
        }
        if self.inputs.iter().any(|i| i.name == text) {
            return taken(format!("{text} is an input already"));
        }
        let id = self.get(item.value)?;
        match self.names.insert(text.to_owned(), id) {
            None => Ok(()),
            Some(_) => taken(format!("{text} is defined already")),
        }
    }

    fn value(&mut self, expr: &Expr<'_>) -> Result<Id, Problem> {
        match &expr.kind {
            ExprKind::Name(name) => self.variable(name, expr.span),
            ExprKind::Op(op, args) => {
                let args = self.all(args)?;
                Ok(self.graph.op(*op, &args))
            }
            ExprKind::Call(name, args) => self.call(*name, args),
            ExprKind::Index(name, at, bounds) => {
                let input = self.indexed(*name, at.len())?;
                let at = self.all(at)?;
                Ok(self.graph.add(Node::Load { input, at, bounds: *bounds }))
            }
            ExprKind::Int(_) | ExprKind::Float(_) | ExprKind::Bool(_) => {
                Err(Problem::new(expr.span, "a literal out of place", "expected a value"))
            }
        }
    }

    fn variable(&mut self, name: &str, span: Span) -> Result<Id, Problem> {
        if let Some(&id) = self.names.get(name) {
            return Ok(id);
        }
        if let Some(n) = self.inputs.iter().position(|i| i.name == name) {
            return match self.inputs[n].role {
                Role::Indexed(rank) => {
                    let at =
                        ["i", "j", "k"].iter().take(rank as usize).copied().collect::<Vec<_>>().join(", ");
                    let more = if rank > 3 { ", ..." } else { "" };
                    let label = format!("read an element: {name}[{at}{more}]");
                    Err(Problem::new(span, format!("{name} is an array"), label))
                }
                _ => Ok(self.graph.input(n)),
            };
        }
        if find(name).is_some() {
            return Err(Problem::new(span, format!("{name} is a function"), format!("write {name}(...)")));
        }
        Err(self.unknown(name, span))
    }

    fn unknown(&self, name: &str, span: Span) -> Problem {
        let mut known: Vec<&str> = self.names.keys().map(String::as_str).collect();
        known.sort_unstable();
        known.extend(self.inputs.iter().map(|i| i.name.as_str()));
        let inputs = self.inputs.iter().take(12).map(|i| i.name.as_str()).collect::<Vec<_>>().join(", ");
        let inputs = match self.inputs.len() {
            0 => "there are no inputs".to_owned(),
            1 => format!("the input is {inputs}"),
            2..=12 => format!("inputs are {inputs}"),
            _ => format!("inputs are {inputs}, ..."),
        };
        let label = match suggest(name, known.into_iter()) {
            Some(near) => format!("did you mean {near}? {inputs}"),
            None => inputs,
        };
        Problem::new(span, format!("unknown name {name}"), label)
    }

    fn indexed(&self, name: Word<'_>, count: usize) -> Result<u32, Problem> {
        let Some(n) = self.inputs.iter().position(|i| i.name == name.text) else {
            if self.names.contains_key(name.text) {
                let title = format!("{} is a value, not an array", name.text);
                return Err(Problem::new(
                    name.span,
                    title,
                    "only inputs declared as array[axes] can be indexed",
                ));
            }
            return Err(self.unknown(name.text, name.span));
        };
        match self.inputs[n].role {
            Role::Indexed(rank) if rank as usize == count => Ok(n as u32),
            Role::Indexed(rank) => {
                let axes = if rank == 1 { "axis" } else { "axes" };
                let title = format!("{} has {rank} {axes}, got {}", name.text, counted(count, "coordinate"));
                Err(Problem::new(name.span, title, "expected one coordinate for each axis, outermost first"))
            }
            _ => {
                let title = format!("{} is not an array", name.text);
                Err(Problem::new(name.span, title, format!("declare it as {}: array[{count}]", name.text)))
            }
        }
    }

    fn call(&mut self, name: Word<'_>, args: &[ExprId]) -> Result<Id, Problem> {
        let Some(callable) = find(name.text) else {
            return Err(self.unknown_function(name));
        };
        let params = callable.params();
        let right = match callable {
            Callable::Fold(_) => args.len() >= 2,
            _ => args.len() == params.len(),
        };
        if !right {
            let count = match callable {
                Callable::Fold(_) => "at least 2 arguments".to_owned(),
                _ => counted(params.len(), "argument"),
            };
            let title = format!("{} takes {count}, got {}", name.text, args.len());
            return Err(Problem::new(name.span, title, format!("{}({})", name.text, params.join(", "))));
        }
        match callable {
            Callable::Index => Ok(self.axis(args[0]).map(|axis| self.graph.add(Node::Index(axis)))?),
            Callable::Len => Ok(self.axis(args[0]).map(|axis| self.graph.add(Node::Len(axis)))?),
            Callable::Expansion(e) => {
                let args = self.all(args)?;
                let named: Vec<(&str, Id)> = e.params.iter().copied().zip(args).collect();
                let wrong = |_| Problem::new(name.span, format!("{} can't be expanded", name.text), "");
                let values = super::parse_expr_into(self.graph, e.text, &[], &named).map_err(wrong)?;
                Ok(values[0])
            }
            _ => {
                let args = self.all(args)?;
                let missing = || Problem::new(name.span, format!("{} takes arguments", name.text), "");
                callable.build(self.graph, &args).ok_or_else(missing)
            }
        }
    }

    fn axis(&self, arg: ExprId) -> Result<u32, Problem> {
        let Expr { kind, span } = &self.exprs[arg];
        match kind {
            ExprKind::Int(axis @ 0..=31) => Ok(*axis as u32),
            _ => {
                let label = "expected an integer literal from 0 to 31; 0 is the last axis";
                Err(Problem::new(*span, "not an axis", label))
            }
        }
    }

    fn unknown_function(&self, name: Word<'_>) -> Problem {
        let variable = self.names.contains_key(name.text) || self.inputs.iter().any(|i| i.name == name.text);
        if variable {
            let label = "write * to multiply";
            return Problem::new(name.span, format!("{} is a value, not a function", name.text), label);
        }
        let known = names();
        let label = meant(name.text, known.iter().map(String::as_str), "not a function of the language");
        Problem::new(name.span, format!("unknown function {}", name.text), label)
    }
}

fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}
