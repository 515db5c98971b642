//! A graph that grows by derivatives, with constructors that leave out what adds nothing.

use crate::simplify::normal::{self, Normal};
use crate::{Const, Dtype, Graph, Id, InputDecl, Kernel, Node, Op, ReduceOp, Role, ScanOp};

/// All values built here are floats or conditions, so multiplying by 1 may be left out without a change of type.
pub(super) struct Build {
    pub(super) graph: Graph,
    pub(super) inputs: Vec<InputDecl>,
    /// For each node, whether it is the same along the row.
    pub(super) uniform: Vec<bool>,
    /// Whether sums may be rearranged.
    relaxed: bool,
    /// Nodes of the forward kernel.
    forward: usize,
    normal: Normal,
}

impl Build {
    /// Starts from a kernel's graph; its values keep their ids.
    pub(super) fn new(kernel: &Kernel) -> Self {
        Self {
            graph: kernel.graph.clone(),
            inputs: kernel.inputs.clone(),
            uniform: kernel.row_uniform(),
            relaxed: !kernel.strict,
            forward: kernel.graph.nodes().len(),
            normal: Normal::default(),
        }
    }

    pub(super) fn add(&mut self, node: Node) -> Id {
        let id = self.graph.add(node);
        self.refresh();
        id
    }

    /// Catches up with nodes that were added to the graph directly.
    pub(super) fn refresh(&mut self) {
        for i in self.uniform.len()..self.graph.nodes().len() {
            let uniform = match &self.graph.nodes()[i] {
                Node::Input(n) => !matches!(self.inputs[*n as usize].role, Role::Element),
                Node::Index(axis) => *axis != 0,
                Node::Random(_) | Node::Scan { .. } => false,
                Node::Reduce(..) => true,
                node => node.args().iter().all(|a| self.uniform[a.index()]),
            };
            self.uniform.push(uniform);
        }
    }

    pub(super) fn is_uniform(&self, id: Id) -> bool {
        self.uniform[id.index()]
    }

    /// The value of a literal.
    pub(super) fn literal(&self, id: Id) -> Option<f64> {
        match self.graph.node(id) {
            Node::Const(c @ (Const::Float(_) | Const::Int(_))) => Some(c.as_f64()),
            _ => None,
        }
    }

    pub(super) fn c(&mut self, v: f64) -> Id {
        self.add(Node::Const(Const::float(v)))
    }

    pub(super) fn op(&mut self, op: Op, args: &[Id]) -> Id {
        self.add(Node::Op(op, args.to_vec()))
    }

    fn negated(&self, id: Id) -> Option<Id> {
        match self.graph.node(id) {
            Node::Op(Op::Neg, a) => Some(a[0]),
            _ => None,
        }
    }

    pub(super) fn neg(&mut self, x: Id) -> Id {
        match (self.literal(x), self.negated(x)) {
            (Some(v), _) => self.c(-v),
            (_, Some(x)) => x,
            _ => self.op(Op::Neg, &[x]),
        }
    }

    pub(super) fn plus(&mut self, a: Id, b: Id) -> Id {
        match (self.literal(a), self.literal(b), self.negated(a), self.negated(b)) {
            (Some(x), Some(y), ..) => self.c(x + y),
            (_, _, _, Some(b)) => self.difference(a, b),
            (_, _, Some(a), _) => self.difference(b, a),
            _ if a == b => self.times_const(2.0, a),
            _ => match self.same_divisor(a, b) {
                Some((a, b, u)) => {
                    let sum = self.plus(a, b);
                    self.over(sum, u)
                }
                None => self.op(Op::Add, &[a, b]),
            },
        }
    }

    fn difference(&mut self, a: Id, b: Id) -> Id {
        match self.same_divisor(a, b) {
            Some((a, b, u)) => {
                let difference = self.minus(a, b);
                self.over(difference, u)
            }
            None => self.op(Op::Sub, &[a, b]),
        }
    }

    /// `a / u` and `b / u`, or their opposites: `(a, b, u)`.
    fn same_divisor(&self, a: Id, b: Id) -> Option<(Id, Id, Id)> {
        match (self.graph.node(a), self.graph.node(b)) {
            (Node::Op(Op::Div, a), Node::Op(Op::Div, b)) if self.relaxed && a[1] == b[1] => {
                Some((a[0], b[0], a[1]))
            }
            _ => None,
        }
    }

    /// `a * (b / u)` as `(a / u) * b` where `a / u` is there already: softmax's gradient by softmax itself.
    fn known_quotient(&mut self, a: Id, b: Id) -> Option<Id> {
        let Node::Op(Op::Div, quotient) = self.graph.node(b) else { return None };
        if !self.relaxed || b.index() < self.forward {
            return None;
        }
        let (b, u) = (quotient[0], quotient[1]);
        let forward = |id: Id| id.index() < self.forward;
        let known = self.graph.find(&Node::Op(Op::Div, vec![a, u])).filter(|k| forward(*k))?;
        Some(self.op(Op::Mul, &[known, b]))
    }

