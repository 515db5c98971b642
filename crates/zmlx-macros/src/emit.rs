//! Nodes from typed operations: Rust's meaning of an operation in terms of the language's.

use quote::ToTokens;
use syn::Result;
use zmlx_lang::{Const, Dtype, Graph, Id, Node, Op};

use crate::fold;
use crate::value::{Known, Repr, Scalar, Type, error, int_range};

/// The graph that is being built.
#[derive(Debug, Default)]
pub struct Emitter {
    pub graph: Graph,
    /// Above 0 in a branch that a constant condition rules out: its arithmetic may overflow.
    pub dead: u32,
    /// Choices between integer literals: condition and both sides.
    choices: Vec<[Scalar; 3]>,
}

impl Emitter {
    /// Gives an integer literal the type `dtype`; other scalars must have it already.
    pub fn coerce(&mut self, s: Scalar, dtype: Dtype, at: &dyn ToTokens) -> Result<Scalar> {
        if let (Repr::Choice(n), true) = (s.repr, Type::Known(dtype).is_int()) {
            let [condition, a, b] = self.choices[n];
            let (a, b) = (self.coerce(a, dtype, at)?, self.coerce(b, dtype, at)?);
            return self.select(condition, a, b, at);
        }
        match (s.ty, s.known_int()) {
            (Type::Known(d), _) if d == dtype => Ok(s),
            (Type::Integer, Some(v)) if Type::Known(dtype).is_int() => {
                let (low, high) = int_range(dtype);
                if v < low || v > high {
                    return Err(error(at, format!("literal {v} is out of range for {dtype}")));
                }
                Ok(Scalar::int(dtype, v))
            }
            (Type::Integer, _) if dtype == Dtype::F32 => {
                Err(error(at, "expected f32, found an integer literal; write it with a point, like 1.0"))
            }
            (found, _) => Err(mismatch(dtype.name(), found, at)),
        }
    }

    /// Gives a lone integer literal the type `i32`, as Rust does.
    pub fn settle(&mut self, s: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        if s.ty == Type::Integer { self.coerce(s, Dtype::I32, at) } else { Ok(s) }
    }

    /// Gives a choice between literals the type `i32`; a literal stays one.
    fn settle_choice(&mut self, s: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        if matches!(s.repr, Repr::Choice(_)) { self.settle(s, at) } else { Ok(s) }
    }

    /// Two operands in their common type: equal types, or literals that adapt. Rust has no promotion, nor is there any
    /// here.
    pub fn unify(&mut self, a: Scalar, b: Scalar, at: &dyn ToTokens) -> Result<(Scalar, Scalar)> {
        match (a.ty, b.ty) {
            (Type::Integer, Type::Integer) if a.known_int().is_none() || b.known_int().is_none() => {
                Ok((self.settle(a, at)?, self.settle(b, at)?))
            }
            (x, y) if x == y => Ok((a, b)),
            (Type::Known(d), Type::Integer) if d.compute().is_int() => Ok((a, self.coerce(b, d, at)?)),
            (Type::Integer, Type::Known(d)) if d.compute().is_int() => Ok((self.coerce(a, d, at)?, b)),
            (Type::Integer, Type::Known(Dtype::F32)) | (Type::Known(Dtype::F32), Type::Integer) => {
                Err(error(at, "f32 with an integer literal; write the literal with a point, like 1.0"))
            }
            (x, y) => {
                let what =
                    format!("mixed types {} and {}; convert one of them with `as`", x.name(), y.name());
                Err(error(at, what))
            }
        }
    }

    /// The node of a scalar among operands that fix its type.
    fn weak(&mut self, s: Scalar) -> Id {
        match s.repr {
            Repr::Node(id) => id,
            // Operands are settled before they are used; a choice that is not is one between i32.
            Repr::Choice(n) => {
                let sides = self.choices[n];
                let ids = sides.map(|s| self.weak(s));
                self.graph.op(Op::Select, &ids)
            }
            Repr::Known(Known::Float(v)) => self.graph.float(v),
            Repr::Known(Known::Bool(v)) => self.graph.add(Node::Const(Const::Bool(v))),
            Repr::Known(Known::Int(v)) => match i64::try_from(v) {
                Ok(v) => self.graph.int(v),
                // Only u64 reaches beyond i64: the same bits, converted.
                Err(_) => {
                    let bits = self.graph.int(v as u64 as i64);
                    self.graph.cast(Dtype::U64, bits)
                }
            },
        }
    }

    /// The node of a scalar, of its own type wherever it stands.
    pub fn strong(&mut self, s: Scalar) -> Id {
        let id = self.weak(s);
        match (s.ty, s.known_int()) {
            // A bare literal up to i32 is an i32 in the language.
            (Type::Known(d), Some(_)) if d.compute().storage() != Dtype::I32 => self.graph.cast(d, id),
            _ => id,
        }
    }

    /// The node of an output, which is converted to its declared dtype.
    pub fn output(&mut self, s: Scalar) -> Id {
        self.weak(s)
    }

    /// An operation on operands of one type.
    pub fn op(&mut self, op: Op, args: &[Scalar]) -> Id {
        let fixed = args.iter().any(|a| a.known_value().is_none() || !a.ty.is_int());
        let ids: Vec<Id> = args.iter().map(|&a| if fixed { self.weak(a) } else { self.strong(a) }).collect();
        self.graph.op(op, &ids)
    }

