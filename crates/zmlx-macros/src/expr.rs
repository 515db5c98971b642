//! Expressions.

use std::rc::Rc;

use quote::ToTokens;
use syn::spanned::Spanned;
use syn::{
    Expr, ExprAssign, ExprBinary, ExprCall, ExprClosure, ExprIndex, ExprLit, FnArg, ItemFn, Lit, Member,
};
use syn::{Result, UnOp};
use zmlx_lang::Dtype;

use crate::body::{Body, MAX_BODY_NODES, strip_parens};
use crate::env::{Env, Meaning};
use crate::types::{cast_type, value_type};
use crate::value::{Known, Scalar, Type, Value, error};

impl Body {
    /// The value of an expression.
    pub fn expr(&mut self, e: &Expr) -> Result<Value> {
        crate::signature::plain_attributes(attributes(e))?;
        let value = self.step(e, |s| s.expr_at_depth(e))?;
        // Tuples of tuples double with each line.
        if matches!(e, Expr::Tuple(_) | Expr::Array(_)) && value.size() > MAX_BODY_NODES {
            return Err(error(e, format!("more than {MAX_BODY_NODES} values in one tuple or array")));
        }
        Ok(value)
    }

    /// The value of an expression that must be a number or a boolean.
    pub fn scalar(&mut self, e: &Expr) -> Result<Scalar> {
        self.expr(e)?.scalar(e)
    }

    fn expr_at_depth(&mut self, e: &Expr) -> Result<Value> {
        match e {
            Expr::Lit(l) => Ok(literal(l, false)?.into()),
            Expr::Paren(p) => self.expr(&p.expr),
            Expr::Group(g) => self.expr(&g.expr),
            Expr::Path(p) => self.path(p),
            Expr::Unary(syn::ExprUnary { op: UnOp::Neg(_), expr, .. }) if matches!(**expr, Expr::Lit(_)) => {
                let Expr::Lit(l) = &**expr else { return Err(error(e, rejected(e))) };
                let x = literal(l, true)?;
                Ok(self.emit.negate(x, e)?.into())
            }
            Expr::Unary(u) => {
                let x = |s: &mut Self| s.scalar(&u.expr);
                match u.op {
                    UnOp::Neg(_) => x(self).and_then(|x| Ok(self.emit.negate(x, e)?.into())),
                    UnOp::Not(_) => x(self).and_then(|x| Ok(self.emit.not(x, e)?.into())),
                    _ => Err(error(e, "references are not accepted in a kernel: values are plain numbers")),
                }
            }
            Expr::Binary(b) => self.binary(b),
            Expr::Assign(a) => self.assign(a),
            Expr::Cast(c) => {
                let x = self.scalar(&c.expr)?;
                match cast_type(&c.ty)? {
                    Some(d) => Ok(self.emit.cast(x, d, e)?.into()),
                    None if x.known_int().is_some_and(|v| v >= 0) => Ok(x.into()),
                    None => Err(error(e, "a usize must be known while compiling; use `as i32` or `as u32`")),
                }
            }
            Expr::Call(c) => self.call(c),
            Expr::MethodCall(m) => self.method(m),
            Expr::If(i) => self.if_else(i),
            Expr::Block(b) if b.label.is_none() => self.block(&b.block),
            Expr::ForLoop(f) => self.for_loop(f),
            Expr::Tuple(t) if t.elems.is_empty() => Ok(Value::Unit),
            Expr::Tuple(t) => Ok(Value::Tuple(t.elems.iter().map(|e| self.expr(e)).collect::<Result<_>>()?)),
            Expr::Array(a) => self.array(a),
            Expr::Repeat(r) => {
                let value = self.expr(&r.expr)?;
                let len = self.scalar(&r.len)?.known_int().and_then(|n| usize::try_from(n).ok());
                match len.filter(|n| n.saturating_mul(value.size()) <= MAX_BODY_NODES) {
                    Some(n) => Ok(Value::Array(vec![value; n])),
                    None => {
                        Err(error(&r.len, "the length of an array is a small integer known while compiling"))
                    }
                }
            }
            Expr::Index(i) => self.index(i),
            Expr::Field(f) => match (self.expr(&f.base)?, &f.member) {
                (Value::Tuple(mut v), Member::Unnamed(i)) if (i.index as usize) < v.len() => {
                    Ok(v.swap_remove(i.index as usize))
                }
                (found, _) => Err(error(&f.member, format!("{} has no such field", found.name()))),
            },
            other => Err(error(other, rejected(other))),
        }
    }

