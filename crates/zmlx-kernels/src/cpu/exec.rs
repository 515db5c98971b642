//! One block of values, one operation after another.

use std::cell::Cell;

use pulp::{Simd, WithSimd};
use zmlx_lang::{Dtype, Id, Node, Op, Program, Ty};
use zmlx_simd::lockstep::{Lockstep, Loop, Soon, Source};
use zmlx_simd::philox::philox4x32;
use zmlx_simd::{convert, math};

use super::code::Step;
use super::reduce::{self, Acc};
use super::table::{OutOfBounds, Table, load};

/// A block under evaluation: where each value's lanes are, and where the block lies.
pub(super) struct Block<'a> {
    pub program: &'a Program,
    /// The instruction set.
    pub arch: pulp::Arch,
    /// Lanes of every value in use: `n` of 4 bytes, or 8 for 64-bit types. Values of one operation do not overlap.
    pub lanes: &'a [*mut u8],
    /// The bits of each value that is the same along the row and is known by now.
    pub cells: *const u64,
    /// Elements in the block.
    pub n: usize,
    /// First column.
    pub col: usize,
    /// Row-major number of the first element in the domain.
    pub linear: u64,
    pub tables: &'a [Table<'a>],
    /// A value whose lanes are an output that is written past the caches; those that can't are stored as usual.
    pub streamed: Option<Id>,
    /// Memory of the next row, to be asked for by the first loop over registers.
    pub soon: Cell<Option<Soon>>,
}

impl Block<'_> {
    /// The lanes of a value as `T`.
    ///
    /// # Safety
    /// The value has a place with room for `n` lanes of `T`, aligned, and is not being written.
    #[inline(always)]
    pub(super) unsafe fn get<T>(&self, id: Id) -> &[T] {
        // SAFETY: as the caller promises.
        unsafe { std::slice::from_raw_parts(self.lanes[id.index()] as *const T, self.n) }
    }

    /// # Safety
    /// As for `get`, and nothing else reads or writes the value while the slice lives.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // the memory is behind raw pointers, not behind `self`
    pub(super) unsafe fn get_mut<T>(&self, id: Id) -> &mut [T] {
        // SAFETY: as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.lanes[id.index()] as *mut T, self.n) }
    }
}

/// Computes the values of `code`, then adds to accumulators.
pub(super) struct Exec<'a> {
    pub block: &'a Block<'a>,
    pub code: &'a [Step],
}

impl Block<'_> {
    /// A float operand of a loop over registers: lanes, or the one value of all lanes.
    ///
    /// # Safety
    /// As for `get`; a uniform value has been computed.
    unsafe fn operand(&self, id: Id) -> Source<'_> {
        // SAFETY: as the caller promises; there is one cell a value.
        unsafe {
            if self.program.value(id).uniform {
                Source::Same(f32::from_bits(*self.cells.add(id.index()) as u32))
            } else {
                Source::Lanes(self.get(id))
            }
        }
    }

    /// Whether a value's vectors go past the caches: it is streamed and its lanes are aligned.
    #[inline(always)]
    fn streams(&self, id: Id) -> bool {
        self.streamed == Some(id) && (self.lanes[id.index()] as usize).is_multiple_of(64)
    }
}

/// Runs a loop in a function of its own. Inlined into the caller, which is compiled for each instruction set, it would be compiled
/// that many times over.
#[inline(never)]
fn apart<W: WithSimd>(arch: pulp::Arch, work: W) -> W::Output {
    arch.dispatch(work)
}

