//! What was written, before names are looked up.

use crate::graph::Bounds;
use crate::{Const, Dtype, Op, Role};

/// A byte range of the text.
pub(super) type Span = (usize, usize);

/// An expression by its place in [`Ast::exprs`].
pub(super) type ExprId = usize;

/// A word with its place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Word<'s> {
    pub text: &'s str,
    pub span: Span,
}

/// An expression. Operands always come earlier in the list, so that nothing needs recursion over it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ExprKind<'s> {
    /// A variable.
    Name(&'s str),
    /// A number or boolean. Integers are wider than any type until the sign is known.
    Int(i128),
    Float(f64),
    Bool(bool),
    /// An operator.
    Op(Op, Vec<ExprId>),
    /// `name(args)`.
    Call(Word<'s>, Vec<ExprId>),
    /// `name[at; bounds]`.
    Index(Word<'s>, Vec<ExprId>, Bounds),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Expr<'s> {
    pub kind: ExprKind<'s>,
    pub span: Span,
}

/// `let name = value;`
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Let<'s> {
    pub name: Word<'s>,
    pub value: ExprId,
}

/// `name[at; bounds] += value like input`
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ScatterAst<'s> {
    pub output: Word<'s>,
    pub at: Vec<ExprId>,
    pub bounds: Bounds,
    pub like: Option<Word<'s>>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct ValueAst<'s> {
    pub value: ExprId,
    pub scatter: Option<ScatterAst<'s>>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Body<'s> {
    pub exprs: Vec<Expr<'s>>,
    pub lets: Vec<Let<'s>>,
    pub values: Vec<ValueAst<'s>>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Param<'s> {
    pub name: Word<'s>,
    pub role: Role,
    pub dtype: Option<Dtype>,
}

/// An output of the header.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Out<'s> {
    pub name: Word<'s>,
    pub dtype: Option<Dtype>,
    pub keep: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Header<'s> {
    pub strict: bool,
    pub name: Word<'s>,
    pub params: Vec<Param<'s>>,
    pub outs: Option<Vec<Out<'s>>>,
}

impl ExprKind<'_> {
    /// The literal it is, when it is one that fits.
    pub fn literal(&self) -> Option<Const> {
        match *self {
            Self::Int(v) => i64::try_from(v).ok().map(Const::Int),
            Self::Float(v) => Some(Const::float(v)),
            Self::Bool(v) => Some(Const::Bool(v)),
            _ => None,
        }
    }
}
