//! The derivatives of reductions and scans, both ways.

use super::build::Build;
use crate::{Dtype, Id, Node, Op, ReduceOp, ScanOp};

/// A scan of a value.
#[derive(Clone, Copy)]
pub(super) struct Scan {
    pub(super) op: ScanOp,
    pub(super) reverse: bool,
    pub(super) exclusive: bool,
    pub(super) x: Id,
    /// The scan's own result.
    pub(super) y: Id,
}

/// What `x` gets, element by element, from the cotangent `g` of `y = op(x)` over the row.
pub(super) fn reduce_reverse(b: &mut Build, op: ReduceOp, x: Id, y: Id, g: Id) -> Option<Id> {
    match op {
        ReduceOp::Sum => Some(g),
        ReduceOp::Prod => {
            let others = product_of_others(b, x);
            Some(b.times(others, g))
        }
        ReduceOp::Max | ReduceOp::Min => {
            let (holds, count) = extremes(b, x, y);
            let share = b.over(g, count);
            Some(b.only(holds, share))
        }
        ReduceOp::ArgMax | ReduceOp::ArgMin => None,
    }
}

/// The change of `y = op(x)` over the row for the change `t` of `x`.
pub(super) fn reduce_forward(b: &mut Build, op: ReduceOp, x: Id, y: Id, t: Id) -> Option<Id> {
    match op {
        ReduceOp::Sum => Some(b.row_sum(t)),
        ReduceOp::Prod => {
            let others = product_of_others(b, x);
            let change = b.times(others, t);
            Some(b.row_sum(change))
        }
        ReduceOp::Max | ReduceOp::Min => {
            let (holds, count) = extremes(b, x, y);
            let change = b.only(holds, t);
            let sum = b.row_sum(change);
            Some(b.over(sum, count))
        }
        ReduceOp::ArgMax | ReduceOp::ArgMin => None,
    }
}

/// The product of the row without the element itself, right with zeros in the row.
fn product_of_others(b: &mut Build, x: Id) -> Id {
    let before = b.scan(ScanOp::Prod, false, true, x);
    let after = b.scan(ScanOp::Prod, true, true, x);
    b.times(before, after)
}

/// Which elements equal the extreme, and how many.
fn extremes(b: &mut Build, x: Id, y: Id) -> (Id, Id) {
    let holds = b.op(Op::Eq, &[x, y]);
    let count = b.add(Node::Cast(Dtype::F32, holds));
    (holds, b.row_sum(count))
}

/// What `x` gets from the cotangent `g` of a scan.
pub(super) fn scan_reverse(b: &mut Build, s: Scan, g: Id) -> Id {
    match s.op {
        ScanOp::Sum => b.scan(ScanOp::Sum, !s.reverse, s.exclusive, g),
        ScanOp::Prod => {
            let p = product(b, s);
            let back = |b: &mut Build, v: Id| {
                let v = b.times(v, g);
                b.scan(ScanOp::Sum, !s.reverse, s.exclusive, v)
            };
            let at_zero = back(b, p.with_one);
            let before = back(b, s.y);
            let before = b.over(before, s.x);
            let zero = b.c(0.0);
            let usual = b.op(Op::Select, &[p.vanished, zero, before]);
            b.op(Op::Select, &[p.first_zero, at_zero, usual])
        }
        // An element gets the cotangents from its own place to the next holder's: a difference of running sums. The
        // sum at the next holder is found as a running maximum, which needs sums that only grow, so the positive
        // and the negative parts of the cotangent are summed apart.
        ScanOp::Max | ScanOp::Min => {
            let holder = holder(b, s);
            let (positive, negative) = parts(b, g);
            let positive = until_next(b, s, holder, positive);
            let negative = until_next(b, s, holder, negative);
            let sum = b.minus(positive, negative);
            b.only(holder, sum)
        }
    }
}

