//! Blocks and statements: straight code in single-assignment form.

use std::rc::Rc;

use quote::ToTokens;
use syn::{Block, Expr, ExprForLoop, ExprIf, Item, ItemFn, Local, Pat, Result, Stmt};

use crate::emit::Emitter;
use crate::env::{Env, Meaning};
use crate::types::value_type;
use crate::value::{Known, Scalar, Type, Value, error};

/// Nodes that one kernel's body may take while it is compiled, unrolled loops included.
pub const MAX_BODY_NODES: usize = 4096;
/// Expressions read at most, counting each turn of a loop: bounds the compile time of loops that build nothing.
const MAX_STEPS: u32 = 200_000;
/// Rounds of one loop at most.
const MAX_ROUNDS: i128 = 4096;
/// Depth of nesting of expressions and inlined calls at most; a thread of the compiler has a few megabytes of stack.
const MAX_DEPTH: u32 = 128;

/// The state while one body is compiled.
pub struct Body {
    pub emit: Emitter,
    pub env: Env,
    /// The helper functions that are being inlined, innermost last.
    pub calls: Vec<Rc<ItemFn>>,
    /// Whether reductions and scans are accepted.
    pub rows: bool,
    steps: u32,
    depth: u32,
}

impl Body {
    pub fn new(rows: bool) -> Self {
        Self { emit: Emitter::default(), env: Env::default(), calls: Vec::new(), rows, steps: 0, depth: 0 }
    }

    /// Counts one expression, so that nothing takes forever or exhausts the stack.
    pub fn step<T>(&mut self, at: &dyn ToTokens, run: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.steps += 1;
        if self.steps > MAX_STEPS || self.emit.graph.nodes().len() > MAX_BODY_NODES {
            let what = format!(
                "the kernel is too large: unrolled and inlined it passes {MAX_BODY_NODES} operations"
            );
            return Err(error(at, what));
        }
        if self.depth >= MAX_DEPTH {
            return Err(error(at, format!("expressions and calls are nested more than {MAX_DEPTH} deep")));
        }
        self.depth += 1;
        let result = run(self);
        self.depth -= 1;
        result
    }

    /// The body of a function: a block whose last statement may be `return value;`.
    pub fn function(&mut self, block: &Block) -> Result<Value> {
        match block.stmts.split_last() {
            Some((Stmt::Expr(Expr::Return(last), _), before)) => {
                let Some(value) = &last.expr else {
                    return Err(error(last, "expected a value after `return`"));
                };
                let mark = self.env.enter();
                self.items(before)?;
                for stmt in before {
                    self.statement(stmt)?;
                }
                let value = self.expr(value)?;
                self.env.leave(mark);
                Ok(value)
            }
            _ => self.block(block),
        }
    }

    /// A block; its value is that of a last expression without semicolon.
    pub fn block(&mut self, block: &Block) -> Result<Value> {
        let mark = self.env.enter();
        self.items(&block.stmts)?;
        let mut value = Value::Unit;
        for (i, stmt) in block.stmts.iter().enumerate() {
            match stmt {
                Stmt::Expr(e, None) if i + 1 == block.stmts.len() => value = self.expr(e)?,
                _ => self.statement(stmt)?,
            }
        }
        self.env.leave(mark);
        Ok(value)
    }

    /// Items are known in the whole block, before and after where they stand.
    fn items(&mut self, stmts: &[Stmt]) -> Result<()> {
        let items = stmts.iter().filter(|s| matches!(s, Stmt::Item(Item::Fn(_) | Item::Const(_)))).count();
        let visible = self.env.enter() + items;
        for stmt in stmts {
            if let Stmt::Item(Item::Fn(f)) = stmt {
                crate::signature::plain_attributes(&f.attrs)?;
                crate::signature::plain_function(&f.sig)?;
                let name = crate::signature::name(&f.sig.ident);
                self.env.add(name, Meaning::Function(Rc::new(f.clone()), visible));
            }
        }
        for stmt in stmts {
            if let Stmt::Item(Item::Const(c)) = stmt {
                crate::signature::plain_attributes(&c.attrs)?;
                let found = self.expr(&c.expr)?;
                let value = value_type(&c.ty)?.check(&mut self.emit, found, &c.expr)?;
                if !is_known(&value) {
                    return Err(error(&c.expr, "a constant must be known while compiling"));
                }
                self.env.add(crate::signature::name(&c.ident), Meaning::Constant(value));
            }
        }
        Ok(())
    }