/// `d = f(x, ...)` over registers, several side by side: an expression over arrays of them.
macro_rules! vectors {
    ($b:ident, $d:expr, [$($x:ident = $a:expr),+], |$simd:ident| $e:expr) => {{
        #[derive(Clone, Copy)]
        struct Function;
        impl Lockstep<{ [$(stringify!($x)),+].len() }> for Function {
            #[inline(always)]
            fn eval<S: Simd, const K: usize>(
                self,
                $simd: S,
                [$($x),+]: [[S::f32s; K]; { [$(stringify!($x)),+].len() }],
            ) -> [S::f32s; K] {
                $e
            }
        }
        let past = $b.streams($d);
        // SAFETY: places of one operation are disjoint and hold `n` 32-bit lanes; lanes that are streamed are aligned, and
        // the task ends with a fence.
        let work = unsafe {
            let (to, from) = ($b.get_mut::<f32>($d), [$($b.operand($a)),+]);
            Loop::new(Function, to, from).past(past).soon($b.soon.take())
        };
        apart($b.arch, work);
    }};
}

/// `d = f(a)`, `f(a, b)` or `f(a, b, c)` over lanes, left to the compiler to vectorise.
macro_rules! lanes {
    ($b:ident, $d:expr, $to:ty, |$x:ident: $tx:ty = $a:ident| $e:expr) => {{
        // SAFETY: places of one operation are disjoint and hold `n` lanes of these types.
        let (d, a) = unsafe { ($b.get_mut::<$to>($d), $b.get::<$tx>($a)) };
        for (d, &$x) in d.iter_mut().zip(a) {
            *d = $e;
        }
    }};
    ($b:ident, $d:expr, $to:ty, |$x:ident: $tx:ty = $a:ident, $y:ident: $ty:ty = $c:ident| $e:expr) => {{
        // SAFETY: as above.
        let (d, a, c) = unsafe { ($b.get_mut::<$to>($d), $b.get::<$tx>($a), $b.get::<$ty>($c)) };
        for ((d, &$x), &$y) in d.iter_mut().zip(a).zip(c) {
            *d = $e;
        }
    }};
    ($b:ident, $d:expr, $to:ty, |$x:ident: $tx:ty = $a:ident, $y:ident: $ty:ty = $c:ident, $z:ident: $tz:ty = $g:ident| $e:expr) => {{
        // SAFETY: as above.
        let d = unsafe { $b.get_mut::<$to>($d) };
        // SAFETY: as above.
        let (a, c, g) = unsafe { ($b.get::<$tx>($a), $b.get::<$ty>($c), $b.get::<$tz>($g)) };
        for (((d, &$x), &$y), &$z) in d.iter_mut().zip(a).zip(c).zip(g) {
            *d = $e;
        }
    }};
}

#[inline(always)]
pub(super) fn mask(b: bool) -> u32 {
    if b { u32::MAX } else { 0 }
}

/// Whether an operation on floats is a loop over registers, whose operands may be uniform values without lanes.
pub(super) fn by_registers(program: &Program, id: Id) -> bool {
    let (Node::Op(op, _), Ty::F32) = (&program.value(id).node, program.value(id).ty) else {
        return false;
    };
    matches!(
        op,
        Op::Add
            | Op::Sub
            | Op::Mul
            | Op::Fma
            | Op::Pow
            | Op::Sign
            | Op::Exp
            | Op::Exp2
            | Op::Log
            | Op::Log2
            | Op::Log10
            | Op::Log1p
            | Op::Expm1
            | Op::Sqrt
            | Op::Rsqrt
            | Op::Sin
            | Op::Cos
            | Op::Tanh
            | Op::Sigmoid
            | Op::Silu
            | Op::GeluTanh
            | Op::GeluErf
            | Op::Softplus
            | Op::Mish
            | Op::Erf
            | Op::Floor
            | Op::Ceil
            | Op::Trunc
            | Op::Round
    )
}

