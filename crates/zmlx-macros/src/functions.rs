//! Functions of the language that Rust's numbers don't have.

use quote::ToTokens;
use syn::{ExprCall, Ident, Result};
use zmlx_lang::{Dtype, Node, Op, ReduceOp, ScanOp, Signature, text};

use crate::body::Body;
use crate::value::{Scalar, Type, Value, error};

/// What a name followed by arguments means.
enum Function {
    Op(Op),
    Reduce(ReduceOp),
    Scan {
        op: ScanOp,
        exclusive: bool,
        reverse: bool,
    },
    Clamp,
    Square,
    Index,
    Len,
    Random,
    /// A short name for an expression, with its number of parameters.
    Expansion(usize),
}

/// Functions of the text language that Rust writes otherwise: casts, and a name that is a keyword.
fn is_foreign(name: &str) -> bool {
    name == "where" || name.starts_with("bitcast_") || Dtype::from_name(name).is_some()
}

impl Function {
    fn from_name(name: &str) -> Option<Self> {
        match name {
            "clamp" => return Some(Self::Clamp),
            "square" => return Some(Self::Square),
            "index" => return Some(Self::Index),
            "len" => return Some(Self::Len),
            "random" => return Some(Self::Random),
            _ => {}
        }
        if let Some(op) = Op::from_name(name) {
            return is_function(op).then_some(Self::Op(op));
        }
        if let Some(op) = ReduceOp::ALL.into_iter().find(|op| op.name() == name) {
            return Some(Self::Reduce(op));
        }
        for op in ScanOp::ALL {
            let (exclusive, reverse) = match name.strip_prefix(op.name()) {
                Some("") => (false, false),
                Some("_exclusive") => (true, false),
                Some("_reverse") => (false, true),
                Some("_exclusive_reverse") => (true, true),
                _ => continue,
            };
            return Some(Self::Scan { op, exclusive, reverse });
        }
        let known = text::functions().into_iter().find(|f| f.name == name && !is_foreign(name))?;
        Some(Self::Expansion(known.params.split(',').count()))
    }

    /// Whether it looks along the row.
    fn is_row(&self, name: &str) -> bool {
        matches!(self, Self::Reduce(_) | Self::Scan { .. }) || name.starts_with("row_")
    }
}

/// Operations that have no operator in Rust; the others are written as operators.
fn is_function(op: Op) -> bool {
    match op.signature() {
        Signature::Float => op != Op::Div,
        Signature::FloatTest | Signature::Select => true,
        Signature::Number => matches!(op, Op::Abs | Op::Sign | Op::Min | Op::Max | Op::FloorDiv | Op::Rem),
        Signature::Integer | Signature::Compare | Signature::Logic => false,
    }
}

/// Every name of a function, for messages.
fn names() -> impl Iterator<Item = String> {
    let operator = |name: &str| Op::from_name(name).is_some_and(|op| !is_function(op));
    text::functions().into_iter().map(|f| f.name).filter(move |n| !is_foreign(n) && !operator(n))
}

/// Whether a name is that of a function of the language.
pub fn is_known(name: &str) -> bool {
    Function::from_name(name).is_some()
}

/// The name that is most like one misspelt.
pub fn nearest(name: &str, names: impl Iterator<Item = String>) -> Option<String> {
    let like = names.map(|n| (strsim::damerau_levenshtein(&n, name), n));
    like.filter(|(distance, _)| *distance <= 2).min().map(|(_, n)| n)
}

impl Body {
    /// A call of a function of the language.
    pub fn free_function(&mut self, ident: &Ident, e: &ExprCall) -> Result<Value> {
        let name = crate::signature::name(ident);
        let Some(function) = Function::from_name(&name) else {
            if let Some(op) = Op::from_name(&name) {
                return Err(error(ident, format!("{name} is written as an operator: {}", op.doc())));
            }
            let hint = match nearest(&name, names()) {
                Some(n) => format!("did you mean {n}?"),
                None => "declare it inside the kernel, or see the language's functions".to_owned(),
            };
            return Err(error(ident, format!("unknown function {name}; {hint}")));
        };
        if function.is_row(&name) && !self.rows {
            return Err(error(
                e,
                format!("{name} looks along the row: elementwise! has no rows; use #[kernel]"),
            ));
        }
        Ok(match function {
            Function::Op(op) => self.op_function(op, e)?,
            Function::Reduce(op) => {
                let [x] = self.scalars::<1>(e, e.args.iter())?;
                self.reduce(op, x, e)?
            }
            Function::Scan { op, exclusive, reverse } => {
                let [x] = self.scalars::<1>(e, e.args.iter())?;
                let x = self.emit.settle(x, e)?;
                let (arg, dtype) = (self.emit.strong(x), accumulated(x.ty));
                Scalar::node(dtype, self.emit.graph.add(Node::Scan { op, reverse, exclusive, arg }))
            }
            Function::Clamp => {
                let [x, low, high] = self.scalars::<3>(e, e.args.iter())?;
                let x = self.min_max(Op::Max, x, low, e)?;
                self.min_max(Op::Min, x, high, e)?
            }
            Function::Square => {
                let [x] = self.scalars::<1>(e, e.args.iter())?;
                self.emit.binary(Op::Mul, x, x, e)?
            }
            Function::Index => self.axis(e, Node::Index)?,
            Function::Len => self.axis(e, Node::Len)?,
            Function::Random => self.random(e)?,
            Function::Expansion(params) => self.expansion(&name, params, e)?,
        }
        .into())
    }

