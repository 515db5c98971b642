//! Rewriting kernels into simpler ones that mean the same.
//!
//! Some rules hold for every value, infinities, NaN and the sign of zero included; they serve every kernel. The others
//! hold for real numbers and make a kernel faster or more accurate (`log(1 + x)` becomes `log1p(x)`); a strict kernel
//! is left alone by those. Constants of a strict kernel are folded only where the result is what the device would
//! get: the correctly rounded one.

mod fold;
pub(crate) mod kind;
pub(crate) mod normal;
mod product;
mod real;
mod safe;

use crate::{Dtype, Graph, Id, Kernel, Node, Op, OutputDecl};
use kind::Kind;

/// A kernel that means the same with fewer or cheaper operations, without nodes that nothing needs. Simplifying again
/// changes nothing. Outputs keep their shapes: whether a value is one a row or one an element stays.
pub fn simplify(kernel: &Kernel) -> Kernel {
    with_floats(kernel, &[], true)
}

/// Passes at most; each pass feeds results to rules that look at operands, so this is a depth of rewriting.
const PASSES: usize = 12;

/// [`simplify`] where these inputs are known to be floats though their dtype is open. `powers`: whether powers become
/// products, which derivatives are better taken before.
pub(crate) fn with_floats(kernel: &Kernel, floats: &[usize], powers: bool) -> Kernel {
    let mut now = prune(kernel);
    for _ in 0..PASSES {
        let next = prune(&Rewrite::pass(&now, floats, powers));
        if next == now {
            break;
        }
        now = next;
    }
    if shape_class(&now) == shape_class(kernel) { now } else { prune(kernel) }
}

/// What decides the outputs' shapes.
fn shape_class(kernel: &Kernel) -> (bool, Vec<bool>) {
    let (uniform, has_rows) = (kernel.row_uniform(), kernel.has_rows());
    (has_rows, kernel.outputs.iter().map(|o| has_rows && uniform[o.value.index()]).collect())
}

fn prune(kernel: &Kernel) -> Kernel {
    let mut graph = Graph::default();
    let roots = graph.import(&kernel.graph, &kernel.roots(), |_, _, _| None);
    let mut kernel = Kernel { graph, ..kernel.clone() };
    set_roots(&mut kernel.outputs, &roots);
    kernel
}

/// Puts new values into outputs, in the order of [`Kernel::roots`].
pub(crate) fn set_roots(outputs: &mut [OutputDecl], roots: &[Id]) {
    let mut roots = roots.iter().copied();
    for o in outputs {
        let places = o.scatter.iter_mut().flat_map(|s| &mut s.at);
        for (place, root) in std::iter::once(&mut o.value).chain(places).zip(&mut roots) {
            *place = root;
        }
    }
}

/// One pass over a kernel.
struct Rewrite {
    graph: Graph,
    strict: bool,
    powers: bool,
    inputs: Vec<Kind>,
    /// For each node of the new graph.
    kinds: Vec<Kind>,
    /// For each node of the new graph, how many nodes and outputs used what it stands for.
    uses: Vec<u32>,
}

impl Rewrite {
    fn pass(kernel: &Kernel, floats: &[usize], powers: bool) -> Kernel {
        let mut uses = vec![0u32; kernel.graph.nodes().len()];
        let roots = kernel.roots();
        let args = kernel.graph.nodes().iter().flat_map(|n| n.args());
        args.chain(&roots).for_each(|a| uses[a.index()] += 1);
        let mut r = Self {
            graph: Graph::default(),
            strict: kernel.strict,
            powers,
            inputs: Kind::inputs(kernel, floats),
            kinds: Vec::new(),
            uses: Vec::new(),
        };
        let mut new: Vec<Id> = Vec::with_capacity(uses.len());
        for (node, uses) in kernel.graph.nodes().iter().zip(uses) {
            let moved = node.map_args(|a| new[a.index()]);
            let id = r.rewrite(moved);
            r.uses[id.index()] += uses;
            new.push(id);
        }
        let roots: Vec<Id> = roots.iter().map(|x| new[x.index()]).collect();
        let mut kernel = Kernel { graph: r.graph, ..kernel.clone() };
        set_roots(&mut kernel.outputs, &roots);
        kernel
    }

    fn rewrite(&mut self, node: Node) -> Id {
        let node = self.ordered(node);
        let known = self.folded(&node).or_else(|| self.safe(&node));
        let known = known.or_else(|| if self.strict { None } else { self.real(&node) });
        known.unwrap_or_else(|| self.add(node))
    }

    /// Operands of commutative operations in one order, literals last, so that equal ones meet.
    fn ordered(&self, node: Node) -> Node {
        use Op::{Add, And, BitAnd, BitOr, BitXor, Eq, Mul, Ne, Or};
        match node {
            Node::Op(op @ (Add | Mul | And | Or | Eq | Ne | BitAnd | BitOr | BitXor), mut args) => {
                args.sort_by_key(|a| (matches!(self.graph.node(*a), Node::Const(_)), *a));
                Node::Op(op, args)
            }
            node => node,
        }
    }

    fn add(&mut self, node: Node) -> Id {
        let args: Vec<Kind> = node.args().iter().map(|a| self.kinds[a.index()]).collect();
        let kind = Kind::node(&node, &self.inputs, &args);
        let id = self.graph.add(node);
        if id.index() == self.kinds.len() {
            self.kinds.push(kind);
            self.uses.push(0);
        }
        id
    }

    fn op(&mut self, op: Op, args: &[Id]) -> Id {
        let node = self.ordered(Node::Op(op, args.to_vec()));
        self.add(node)
    }

    fn float(&mut self, v: f64) -> Id {
        self.add(Node::Const(crate::Const::float(v)))
    }

    fn kind(&self, id: Id) -> Kind {
        self.kinds[id.index()]
    }

    fn is_float(&self, id: Id) -> bool {
        self.kind(id) == Kind::Float
    }

    /// The value as a float, as an operation with a float literal would take it.
    fn as_float(&mut self, id: Id) -> Id {
        match self.graph.node(id) {
            _ if self.is_float(id) => id,
            Node::Const(c) => {
                let v = c.as_f64();
                self.float(v)
            }
            _ => self.add(Node::Cast(Dtype::F32, id)),
        }
    }

    /// The operands of a node that is this operation.
    fn args(&self, id: Id, op: Op) -> Option<&[Id]> {
        match self.graph.node(id) {
            Node::Op(o, args) if *o == op => Some(args),
            _ => None,
        }
    }

    /// The operand of a node that is this operation of one operand.
    fn arg(&self, id: Id, op: Op) -> Option<Id> {
        self.args(id, op).map(|a| a[0])
    }

    /// The value of a number literal.
    fn literal(&self, id: Id) -> Option<f64> {
        match self.graph.node(id) {
            Node::Const(c @ (crate::Const::Float(_) | crate::Const::Int(_))) => Some(c.as_f64()),
            _ => None,
        }
    }

    fn boolean(&self, id: Id) -> Option<bool> {
        match self.graph.node(id) {
            Node::Const(crate::Const::Bool(b)) => Some(*b),
            _ => None,
        }
    }
}
