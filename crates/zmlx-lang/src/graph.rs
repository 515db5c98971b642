//! Expressions as a hash-consed graph.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::{Dtype, Op, ReduceOp, ScanOp};

/// A value of a [`Graph`]: the position of its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Id(pub u32);

impl Id {
    /// The position as an index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A literal. Numbers are weak: they take the type of what they are combined with, and are `f32` or `i32` (`i64` when
/// they do not fit) alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Const {
    /// The bits of a double; infinities and NaN included.
    Float(u64),
    /// An integer.
    Int(i64),
    /// A boolean.
    Bool(bool),
}

impl Const {
    /// A float literal.
    pub fn float(v: f64) -> Self {
        Self::Float(v.to_bits())
    }

    /// The value as a double.
    pub fn as_f64(self) -> f64 {
        match self {
            Self::Float(bits) => f64::from_bits(bits),
            Self::Int(v) => v as f64,
            Self::Bool(v) => f64::from(u8::from(v)),
        }
    }
}

/// What a load outside its array gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bounds {
    /// An error on the CPU; NaN (0 for integers) on a GPU, which can't report one.
    Checked,
    /// The nearest element.
    Clamp,
    /// Zero.
    Zero,
}

/// One step of an expression. Operands always come earlier in the graph.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Node {
    /// The element of an input at the current place, numpy-broadcast.
    Input(u32),
    /// A literal.
    Const(Const),
    /// The current place along an axis, `i32`; axes count from the last, which is 0.
    Index(u32),
    /// The length of that axis of the domain, `i32`.
    Len(u32),
    /// 32 random bits, `u32`: word `i % 4` of Philox4x32-10 at counter `i / 4`, where `i` is the row-major number of
    /// the current element, keyed by the operand (a `u32` or `u64` seed).
    Random(Id),
    /// An operation.
    Op(Op, Vec<Id>),
    /// Conversion to a dtype, rounding to its precision (floats: to nearest, ties to even; float to integer: toward
    /// zero, saturating, NaN to 0; integers wrap).
    Cast(Dtype, Id),
    /// The bits of the operand's 32 bits as another 32-bit type (`f32`, `i32`, `u32`).
    Bitcast(Dtype, Id),
    /// A reduction over the row: the same value for the whole row.
    Reduce(ReduceOp, Id),
    /// A running reduction along the row.
    Scan {
        /// Which.
        op: ScanOp,
        /// From the end of the row.
        reverse: bool,
        /// Without the element itself.
        exclusive: bool,
        /// What is accumulated.
        arg: Id,
    },
    /// An element of an indexed input at computed places, one for each axis.
    Load {
        /// The input's number.
        input: u32,
        /// Integer coordinates, outermost axis first.
        at: Vec<Id>,
        /// What happens outside.
        bounds: Bounds,
    },
}

impl Node {
    /// The operands.
    pub fn args(&self) -> &[Id] {
        match self {
            Self::Op(_, args) => args,
            Self::Load { at, .. } => at,
            Self::Random(a)
            | Self::Cast(_, a)
            | Self::Bitcast(_, a)
            | Self::Reduce(_, a)
            | Self::Scan { arg: a, .. } => std::slice::from_ref(a),
            Self::Input(_) | Self::Const(_) | Self::Index(_) | Self::Len(_) => &[],
        }
    }

    /// The same node with other operands.
    pub fn map_args(&self, mut f: impl FnMut(Id) -> Id) -> Self {
        let mut node = self.clone();
        match &mut node {
            Self::Op(_, args) => args.iter_mut().for_each(|a| *a = f(*a)),
            Self::Load { at, .. } => at.iter_mut().for_each(|a| *a = f(*a)),
            Self::Random(a)
            | Self::Cast(_, a)
            | Self::Bitcast(_, a)
            | Self::Reduce(_, a)
            | Self::Scan { arg: a, .. } => {
                *a = f(*a);
            }
            Self::Input(_) | Self::Const(_) | Self::Index(_) | Self::Len(_) => {}
        }
        node
    }
}

/// Expressions that share their common parts: equal nodes are one node.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(from = "Vec<Node>", into = "Vec<Node>")]
pub struct Graph {
    nodes: Vec<Node>,
    known: HashMap<Node, Id>,
}

impl PartialEq for Graph {
    fn eq(&self, other: &Self) -> bool {
        self.nodes == other.nodes
    }
}

impl From<Vec<Node>> for Graph {
    /// Takes nodes as they are, without looking whether operands come first: [`Kernel::validate`](crate::Kernel) does.
    fn from(nodes: Vec<Node>) -> Self {
        let known = nodes.iter().enumerate().map(|(i, n)| (n.clone(), Id(i as u32))).collect();
        Self { nodes, known }
    }
}

impl From<Graph> for Vec<Node> {
    fn from(graph: Graph) -> Self {
        graph.nodes
    }
}

impl Graph {
    /// The nodes, operands before their users.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node of a value.
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id.index()]
    }

    /// Adds a node, or finds the equal one.
    pub fn add(&mut self, node: Node) -> Id {
        if let Some(&id) = self.known.get(&node) {
            return id;
        }
        let id = Id(self.nodes.len() as u32);
        self.nodes.push(node.clone());
        self.known.insert(node, id);
        id
    }

    /// The value of a node that is already there.
    pub fn find(&self, node: &Node) -> Option<Id> {
        self.known.get(node).copied()
    }

    /// An input's element.
    pub fn input(&mut self, number: usize) -> Id {
        self.add(Node::Input(number as u32))
    }

    /// A float literal.
    pub fn float(&mut self, v: f64) -> Id {
        self.add(Node::Const(Const::float(v)))
    }

    /// An integer literal.
    pub fn int(&mut self, v: i64) -> Id {
        self.add(Node::Const(Const::Int(v)))
    }

    /// An operation of any arity; `args` must be as many as the operation takes.
    pub fn op(&mut self, op: Op, args: &[Id]) -> Id {
        debug_assert_eq!(op.arity(), args.len());
        self.add(Node::Op(op, args.to_vec()))
    }

    /// A conversion.
    pub fn cast(&mut self, dtype: Dtype, x: Id) -> Id {
        self.add(Node::Cast(dtype, x))
    }

    /// A reduction over the row.
    pub fn reduce(&mut self, op: ReduceOp, x: Id) -> Id {
        self.add(Node::Reduce(op, x))
    }

    /// Which nodes the values need, by position.
    pub fn reachable(&self, roots: &[Id]) -> Vec<bool> {
        let mut seen = vec![false; self.nodes.len()];
        for r in roots {
            seen[r.index()] = true;
        }
        for i in (0..self.nodes.len()).rev() {
            if seen[i] {
                for a in self.nodes[i].args() {
                    seen[a.index()] = true;
                }
            }
        }
        seen
    }

    /// Copies what `roots` of `from` need into this graph, with `replace` deciding for each node whether another value
    /// stands in for it (given the operands' new ids). Returns the new roots.
    pub fn import(
        &mut self,
        from: &Self,
        roots: &[Id],
        mut replace: impl FnMut(&mut Self, Id, &Node) -> Option<Id>,
    ) -> Vec<Id> {
        let needed = from.reachable(roots);
        let mut new = vec![Id(u32::MAX); from.nodes.len()];
        for (i, node) in from.nodes.iter().enumerate().filter(|&(i, _)| needed[i]) {
            let moved = node.map_args(|a| new[a.index()]);
            new[i] = match replace(self, Id(i as u32), &moved) {
                Some(id) => id,
                None => self.add(moved),
            };
        }
        roots.iter().map(|r| new[r.index()]).collect()
    }
}