    pub(super) fn minus(&mut self, a: Id, b: Id) -> Id {
        let b = self.neg(b);
        self.plus(a, b)
    }

    pub(super) fn times_const(&mut self, c: f64, x: Id) -> Id {
        let c = self.c(c);
        self.times(x, c)
    }

    pub(super) fn times(&mut self, a: Id, b: Id) -> Id {
        match (self.literal(a), self.literal(b), self.negated(a), self.negated(b)) {
            (Some(x), Some(y), ..) => self.c(x * y),
            (Some(1.0), ..) => b,
            (_, Some(1.0), ..) => a,
            (Some(-1.0), ..) => self.neg(b),
            (_, Some(-1.0), ..) => self.neg(a),
            (_, _, Some(a), Some(b)) => self.times(a, b),
            (_, None, Some(a), _) => {
                let product = self.times(a, b);
                self.neg(product)
            }
            (None, _, _, Some(b)) => {
                let product = self.times(a, b);
                self.neg(product)
            }
            _ => match self.known_quotient(a, b).or_else(|| self.known_quotient(b, a)) {
                Some(known) => known,
                None => self.op(Op::Mul, &[a, b]),
            },
        }
    }

    pub(super) fn over(&mut self, a: Id, b: Id) -> Id {
        match (self.literal(a), self.literal(b), self.negated(a)) {
            (Some(x), Some(y), _) => self.c(x / y),
            (_, Some(1.0), _) => a,
            (_, _, Some(a)) => {
                let quotient = self.over(a, b);
                self.neg(quotient)
            }
            _ => self.op(Op::Div, &[a, b]),
        }
    }

    /// `condition ? x : 0`.
    pub(super) fn only(&mut self, condition: Id, x: Id) -> Id {
        let zero = self.c(0.0);
        self.op(Op::Select, &[condition, x, zero])
    }

    pub(super) fn scan(&mut self, op: ScanOp, reverse: bool, exclusive: bool, arg: Id) -> Id {
        self.add(Node::Scan { op, reverse, exclusive, arg })
    }

    /// The length of the row, as a float.
    pub(super) fn row_len(&mut self) -> Id {
        let len = self.add(Node::Len(0));
        self.add(Node::Cast(Dtype::F32, len))
    }

    /// The sum over the row, factors that are the same along it taken out.
    pub(super) fn row_sum(&mut self, x: Id) -> Id {
        self.row_sum_within(x, 64)
    }

    /// Takes out so many factors at most.
    fn row_sum_within(&mut self, x: Id, factors: u32) -> Id {
        if self.is_uniform(x) {
            let len = self.row_len();
            return self.times(x, len);
        }
        match self.graph.node(x).clone() {
            Node::Op(Op::Neg, a) if factors > 0 => {
                let sum = self.row_sum_within(a[0], factors - 1);
                self.neg(sum)
            }
            Node::Op(Op::Mul, a) if factors > 0 && self.relaxed && self.is_uniform(a[0]) => {
                let sum = self.row_sum_within(a[1], factors - 1);
                self.times(a[0], sum)
            }
            Node::Op(Op::Mul, a) if factors > 0 && self.relaxed && self.is_uniform(a[1]) => {
                let sum = self.row_sum_within(a[0], factors - 1);
                self.times(sum, a[1])
            }
            Node::Op(Op::Div, a) if factors > 0 && self.relaxed && self.is_uniform(a[1]) => {
                let sum = self.row_sum_within(a[0], factors - 1);
                self.over(sum, a[1])
            }
            _ => self.add(Node::Reduce(ReduceOp::Sum, x)),
        }
    }

    /// Whether a value is 0 by the laws of arithmetic, so that everything made of it can be left out: what reaches
    /// the maximum that softmax subtracts, or the mean under a variance.
    pub(super) fn cancels(&mut self, x: Id) -> bool {
        self.relaxed && self.normal.of(&self.graph, &self.uniform, x).is_empty()
    }

    /// Whether a value does not depend on the input `on` by the laws of arithmetic, though it is made of it.
    pub(super) fn independent(&self, x: Id, on: Id) -> bool {
        let sum = Normal::with_atom(on).of(&self.graph, &self.uniform, x);
        let atoms = sum.keys().flat_map(normal::nodes);
        let others: Vec<Id> = atoms.filter(|a| *a != on).collect();
        !sum.keys().flat_map(normal::nodes).any(|a| a == on) && !self.graph.reachable(&others)[on.index()]
    }

    pub(super) fn sum(&mut self, terms: &[Id]) -> Option<Id> {
        let (first, rest) = terms.split_first()?;
        Some(rest.iter().fold(*first, |acc, t| self.plus(acc, *t)))
    }
}
