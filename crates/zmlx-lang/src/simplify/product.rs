//! Products as a whole: constants gathered, activations recognised among the factors.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI};

use super::Rewrite;
use super::normal::{Atom, Normal, Sum};
use crate::{Id, Node, Op};

/// Factors looked at.
const FACTORS: usize = 8;

/// Operands below this depth are factors as they are.
const DEPTH: u32 = 16;

/// Coefficients as authors write them have at least this many right digits.
const CLOSE: f64 = 2e-6;

impl Rewrite {
    pub(super) fn product(&mut self, op: Op, a: Id, b: Id) -> Option<Id> {
        let mut factors = Vec::new();
        let c = self.factors(a, &mut factors, DEPTH)?
            * match op {
                Op::Mul => self.factors(b, &mut factors, DEPTH)?,
                _ => 1.0 / self.literal(b).filter(|v| *v != 0.0)?,
            };
        for f in 0..factors.len() {
            for x in (0..factors.len()).filter(|x| *x != f) {
                if let Some((function, scale)) = self.activation(factors[f], factors[x]) {
                    let value = self.op(function, &[factors[x]]);
                    let rest =
                        (0..factors.len()).filter(|k| *k != f && *k != x).map(|k| factors[k]).collect();
                    return Some(self.multiply(c * scale, value, rest));
                }
            }
        }
        self.gathered(op, a, b)
    }

    /// Appends the factors of a product of floats and returns its constant; `None` for too many.
    fn factors(&self, x: Id, out: &mut Vec<Id>, depth: u32) -> Option<f64> {
        if let Some(v) = self.literal(x) {
            return Some(v);
        }
        match self.graph.node(x) {
            Node::Op(Op::Mul, args) if depth > 0 && self.is_float(x) => {
                Some(self.factors(args[0], out, depth - 1)? * self.factors(args[1], out, depth - 1)?)
            }
            Node::Op(Op::Neg, args) if depth > 0 && self.is_float(x) => {
                Some(-self.factors(args[0], out, depth - 1)?)
            }
            Node::Op(Op::Div, args) if depth > 0 && self.literal(args[1]).is_some_and(|v| v != 0.0) => {
                Some(self.factors(args[0], out, depth - 1)? / self.literal(args[1])?)
            }
            _ if out.len() == FACTORS => None,
            _ => {
                out.push(x);
                Some(1.0)
            }
        }
    }

    fn multiply(&mut self, c: f64, first: Id, rest: Vec<Id>) -> Id {
        let product = rest.into_iter().fold(first, |acc, f| self.op(Op::Mul, &[acc, f]));
        if c == 1.0 {
            return product;
        }
        let c = self.float(c);
        self.op(Op::Mul, &[product, c])
    }

    /// `c (d x)` as `(c d) x`, where nothing else needs `d x`.
    fn gathered(&mut self, op: Op, a: Id, b: Id) -> Option<Id> {
        let c = self.literal(b).filter(|v| *v != 0.0)?;
        if self.uses[a.index()] > 1 {
            return None;
        }
        let (x, d) = match *self.args(a, Op::Mul)? {
            [x, d] => (x, self.literal(d).filter(|d| *d != 0.0)?),
            _ => return None,
        };
        if !self.is_float(a) && op == Op::Mul && !self.is_float(b) {
            return None;
        }
        let (x, c) = (self.as_float(x), if op == Op::Mul { c * d } else { d / c });
        let c = self.float(c);
        Some(self.op(Op::Mul, &[x, c]))
    }

    /// The activation that a factor makes with the factor `x`, and what remains as a constant.
    fn activation(&self, f: Id, x: Id) -> Option<(Op, f64)> {
        if self.arg(f, Op::Sigmoid) == Some(x) && self.uses[f.index()] <= 1 {
            return Some((Op::Silu, 1.0));
        }
        if let Some(inner) = self.arg(f, Op::Tanh)
            && self.arg(inner, Op::Softplus) == Some(x)
            && self.uses[f.index()] <= 1
        {
            return Some((Op::Mish, 1.0));
        }
        self.gelu(f, x)
    }

    /// Whether a sum or product has a `tanh` or `erf` near its top: a cheap look before the thorough one.
    fn holds_curve(&self, x: Id, depth: u32) -> bool {
        match self.graph.node(x) {
            Node::Op(Op::Tanh | Op::Erf, _) => depth < 3,
            Node::Op(Op::Add | Op::Mul | Op::Div | Op::Sub, args) if depth > 0 => {
                args.iter().any(|a| self.holds_curve(*a, depth - 1))
            }
            _ => false,
        }
    }

    /// `h (1 + tanh(k (x + a x^3)))` and `h (1 + erf(x / sqrt 2))`, in any arrangement.
    fn gelu(&self, f: Id, x: Id) -> Option<(Op, f64)> {
        if !self.holds_curve(f, 3) {
            return None;
        }
        let varies = vec![false; self.graph.nodes().len()];
        let sum = Normal::default().of(&self.graph, &varies, f);
        let half = *sum.get(&Vec::new())?;
        let (inner, slope) = sum.iter().find_map(|(product, c)| match product.as_slice() {
            [(Atom::Node(t), 1)] => Some((*t, *c)),
            _ => None,
        })?;
        if sum.len() != 2 || !close(half, slope) {
            return None;
        }
        let tanh = self.arg(inner, Op::Tanh);
        let argument = tanh.or_else(|| self.arg(inner, Op::Erf))?;
        let argument = Normal::with_atom(x).of(&self.graph, &varies, argument);
        let coefficient = |n: i32| argument.get(&vec![(Atom::Node(x), n)]).copied();
        let linear = coefficient(1)?;
        let matches = |s: &Sum| match tanh {
            Some(_) => {
                let k = FRAC_2_PI.sqrt();
                s.len() == 2 && close(linear, k) && coefficient(3).is_some_and(|c| close(c, k * 0.044715))
            }
            None => s.len() == 1 && close(linear, FRAC_1_SQRT_2),
        };
        let function = if tanh.is_some() { Op::GeluTanh } else { Op::GeluErf };
        matches(&argument).then_some((function, 2.0 * half))
    }
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= CLOSE * b.abs()
}