    fn statement(&mut self, stmt: &Stmt) -> Result<()> {
        match stmt {
            Stmt::Local(local) => self.local(local),
            Stmt::Item(Item::Fn(_) | Item::Const(_)) => Ok(()),
            Stmt::Item(other) => Err(error(other, "only `fn` and `const` items are accepted in a kernel")),
            Stmt::Macro(m) => Err(error(m, "macros are not accepted in a kernel")),
            Stmt::Expr(e, semicolon) => match (self.expr(e)?, semicolon) {
                (Value::Unit, _) | (_, Some(_)) => Ok(()),
                (found, None) => Err(error(e, format!("expected `()`, found {}", found.name()))),
            },
        }
    }

    fn local(&mut self, local: &Local) -> Result<()> {
        crate::signature::plain_attributes(&local.attrs)?;
        let (pat, shape) = match &local.pat {
            Pat::Type(t) => (&*t.pat, Some(value_type(&t.ty)?)),
            pat => (pat, None),
        };
        let Some(init) = &local.init else {
            let Pat::Ident(p) = pat else { return Err(error(pat, "a `let` without value takes one name")) };
            let meaning = Meaning::Variable { value: None, mutable: p.mutability.is_some(), shape };
            self.env.add(crate::signature::name(&p.ident), meaning);
            return Ok(());
        };
        if let Some((_, diverge)) = &init.diverge {
            return Err(error(diverge, "`let ... else` is not accepted in a kernel"));
        }
        if let Expr::Closure(c) = &*init.expr {
            let Pat::Ident(p) = pat else { return Err(error(pat, "a closure takes one name")) };
            crate::signature::plain_closure(c)?;
            let meaning = Meaning::Closure(Rc::new((c.clone(), self.env.captured())));
            self.env.add(crate::signature::name(&p.ident), meaning);
            return Ok(());
        }
        let mut value = self.expr(&init.expr)?;
        if let Some(shape) = shape {
            value = shape.check(&mut self.emit, value, &init.expr)?;
        }
        self.bind(pat, value)
    }

    /// Gives the names of a pattern their values.
    pub fn bind(&mut self, pat: &Pat, value: Value) -> Result<()> {
        match (pat, value) {
            (Pat::Ident(p), value) if p.by_ref.is_none() && p.subpat.is_none() => {
                let meaning =
                    Meaning::Variable { value: Some(value), mutable: p.mutability.is_some(), shape: None };
                self.env.add(crate::signature::name(&p.ident), meaning);
                Ok(())
            }
            (Pat::Wild(_), _) => Ok(()),
            (Pat::Paren(p), value) => self.bind(&p.pat, value),
            (Pat::Type(t), value) => {
                let value = value_type(&t.ty)?.check(&mut self.emit, value, &t.pat)?;
                self.bind(&t.pat, value)
            }
            (Pat::Tuple(p), Value::Tuple(values)) if p.elems.len() == values.len() => {
                p.elems.iter().zip(values).try_for_each(|(p, v)| self.bind(p, v))
            }
            (Pat::Slice(p), Value::Array(values)) if p.elems.len() == values.len() => {
                p.elems.iter().zip(values).try_for_each(|(p, v)| self.bind(p, v))
            }
            (Pat::Tuple(_) | Pat::Slice(_), value) => {
                Err(error(pat, format!("this pattern does not fit {}", value.name())))
            }
            _ => Err(error(pat, "only names, `_`, tuples and arrays are accepted as patterns")),
        }
    }

    /// `if`: both ways are computed and every value they disagree on is selected; a condition known while compiling
    /// picks its way at once.
    pub fn if_else(&mut self, e: &ExprIf) -> Result<Value> {
        if let Expr::Let(l) = &*e.cond {
            return Err(error(l, "`if let` is not accepted in a kernel"));
        }
        let condition = self.expr(&e.cond)?.scalar(&e.cond)?;
        if condition.ty != Type::BOOL {
            return Err(crate::emit::mismatch("bool", condition.ty, &e.cond));
        }
        let known = condition.known_bool();
        let before = self.env.clone();
        let a = self.branch(known == Some(false), |s| s.block(&e.then_branch))?;
        let after_then = std::mem::replace(&mut self.env, before);
        let b = match &e.else_branch {
            Some((_, other)) => self.branch(known == Some(true), |s| s.expr(other))?,
            None => Value::Unit,
        };
        if e.else_branch.is_none() && a != Value::Unit {
            return Err(error(&e.then_branch, "an `if` with a value needs an `else`"));
        }
        self.join_variables(condition, after_then, e)?;
        let at: &dyn ToTokens = match &e.else_branch {
            Some((_, other)) => other,
            None => &e.then_branch,
        };
        self.join(condition, a, b, at)
    }

    /// One way through an `if`; in a way never taken, constant arithmetic may overflow.
    fn branch(&mut self, dead: bool, run: impl FnOnce(&mut Self) -> Result<Value>) -> Result<Value> {
        self.emit.dead += u32::from(dead);
        let value = run(self);
        self.emit.dead -= u32::from(dead);
        value
    }

