//! What both directions need to know of the kernel before they start.

use crate::error::{LangError, Result};
use crate::simplify::{self, kind::Kind};
use crate::{Dtype, Id, Kernel, Node, Op, Role};

/// How an output meets the domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Level {
    /// A value an element.
    Element,
    /// A value a row.
    Row,
    /// Added to places of an array with this many axes.
    Scatter(u32),
}

pub(super) struct Plan {
    /// The kernel, simplified unless it is strict.
    pub(super) kernel: Kernel,
    /// For each output its level; `None` for integers and booleans, which have no derivative.
    pub(super) outputs: Vec<Option<Level>>,
    /// For each node, whether it changes smoothly with one of the inputs asked for.
    pub(super) active: Vec<bool>,
    /// For each node, whether it depends on them in any way.
    depends: Vec<bool>,
    /// Which inputs are asked for and can have a derivative.
    pub(super) smooth_inputs: Vec<bool>,
}

impl Plan {
    pub(super) fn new(kernel: &Kernel, wrt: &[usize]) -> Result<Self> {
        kernel.validate()?;
        if let Some(n) = wrt.iter().find(|n| **n >= kernel.inputs.len()) {
            let what = format!("there is no input {n} to take the derivative with respect to");
            return Err(LangError::Kernel { kernel: kernel.name.clone(), what });
        }
        let float = |n: &usize| kernel.inputs[*n].dtype.is_none_or(Dtype::is_float);
        let wrt: Vec<usize> = wrt.iter().copied().filter(float).collect();
        let levels = levels(kernel);
        let kernel = simplify::with_floats(kernel, &wrt, false);
        let kinds = Kind::all(&kernel, &wrt);
        let smooth = |(o, level): (&crate::OutputDecl, Level)| {
            let discrete = o.dtype.is_some_and(|d| !d.is_float())
                || matches!(kinds[o.value.index()], Kind::Int | Kind::Bool);
            (!discrete).then_some(level)
        };
        let outputs = kernel.outputs.iter().zip(levels).map(smooth).collect();
        let mut smooth_inputs = vec![false; kernel.inputs.len()];
        wrt.iter().for_each(|n| smooth_inputs[*n] = true);
        let (active, depends) = activity(&kernel, &kinds, &smooth_inputs);
        Ok(Self { kernel, outputs, active, depends, smooth_inputs })
    }

    /// Fails for a float made of the bits of something that depends on the inputs: it does change with them, but not
    /// in a way that can be written down.
    pub(super) fn check_bits(&self, id: Id) -> Result<()> {
        match self.kernel.graph.node(id) {
            Node::Bitcast(Dtype::F32, x) if self.depends[x.index()] => Err(LangError::NoDerivative {
                kernel: self.kernel.name.clone(),
                input: self.smooth_names(),
                why: "a float is made of computed bits (bitcast_f32); give the gradient yourself".to_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn smooth_names(&self) -> String {
        let names = self.kernel.inputs.iter().zip(&self.smooth_inputs).filter(|(_, s)| **s);
        names.map(|(i, _)| i.name.as_str()).collect::<Vec<_>>().join(", ")
    }
}

fn levels(kernel: &Kernel) -> Vec<Level> {
    let (uniform, has_rows) = (kernel.row_uniform(), kernel.has_rows());
    let level = |o: &crate::OutputDecl| match &o.scatter {
        Some(s) => Level::Scatter(s.at.len() as u32),
        None if has_rows && uniform[o.value.index()] => Level::Row,
        None => Level::Element,
    };
    kernel.outputs.iter().map(level).collect()
}

fn activity(kernel: &Kernel, kinds: &[Kind], smooth: &[bool]) -> (Vec<bool>, Vec<bool>) {
    let nodes = kernel.graph.nodes();
    let (mut active, mut depends) = (Vec::with_capacity(nodes.len()), Vec::with_capacity(nodes.len()));
    for (node, kind) in nodes.iter().zip(kinds) {
        let any = |of: &[bool]| node.args().iter().any(|a| of[a.index()]);
        let own = match node {
            Node::Input(n) | Node::Load { input: n, .. } => smooth[*n as usize],
            _ => false,
        };
        let through = match node {
            // Coordinates and seeds are integers; a bitcast is for `check_bits`.
            Node::Load { .. } | Node::Random(_) => false,
            Node::Bitcast(..) => any(&depends) && *kind == Kind::Float,
            Node::Op(op, _) => any(&active) && !flat(*op),
            _ => any(&active),
        };
        active.push(!matches!(kind, Kind::Int | Kind::Bool) && (own || through));
        depends.push(own || any(&depends));
    }
    (active, depends)
}

/// Operations whose derivative is 0 wherever there is one.
fn flat(op: Op) -> bool {
    matches!(op, Op::Sign | Op::Floor | Op::Ceil | Op::Trunc | Op::Round | Op::FloorDiv)
}

impl Level {
    /// How a cotangent, a tangent or a saved value of an output at this level comes in.
    pub(super) fn role(self) -> Role {
        match self {
            Self::Element => Role::Element,
            Self::Row => Role::Row,
            Self::Scatter(rank) => Role::Indexed(rank),
        }
    }
}