impl WithSimd for Exec<'_> {
    type Output = Result<(), OutOfBounds>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Self::Output {
        let b = self.block;
        for step in self.code {
            let id = step.id;
            let value = b.program.value(id);
            if let Some(inner) = step.inner {
                fused(b, id, inner);
                continue;
            }
            match &value.node {
                Node::Op(op, args) => {
                    let ty = b.program.value(args[args.len() - 1]).ty;
                    match ty {
                        Ty::F32 => float_op(b, *op, id, args),
                        Ty::Bool => bool_op(b, *op, id, args),
                        Ty::I32 => int_op_i32(b, *op, id, args),
                        Ty::U32 => int_op_u32(b, *op, id, args),
                        Ty::I64 => int_op_i64(b, *op, id, args),
                        Ty::U64 => int_op_u64(b, *op, id, args),
                    }
                }
                Node::Cast(dtype, x) => cast(b, *dtype, id, *x),
                Node::Bitcast(_, x) => {
                    let x = *x;
                    lanes!(b, id, u32, |v: u32 = x| v);
                }
                Node::Index(_) => {
                    // SAFETY: a place of `n` lanes.
                    let d = unsafe { b.get_mut::<i32>(id) };
                    for (i, d) in d.iter_mut().enumerate() {
                        *d = (b.col + i) as i32;
                    }
                }
                Node::Random(seed) => random(b, id, *seed),
                Node::Load { input, at, bounds } => load(b, id, *input as usize, at, *bounds)?,
                // Inputs are put in place by the caller; the others are the same along the row.
                Node::Input(_) | Node::Const(_) | Node::Len(_) | Node::Reduce(..) | Node::Scan { .. } => {}
            }
        }
        Ok(())
    }
}

/// Two operations in one: see [`super::code::fuse`].
fn fused(b: &Block<'_>, d: Id, inner: Id) {
    let (Node::Op(outer, own), Node::Op(op, args)) = (&b.program.value(d).node, &b.program.value(inner).node)
    else {
        return;
    };
    let other = if own.len() == 2 && own[0] == inner { own[1] } else { own[0] };
    let x = args[0];
    match (*outer, *op) {
        (Op::Exp, Op::Sub) => {
            let y = args[1];
            vectors!(b, d, [v = x, w = y], |simd| math::exp(simd, math::sub(simd, v, w)));
        }
        (Op::Mul, Op::Mul) => {
            let y = args[1];
            vectors!(b, d, [u = x, v = y, w = other], |simd| math::mul(simd, math::mul(simd, u, v), w));
        }
        (Op::Mul, Op::Silu) => {
            vectors!(b, d, [v = x, w = other], |simd| math::mul(simd, math::silu(simd, v), w))
        }
        (Op::Mul, Op::GeluTanh) => {
            vectors!(b, d, [v = x, w = other], |simd| math::mul(simd, math::gelu_tanh(simd, v), w));
        }
        (Op::Mul, Op::GeluErf) => {
            vectors!(b, d, [v = x, w = other], |simd| math::mul(simd, math::gelu_erf(simd, v), w));
        }
        (Op::Mul, Op::Sigmoid) => {
            vectors!(b, d, [v = x, w = other], |simd| math::mul(simd, math::sigmoid(simd, v), w));
        }
        (Op::Mul, Op::Exp) => {
            vectors!(b, d, [v = x, w = other], |simd| math::mul(simd, math::exp(simd, v), w))
        }
        _ => {}
    }
}

