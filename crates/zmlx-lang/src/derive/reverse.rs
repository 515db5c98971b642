//! Reverse mode: from cotangents of outputs to gradients of inputs.

use super::build::Build;
use super::finish::{self, Derived, Extra};
use super::local::local;
use super::plan::{Level, Plan};
use super::rows::{self, Scan};
use crate::error::Result;
use crate::{Bounds, Const, Dtype, Id, Kernel, Node, Op, OutputDecl, Role, Scatter};

/// A kernel that gives gradients.
///
/// Its inputs are the primal inputs it needs, then the cotangents, then saved outputs. It must be run over the forward
/// call's domain, given explicitly: the inputs it has need not span it.
/// * A cotangent or a saved value of an output that is a value a row comes with a last axis of 1, also when the output
///   itself has dropped it; that of a scattered output is read at the scattered places.
/// * The gradient of an element input has the domain's shape: sum it over the axes the input was broadcast along. That
///   of a row input or a scalar has 1 for the last axis and the domain's other axes: likewise. That of an indexed input
///   is scattered in the input's shape, in `f32`.
#[derive(Debug, Clone, PartialEq)]
pub struct Vjp {
    /// The kernel. Without outputs when all gradients are 0 everywhere; it can't run then.
    pub kernel: Kernel,
    /// Which inputs of the forward kernel it takes first, in this order.
    pub primals: Vec<usize>,
    /// The cotangents of which outputs it takes next.
    pub cotangents: Vec<usize>,
    /// Which outputs of the forward kernel it takes last.
    pub saved: Vec<usize>,
    /// For each input asked for, the outputs whose sum is its gradient: one; or several for an indexed input that is
    /// loaded from at several places; none when it is 0 everywhere (an integer, or only floors and comparisons).
    pub gradients: Vec<Vec<usize>>,
}

/// Choices for [`vjp`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VjpOptions {
    /// For each output, whether its value may be read back instead of computed again. It is when computing it costs
    /// more than reading memory does. Missing ones may not.
    pub allow_saved: Vec<bool>,
}

/// Contributions to a value's adjoint.
#[derive(Debug, Clone, Default)]
struct Adjoint {
    /// One an element; for a value of the row they are summed.
    element: Vec<Id>,
    /// One a row, for values that are the same along it.
    row: Vec<Id>,
}

/// An addition to the gradient of an indexed input.
struct Scattered {
    input: u32,
    at: Vec<Id>,
    bounds: Bounds,
    value: Id,
}

/// Gradients with respect to the inputs `wrt`, given cotangents of the outputs.
///
/// # Errors
/// [`crate::LangError::Kernel`] when an input is not there; [`crate::LangError::NoDerivative`] for a float made of
/// computed bits.
pub fn vjp(kernel: &Kernel, wrt: &[usize], options: &VjpOptions) -> Result<Vjp> {
    let plan = Plan::new(kernel, wrt)?;
    let mut b = Build::new(&plan.kernel);
    let extra = Extra::declare(&mut b, &plan);
    let mut reverse = Reverse {
        plan: &plan,
        b,
        adjoints: vec![Adjoint::default(); plan.kernel.graph.nodes().len()],
        scattered: Vec::new(),
        inputs: vec![None; plan.kernel.inputs.len()],
    };
    reverse.seed(&extra);
    reverse.sweep()?;
    let mut gradients = Vec::new();
    let mut outputs = Vec::new();
    for &n in wrt {
        let from = outputs.len();
        reverse.gradient(n, &mut outputs);
        gradients.push((from..outputs.len()).collect());
    }
    let derived = finish::kernel(&plan, reverse.b, outputs, "vjp", &extra, &options.allow_saved);
    let finish::Finished { kernel, primals, given: cotangents, saved } = derived;
    Ok(Vjp { kernel, primals, cotangents, saved, gradients })
}

struct Reverse<'a> {
    plan: &'a Plan,
    b: Build,
    adjoints: Vec<Adjoint>,
    scattered: Vec<Scattered>,
    /// For each input that is read in place, its gradient.
    inputs: Vec<Option<Id>>,
}

