//! Methods of numbers.

use quote::ToTokens;
use syn::{Expr, ExprMethodCall, Ident, Result};
use zmlx_lang::{Bounds, Dtype, Node, Op};

use crate::body::Body;
use crate::value::{Known, Scalar, Type, Value, error};

/// Methods of `f32` that are one operation of the language.
const FLOAT_METHODS: &[(&str, Op)] = &[
    ("exp", Op::Exp),
    ("exp2", Op::Exp2),
    ("exp_m1", Op::Expm1),
    ("ln", Op::Log),
    ("ln_1p", Op::Log1p),
    ("log2", Op::Log2),
    ("log10", Op::Log10),
    ("sqrt", Op::Sqrt),
    ("sin", Op::Sin),
    ("cos", Op::Cos),
    ("tan", Op::Tan),
    ("asin", Op::Asin),
    ("acos", Op::Acos),
    ("atan", Op::Atan),
    ("tanh", Op::Tanh),
    ("floor", Op::Floor),
    ("ceil", Op::Ceil),
    ("trunc", Op::Trunc),
    ("round_ties_even", Op::Round),
];

/// All other accepted methods.
const OTHER_METHODS: [&str; 19] = [
    "abs",
    "signum",
    "recip",
    "powi",
    "powf",
    "mul_add",
    "min",
    "max",
    "clamp",
    "is_nan",
    "is_infinite",
    "is_finite",
    "to_bits",
    "rem_euclid",
    "count_ones",
    "wrapping_add",
    "wrapping_sub",
    "wrapping_mul",
    "wrapping_neg",
];

/// What to write instead of a method that is not there.
fn unknown_method(name: &str) -> String {
    let all = || FLOAT_METHODS.iter().map(|(n, _)| *n).chain(OTHER_METHODS).map(str::to_owned);
    if crate::functions::is_known(name) {
        return format!("{name} is a function: write {name}(x)");
    }
    match crate::functions::nearest(name, all()) {
        Some(n) => format!("unknown method {name}; did you mean {n}?"),
        None => format!("unknown method {name}; accepted are {}", all().collect::<Vec<_>>().join(", ")),
    }
}

impl Body {
    /// `receiver.method(args)`.
    pub fn method(&mut self, e: &ExprMethodCall) -> Result<Value> {
        if let Some(generics) = &e.turbofish {
            return Err(error(generics, "generic arguments are not accepted in a kernel"));
        }
        let args: Vec<&Expr> = e.args.iter().collect();
        match self.expr(&e.receiver)? {
            Value::Table(t) => {
                let bounds = match e.method.to_string().as_str() {
                    "clamp_at" => Bounds::Clamp,
                    "zero_at" => Bounds::Zero,
                    _ => {
                        return Err(error(
                            &e.method,
                            "an input's elements are read with t[i], t.clamp_at(i), t.zero_at(i)",
                        ));
                    }
                };
                let [at] = args[..] else { return Err(error(e, "expected one place, like [i, j]")) };
                let at = self.coordinates(at)?;
                Ok(self.load(t, at, bounds, e)?.into())
            }
            receiver => {
                let x = receiver.scalar(&e.receiver)?;
                Ok(self.method_of(x, &e.method, &args, e)?.into())
            }
        }
    }

