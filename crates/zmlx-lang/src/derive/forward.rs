//! Forward mode: from changes of inputs to changes of outputs.

use super::build::Build;
use super::finish::{self, Derived, Extra};
use super::local::local;
use super::plan::{Level, Plan};
use super::rows::{self, Scan};
use crate::error::Result;
use crate::{Id, Kernel, Node, Op, OutputDecl, ReduceOp};

/// A kernel that gives the changes of outputs for changes of inputs.
///
/// Its inputs are the primal inputs it needs, then the tangents: of the primal input's shape, except that a scalar's
/// tangent may be any value a row. It must be run over the forward call's domain, given explicitly.
#[derive(Debug, Clone, PartialEq)]
pub struct Jvp {
    /// The kernel. Without outputs when all changes are 0 everywhere; it can't run then.
    pub kernel: Kernel,
    /// Which inputs of the forward kernel it takes first, in this order.
    pub primals: Vec<usize>,
    /// The tangents of which inputs it takes next.
    pub tangents: Vec<usize>,
    /// For each output of the forward kernel, the output that is its tangent, of the same shape; `None` when it does not
    /// change.
    pub outputs: Vec<Option<usize>>,
}

/// Tangents of all outputs, given tangents of the inputs `wrt`.
///
/// # Errors
/// [`crate::LangError::Kernel`] when an input is not there; [`crate::LangError::NoDerivative`] for a float made of
/// computed bits.
pub fn jvp(kernel: &Kernel, wrt: &[usize]) -> Result<Jvp> {
    let plan = Plan::new(kernel, wrt)?;
    let mut b = Build::new(&plan.kernel);
    let extra = Extra::tangents(&mut b, &plan);
    let mut forward =
        Forward { plan: &plan, b, extra: &extra, changes: Vec::new(), still: Vec::new(), symbol: None };
    forward.sweep()?;
    while forward.find_still()? {}
    let (mut numbers, mut outputs) = (Vec::new(), Vec::new());
    for j in 0..plan.kernel.outputs.len() {
        let output = forward.output(j);
        numbers.push(output.is_some().then_some(outputs.len()));
        outputs.extend(output);
    }
    let finish::Finished { kernel, primals, given: tangents, .. } =
        finish::kernel(&plan, forward.b, outputs, "jvp", &extra, &[]);
    Ok(Jvp { kernel, primals, tangents, outputs: numbers })
}

struct Forward<'a> {
    plan: &'a Plan,
    b: Build,
    extra: &'a Extra,
    /// For each node its change; `None` is 0.
    changes: Vec<Option<Id>>,
    /// Nodes whose change no output feels.
    still: Vec<Id>,
    /// A node whose change is a symbol instead, while asking whether outputs feel it.
    symbol: Option<(Id, Id)>,
}

/// Values that [`Forward::find_still`] looks at.
const LOOKED_AT: usize = 8;

impl Forward<'_> {
    /// Looks for an extreme of the row that outputs do not depend on in sum, though they are made of it: the maximum
    /// that softmax subtracts. Its change is made a symbol, which then cancels from all changes of outputs.
    fn find_still(&mut self) -> Result<bool> {
        let kernel = &self.plan.kernel;
        if kernel.strict {
            return Ok(false);
        }
        let nodes = kernel.graph.nodes();
        let extreme = |n: &Node| matches!(n, Node::Reduce(ReduceOp::Max | ReduceOp::Min, _));
        let candidate = |y: &usize| match &nodes[*y] {
            Node::Op(Op::Select, args) => args.iter().any(|a| extreme(&nodes[a.index()])),
            node => extreme(node),
        };
        let felt = |y: &usize| self.changes[*y].is_some() && self.b.is_uniform(Id(*y as u32));
        let candidates: Vec<usize> =
            (0..nodes.len()).rev().filter(candidate).filter(felt).take(LOOKED_AT).collect();
        for y in candidates {
            let y = Id(y as u32);
            let symbol = finish::row_symbol(&mut self.b);
            self.symbol = Some((y, symbol));
            self.sweep()?;
            let outputs = kernel.outputs.iter().filter_map(|o| self.changes[o.value.index()]);
            let independent = outputs.into_iter().all(|o| self.b.independent(o, symbol));
            self.symbol = None;
            if independent {
                self.still.push(y);
            }
            self.sweep()?;
            if independent {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn sweep(&mut self) -> Result<()> {
        self.changes.clear();
        for i in 0..self.plan.kernel.graph.nodes().len() {
            let y = Id(i as u32);
            let change = match self.symbol {
                Some((at, symbol)) if at == y => Some(symbol),
                _ if self.plan.active[i] && !self.still.contains(&y) => {
                    self.plan.check_bits(y)?;
                    self.node(y)
                }
                _ => None,
            };
            self.changes.push(change);
        }
        Ok(())
    }

    fn node(&mut self, y: Id) -> Option<Id> {
        let change = |s: &Self, x: Id| s.changes[x.index()];
        match self.plan.kernel.graph.node(y) {
            Node::Input(n) => Some(self.b.add(Node::Input(self.extra.given[*n as usize]))),
            Node::Load { input, at, bounds } => {
                let input = self.extra.given[*input as usize];
                Some(self.b.add(Node::Load { input, at: at.clone(), bounds: *bounds }))
            }
            Node::Op(op, args) => self.op(*op, args, y),
            Node::Cast(_, x) => change(self, *x),
            Node::Reduce(op, x) => {
                let t = change(self, *x)?;
                rows::reduce_forward(&mut self.b, *op, *x, y, t)
            }
            Node::Scan { op, reverse, exclusive, arg } => {
                let t = change(self, *arg)?;
                let scan = Scan { op: *op, reverse: *reverse, exclusive: *exclusive, x: *arg, y };
                Some(rows::scan_forward(&mut self.b, scan, t))
            }
            Node::Const(_) | Node::Index(_) | Node::Len(_) | Node::Random(_) | Node::Bitcast(..) => None,
        }
    }

    fn op(&mut self, op: Op, args: &[Id], y: Id) -> Option<Id> {
        let mut terms = Vec::new();
        for (k, arg) in args.iter().enumerate() {
            if let Some(t) = self.changes[arg.index()]
                && let Some(slope) = local(&mut self.b, op, args, y, k)
            {
                terms.push(slope.apply(&mut self.b, t));
            }
        }
        let sum = self.b.sum(&terms)?;
        (terms.len() < 2 || !self.b.cancels(sum)).then_some(sum)
    }

    fn output(&mut self, j: usize) -> Option<Derived> {
        let decl = &self.plan.kernel.outputs[j];
        let level: Level = self.plan.outputs[j]?;
        let value = self.changes[decl.value.index()]?;
        let name = format!("t_{}", decl.name);
        Some((OutputDecl { name, value, ..decl.clone() }, level))
    }
}