impl Reverse<'_> {
    fn seed(&mut self, extra: &Extra) {
        for (j, output) in self.plan.kernel.outputs.iter().enumerate() {
            let Some(level) = self.plan.outputs[j] else { continue };
            let input = extra.given[j];
            let g = match &output.scatter {
                Some(s) => self.b.add(Node::Load { input, at: s.at.clone(), bounds: s.bounds }),
                None => self.b.add(Node::Input(input)),
            };
            self.give(output.value, g, level == Level::Row);
        }
    }

    /// Adds to a value's adjoint. `row`: once for the row, from a use that is the same along it.
    fn give(&mut self, to: Id, g: Id, row: bool) {
        if self.plan.active[to.index()] {
            let adjoint = &mut self.adjoints[to.index()];
            if row { adjoint.row.push(g) } else { adjoint.element.push(g) }
        }
    }

    fn total(&mut self, id: Id) -> Option<Id> {
        let Adjoint { element, mut row } = std::mem::take(&mut self.adjoints[id.index()]);
        let terms = element.len() + row.len();
        let mut total = self.b.sum(&element);
        if self.b.is_uniform(id) {
            let summed = total.map(|t| self.b.row_sum(t));
            row.extend(summed);
            total = self.b.sum(&row);
        }
        total.filter(|t| terms < 2 && !self.b.is_uniform(id) || !self.b.cancels(*t))
    }

    fn sweep(&mut self) -> Result<()> {
        for i in (0..self.plan.kernel.graph.nodes().len()).rev() {
            let y = Id(i as u32);
            if let Some(g) = self.total(y) {
                self.plan.check_bits(y)?;
                self.node(y, g);
            }
        }
        Ok(())
    }

    fn node(&mut self, y: Id, g: Id) {
        let row = self.b.is_uniform(y);
        match self.plan.kernel.graph.node(y) {
            Node::Input(n) => self.inputs[*n as usize] = Some(g),
            Node::Op(op, args) => self.op(*op, args, y, g),
            Node::Cast(_, x) => self.give(*x, g, row),
            Node::Reduce(op, x) => {
                if let Some(g) = rows::reduce_reverse(&mut self.b, *op, *x, y, g) {
                    self.give(*x, g, false);
                }
            }
            Node::Scan { op, reverse, exclusive, arg } => {
                let scan = Scan { op: *op, reverse: *reverse, exclusive: *exclusive, x: *arg, y };
                let g = rows::scan_reverse(&mut self.b, scan, g);
                self.give(*arg, g, false);
            }
            Node::Load { input, at, bounds } => self.load(*input, at, *bounds, y, g),
            Node::Const(_) | Node::Index(_) | Node::Len(_) | Node::Random(_) | Node::Bitcast(..) => {}
        }
    }

    fn op(&mut self, op: Op, args: &[Id], y: Id, g: Id) {
        let row = self.b.is_uniform(y);
        if op == Op::Mul && args[0] == args[1] {
            let g = self.b.times_const(2.0, g);
            let g = self.b.times(g, args[0]);
            return self.give(args[0], g, row);
        }
        for (k, &arg) in args.iter().enumerate() {
            if !self.plan.active[arg.index()] {
                continue;
            }
            if let Some(slope) = local(&mut self.b, op, args, y, k) {
                let g = slope.apply(&mut self.b, g);
                self.give(arg, g, row);
            }
        }
    }

    /// Scatters to where it was loaded from. A load that is the same along the row counts once: other elements of the
    /// row add nothing, nowhere if that can be said.
    fn load(&mut self, input: u32, at: &[Id], bounds: Bounds, y: Id, g: Id) {
        let (mut at, mut bounds, mut value) = (at.to_vec(), bounds, g);
        if self.b.is_uniform(y) {
            let place = self.b.add(Node::Index(0));
            let zero = self.b.add(Node::Const(Const::Int(0)));
            let first = self.b.op(Op::Eq, &[place, zero]);
            match at.first_mut() {
                Some(outer) if bounds != Bounds::Clamp => {
                    let nowhere = self.b.add(Node::Const(Const::Int(-1)));
                    *outer = self.b.op(Op::Select, &[first, *outer, nowhere]);
                    bounds = Bounds::Zero;
                }
                _ => value = self.b.only(first, g),
            }
        }
        self.scattered.push(Scattered { input, at, bounds, value });
    }

    fn gradient(&mut self, n: usize, outputs: &mut Vec<Derived>) {
        let decl = &self.plan.kernel.inputs[n];
        if !self.plan.smooth_inputs[n] {
            return;
        }
        let name = format!("d_{}", decl.name);
        let output =
            |value, dtype, scatter| OutputDecl { name: name.clone(), value, dtype, keep_dims: true, scatter };
        if let Role::Indexed(rank) = decl.role {
            for s in self.scattered.iter().filter(|s| s.input as usize == n) {
                let scatter = Scatter { at: s.at.clone(), bounds: s.bounds, like: Some(n as u32) };
                outputs.push((output(s.value, Some(Dtype::F32), Some(scatter)), Level::Scatter(rank)));
            }
        } else if let Some(value) = self.inputs[n] {
            let scalar = matches!(decl.role, Role::Scalar(_)).then_some(Dtype::F32);
            let level = if decl.role == Role::Element { Level::Element } else { Level::Row };
            outputs.push((output(value, decl.dtype.or(scalar), None), level));
        }
    }
}