    fn binary(&mut self, e: &ExprBinary) -> Result<Value> {
        let Some((op, assigns)) = crate::binary::operation(&e.op) else {
            return Err(error(&e.op, "this operator is not accepted in a kernel"));
        };
        if assigns {
            let old = self.scalar(&e.left)?;
            let right = self.scalar(&e.right)?;
            let new = self.emit.binary(op, old, right, e)?;
            return self.store(&e.left, new.into(), e);
        }
        // A chain like a + b + c leans to the left: it is walked, not recursed into, so that it may be long.
        let mut chain = vec![(op, e)];
        let mut first = &*e.left;
        while let Expr::Binary(b) = first
            && let Some((op, false)) = crate::binary::operation(&b.op)
        {
            crate::signature::plain_attributes(&b.attrs)?;
            chain.push((op, b));
            first = &b.left;
        }
        let mut value = self.scalar(first)?;
        for (op, b) in chain.into_iter().rev() {
            let right = self.scalar(&b.right)?;
            value = self.emit.binary(op, value, right, b)?;
        }
        Ok(value.into())
    }

    fn assign(&mut self, e: &ExprAssign) -> Result<Value> {
        let value = self.expr(&e.right)?;
        self.store(&e.left, value, e)
    }

    /// Gives a variable, or a place of an array or tuple in one, a new value.
    fn store(&mut self, place: &Expr, new: Value, at: &dyn ToTokens) -> Result<Value> {
        match strip_parens(place) {
            Expr::Path(p) if p.path.get_ident().is_some() => {
                let name = crate::signature::name(&p.path.segments[0].ident);
                let (meaning, outside) = match self.env.get_mut(&name) {
                    Some(found) => found,
                    None => return Err(error(p, format!("unknown name {name}"))),
                };
                let Meaning::Variable { value, mutable, shape } = meaning else {
                    return Err(error(p, format!("{name} is not a variable")));
                };
                if outside {
                    return Err(error(
                        at,
                        format!("a closure can't assign {name}, which is outside; return the value"),
                    ));
                }
                let new = match (&*value, &*shape) {
                    (Some(_), _) if !*mutable => {
                        return Err(error(
                            at,
                            format!("{name} can't be assigned twice; declare it `let mut {name}`"),
                        ));
                    }
                    (Some(old), _) => fit(&mut self.emit, old, new, at)?,
                    (None, Some(shape)) => shape.check(&mut self.emit, new, at)?,
                    (None, None) => new,
                };
                *value = Some(new);
                Ok(Value::Unit)
            }
            Expr::Index(i) => {
                let base = self.expr(&i.expr)?;
                let at_index = self.array_index(&base, &i.index)?;
                let Value::Array(mut values) = base else {
                    return Err(error(i, "inputs can't be assigned; return the value"));
                };
                values[at_index] = fit(&mut self.emit, &values[at_index], new, at)?;
                self.store(&i.expr, Value::Array(values), at)
            }
            other => Err(error(other, "only variables and elements of arrays can be assigned")),
        }
    }

    fn array(&mut self, a: &syn::ExprArray) -> Result<Value> {
        let mut values: Vec<Value> = Vec::new();
        for e in &a.elems {
            let value = self.expr(e)?;
            if let Some(first) = values.first() {
                // All elements have the type of the first.
                let value = fit(&mut self.emit, first, value, e)?;
                values.push(value);
            } else {
                values.push(value);
            }
        }
        Ok(Value::Array(values))
    }

    fn index(&mut self, e: &ExprIndex) -> Result<Value> {
        match self.expr(&e.expr)? {
            Value::Table(t) => {
                let at = self.coordinates(&e.index)?;
                Ok(self.load(t, at, zmlx_lang::Bounds::Checked, &e.index)?.into())
            }
            base => {
                let i = self.array_index(&base, &e.index)?;
                let Value::Array(mut values) = base else { return Err(error(e, "this can't be indexed")) };
                Ok(values.swap_remove(i))
            }
        }
    }

    fn array_index(&mut self, base: &Value, index: &Expr) -> Result<usize> {
        let Value::Array(values) = base else {
            return Err(error(index, format!("{} can't be indexed", base.name())));
        };
        let Some(i) = self.scalar(index)?.known_int() else {
            return Err(error(index, "an array is indexed by integers known while compiling"));
        };
        let inside = usize::try_from(i).ok().filter(|i| *i < values.len());
        inside.ok_or_else(|| error(index, format!("index {i} is outside an array of {}", values.len())))
    }

    /// The coordinates in `t[i]` or `t[[i, j]]`.
    pub fn coordinates(&mut self, e: &Expr) -> Result<Vec<Scalar>> {
        match strip_parens(e) {
            Expr::Array(a) => a.elems.iter().map(|e| self.scalar(e)).collect(),
            one => Ok(vec![self.scalar(one)?]),
        }
    }

