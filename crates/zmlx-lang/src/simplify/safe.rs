//! Rules that hold for every value.

use super::Rewrite;
use super::kind::Kind;
use crate::{Const, Dtype, Id, Node, Op};

impl Rewrite {
    pub(super) fn safe(&mut self, node: &Node) -> Option<Id> {
        match node {
            Node::Cast(dtype, x) => self.conversion(*dtype, *x),
            Node::Op(op, args) => match *args.as_slice() {
                [x] => self.safe_unary(*op, x),
                [a, b] => self.safe_binary(*op, a, b),
                [c, a, b] if *op == Op::Select => self.selection(c, a, b),
                _ => None,
            },
            _ => None,
        }
    }

    fn conversion(&self, dtype: Dtype, x: Id) -> Option<Id> {
        let same = match self.graph.node(x) {
            Node::Cast(inner, _) => *inner == dtype,
            _ => false,
        };
        let kept = same
            || dtype == Dtype::F32 && self.is_float(x)
            || dtype == Dtype::Bool && self.kind(x) == Kind::Bool;
        kept.then_some(x)
    }

    fn safe_unary(&mut self, op: Op, x: Id) -> Option<Id> {
        let settled = matches!(self.kind(x), Kind::Float | Kind::Int);
        match op {
            Op::Neg => self.arg(x, Op::Neg).filter(|_| settled),
            Op::Abs if self.args(x, Op::Abs).is_some() => Some(x),
            Op::Abs if self.is_float(x) => {
                let x = self.arg(x, Op::Neg)?;
                Some(self.op(Op::Abs, &[x]))
            }
            Op::Floor | Op::Ceil | Op::Trunc | Op::Round => {
                let whole = [Op::Floor, Op::Ceil, Op::Trunc, Op::Round];
                whole.iter().any(|op| self.args(x, *op).is_some()).then_some(x)
            }
            Op::Not => {
                if let Some(x) = self.arg(x, Op::Not) {
                    return (self.kind(x) == Kind::Bool).then_some(x);
                }
                let (op, args) = match self.graph.node(x) {
                    Node::Op(Op::Eq, args) => (Op::Ne, args.clone()),
                    Node::Op(Op::Ne, args) => (Op::Eq, args.clone()),
                    _ => return None,
                };
                Some(self.op(op, &args))
            }
            Op::BitNot => self.arg(x, Op::BitNot),
            _ => None,
        }
    }

    fn safe_binary(&mut self, op: Op, a: Id, b: Id) -> Option<Id> {
        match op {
            Op::Add | Op::Sub => self.safe_sum(op, a, b),
            Op::Mul | Op::Div => self.safe_product(op, a, b),
            Op::Pow => self.safe_power(a, b),
            Op::Min | Op::Max => (a == b && matches!(self.kind(a), Kind::Float | Kind::Int)).then_some(a),
            Op::And | Op::Or => {
                if a == b && self.kind(a) == Kind::Bool {
                    return Some(a);
                }
                let known = self.boolean(b)?;
                if known == (op == Op::Or) { Some(b) } else { (self.kind(a) == Kind::Bool).then_some(a) }
            }
            _ => None,
        }
    }

    fn safe_sum(&mut self, op: Op, a: Id, b: Id) -> Option<Id> {
        let negated = |s: &Self, x: Id| s.arg(x, Op::Neg).filter(|_| s.is_float(x));
        let opposite = if op == Op::Add { Op::Sub } else { Op::Add };
        if let Some(b) = negated(self, b) {
            return Some(self.op(opposite, &[a, b]));
        }
        if let (Op::Add, Some(a)) = (op, negated(self, a)) {
            return Some(self.op(Op::Sub, &[b, a]));
        }
        // x + -0 and x - 0 are x also for a zero of either sign; x + 0 is not.
        let neutral = if op == Op::Add { -0.0f64 } else { 0.0 };
        match self.graph.node(b) {
            Node::Const(Const::Float(bits)) if *bits == neutral.to_bits() => Some(self.as_float(a)),
            Node::Const(Const::Int(0)) => {
                let kind = self.kind(a);
                (kind == Kind::Int || kind == Kind::Float && op == Op::Sub).then_some(a)
            }
            _ => None,
        }
    }

    fn safe_product(&mut self, op: Op, a: Id, b: Id) -> Option<Id> {
        let negated = |s: &Self, x: Id| s.arg(x, Op::Neg).filter(|_| s.is_float(x));
        if let (Some(a), Some(b)) = (negated(self, a), negated(self, b)) {
            return Some(self.op(op, &[a, b]));
        }
        let factor = self.literal(b)?;
        let float = op == Op::Div || self.is_float(b) || self.is_float(a);
        if factor == 1.0 {
            return match self.kind(a) {
                _ if float => Some(self.as_float(a)),
                Kind::Int => Some(a),
                _ => None,
            };
        }
        if !float {
            return None;
        }
        if factor == -1.0 {
            let a = self.as_float(a);
            return Some(self.op(Op::Neg, &[a]));
        }
        if let Some(a) = negated(self, a) {
            let factor = self.float(-factor);
            return Some(self.op(op, &[a, factor]));
        }
        // The reciprocal of a power of two is exact.
        let bits = factor.abs().to_bits();
        let exponent = (bits >> 52) as i64 - 1023;
        if op == Op::Div && bits << 12 == 0 && (-100..=100).contains(&exponent) {
            let (a, inverse) = (self.as_float(a), self.float(1.0 / factor));
            return Some(self.op(Op::Mul, &[a, inverse]));
        }
        None
    }

    fn safe_power(&mut self, a: Id, b: Id) -> Option<Id> {
        if self.literal(a) == Some(1.0) {
            return Some(self.float(1.0));
        }
        let exponent = self.literal(b)?;
        let x = self.as_float(a);
        match exponent {
            0.0 => Some(self.float(1.0)),
            1.0 => Some(x),
            2.0 if self.powers => Some(self.op(Op::Mul, &[x, x])),
            -1.0 => {
                let one = self.float(1.0);
                Some(self.op(Op::Div, &[one, x]))
            }
            _ => None,
        }
    }

    fn selection(&mut self, c: Id, a: Id, b: Id) -> Option<Id> {
        if a == b {
            return Some(a);
        }
        if let Some(c) = self.arg(c, Op::Not) {
            return Some(self.op(Op::Select, &[c, b, a]));
        }
        let truth = self.boolean(c).or_else(|| self.literal(c).map(|v| v != 0.0))?;
        let taken = if truth { a } else { b };
        match (self.kind(a), self.kind(b)) {
            (Kind::Float, _) | (_, Kind::Float) => Some(self.as_float(taken)),
            (Kind::Bool, Kind::Bool) => Some(taken),
            _ => None,
        }
    }
}