    /// A method of a number, also when written `f32::method(x, args)`.
    pub fn method_of(
        &mut self,
        x: Scalar,
        method: &Ident,
        args: &[&Expr],
        at: &dyn ToTokens,
    ) -> Result<Scalar> {
        let name = method.to_string();
        if let Some((_, op)) = FLOAT_METHODS.iter().find(|(n, _)| *n == name) {
            let [] = self.scalars::<0>(at, args.iter().copied())?;
            self.must_be_float(x, method)?;
            return Ok(self.emit.float(*op, &[x]));
        }
        match (name.as_str(), args.len()) {
            ("min" | "max", 1) => {
                let [y] = self.scalars::<1>(at, args.iter().copied())?;
                self.min_max(if name == "min" { Op::Min } else { Op::Max }, x, y, at)
            }
            ("clamp", 2) => {
                let [low, high] = self.scalars::<2>(at, args.iter().copied())?;
                let x = self.min_max(Op::Max, x, low, at)?;
                self.min_max(Op::Min, x, high, at)
            }
            ("wrapping_add" | "wrapping_sub" | "wrapping_mul", 1) => {
                let [y] = self.scalars::<1>(at, args.iter().copied())?;
                let op = match name.as_str() {
                    "wrapping_add" => Op::Add,
                    "wrapping_sub" => Op::Sub,
                    _ => Op::Mul,
                };
                self.emit.wrapping(op, x, y, at)
            }
            ("wrapping_neg", 0) => {
                let x = self.emit.settle(x, at)?;
                let Type::Known(d) = x.ty else { return Err(error(at, "expected an integer")) };
                self.emit.wrapping(Op::Sub, Scalar::int(d, 0), x, at)
            }
            ("rem_euclid", 1) => {
                let [y] = self.scalars::<1>(at, args.iter().copied())?;
                self.emit.rem_euclid(x, y, at)
            }
            ("count_ones", 0) if x.ty.is_int() => self.count_ones(x, at),
            ("abs" | "signum", 0) if x.ty.is_int() && x.ty.is_signed() => {
                let x = self.emit.settle(x, at)?;
                let Type::Known(d) = x.ty else { return Err(error(at, "expected an integer")) };
                Ok(self.emit.number(if name == "abs" { Op::Abs } else { Op::Sign }, d, &[x]))
            }
            _ => self.float_method(x, method, args, at),
        }
    }

    fn float_method(
        &mut self,
        x: Scalar,
        method: &Ident,
        args: &[&Expr],
        at: &dyn ToTokens,
    ) -> Result<Scalar> {
        let name = method.to_string();
        match (name.as_str(), args.len()) {
            ("round", _) => {
                let what = "round() takes ties away from zero, which no backend has; use round_ties_even()";
                return Err(error(method, what));
            }
            (
                "abs" | "signum" | "recip" | "is_nan" | "is_infinite" | "is_finite" | "to_bits" | "powi"
                | "powf" | "mul_add",
                _,
            ) => self.must_be_float(x, method)?,
            (
                "min" | "max" | "clamp" | "rem_euclid" | "count_ones" | "wrapping_add" | "wrapping_sub"
                | "wrapping_mul",
                n,
            ) => {
                return Err(error(at, format!("{} has no {name} of {n} arguments", x.ty.name())));
            }
            _ => return Err(error(method, unknown_method(&name))),
        }
        match (name.as_str(), args.len()) {
            ("abs", 0) => Ok(self.emit.float(Op::Abs, &[x])),
            ("signum", 0) => self.signum(x, at),
            ("recip", 0) => Ok(self.emit.float(Op::Div, &[Scalar::float(1.0), x])),
            ("is_nan", 0) => Ok(self.emit.test(Op::IsNan, &[x])),
            ("is_infinite", 0) => Ok(self.emit.test(Op::IsInf, &[x])),
            ("is_finite", 0) => {
                let nan = self.emit.test(Op::IsNan, &[x]);
                let infinite = self.emit.test(Op::IsInf, &[x]);
                let either = self.emit.test(Op::Or, &[nan, infinite]);
                Ok(self.emit.test(Op::Not, &[either]))
            }
            ("to_bits", 0) => {
                if let Some(Known::Float(v)) = x.known_value() {
                    return Ok(Scalar::int(Dtype::U32, (v as f32).to_bits().into()));
                }
                let id = self.emit.strong(x);
                Ok(Scalar::node(Dtype::U32, self.emit.graph.add(Node::Bitcast(Dtype::U32, id))))
            }
            ("powf", 1) => {
                let [y] = self.scalars::<1>(at, args.iter().copied())?;
                self.must_be_float(y, args[0])?;
                Ok(self.emit.float(Op::Pow, &[x, y]))
            }
            ("powi", 1) => {
                let [n] = self.scalars::<1>(at, args.iter().copied())?;
                let n = self.emit.coerce(n, Dtype::I32, args[0])?;
                self.powi(x, n, at)
            }
            ("mul_add", 2) => {
                let [a, b] = self.scalars::<2>(at, args.iter().copied())?;
                self.must_be_float(a, args[0])?;
                self.must_be_float(b, args[1])?;
                Ok(self.emit.float(Op::Fma, &[x, a, b]))
            }
            (_, n) => Err(error(at, format!("{name} does not take {n} arguments"))),
        }
    }