    fn call(&mut self, e: &ExprCall) -> Result<Value> {
        let Expr::Path(p) = strip_parens(&e.func) else {
            return Err(error(&e.func, "only functions and closures with a name can be called"));
        };
        crate::paths::plain(p)?;
        let Some(ident) = p.path.get_ident() else { return self.associated(p, e) };
        let name = crate::signature::name(ident);
        match self.env.get(&name).cloned() {
            Some(Meaning::Closure(c)) => {
                let args = e.args.iter().map(|a| self.expr(a)).collect::<Result<_>>()?;
                self.call_closure(&c, args, e)
            }
            Some(Meaning::Function(f, visible)) => {
                let args = e.args.iter().map(|a| self.expr(a)).collect::<Result<_>>()?;
                self.call_function(&f, visible, args, e)
            }
            Some(_) => Err(error(p, format!("{name} is a value here, not a function"))),
            None => self.free_function(ident, e),
        }
    }

    fn call_closure(&mut self, c: &Rc<(ExprClosure, Env)>, args: Vec<Value>, e: &ExprCall) -> Result<Value> {
        let (closure, env) = &**c;
        count(closure.inputs.len(), &args, e)?;
        let outer = std::mem::replace(&mut self.env, env.clone());
        for (pat, value) in closure.inputs.iter().zip(args) {
            self.bind(pat, value)?;
        }
        let mut value = match &*closure.body {
            Expr::Block(b) => self.step(e, |s| s.function(&b.block))?,
            body => self.expr(body)?,
        };
        if let syn::ReturnType::Type(_, ty) = &closure.output {
            value = value_type(ty)?.check(&mut self.emit, value, &closure.body)?;
        }
        self.env = outer;
        Ok(value)
    }

    fn call_function(
        &mut self,
        f: &Rc<ItemFn>,
        visible: usize,
        args: Vec<Value>,
        e: &ExprCall,
    ) -> Result<Value> {
        if self.calls.iter().any(|c| Rc::ptr_eq(c, f)) {
            return Err(error(
                e,
                format!("{} calls itself; recursion is not accepted in a kernel", f.sig.ident),
            ));
        }
        count(f.sig.inputs.len(), &args, e)?;
        let inside = self.env.items(visible);
        let outer = std::mem::replace(&mut self.env, inside);
        self.calls.push(f.clone());
        for ((input, value), given) in f.sig.inputs.iter().zip(args).zip(&e.args) {
            let FnArg::Typed(t) = input else {
                return Err(error(input, "`self` is not accepted in a kernel"));
            };
            let value = value_type(&t.ty)?.check(&mut self.emit, value, given)?;
            self.bind(&t.pat, value)?;
        }
        let value = self.step(e, |s| s.function(&f.block))?;
        self.calls.pop();
        self.env = outer;
        match &f.sig.output {
            syn::ReturnType::Type(_, ty) => value_type(ty)?.check(&mut self.emit, value, &f.block),
            syn::ReturnType::Default => crate::types::Shape::Unit.check(&mut self.emit, value, &f.block),
        }
    }
}

/// A new value for a variable that holds `old`: of the same type.
fn fit(emit: &mut crate::emit::Emitter, old: &Value, new: Value, at: &dyn ToTokens) -> Result<Value> {
    match (old, new) {
        (Value::Scalar(old), Value::Scalar(new)) => match (old.ty, new.ty) {
            (Type::Known(d), _) => Ok(emit.coerce(new, d, at)?.into()),
            (Type::Integer, Type::Known(Dtype::F32 | Dtype::Bool)) => {
                Err(crate::emit::mismatch("an integer", new.ty, at))
            }
            (Type::Integer, _) => Ok(new.into()),
        },
        (Value::Tuple(old), Value::Tuple(new)) if old.len() == new.len() => {
            let all = old.iter().zip(new).map(|(o, n)| fit(emit, o, n, at));
            Ok(Value::Tuple(all.collect::<Result<_>>()?))
        }
        (Value::Array(old), Value::Array(new)) if old.len() == new.len() => {
            let all = old.iter().zip(new).map(|(o, n)| fit(emit, o, n, at));
            Ok(Value::Array(all.collect::<Result<_>>()?))
        }
        (old, new) => Err(error(at, format!("expected {}, found {}", old.name(), new.name()))),
    }
}

fn count(expected: usize, args: &[Value], e: &ExprCall) -> Result<()> {
    if expected == args.len() {
        return Ok(());
    }
    Err(error(
        e,
        format!("{} takes {expected} arguments, {} are given", e.func.to_token_stream(), args.len()),
    ))
}

