//! Running reductions along a row.

use zmlx_lang::{Id, Node, ScanOp, Ty};

use super::exec::Block;
use super::reduce::Acc;

/// A scan's state between blocks, as lane bits; float sums and products in double precision.
#[derive(Debug, Clone, Copy)]
pub(super) struct Carry {
    pub f: f64,
    pub i: i64,
}

impl Carry {
    pub fn new(op: ScanOp, ty: Ty) -> Self {
        let acc = Acc::new(
            match op {
                ScanOp::Sum => zmlx_lang::ReduceOp::Sum,
                ScanOp::Prod => zmlx_lang::ReduceOp::Prod,
                ScanOp::Max => zmlx_lang::ReduceOp::Max,
                ScanOp::Min => zmlx_lang::ReduceOp::Min,
            },
            ty,
        );
        Self { f: acc.f, i: acc.i }
    }
}

/// Scans one block, in the order of the scan.
pub(super) fn scan(b: &Block<'_>, value: Id, carry: &mut Carry) {
    let Node::Scan { op, reverse, exclusive, arg } = b.program.value(value).node else { return };
    macro_rules! walk {
        ($t:ty, $acc:expr, $put:expr, |$s:ident, $v:ident| $step:expr, $read:expr) => {{
            // SAFETY: the operand's block and the scan's row are disjoint, with `n` lanes of the type.
            let (d, x) = unsafe { (b.get_mut::<$t>(value), b.get::<$t>(arg)) };
            let mut $s = $acc;
            let mut one = |i: usize| {
                let $v = x[i];
                if exclusive {
                    d[i] = $read($s);
                    $s = $step;
                } else {
                    $s = $step;
                    d[i] = $read($s);
                }
            };
            if reverse {
                (0..b.n).rev().for_each(&mut one)
            } else {
                (0..b.n).for_each(&mut one)
            }
            $put($s);
        }};
    }
    macro_rules! ints {
        ($t:ty) => {
            match op {
                ScanOp::Sum => {
                    walk!($t, carry.i as $t, |s| carry.i = s as i64, |s, v| s.wrapping_add(v), |s| s)
                }
                ScanOp::Prod => {
                    walk!($t, carry.i as $t, |s| carry.i = s as i64, |s, v| s.wrapping_mul(v), |s| s)
                }
                ScanOp::Max => walk!($t, carry.i as $t, |s| carry.i = s as i64, |s, v| s.max(v), |s| s),
                ScanOp::Min => walk!($t, carry.i as $t, |s| carry.i = s as i64, |s, v| s.min(v), |s| s),
            }
        };
    }
    match b.program.value(value).ty {
        Ty::F32 => match op {
            ScanOp::Sum => walk!(f32, carry.f, |s| carry.f = s, |s, v| s + f64::from(v), |s| s as f32),
            ScanOp::Prod => walk!(f32, carry.f, |s| carry.f = s, |s, v| s * f64::from(v), |s| s as f32),
            ScanOp::Max => {
                let pick = |s: f32, v: f32| if s > v || s.is_nan() { s } else { v };
                walk!(f32, carry.f as f32, |s| carry.f = f64::from(s), |s, v| pick(s, v), |s| s);
            }
            ScanOp::Min => {
                let pick = |s: f32, v: f32| if s < v || s.is_nan() { s } else { v };
                walk!(f32, carry.f as f32, |s| carry.f = f64::from(s), |s, v| pick(s, v), |s| s);
            }
        },
        Ty::I32 => ints!(i32),
        Ty::U32 | Ty::Bool => ints!(u32),
        Ty::I64 => ints!(i64),
        Ty::U64 => ints!(u64),
    }
}