    /// Integer or float arithmetic that stays in the type `dtype`: narrow integers wrap, as Rust's do in release.
    pub fn number(&mut self, op: Op, dtype: Dtype, args: &[Scalar]) -> Scalar {
        let id = self.op(op, args);
        let stays = matches!(op, Op::Min | Op::Max | Op::BitAnd | Op::BitOr | Op::BitXor | Op::Shr | Op::Rem);
        let narrow = dtype.compute().storage() != dtype && !stays;
        Scalar::node(dtype, if narrow { self.graph.cast(dtype, id) } else { id })
    }

    /// A float operation.
    pub fn float(&mut self, op: Op, args: &[Scalar]) -> Scalar {
        Scalar::node(Dtype::F32, self.op(op, args))
    }

    /// An operation that gives a boolean.
    pub fn test(&mut self, op: Op, args: &[Scalar]) -> Scalar {
        Scalar::node(Dtype::Bool, self.op(op, args))
    }

    /// `condition ? a : b`; both have one type.
    pub fn select(&mut self, condition: Scalar, a: Scalar, b: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        if condition.ty != Type::BOOL {
            return Err(mismatch("bool", condition.ty, at));
        }
        let literals = a.ty == Type::Integer && b.ty == Type::Integer;
        let (a, b) = if literals { (a, b) } else { self.unify(a, b, at)? };
        if a == b {
            return Ok(a);
        }
        match condition.known_bool() {
            Some(true) => return Ok(a),
            Some(false) => return Ok(b),
            None => {}
        }
        if literals {
            self.choices.push([condition, a, b]);
            return Ok(Scalar { ty: Type::Integer, repr: Repr::Choice(self.choices.len() - 1) });
        }
        let Type::Known(dtype) = a.ty else { return Err(mismatch("a number", a.ty, at)) };
        let condition = self.weak(condition);
        // The condition does not take part in finding the common type, so two literals need theirs written down.
        let fixed = !a.ty.is_int() || a.known_value().is_none() || b.known_value().is_none();
        let ids = if fixed { [self.weak(a), self.weak(b)] } else { [self.strong(a), self.strong(b)] };
        Ok(Scalar::node(dtype, self.graph.op(Op::Select, &[condition, ids[0], ids[1]])))
    }

    /// `-x`.
    pub fn negate(&mut self, x: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        let x = self.settle_choice(x, at)?;
        match (x.ty, x.known_value()) {
            (_, Some(Known::Float(v))) => Ok(Scalar::float(-v)),
            (ty, Some(Known::Int(v))) if ty.is_signed() => fold::in_range(ty, -v, self.dead > 0, at),
            (Type::Known(d), _) if d == Dtype::F32 || x.ty.is_signed() => Ok(self.number(Op::Neg, d, &[x])),
            (ty, _) => Err(error(at, format!("{} can't be negated", ty.name()))),
        }
    }

    /// `!x`.
    pub fn not(&mut self, x: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        let x = self.settle_choice(x, at)?;
        match (x.ty, x.known_value()) {
            (_, Some(Known::Bool(v))) => Ok(Scalar::boolean(!v)),
            (ty, Some(Known::Int(v))) if ty.is_int() => Ok(Scalar::known(ty, Known::Int(fold::wrap(ty, !v)))),
            (Type::Known(Dtype::Bool), _) => Ok(self.test(Op::Not, &[x])),
            (Type::Known(d), _) if x.ty.is_int() => Ok(self.number(Op::BitNot, d, &[x])),
            (ty, _) => Err(error(at, format!("`!` takes a boolean or an integer, not {}", ty.name()))),
        }
    }

    /// `x as dtype`, with Rust's rules: floats to integers truncate and saturate, integers wrap. A cast to `f16` or
    /// `bf16` rounds to that precision and gives an `f32`.
    pub fn cast(&mut self, x: Scalar, to: Dtype, at: &dyn ToTokens) -> Result<Scalar> {
        let value = if to.is_float() { Dtype::F32 } else { to };
        if to == Dtype::Bool && x.ty != Type::BOOL {
            return Err(error(at, "numbers don't cast to bool; compare with `!= 0`"));
        }
        if to.is_float() && x.ty == Type::BOOL {
            return Err(error(at, "bool does not cast to a float; write `if c { 1.0 } else { 0.0 }`"));
        }
        let rounds = matches!(to, Dtype::F16 | Dtype::Bf16);
        if x.ty == Type::Known(to) {
            return Ok(x);
        }
        if let Some(known) = x.known_value()
            && !rounds
        {
            return Ok(Scalar::known(Type::Known(value), fold::cast(known, to)));
        }
        let x = self.settle(x, at)?;
        let mut id = self.strong(x);
        // The language wraps a float beyond a narrow integer; Rust saturates.
        if x.ty.is_float() && !to.is_float() && to.compute().storage() != to {
            let (low, high) = int_range(to);
            let (low, high) = (self.graph.float(low as f64), self.graph.float(high as f64));
            id = self.graph.op(Op::Max, &[id, low]);
            id = self.graph.op(Op::Min, &[id, high]);
        }
        Ok(Scalar::node(value, self.graph.cast(to, id)))
    }
}

/// "expected ..., found ...".
pub fn mismatch(expected: &str, found: Type, at: &dyn ToTokens) -> syn::Error {
    error(at, format!("expected {expected}, found {}", found.name()))
}