/// The change of a scan for the change `t` of `x`.
pub(super) fn scan_forward(b: &mut Build, s: Scan, t: Id) -> Id {
    match s.op {
        ScanOp::Sum => b.scan(ScanOp::Sum, s.reverse, s.exclusive, t),
        ScanOp::Prod => {
            let p = product(b, s);
            let zero = b.c(0.0);
            let ratio = b.over(t, s.x);
            let ratio = b.op(Op::Select, &[p.vanished, zero, ratio]);
            let ratios = b.scan(ScanOp::Sum, s.reverse, s.exclusive, ratio);
            let before = b.times(s.y, ratios);
            let change = b.only(p.first_zero, t);
            let change = b.scan(ScanOp::Sum, s.reverse, s.exclusive, change);
            let after = b.times(p.with_one, change);
            b.plus(before, after)
        }
        ScanOp::Max | ScanOp::Min => {
            let holder = holder(b, s);
            let held = b.only(holder, t);
            let (positive, negative) = parts(b, held);
            let positive = at_holder(b, s, holder, positive);
            let negative = at_holder(b, s, holder, negative);
            b.minus(positive, negative)
        }
    }
}

/// A running product around the first zero of its row, as MLX takes it apart: before it by division, at it with the
/// zero replaced by 1, nothing after it.
struct Product {
    /// Whether the product up to and with the element is 0.
    vanished: Id,
    /// Whether the element is what makes it 0.
    first_zero: Id,
    /// The scan with the first zero replaced by 1.
    with_one: Id,
}

fn product(b: &mut Build, s: Scan) -> Product {
    let other = b.scan(ScanOp::Prod, s.reverse, !s.exclusive, s.x);
    let (inclusive, exclusive) = if s.exclusive { (other, s.y) } else { (s.y, other) };
    let (zero, one) = (b.c(0.0), b.c(1.0));
    let vanished = b.op(Op::Eq, &[inclusive, zero]);
    let alive = b.op(Op::Ne, &[exclusive, zero]);
    let first_zero = b.op(Op::And, &[vanished, alive]);
    let x = b.op(Op::Select, &[first_zero, one, s.x]);
    let with_one = b.scan(ScanOp::Prod, s.reverse, s.exclusive, x);
    Product { vanished, first_zero, with_one }
}

/// Which elements are a new running extreme; of equals the latest counts from there on, as in MLX.
fn holder(b: &mut Build, s: Scan) -> Id {
    let inclusive = if s.exclusive { b.scan(s.op, s.reverse, false, s.x) } else { s.y };
    b.op(Op::Eq, &[s.x, inclusive])
}

/// `v` as a difference of two values that are not negative.
fn parts(b: &mut Build, v: Id) -> (Id, Id) {
    let zero = b.c(0.0);
    let positive = b.op(Op::Max, &[v, zero]);
    let negative = b.minus(positive, v);
    (positive, negative)
}

/// For holders, the sum of `v` (not negative) from the place to the next holder's.
fn until_next(b: &mut Build, s: Scan, holder: Id, v: Id) -> Id {
    let sum = b.scan(ScanOp::Sum, !s.reverse, s.exclusive, v);
    let next = largest_held(b, holder, sum, !s.reverse, true);
    b.minus(sum, next)
}

/// The value of `v` (not negative, 0 but at holders) at the last holder.
fn at_holder(b: &mut Build, s: Scan, holder: Id, v: Id) -> Id {
    let sum = b.scan(ScanOp::Sum, s.reverse, s.exclusive, v);
    let before = b.scan(ScanOp::Sum, s.reverse, true, v);
    let before = largest_held(b, holder, before, s.reverse, s.exclusive);
    b.minus(sum, before)
}

/// The running maximum of what holders have, 0 before the first. Others count as -1, below every sum, so that the
/// maximum is a holder's also where sums are 0: its own derivative is taken there.
fn largest_held(b: &mut Build, holder: Id, sum: Id, reverse: bool, exclusive: bool) -> Id {
    let (zero, below) = (b.c(0.0), b.c(-1.0));
    let held = b.op(Op::Select, &[holder, sum, below]);
    let largest = b.scan(ScanOp::Max, reverse, exclusive, held);
    // In this order 0 does not take the derivative from a sum of 0.
    b.op(Op::Max, &[zero, largest])
}