    /// Selects each variable's value from the two ways; the current environment is that of `else`.
    fn join_variables(&mut self, condition: Scalar, mut after_then: Env, at: &ExprIf) -> Result<()> {
        let mut env = std::mem::take(&mut self.env);
        for ((name, a), (_, b)) in after_then.variables_mut().zip(env.variables_mut()) {
            if a == b {
                continue;
            }
            let joined = match (a.take(), b.take(), condition.known_bool()) {
                (a, _, Some(true)) => a,
                (_, b, Some(false)) => b,
                (Some(a), Some(b), None) => Some(self.join(condition, a, b, &at.cond).map_err(|e| {
                    error(&at.cond, format!("the two ways give {name} values that don't fit: {e}"))
                })?),
                // Not assigned in one of the ways: still without a value.
                _ => None,
            };
            *b = joined;
        }
        self.env = env;
        Ok(())
    }

    fn join(&mut self, condition: Scalar, a: Value, b: Value, at: &dyn ToTokens) -> Result<Value> {
        let pairs = |s: &mut Self, a: Vec<Value>, b: Vec<Value>| -> Result<Vec<Value>> {
            a.into_iter().zip(b).map(|(a, b)| s.join(condition, a, b, at)).collect()
        };
        match (a, b) {
            (Value::Unit, Value::Unit) => Ok(Value::Unit),
            (Value::Scalar(a), Value::Scalar(b)) => Ok(self.emit.select(condition, a, b, at)?.into()),
            (Value::Tuple(a), Value::Tuple(b)) if a.len() == b.len() => Ok(Value::Tuple(pairs(self, a, b)?)),
            (Value::Array(a), Value::Array(b)) if a.len() == b.len() => Ok(Value::Array(pairs(self, a, b)?)),
            (a, b) => Err(error(at, format!("`if` gives {}, `else` gives {}", a.name(), b.name()))),
        }
    }

    /// `for i in 0..4 { ... }`, unrolled.
    pub fn for_loop(&mut self, e: &ExprForLoop) -> Result<Value> {
        if let Some(label) = &e.label {
            return Err(error(label, "labels are not accepted in a kernel"));
        }
        for value in self.rounds(&e.expr)? {
            let mark = self.env.enter();
            self.bind(&e.pat, value)?;
            let given = self.step(&e.expr, |s| s.block(&e.body))?;
            if given != Value::Unit {
                return Err(error(&e.body, format!("expected `()`, found {}", given.name())));
            }
            self.env.leave(mark);
        }
        Ok(Value::Unit)
    }

    /// The values a loop goes through.
    fn rounds(&mut self, over: &Expr) -> Result<Vec<Value>> {
        let (range, reversed) = match over {
            Expr::MethodCall(m) if m.method == "rev" && m.args.is_empty() => (&*m.receiver, true),
            other => (other, false),
        };
        let range = strip_parens(range);
        let mut values = match range {
            Expr::Range(r) => {
                let bound = "a loop needs both bounds, known while compiling, like 0..4 or 0..=N";
                let (Some(start), Some(end)) = (&r.start, &r.end) else { return Err(error(r, bound)) };
                let (low, high) = (self.bound(start)?, self.bound(end)?);
                let (low, high) = self.emit.unify(low, high, r)?;
                let (Some(from), Some(to)) = (low.known_int(), high.known_int()) else {
                    return Err(error(r, bound));
                };
                let to = if matches!(r.limits, syn::RangeLimits::Closed(_)) { to + 1 } else { to };
                if to - from > MAX_ROUNDS {
                    return Err(error(
                        r,
                        format!("{} rounds are more than the {MAX_ROUNDS} that are unrolled", to - from),
                    ));
                }
                (from..to).map(|v| Scalar::known(low.ty, Known::Int(v)).into()).collect()
            }
            _ => match self.expr(range)? {
                Value::Array(values) => values,
                other => {
                    let what =
                        format!("a loop runs over a range like 0..4 or an array, not {}", other.name());
                    return Err(error(over, what));
                }
            },
        };
        if reversed {
            values.reverse();
        }
        Ok(values)
    }

    fn bound(&mut self, e: &Expr) -> Result<Scalar> {
        let s = self.expr(e)?.scalar(e)?;
        match s.known_int() {
            Some(_) => Ok(s),
            None => Err(error(e, "the bounds of a loop must be integers known while compiling")),
        }
    }
}

fn is_known(value: &Value) -> bool {
    match value {
        Value::Unit => true,
        Value::Scalar(s) => s.known_value().is_some(),
        Value::Tuple(v) | Value::Array(v) => v.iter().all(is_known),
        Value::Table(_) => false,
    }
}

pub fn strip_parens(e: &Expr) -> &Expr {
    match e {
        Expr::Paren(p) => strip_parens(&p.expr),
        Expr::Group(g) => strip_parens(&g.expr),
        other => other,
    }
}