#[inline(always)]
fn float_op(b: &Block<'_>, op: Op, d: Id, args: &[Id]) {
    let x = args[0];
    let y = *args.get(1).unwrap_or(&x);
    let z = *args.get(2).unwrap_or(&x);
    match op {
        Op::Neg => lanes!(b, d, f32, |v: f32 = x| -v),
        Op::Abs => lanes!(b, d, f32, |v: f32 = x| v.abs()),
        Op::Sign => vectors!(b, d, [v = x], |simd| math::sign(simd, v)),
        Op::Exp => vectors!(b, d, [v = x], |simd| math::exp(simd, v)),
        Op::Exp2 => vectors!(b, d, [v = x], |simd| math::exp2(simd, v)),
        Op::Log => vectors!(b, d, [v = x], |simd| math::log(simd, v)),
        Op::Log2 => vectors!(b, d, [v = x], |simd| math::log2(simd, v)),
        Op::Log10 => vectors!(b, d, [v = x], |simd| math::log10(simd, v)),
        Op::Log1p => vectors!(b, d, [v = x], |simd| math::log1p(simd, v)),
        Op::Expm1 => vectors!(b, d, [v = x], |simd| math::expm1(simd, v)),
        Op::Sqrt => vectors!(b, d, [v = x], |simd| math::sqrt(simd, v)),
        Op::Rsqrt => vectors!(b, d, [v = x], |simd| math::rsqrt(simd, v)),
        Op::Sin => vectors!(b, d, [v = x], |simd| math::sin(simd, v)),
        Op::Cos => vectors!(b, d, [v = x], |simd| math::cos(simd, v)),
        // Rare in kernels: through double precision, one lane at a time.
        Op::Tan => lanes!(b, d, f32, |v: f32 = x| f64::from(v).tan() as f32),
        Op::Asin => lanes!(b, d, f32, |v: f32 = x| f64::from(v).asin() as f32),
        Op::Acos => lanes!(b, d, f32, |v: f32 = x| f64::from(v).acos() as f32),
        Op::Atan => lanes!(b, d, f32, |v: f32 = x| f64::from(v).atan() as f32),
        Op::Tanh => vectors!(b, d, [v = x], |simd| math::tanh(simd, v)),
        Op::Sigmoid => vectors!(b, d, [v = x], |simd| math::sigmoid(simd, v)),
        Op::Silu => vectors!(b, d, [v = x], |simd| math::silu(simd, v)),
        Op::GeluTanh => vectors!(b, d, [v = x], |simd| math::gelu_tanh(simd, v)),
        Op::GeluErf => vectors!(b, d, [v = x], |simd| math::gelu_erf(simd, v)),
        Op::Softplus => vectors!(b, d, [v = x], |simd| math::softplus(simd, v)),
        Op::Mish => vectors!(b, d, [v = x], |simd| math::mish(simd, v)),
        Op::Erf => vectors!(b, d, [v = x], |simd| math::erf(simd, v)),
        Op::Floor => vectors!(b, d, [v = x], |simd| math::floor(simd, v)),
        Op::Ceil => vectors!(b, d, [v = x], |simd| math::ceil(simd, v)),
        Op::Trunc => vectors!(b, d, [v = x], |simd| math::trunc(simd, v)),
        Op::Round => vectors!(b, d, [v = x], |simd| math::round(simd, v)),
        Op::IsNan => lanes!(b, d, u32, |v: f32 = x| mask(v.is_nan())),
        Op::IsInf => lanes!(b, d, u32, |v: f32 = x| mask(v.is_infinite())),
        Op::Add => vectors!(b, d, [v = x, w = y], |simd| math::add(simd, v, w)),
        Op::Sub => vectors!(b, d, [v = x, w = y], |simd| math::sub(simd, v, w)),
        Op::Mul => vectors!(b, d, [v = x, w = y], |simd| math::mul(simd, v, w)),
        Op::Div => lanes!(b, d, f32, |v: f32 = x, w: f32 = y| v / w),
        Op::FloorDiv => lanes!(b, d, f32, |v: f32 = x, w: f32 = y| (v / w).floor()),
        Op::Rem => lanes!(b, d, f32, |v: f32 = x, w: f32 = y| float_rem(v, w)),
        Op::Pow => vectors!(b, d, [v = x, w = y], |simd| math::pow(simd, v, w)),
        Op::Min => lanes!(b, d, f32, |v: f32 = x, w: f32 = y| if v < w || v.is_nan() { v } else { w }),
        Op::Max => lanes!(b, d, f32, |v: f32 = x, w: f32 = y| if v > w || v.is_nan() { v } else { w }),
        Op::Lt => lanes!(b, d, u32, |v: f32 = x, w: f32 = y| mask(v < w)),
        Op::Le => lanes!(b, d, u32, |v: f32 = x, w: f32 = y| mask(v <= w)),
        Op::Gt => lanes!(b, d, u32, |v: f32 = x, w: f32 = y| mask(v > w)),
        Op::Ge => lanes!(b, d, u32, |v: f32 = x, w: f32 = y| mask(v >= w)),
        Op::Eq => lanes!(b, d, u32, |v: f32 = x, w: f32 = y| mask(v == w)),
        Op::Ne => lanes!(b, d, u32, |v: f32 = x, w: f32 = y| mask(v != w)),
        Op::Fma => vectors!(b, d, [u = x, v = y, w = z], |simd| math::fma(simd, u, v, w)),
        Op::Select => lanes!(b, d, u32, |c: u32 = x, v: u32 = y, w: u32 = z| if c != 0 { v } else { w }),
        // Integer and logical operations never have float operands: types are decided before.
        Op::Not
        | Op::BitNot
        | Op::Popcount
        | Op::And
        | Op::Or
        | Op::BitAnd
        | Op::BitOr
        | Op::BitXor
        | Op::Shl
        | Op::Shr => {}
    }
}

