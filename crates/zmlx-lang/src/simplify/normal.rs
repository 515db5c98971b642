//! Sums of products: a normal form in which expressions that are equal by the laws of arithmetic look the same.
//!
//! It works with real numbers, so it serves only kernels that may be rewritten.

use std::collections::{BTreeMap, HashMap};

use crate::{Const, Dtype, Graph, Id, Node, Op, ReduceOp};

/// What is not taken apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Atom {
    /// A value.
    Node(Id),
    /// The length of the row.
    Len,
    /// The sum over the row of a product without factors that are the same along the row.
    RowSum(Product),
}

/// Atoms with their powers, in order, no power 0.
pub(crate) type Product = Vec<(Atom, i32)>;

/// Products with their coefficients, none 0.
pub(crate) type Sum = BTreeMap<Product, f64>;

/// Sums with more terms stay atoms.
const TERMS: usize = 24;
/// Operands below this depth stay atoms.
const DEPTH: u32 = 48;

/// Normal forms of one graph's values, remembered.
#[derive(Debug, Default)]
pub(crate) struct Normal {
    known: HashMap<Id, Sum>,
}

impl Normal {
    /// Takes a value as an atom, whatever it is made of.
    pub(crate) fn with_atom(id: Id) -> Self {
        Self { known: HashMap::from([(id, atom(Atom::Node(id)))]) }
    }

    /// The normal form of a value; `uniform` says which are the same along the row.
    pub(crate) fn of(&mut self, graph: &Graph, uniform: &[bool], id: Id) -> Sum {
        self.depth(graph, uniform, id, DEPTH)
    }

    fn depth(&mut self, graph: &Graph, uniform: &[bool], id: Id, depth: u32) -> Sum {
        if let Some(sum) = self.known.get(&id) {
            return sum.clone();
        }
        let whole = || atom(Atom::Node(id));
        if depth == 0 {
            return whole();
        }
        let mut get = |x: Id| self.depth(graph, uniform, x, depth - 1);
        let sum = match graph.node(id) {
            Node::Const(Const::Float(_) | Const::Int(_)) => literal(graph, id),
            Node::Len(0) => Some(atom(Atom::Len)),
            // What is read is a number; what was computed in integers may have wrapped.
            Node::Cast(Dtype::F32, x)
                if matches!(graph.node(*x), Node::Len(0) | Node::Input(_) | Node::Load { .. }) =>
            {
                Some(get(*x))
            }
            Node::Op(Op::Neg, a) => Some(scale(get(a[0]), -1.0)),
            Node::Op(Op::Add, a) => Some(plus(get(a[0]), &get(a[1]))),
            Node::Op(Op::Sub, a) => Some(plus(get(a[0]), &scale(get(a[1]), -1.0))),
            Node::Op(Op::Mul, a) => times(&get(a[0]), &get(a[1])),
            Node::Op(Op::Fma, a) => times(&get(a[0]), &get(a[1])).map(|p| plus(p, &get(a[2]))),
            Node::Op(Op::Div, a) => {
                let by = inverse(&get(a[1])).unwrap_or_else(|| power(Atom::Node(a[1]), -1));
                times(&get(a[0]), &by)
            }
            Node::Op(Op::Pow, a) => small_power(graph, a[1]).and_then(|n| {
                let base = get(a[0]);
                (1..n).try_fold(base.clone(), |acc, _| times(&acc, &base))
            }),
            Node::Reduce(ReduceOp::Sum, x) => Some(row_sum(&get(*x), uniform)),
            _ => None,
        };
        let sum = sum.filter(|s| s.len() <= TERMS && s.values().all(|c| c.is_finite())).unwrap_or_else(whole);
        self.known.insert(id, sum.clone());
        sum
    }
}

/// The values that a product is made of.
pub(crate) fn nodes(product: &Product) -> Vec<Id> {
    let one = |(atom, _): &(Atom, i32)| match atom {
        Atom::Node(id) => vec![*id],
        Atom::Len => vec![],
        Atom::RowSum(product) => nodes(product),
    };
    product.iter().flat_map(one).collect()
}

fn atom(a: Atom) -> Sum {
    power(a, 1)
}

fn power(a: Atom, n: i32) -> Sum {
    Sum::from([(vec![(a, n)], 1.0)])
}

fn literal(graph: &Graph, id: Id) -> Option<Sum> {
    let Node::Const(c) = graph.node(id) else { return None };
    Some(if c.as_f64() == 0.0 { Sum::new() } else { Sum::from([(Vec::new(), c.as_f64())]) })
}

fn small_power(graph: &Graph, id: Id) -> Option<u32> {
    let Node::Const(c) = graph.node(id) else { return None };
    [1.0, 2.0, 3.0, 4.0].iter().position(|n| *n == c.as_f64()).map(|n| n as u32 + 1)
}

fn scale(mut sum: Sum, by: f64) -> Sum {
    sum.values_mut().for_each(|c| *c *= by);
    sum
}

fn plus(mut a: Sum, b: &Sum) -> Sum {
    for (product, c) in b {
        insert(&mut a, product.clone(), *c);
    }
    a
}

/// Adds a term; one that cancels up to rounding goes.
fn insert(sum: &mut Sum, product: Product, c: f64) {
    let old = sum.get(&product).copied().unwrap_or(0.0);
    let new = old + c;
    if new.abs() <= 1e-12 * (old.abs() + c.abs()) {
        sum.remove(&product);
    } else {
        sum.insert(product, new);
    }
}

fn join(a: &Product, b: &Product) -> Product {
    let mut powers: BTreeMap<Atom, i32> = a.iter().cloned().collect();
    for (atom, n) in b {
        *powers.entry(atom.clone()).or_insert(0) += n;
    }
    powers.into_iter().filter(|(_, n)| *n != 0).collect()
}

fn times(a: &Sum, b: &Sum) -> Option<Sum> {
    if a.len() * b.len() > TERMS {
        return None;
    }
    let mut out = Sum::new();
    for (p, c) in a {
        for (q, d) in b {
            insert(&mut out, join(p, q), c * d);
        }
    }
    Some(out)
}

fn inverse(a: &Sum) -> Option<Sum> {
    let mut terms = a.iter();
    let ((product, c), None) = (terms.next()?, terms.next()) else { return None };
    Some(Sum::from([(product.iter().map(|(a, n)| (a.clone(), -n)).collect(), 1.0 / c)]))
}

fn row_sum(a: &Sum, uniform: &[bool]) -> Sum {
    let mut out = Sum::new();
    for (product, c) in a {
        let same = |(a, _): &(Atom, i32)| match a {
            Atom::Node(id) => uniform[id.index()],
            Atom::Len | Atom::RowSum(_) => true,
        };
        let (mut outside, inside): (Product, Product) = product.iter().cloned().partition(same);
        let total = if inside.is_empty() { Atom::Len } else { Atom::RowSum(inside) };
        outside = join(&outside, &vec![(total, 1)]);
        insert(&mut out, outside, *c);
    }
    out
}
