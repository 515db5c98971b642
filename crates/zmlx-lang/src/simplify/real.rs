//! Rules that hold for real numbers: cheaper or more accurate forms.

use super::Rewrite;
use super::kind::Kind;
use crate::{Id, Node, Op};

impl Rewrite {
    pub(super) fn real(&mut self, node: &Node) -> Option<Id> {
        let Node::Op(op, args) = node else { return None };
        match (*op, args.as_slice()) {
            (Op::Log, &[x]) => self.logarithm(x),
            (Op::Log1p, &[x]) => {
                let x = self.arg(x, Op::Exp)?;
                Some(self.op(Op::Softplus, &[x]))
            }
            (Op::Neg, &[x]) => {
                let &[a, c] = self.args(x, Op::Mul)? else { return None };
                let c = self.literal(c).filter(|_| self.is_float(x))?;
                let (a, c) = (self.as_float(a), self.float(-c));
                Some(self.op(Op::Mul, &[a, c]))
            }
            (Op::Add | Op::Sub, &[a, b]) => self.real_sum(*op, a, b),
            (Op::Div, &[a, b]) => self.quotient(a, b).or_else(|| self.product(Op::Div, a, b)),
            (Op::Mul, &[a, b]) => self.product(Op::Mul, a, b),
            (Op::Pow, &[x, n]) => self.real_power(x, n),
            (Op::Max, &[a, b]) => {
                let opposite = self.arg(a, Op::Neg) == Some(b) || self.arg(b, Op::Neg) == Some(a);
                let x = if self.args(a, Op::Neg).is_some() { b } else { a };
                (opposite && self.is_float(x)).then(|| self.op(Op::Abs, &[x]))
            }
            _ => None,
        }
    }

    /// The other operand of a sum with 1.
    fn one_plus(&self, x: Id) -> Option<Id> {
        match *self.args(x, Op::Add)? {
            [a, b] if self.literal(b) == Some(1.0) => Some(a),
            _ => None,
        }
    }

    fn logarithm(&mut self, x: Id) -> Option<Id> {
        if let Some(x) = self.arg(x, Op::Exp) {
            return Some(self.as_float(x));
        }
        let rest = self.one_plus(x)?;
        Some(self.op(Op::Log1p, &[rest]))
    }

    fn real_sum(&mut self, op: Op, a: Id, b: Id) -> Option<Id> {
        let one = if op == Op::Sub { 1.0 } else { -1.0 };
        if let (Some(x), Some(c)) = (self.arg(a, Op::Exp), self.literal(b))
            && c == one
        {
            return Some(self.op(Op::Expm1, &[x]));
        }
        if self.literal(b) == Some(0.0) && (self.is_float(a) || self.is_float(b)) {
            return Some(self.as_float(a));
        }
        if op == Op::Sub && self.literal(a) == Some(0.0) && self.kind(b) == Kind::Float {
            return Some(self.op(Op::Neg, &[b]));
        }
        None
    }

    /// Quotients by `1 + exp`, and by a square root.
    fn quotient(&mut self, a: Id, b: Id) -> Option<Id> {
        let unit = self.literal(a) == Some(1.0);
        if let (true, Some(x)) = (unit, self.arg(b, Op::Sqrt)) {
            return Some(self.op(Op::Rsqrt, &[x]));
        }
        let e = self.one_plus(b)?;
        let x = self.arg(e, Op::Exp)?;
        if a == e {
            return Some(self.op(Op::Sigmoid, &[x]));
        }
        let minus = match self.arg(x, Op::Neg) {
            Some(x) => x,
            None if unit => self.op(Op::Neg, &[x]),
            None => return None,
        };
        let function = if unit { Op::Sigmoid } else { Op::Silu };
        (unit || a == minus).then(|| self.op(function, &[minus]))
    }

    fn real_power(&mut self, x: Id, n: Id) -> Option<Id> {
        let n = self.literal(n)?;
        let x = self.as_float(x);
        match n {
            0.5 => Some(self.op(Op::Sqrt, &[x])),
            -0.5 => Some(self.op(Op::Rsqrt, &[x])),
            3.0 | 4.0 if self.powers => {
                let square = self.op(Op::Mul, &[x, x]);
                let other = if n == 3.0 { x } else { square };
                Some(self.op(Op::Mul, &[square, other]))
            }
            _ => None,
        }
    }
}
