//! Operations on literals.

use super::Rewrite;
use crate::eval::Rounding;
use crate::eval::number::{self, Num};
use crate::{Const, Dtype, Id, Node, Op, Signature, Ty};

impl Rewrite {
    pub(super) fn folded(&mut self, node: &Node) -> Option<Id> {
        let value = |id: &Id| match self.graph.node(*id) {
            Node::Const(c) => Some(*c),
            _ => None,
        };
        match node {
            Node::Op(Op::Select, _) => None,
            Node::Op(op, args) => {
                let args: Vec<Const> = args.iter().map(value).collect::<Option<_>>()?;
                let folded = self.operation(*op, &args)?;
                Some(self.add(Node::Const(folded)))
            }
            // A literal float and a converted one are the same to everything that takes them; integers are not.
            Node::Cast(dtype, x) if dtype.is_float() => {
                let v = number::round_float(value(x)?.as_f64(), *dtype);
                Some(self.float(v))
            }
            _ => None,
        }
    }

    fn operation(&self, op: Op, args: &[Const]) -> Option<Const> {
        let is = |f: fn(&Const) -> bool| args.iter().all(f);
        if is(|c| matches!(c, Const::Bool(_))) {
            let logic = matches!(op.signature(), Signature::Logic) || matches!(op, Op::Eq | Op::Ne);
            let args: Vec<Num> = args.iter().map(|c| Num::I(c.as_f64() as i128)).collect();
            return logic.then(|| truth(number::apply(op, Ty::Bool, &args, Rounding::Exact)));
        }
        if args.iter().any(|c| matches!(c, Const::Bool(_))) {
            return None;
        }
        let float = matches!(op.signature(), Signature::Float | Signature::FloatTest);
        if is(|c| matches!(c, Const::Int(_))) && !float {
            return integer(op, args);
        }
        if self.strict && !correctly_rounded(op) {
            return None;
        }
        let rounding = if self.strict { Rounding::EachOperation } else { Rounding::Exact };
        let round = |v: f64| if self.strict { number::round_float(v, Dtype::F32) } else { v };
        let args: Vec<Num> = args.iter().map(|c| Num::F(round(c.as_f64()))).collect();
        Some(match (op.signature(), number::apply(op, Ty::F32, &args, rounding)) {
            (Signature::Compare | Signature::FloatTest, v) => truth(v),
            (Signature::Float | Signature::Number, Num::F(v)) => Const::float(v),
            _ => return None,
        })
    }
}

fn truth(v: Num) -> Const {
    Const::Bool(v != Num::I(0))
}

/// Small integers whose result is small are the same in every integer type a literal can take.
fn integer(op: Op, args: &[Const]) -> Option<Const> {
    use Op::{Abs, Add, Mul, Neg, Sub};
    let args: Vec<Num> =
        args.iter().map(|c| if let Const::Int(v) = c { Num::I((*v).into()) } else { Num::I(0) }).collect();
    let small = |v: Num| matches!(v, Num::I(v) if i32::try_from(v).is_ok());
    if !args.iter().all(|v| small(*v)) {
        return None;
    }
    let result = number::apply(op, Ty::I64, &args, Rounding::Exact);
    match (op.signature(), op, result) {
        (Signature::Compare, ..) => Some(truth(result)),
        (_, Abs | Add | Mul | Neg | Sub, Num::I(v)) if small(result) => Some(Const::Int(v as i64)),
        _ => None,
    }
}

/// Operations that every backend rounds correctly.
fn correctly_rounded(op: Op) -> bool {
    use Op::*;
    matches!(
        op,
        Neg | Abs | Sign | Sqrt | Floor | Ceil | Trunc | Round | Add | Sub | Mul | Div | Min | Max | Fma
    ) || matches!(op.signature(), Signature::Compare | Signature::FloatTest)
}