/// A literal; `negated`: a minus stands before it, so it may reach one further (-128i8).
fn literal(l: &ExprLit, negated: bool) -> Result<Scalar> {
    match &l.lit {
        Lit::Bool(b) => Ok(Scalar::boolean(b.value)),
        Lit::Float(f) => match f.suffix() {
            "" | "f32" => float_literal(f.base10_digits(), l),
            "f64" => Err(error(l, "f64 is not in the language: floats are computed in f32")),
            other => Err(error(l, format!("unknown suffix {other}"))),
        },
        Lit::Int(i) => {
            if i.suffix() == "f32" {
                return float_literal(i.base10_digits(), l);
            }
            let value: i128 = i.base10_parse().map_err(|_| error(l, "this literal is too large"))?;
            match (i.suffix(), Dtype::from_name(i.suffix())) {
                ("" | "usize", _) if u64::try_from(value).is_ok() => {
                    Ok(Scalar::known(Type::Integer, Known::Int(value)))
                }
                (_, Some(d)) if d.compute().is_int() => {
                    let (_, high) = crate::value::int_range(d);
                    if value > high + i128::from(negated) {
                        return Err(error(l, format!("literal {value} is out of range for {d}")));
                    }
                    Ok(Scalar::int(d, value))
                }
                ("", _) => Err(error(l, "this literal is too large")),
                (other, _) => Err(error(l, format!("unknown suffix {other}"))),
            }
        }
        other => Err(error(other, "only numbers and booleans are accepted as literals in a kernel")),
    }
}

/// A float literal: the double as written, unless rounding twice would give another `f32` than rounding once.
fn float_literal(digits: &str, at: &ExprLit) -> Result<Scalar> {
    let (Ok(wide), Ok(narrow)) = (digits.parse::<f64>(), digits.parse::<f32>()) else {
        return Err(syn::Error::new(at.span(), "this is not a float"));
    };
    if narrow.is_infinite() {
        return Err(error(at, "literal out of range for f32; write f32::INFINITY"));
    }
    Ok(Scalar::float(if wide as f32 == narrow { wide } else { f64::from(narrow) }))
}

/// The attributes of an expression, where it may well have some.
fn attributes(e: &Expr) -> &[syn::Attribute] {
    match e {
        Expr::Array(e) => &e.attrs,
        Expr::Assign(e) => &e.attrs,
        Expr::Binary(e) => &e.attrs,
        Expr::Block(e) => &e.attrs,
        Expr::Call(e) => &e.attrs,
        Expr::Cast(e) => &e.attrs,
        Expr::Field(e) => &e.attrs,
        Expr::ForLoop(e) => &e.attrs,
        Expr::If(e) => &e.attrs,
        Expr::Index(e) => &e.attrs,
        Expr::Lit(e) => &e.attrs,
        Expr::MethodCall(e) => &e.attrs,
        Expr::Paren(e) => &e.attrs,
        Expr::Path(e) => &e.attrs,
        Expr::Repeat(e) => &e.attrs,
        Expr::Return(e) => &e.attrs,
        Expr::Tuple(e) => &e.attrs,
        Expr::Unary(e) => &e.attrs,
        _ => &[],
    }
}

/// Why a construct is not accepted, and what to write.
fn rejected(e: &Expr) -> &'static str {
    match e {
        Expr::While(_) | Expr::Loop(_) => {
            "loops of unknown length are not accepted in a kernel; write `for i in 0..N` with constant bounds"
        }
        Expr::Match(_) => "`match` is not accepted in a kernel; write `if ... else`",
        Expr::Reference(_) | Expr::RawAddr(_) => {
            "references are not accepted in a kernel: values are plain numbers"
        }
        Expr::Return(_) => "`return` is accepted only as the last statement of a function",
        Expr::Break(_) | Expr::Continue(_) => {
            "`break` and `continue` are not accepted: loops are unrolled; use `if`"
        }
        Expr::Macro(_) => "macros are not accepted in a kernel",
        Expr::Closure(_) => "a closure needs a name: `let f = |v| ...;`",
        Expr::Range(_) => "ranges are accepted only in `for`",
        Expr::Struct(_) => "structs are not accepted in a kernel; use tuples or arrays",
        Expr::Let(_) => "`let` in a condition is not accepted in a kernel",
        Expr::Unsafe(_) => "`unsafe` is not accepted in a kernel",
        Expr::Await(_) | Expr::Async(_) => "kernels are not asynchronous",
        Expr::Try(_) => "`?` is not accepted in a kernel",
        _ => {
            "not accepted in a kernel; accepted are numbers, arithmetic, comparisons, `let`, `if`, `for` over constant \
             ranges, calls of methods of f32 and of the language's functions, closures and inner functions"
        }
    }
}