/// `v - w * floor(v / w)` without the error of that product: the remainder of truncation, moved to the sign of `w`.
#[inline(always)]
fn float_rem(v: f32, w: f32) -> f32 {
    let r = v % w;
    if r != 0.0 && (r < 0.0) != (w < 0.0) { r + w } else { r }
}

#[inline(always)]
fn bool_op(b: &Block<'_>, op: Op, d: Id, args: &[Id]) {
    let x = args[0];
    let y = *args.get(1).unwrap_or(&x);
    let z = *args.get(2).unwrap_or(&x);
    match op {
        Op::Not | Op::BitNot => lanes!(b, d, u32, |v: u32 = x| !v),
        Op::And | Op::BitAnd => lanes!(b, d, u32, |v: u32 = x, w: u32 = y| v & w),
        Op::Or | Op::BitOr => lanes!(b, d, u32, |v: u32 = x, w: u32 = y| v | w),
        Op::BitXor | Op::Ne => lanes!(b, d, u32, |v: u32 = x, w: u32 = y| v ^ w),
        Op::Eq => lanes!(b, d, u32, |v: u32 = x, w: u32 = y| !(v ^ w)),
        Op::Lt => lanes!(b, d, u32, |v: u32 = x, w: u32 = y| !v & w),
        Op::Le => lanes!(b, d, u32, |v: u32 = x, w: u32 = y| !v | w),
        Op::Gt => lanes!(b, d, u32, |v: u32 = x, w: u32 = y| v & !w),
        Op::Ge => lanes!(b, d, u32, |v: u32 = x, w: u32 = y| v | !w),
        Op::Select => lanes!(b, d, u32, |c: u32 = x, v: u32 = y, w: u32 = z| if c != 0 { v } else { w }),
        // Arithmetic on booleans is lowered to integers.
        _ => {}
    }
}