    /// An `f32`; an integer literal says how to write it.
    pub fn must_be_float(&self, x: Scalar, at: &dyn ToTokens) -> Result<()> {
        match x.ty {
            Type::F32 => Ok(()),
            Type::Integer => {
                Err(error(at, "expected f32, found an integer literal; write it with a point, like 1.0"))
            }
            ty => Err(error(at, format!("expected f32, found {}; convert it with `as f32`", ty.name()))),
        }
    }

    /// The smaller or larger; NaN if either is NaN.
    pub fn min_max(&mut self, op: Op, x: Scalar, y: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        let (x, y) = self.emit.unify(x, y, at)?;
        match (x.ty, x.known_int(), y.known_int()) {
            (Type::BOOL, ..) => Err(error(at, "min and max take numbers, not booleans")),
            (ty, Some(a), Some(b)) => {
                let v = if op == Op::Min { a.min(b) } else { a.max(b) };
                Ok(Scalar::known(ty, Known::Int(v)))
            }
            (Type::Known(d), ..) => Ok(self.emit.number(op, d, &[x, y])),
            (Type::Integer, ..) => Err(error(at, "expected a number")),
        }
    }

    /// Rust's sign: 1 or -1, for zeros too; NaN for NaN. The language's `sign` has 0 for zeros: there the sign of the
    /// reciprocal decides.
    fn signum(&mut self, x: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        let sign = self.emit.float(Op::Sign, &[x]);
        let inverse = self.emit.float(Op::Div, &[Scalar::float(1.0), x]);
        let of_zero = self.emit.float(Op::Sign, &[inverse]);
        let zero = self.emit.test(Op::Eq, &[x, Scalar::float(0.0)]);
        self.emit.select(zero, of_zero, sign, at)
    }

    /// An integer power: products for a known exponent up to 64, else the language's `pow`.
    fn powi(&mut self, x: Scalar, n: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        let Some(n) = n.known_int().filter(|n| n.abs() <= 64) else {
            let n = self.emit.cast(n, Dtype::F32, at)?;
            return Ok(self.emit.float(Op::Pow, &[x, n]));
        };
        let (mut left, mut square) = (n.unsigned_abs(), x);
        let mut product: Option<Scalar> = None;
        while left > 0 {
            if left & 1 == 1 {
                product = Some(product.map_or(square, |p| self.emit.float(Op::Mul, &[p, square])));
            }
            left >>= 1;
            if left > 0 {
                square = self.emit.float(Op::Mul, &[square, square]);
            }
        }
        let product = product.unwrap_or(Scalar::float(1.0));
        Ok(if n < 0 { self.emit.float(Op::Div, &[Scalar::float(1.0), product]) } else { product })
    }

    fn count_ones(&mut self, x: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        let x = self.emit.settle(x, at)?;
        let Type::Known(d) = x.ty else { return Err(error(at, "expected an integer")) };
        // A narrow signed integer is computed in 32 bits: its copies of the sign must not count.
        let x = match d {
            Dtype::I8 => self.emit.cast(x, Dtype::U8, at)?,
            Dtype::I16 => self.emit.cast(x, Dtype::U16, at)?,
            _ => x,
        };
        let id = self.emit.strong(x);
        let count = self.emit.graph.op(Op::Popcount, &[id]);
        // The count has the operand's type in the language, u32 in Rust.
        Ok(Scalar::node(Dtype::U32, self.emit.graph.cast(Dtype::U32, count)))
    }
}
