//! What can be said of types before the inputs' dtypes are known.

use crate::{Const, Dtype, Kernel, Node, Op, ReduceOp, Role, Signature};

/// The kind of a value, as far as the kernel decides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Computed in `f32`.
    Float,
    /// Some integer type.
    Int,
    /// A boolean.
    Bool,
    /// As the inputs have it.
    Open,
}

impl Kind {
    /// Of a dtype.
    pub(crate) fn of(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Bool => Self::Bool,
            d if d.is_float() => Self::Float,
            _ => Self::Int,
        }
    }

    /// Of each input; those in `floats` are known to be floats.
    pub(crate) fn inputs(kernel: &Kernel, floats: &[usize]) -> Vec<Self> {
        let one = |(n, input): (usize, &crate::InputDecl)| match input.dtype {
            Some(d) => Self::of(d),
            None if floats.contains(&n) || matches!(input.role, Role::Scalar(_)) => Self::Float,
            None => Self::Open,
        };
        kernel.inputs.iter().enumerate().map(one).collect()
    }

    /// Of a node, given its inputs' and its operands'.
    pub(crate) fn node(node: &Node, inputs: &[Self], args: &[Self]) -> Self {
        match node {
            Node::Input(n) | Node::Load { input: n, .. } => inputs[*n as usize],
            Node::Const(Const::Float(_)) => Self::Float,
            Node::Const(Const::Bool(_)) => Self::Bool,
            Node::Const(Const::Int(_)) | Node::Index(_) | Node::Len(_) | Node::Random(_) => Self::Int,
            Node::Cast(d, _) | Node::Bitcast(d, _) => Self::of(*d),
            Node::Reduce(ReduceOp::ArgMax | ReduceOp::ArgMin, _) => Self::Int,
            Node::Reduce(..) | Node::Scan { .. } => args[0].number(),
            Node::Op(op, _) => Self::op(*op, args),
        }
    }

    fn number(self) -> Self {
        if self == Self::Bool { Self::Int } else { self }
    }

    fn op(op: Op, args: &[Self]) -> Self {
        let meet = |args: &[Self]| {
            let any = |k: Self| args.contains(&k);
            match () {
                () if any(Self::Float) => Self::Float,
                () if any(Self::Open) => Self::Open,
                () if any(Self::Int) => Self::Int,
                () => Self::Bool,
            }
        };
        match op.signature() {
            Signature::Float => Self::Float,
            Signature::Number => meet(args).number(),
            Signature::Integer => meet(args),
            Signature::Compare | Signature::FloatTest | Signature::Logic => Self::Bool,
            Signature::Select => meet(&args[1..]),
        }
    }

    /// Of all nodes of a kernel.
    pub(crate) fn all(kernel: &Kernel, floats: &[usize]) -> Vec<Self> {
        let inputs = Self::inputs(kernel, floats);
        let mut kinds: Vec<Self> = Vec::with_capacity(kernel.graph.nodes().len());
        for node in kernel.graph.nodes() {
            let args: Vec<Self> = node.args().iter().map(|a| kinds[a.index()]).collect();
            kinds.push(Self::node(node, &inputs, &args));
        }
        kinds
    }
}