macro_rules! int_ops {
    ($name:ident, $t:ty, $signed:literal) => {
        #[inline(always)]
        fn $name(b: &Block<'_>, op: Op, d: Id, args: &[Id]) {
            let x = args[0];
            let y = *args.get(1).unwrap_or(&x);
            let z = *args.get(2).unwrap_or(&x);
            match op {
                Op::Neg => lanes!(b, d, $t, |v: $t = x| v.wrapping_neg()),
                Op::Abs => lanes!(b, d, $t, |v: $t = x| if $signed && v < (0 as $t) { v.wrapping_neg() } else { v }),
                Op::Sign => lanes!(b, d, $t, |v: $t = x| if v == 0 {
                    0
                } else if $signed && v < (0 as $t) {
                    (0 as $t).wrapping_sub(1)
                } else {
                    1
                }),
                Op::BitNot => lanes!(b, d, $t, |v: $t = x| !v),
                Op::Popcount => lanes!(b, d, $t, |v: $t = x| v.count_ones() as $t),
                Op::Add => lanes!(b, d, $t, |v: $t = x, w: $t = y| v.wrapping_add(w)),
                Op::Sub => lanes!(b, d, $t, |v: $t = x, w: $t = y| v.wrapping_sub(w)),
                Op::Mul => lanes!(b, d, $t, |v: $t = x, w: $t = y| v.wrapping_mul(w)),
                Op::FloorDiv => lanes!(b, d, $t, |v: $t = x, w: $t = y| {
                    if w == 0 {
                        0
                    } else {
                        let (q, r) = (v.wrapping_div(w), v.wrapping_rem(w));
                        if $signed && r != 0 && (r < (0 as $t)) != (w < (0 as $t)) { q.wrapping_sub(1) } else { q }
                    }
                }),
                Op::Rem => lanes!(b, d, $t, |v: $t = x, w: $t = y| {
                    if w == 0 {
                        0
                    } else {
                        let r = v.wrapping_rem(w);
                        if $signed && r != 0 && (r < (0 as $t)) != (w < (0 as $t)) { r.wrapping_add(w) } else { r }
                    }
                }),
                Op::Min => lanes!(b, d, $t, |v: $t = x, w: $t = y| v.min(w)),
                Op::Max => lanes!(b, d, $t, |v: $t = x, w: $t = y| v.max(w)),
                Op::Lt => lanes!(b, d, u32, |v: $t = x, w: $t = y| mask(v < w)),
                Op::Le => lanes!(b, d, u32, |v: $t = x, w: $t = y| mask(v <= w)),
                Op::Gt => lanes!(b, d, u32, |v: $t = x, w: $t = y| mask(v > w)),
                Op::Ge => lanes!(b, d, u32, |v: $t = x, w: $t = y| mask(v >= w)),
                Op::Eq => lanes!(b, d, u32, |v: $t = x, w: $t = y| mask(v == w)),
                Op::Ne => lanes!(b, d, u32, |v: $t = x, w: $t = y| mask(v != w)),
                Op::BitAnd => lanes!(b, d, $t, |v: $t = x, w: $t = y| v & w),
                Op::BitOr => lanes!(b, d, $t, |v: $t = x, w: $t = y| v | w),
                Op::BitXor => lanes!(b, d, $t, |v: $t = x, w: $t = y| v ^ w),
                Op::Shl => lanes!(b, d, $t, |v: $t = x, w: $t = y| {
                    if (w as u64) < u64::from(<$t>::BITS) { v << (w as u32 % <$t>::BITS) } else { 0 }
                }),
                Op::Shr => lanes!(b, d, $t, |v: $t = x, w: $t = y| {
                    if (w as u64) < u64::from(<$t>::BITS) {
                        v >> (w as u32 % <$t>::BITS)
                    } else if $signed && v < (0 as $t) {
                        !0
                    } else {
                        0
                    }
                }),
                Op::Select => lanes!(b, d, $t, |c: u32 = x, v: $t = y, w: $t = z| if c != 0 { v } else { w }),
                // Float operations have float operands: types are decided before.
                _ => {}
            }
        }
    };
}

int_ops!(int_op_i32, i32, true);
int_ops!(int_op_u32, u32, false);
int_ops!(int_op_i64, i64, true);
int_ops!(int_op_u64, u64, false);