    fn op_function(&mut self, op: Op, e: &ExprCall) -> Result<Scalar> {
        let args = e.args.iter().map(|a| self.scalar(a)).collect::<Result<Vec<_>>>()?;
        if args.len() != op.arity() {
            let what = format!("{} takes {} arguments, {} are given", op.name(), op.arity(), args.len());
            return Err(error(e, what));
        }
        match op.signature() {
            Signature::Select => self.emit.select(args[0], args[1], args[2], e),
            Signature::Number if args.len() == 1 => {
                let x = self.emit.settle(args[0], e)?;
                match x.ty {
                    Type::Known(d) if d != Dtype::Bool => Ok(self.emit.number(op, d, &[x])),
                    ty => Err(error(e, format!("{} takes a number, not {}", op.name(), ty.name()))),
                }
            }
            Signature::Number => {
                let (a, b) = self.emit.unify(args[0], args[1], e)?;
                let (a, b) = (self.emit.settle(a, e)?, self.emit.settle(b, e)?);
                match a.ty {
                    Type::Known(d) if d != Dtype::Bool => Ok(self.emit.number(op, d, &[a, b])),
                    ty => Err(error(e, format!("{} takes numbers, not {}", op.name(), ty.name()))),
                }
            }
            signature => {
                for (x, at) in args.iter().zip(&e.args) {
                    self.must_be_float(*x, at)?;
                }
                let dtype = if signature == Signature::FloatTest { Dtype::Bool } else { Dtype::F32 };
                Ok(Scalar::node(dtype, self.emit.op(op, &args)))
            }
        }
    }

    /// A function that stands for an expression of the text language. Its parameters are floats but for seeds and what
    /// `row_any` and `row_all` look at.
    fn expansion(&mut self, name: &str, params: usize, e: &ExprCall) -> Result<Scalar> {
        if e.args.len() != params {
            return Err(error(e, format!("{name} takes {params} arguments, {} are given", e.args.len())));
        }
        let mut args = Vec::new();
        for (i, arg) in e.args.iter().enumerate() {
            let x = self.scalar(arg)?;
            let x = match (name, i) {
                ("uniform", 0) | ("dropout", 2) => self.seed(x, arg)?,
                ("row_any" | "row_all", _) => self.emit.coerce(x, Dtype::Bool, arg)?,
                _ => {
                    self.must_be_float(x, arg)?;
                    x
                }
            };
            args.push((format!("a{i}"), self.emit.strong(x)));
        }
        let names: Vec<(&str, zmlx_lang::Id)> = args.iter().map(|(n, id)| (n.as_str(), *id)).collect();
        let list = names.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(", ");
        let values = text::parse_expr_into(&mut self.emit.graph, &format!("{name}({list})"), &[], &names);
        let dtype = if matches!(name, "isfinite" | "row_any" | "row_all") { Dtype::Bool } else { Dtype::F32 };
        match values.as_deref() {
            Ok([id]) => Ok(Scalar::node(dtype, *id)),
            Ok(_) => Err(error(e, format!("{name} gives more than one value"))),
            Err(why) => Err(error(e, why)),
        }
    }

    fn reduce(&mut self, op: ReduceOp, x: Scalar, e: &ExprCall) -> Result<Scalar> {
        let x = self.emit.settle(x, e)?;
        let id = self.emit.strong(x);
        let dtype = match op {
            ReduceOp::ArgMax | ReduceOp::ArgMin => Dtype::U32,
            _ => accumulated(x.ty),
        };
        Ok(Scalar::node(dtype, self.emit.graph.reduce(op, id)))
    }

    /// `index(k)` and `len(k)`: axes count from the last, which is 0.
    fn axis(&mut self, e: &ExprCall, node: impl FnOnce(u32) -> Node) -> Result<Scalar> {
        let [k] = self.scalars::<1>(e, e.args.iter())?;
        let k = k.known_int().and_then(|k| u32::try_from(k).ok()).filter(|k| *k <= 31);
        let Some(k) = k else {
            return Err(error(&e.args, "an axis is a constant from 0, the last, to 31"));
        };
        Ok(Scalar::node(Dtype::I32, self.emit.graph.add(node(k))))
    }

    fn random(&mut self, e: &ExprCall) -> Result<Scalar> {
        let [seed] = self.scalars::<1>(e, e.args.iter())?;
        let seed = self.seed(seed, &e.args)?;
        let id = self.emit.strong(seed);
        Ok(Scalar::node(Dtype::U32, self.emit.graph.add(Node::Random(id))))
    }

    fn seed(&mut self, seed: Scalar, at: &dyn ToTokens) -> Result<Scalar> {
        match seed.ty {
            Type::Known(Dtype::U32 | Dtype::U64) => Ok(seed),
            Type::Integer => self.emit.coerce(seed, Dtype::U32, at),
            ty => Err(error(at, format!("a seed is a u32 or a u64, not {}", ty.name()))),
        }
    }
}

/// The type of a sum: narrow integers and booleans accumulate in 32 bits.
fn accumulated(ty: Type) -> Dtype {
    match ty {
        Type::BOOL | Type::Integer => Dtype::I32,
        Type::Known(d) => d.compute().storage(),
    }
}