#[inline(always)]
fn cast(b: &Block<'_>, to: Dtype, d: Id, x: Id) {
    macro_rules! from {
        ($t:ty, $v:ident, $as_bool:expr) => {
            match to {
                Dtype::Bool => lanes!(b, d, u32, |$v: $t = x| mask($as_bool)),
                Dtype::I8 => lanes!(b, d, i32, |v: $t = x| i32::from(v as i8)),
                Dtype::I16 => lanes!(b, d, i32, |v: $t = x| i32::from(v as i16)),
                Dtype::U8 => lanes!(b, d, u32, |v: $t = x| u32::from(v as u8)),
                Dtype::U16 => lanes!(b, d, u32, |v: $t = x| u32::from(v as u16)),
                Dtype::I32 => lanes!(b, d, i32, |v: $t = x| v as i32),
                Dtype::U32 => lanes!(b, d, u32, |v: $t = x| v as u32),
                Dtype::I64 => lanes!(b, d, i64, |v: $t = x| v as i64),
                Dtype::U64 => lanes!(b, d, u64, |v: $t = x| v as u64),
                Dtype::F16 | Dtype::Bf16 | Dtype::F32 => lanes!(b, d, f32, |v: $t = x| v as f32),
            }
        };
    }
    match b.program.value(x).ty {
        Ty::Bool => match to {
            Dtype::Bool => lanes!(b, d, u32, |v: u32 = x| v),
            Dtype::F16 | Dtype::Bf16 | Dtype::F32 => {
                lanes!(b, d, u32, |v: u32 = x| v & 1.0f32.to_bits());
            }
            Dtype::I64 | Dtype::U64 => lanes!(b, d, u64, |v: u32 = x| u64::from(v & 1)),
            _ => lanes!(b, d, u32, |v: u32 = x| v & 1),
        },
        Ty::F32 => match to {
            Dtype::F32 => lanes!(b, d, f32, |v: f32 = x| v),
            Dtype::F16 => vectors!(b, d, [v = x], |simd| convert::round_to_f16(simd, v)),
            Dtype::Bf16 => vectors!(b, d, [v = x], |simd| convert::round_to_bf16(simd, v)),
            _ => from!(f32, v, v != 0.0),
        },
        Ty::I32 => from!(i32, v, v != 0),
        Ty::U32 => from!(u32, v, v != 0),
        Ty::I64 => from!(i64, v, v != 0),
        Ty::U64 => from!(u64, v, v != 0),
    }
}

#[inline(always)]
fn random(b: &Block<'_>, d: Id, seed: Id) {
    let wide = b.program.value(seed).ty == Ty::U64;
    // SAFETY: a place of `n` 32-bit lanes, disjoint from the seed's.
    let out = unsafe { b.get_mut::<u32>(d) };
    let key = |i: usize| -> [u32; 2] {
        // SAFETY: the seed's lanes, `n` of its type.
        unsafe {
            if wide {
                let s = b.get::<u64>(seed)[i];
                [s as u32, (s >> 32) as u32]
            } else {
                [b.get::<u32>(seed)[i], 0]
            }
        }
    };
    let mut words = [0; 4];
    let mut held: Option<(u64, [u32; 2])> = None;
    for (i, d) in out.iter_mut().enumerate() {
        let at = b.linear + i as u64;
        let want = (at / 4, key(i));
        if held != Some(want) {
            words = philox4x32([want.0 as u32, (want.0 >> 32) as u32, 0, 0], want.1);
            held = Some(want);
        }
        *d = words[(at % 4) as usize];
    }
}

/// Adds a block to the accumulators of its reductions.
pub(super) struct Accumulate<'a> {
    pub block: &'a Block<'a>,
    pub reduces: &'a [Step],
    pub accs: &'a mut [Acc],
}

impl WithSimd for Accumulate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let b = self.block;
        for (r, acc) in self.reduces.iter().zip(self.accs) {
            let Node::Reduce(_, x) = b.program.value(r.id).node else { continue };
            if let (Some(_), Node::Op(_, args)) = (r.inner, &b.program.value(x).node) {
                // SAFETY: the factors' lanes, `n` floats each.
                unsafe { reduce::dot(simd, acc, b.get(args[0]), b.get(args[1])) };
                continue;
            }
            // SAFETY: the operand's lanes, `n` of its type.
            unsafe {
                match acc.ty {
                    Ty::F32 => reduce::floats(simd, acc, b.get(x), b.col),
                    Ty::I32 => reduce::signed(acc, b.get(x), b.col),
                    Ty::U32 | Ty::Bool => reduce::unsigned(acc, b.get(x), b.col),
                    Ty::I64 => reduce::signed_wide(acc, b.get(x), b.col),
                    Ty::U64 => reduce::unsigned_wide(acc, b.get(x), b.col),
                }
            }
        }
    }
}
