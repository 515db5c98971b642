//! One block of values, one operation after another.

use pulp::{Simd, WithSimd};
use zmlx_lang::{Dtype, Id, Node, Op, Program, Ty};
use zmlx_simd::philox::philox4x32;
use zmlx_simd::{convert, math};

use super::code::Step;
use super::reduce::{self, Acc};
use super::table::{OutOfBounds, Table, load};

/// A block under evaluation: where each value's lanes are, and where the block lies.
pub(super) struct Block<'a> {
    pub program: &'a Program,
    /// Lanes of every value in use: `n` of 4 bytes, or 8 for 64-bit types. Values of one operation do not overlap.
    pub lanes: &'a [*mut u8],
    /// Elements in the block.
    pub n: usize,
    /// First column.
    pub col: usize,
    /// Row-major number of the first element in the domain.
    pub linear: u64,
    pub tables: &'a [Table<'a>],
    /// A value whose lanes are an output that is written past the caches; those that can't are stored as usual.
    pub streamed: Option<Id>,
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

/// Stores a vector past the caches where the machine can.
///
/// # Safety
/// `to` is aligned to the vector's size and may be written; a fence must follow before others read it.
#[inline(always)]
unsafe fn store_past<S: Simd>(to: &mut S::f32s, v: S::f32s) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_mm_stream_ps, _mm256_stream_ps, _mm512_stream_ps};
        let to: *mut f32 = std::ptr::from_mut(to).cast();
        // SAFETY: a vector of this size exists only where its instructions do; the same bits in the same size, aligned as
        // the caller promises.
        unsafe {
            match size_of::<S::f32s>() {
                16 if !S::IS_SCALAR => return _mm_stream_ps(to, std::mem::transmute_copy(&v)),
                32 if std::any::TypeId::of::<S>() == std::any::TypeId::of::<pulp::x86::V3>() => {
                    return _mm256_stream_ps(to, std::mem::transmute_copy(&v));
                }
                64 if std::any::TypeId::of::<S>() == std::any::TypeId::of::<pulp::x86::V4>() => {
                    return _mm512_stream_ps(to, std::mem::transmute_copy(&v));
                }
                _ => {}
            }
        }
    }
    *to = v;
}

impl Block<'_> {
    /// Whether a value's vectors go past the caches: it is streamed and its lanes are aligned.
    #[inline(always)]
    fn streams(&self, id: Id) -> bool {
        self.streamed == Some(id) && (self.lanes[id.index()] as usize).is_multiple_of(64)
    }
}

/// `d = f(a)` over vectors.
macro_rules! math1 {
    ($simd:ident, $b:ident, $d:expr, $a:expr, $f:expr) => {{
        // SAFETY: places of one operation are disjoint and hold `n` 32-bit lanes.
        let (d, a) = unsafe { ($b.get_mut::<f32>($d), $b.get::<f32>($a)) };
        let (dv, dt) = S::as_mut_simd_f32s(d);
        let (av, at) = S::as_simd_f32s(a);
        if $b.streams($d) {
            for (d, a) in dv.iter_mut().zip(av) {
                // SAFETY: aligned, since the lanes are and whole vectors follow each other; the task ends with a fence.
                unsafe { store_past::<S>(d, $f($simd, *a)) };
            }
        } else {
            for (d, a) in dv.iter_mut().zip(av) {
                *d = $f($simd, *a);
            }
        }
        if !at.is_empty() {
            let v = $simd.partial_load_f32s(at);
            $simd.partial_store_f32s(dt, $f($simd, v));
        }
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

/// Whether an operation's vectors can be stored past the caches as they are computed.
pub(super) fn can_stream(program: &Program, step: &Step) -> bool {
    let (Node::Op(op, _), Ty::F32) = (&program.value(step.id).node, program.value(step.id).ty) else {
        return false;
    };
    step.inner.is_some()
        || matches!(
            op,
            Op::Add
                | Op::Sub
                | Op::Mul
                | Op::Exp
                | Op::Log
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
        )
}

impl WithSimd for Exec<'_> {
    type Output = Result<(), OutOfBounds>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let b = self.block;
        for step in self.code {
            let id = step.id;
            let value = b.program.value(id);
            if let Some(inner) = step.inner {
                fused(simd, b, id, inner);
                continue;
            }
            match &value.node {
                Node::Op(op, args) => {
                    let ty = b.program.value(args[args.len() - 1]).ty;
                    match ty {
                        Ty::F32 => float_op(simd, b, *op, id, args),
                        Ty::Bool => bool_op(b, *op, id, args),
                        Ty::I32 => int_op_i32(b, *op, id, args),
                        Ty::U32 => int_op_u32(b, *op, id, args),
                        Ty::I64 => int_op_i64(b, *op, id, args),
                        Ty::U64 => int_op_u64(b, *op, id, args),
                    }
                }
                Node::Cast(dtype, x) => cast(simd, b, *dtype, id, *x),
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

/// `d = f(a, b)` over vectors.
macro_rules! math2 {
    ($simd:ident, $b:ident, $d:expr, $a:expr, $c:expr, |$x:ident, $y:ident| $e:expr) => {{
        // SAFETY: places of one operation are disjoint and hold `n` 32-bit lanes.
        let (d, a, c) = unsafe { ($b.get_mut::<f32>($d), $b.get::<f32>($a), $b.get::<f32>($c)) };
        let (dv, dt) = S::as_mut_simd_f32s(d);
        let ((av, at), (cv, ct)) = (S::as_simd_f32s(a), S::as_simd_f32s(c));
        if $b.streams($d) {
            for ((d, &$x), &$y) in dv.iter_mut().zip(av).zip(cv) {
                // SAFETY: as in `math1`.
                unsafe { store_past::<S>(d, $e) };
            }
        } else {
            for ((d, &$x), &$y) in dv.iter_mut().zip(av).zip(cv) {
                *d = $e;
            }
        }
        if !at.is_empty() {
            let ($x, $y) = ($simd.partial_load_f32s(at), $simd.partial_load_f32s(ct));
            $simd.partial_store_f32s(dt, $e);
        }
    }};
}

/// `d = a * b * c` over vectors.
#[inline(always)]
fn product3<S: Simd>(simd: S, b: &Block<'_>, d: Id, factors: [Id; 3]) {
    // SAFETY: places of one operation are disjoint and hold `n` 32-bit lanes.
    let (to, [x, y, z]) = unsafe { (b.get_mut::<f32>(d), factors.map(|f| b.get::<f32>(f))) };
    let (dv, dt) = S::as_mut_simd_f32s(to);
    let ((xv, xt), (yv, yt), (zv, zt)) = (S::as_simd_f32s(x), S::as_simd_f32s(y), S::as_simd_f32s(z));
    if b.streams(d) {
        for (((d, x), y), z) in dv.iter_mut().zip(xv).zip(yv).zip(zv) {
            // SAFETY: as in `math1`.
            unsafe { store_past::<S>(d, simd.mul_f32s(simd.mul_f32s(*x, *y), *z)) };
        }
    } else {
        for (((d, x), y), z) in dv.iter_mut().zip(xv).zip(yv).zip(zv) {
            *d = simd.mul_f32s(simd.mul_f32s(*x, *y), *z);
        }
    }
    for (((d, x), y), z) in dt.iter_mut().zip(xt).zip(yt).zip(zt) {
        *d = x * y * z;
    }
}

/// Two operations in one: see [`super::code::fuse`].
#[inline(always)]
fn fused<S: Simd>(simd: S, b: &Block<'_>, d: Id, inner: Id) {
    let (Node::Op(outer, own), Node::Op(op, args)) = (&b.program.value(d).node, &b.program.value(inner).node)
    else {
        return;
    };
    let other = if own.len() == 2 && own[0] == inner { own[1] } else { own[0] };
    let x = args[0];
    match (*outer, *op) {
        (Op::Exp, Op::Sub) => {
            let y = args[1];
            math2!(simd, b, d, x, y, |v, w| math::exp(simd, simd.sub_f32s(v, w)));
        }
        (Op::Mul, Op::Mul) => {
            let y = args[1];
            product3(simd, b, d, [x, y, other]);
        }
        (Op::Mul, Op::Silu) => math2!(simd, b, d, x, other, |v, w| simd.mul_f32s(math::silu(simd, v), w)),
        (Op::Mul, Op::GeluTanh) => {
            math2!(simd, b, d, x, other, |v, w| simd.mul_f32s(math::gelu_tanh(simd, v), w))
        }
        (Op::Mul, Op::GeluErf) => {
            math2!(simd, b, d, x, other, |v, w| simd.mul_f32s(math::gelu_erf(simd, v), w))
        }
        (Op::Mul, Op::Sigmoid) => {
            math2!(simd, b, d, x, other, |v, w| simd.mul_f32s(math::sigmoid(simd, v), w))
        }
        (Op::Mul, Op::Exp) => math2!(simd, b, d, x, other, |v, w| simd.mul_f32s(math::exp(simd, v), w)),
        _ => {}
    }
}

#[inline(always)]
fn float_op<S: Simd>(simd: S, b: &Block<'_>, op: Op, d: Id, args: &[Id]) {
    let x = args[0];
    let y = *args.get(1).unwrap_or(&x);
    let z = *args.get(2).unwrap_or(&x);
    match op {
        Op::Neg => lanes!(b, d, f32, |v: f32 = x| -v),
        Op::Abs => lanes!(b, d, f32, |v: f32 = x| v.abs()),
        Op::Sign => math1!(simd, b, d, x, math::sign),
        Op::Exp => math1!(simd, b, d, x, math::exp),
        Op::Exp2 => math1!(simd, b, d, x, math::exp2),
        Op::Log => math1!(simd, b, d, x, math::log),
        Op::Log2 => math1!(simd, b, d, x, math::log2),
        Op::Log10 => math1!(simd, b, d, x, math::log10),
        Op::Log1p => math1!(simd, b, d, x, math::log1p),
        Op::Expm1 => math1!(simd, b, d, x, math::expm1),
        Op::Sqrt => math1!(simd, b, d, x, math::sqrt),
        Op::Rsqrt => math1!(simd, b, d, x, math::rsqrt),
        Op::Sin => math1!(simd, b, d, x, math::sin),
        Op::Cos => math1!(simd, b, d, x, math::cos),
        // Rare in kernels: through double precision, one lane at a time.
        Op::Tan => lanes!(b, d, f32, |v: f32 = x| f64::from(v).tan() as f32),
        Op::Asin => lanes!(b, d, f32, |v: f32 = x| f64::from(v).asin() as f32),
        Op::Acos => lanes!(b, d, f32, |v: f32 = x| f64::from(v).acos() as f32),
        Op::Atan => lanes!(b, d, f32, |v: f32 = x| f64::from(v).atan() as f32),
        Op::Tanh => math1!(simd, b, d, x, math::tanh),
        Op::Sigmoid => math1!(simd, b, d, x, math::sigmoid),
        Op::Silu => math1!(simd, b, d, x, math::silu),
        Op::GeluTanh => math1!(simd, b, d, x, math::gelu_tanh),
        Op::GeluErf => math1!(simd, b, d, x, math::gelu_erf),
        Op::Softplus => math1!(simd, b, d, x, math::softplus),
        Op::Mish => math1!(simd, b, d, x, math::mish),
        Op::Erf => math1!(simd, b, d, x, math::erf),
        Op::Floor => math1!(simd, b, d, x, math::floor),
        Op::Ceil => math1!(simd, b, d, x, math::ceil),
        Op::Trunc => math1!(simd, b, d, x, math::trunc),
        Op::Round => math1!(simd, b, d, x, math::round),
        Op::IsNan => lanes!(b, d, u32, |v: f32 = x| mask(v.is_nan())),
        Op::IsInf => lanes!(b, d, u32, |v: f32 = x| mask(v.is_infinite())),
        Op::Add => math2!(simd, b, d, x, y, |v, w| simd.add_f32s(v, w)),
        Op::Sub => math2!(simd, b, d, x, y, |v, w| simd.sub_f32s(v, w)),
        Op::Mul => math2!(simd, b, d, x, y, |v, w| simd.mul_f32s(v, w)),
        Op::Div => lanes!(b, d, f32, |v: f32 = x, w: f32 = y| v / w),
        Op::FloorDiv => lanes!(b, d, f32, |v: f32 = x, w: f32 = y| (v / w).floor()),
        Op::Rem => lanes!(b, d, f32, |v: f32 = x, w: f32 = y| float_rem(v, w)),
        Op::Pow => pow(simd, b, d, x, y),
        Op::Min => lanes!(b, d, f32, |v: f32 = x, w: f32 = y| if v < w || v.is_nan() { v } else { w }),
        Op::Max => lanes!(b, d, f32, |v: f32 = x, w: f32 = y| if v > w || v.is_nan() { v } else { w }),
        Op::Lt => lanes!(b, d, u32, |v: f32 = x, w: f32 = y| mask(v < w)),
        Op::Le => lanes!(b, d, u32, |v: f32 = x, w: f32 = y| mask(v <= w)),
        Op::Gt => lanes!(b, d, u32, |v: f32 = x, w: f32 = y| mask(v > w)),
        Op::Ge => lanes!(b, d, u32, |v: f32 = x, w: f32 = y| mask(v >= w)),
        Op::Eq => lanes!(b, d, u32, |v: f32 = x, w: f32 = y| mask(v == w)),
        Op::Ne => lanes!(b, d, u32, |v: f32 = x, w: f32 = y| mask(v != w)),
        Op::Fma => fma(simd, b, d, x, y, z),
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
fn fma<S: Simd>(simd: S, b: &Block<'_>, d: Id, x: Id, y: Id, z: Id) {
    // SAFETY: places of one operation are disjoint and hold `n` 32-bit lanes.
    let (d, x, y, z) = unsafe { (b.get_mut::<f32>(d), b.get::<f32>(x), b.get::<f32>(y), b.get::<f32>(z)) };
    let (dv, dt) = S::as_mut_simd_f32s(d);
    let ((xv, xt), (yv, yt), (zv, zt)) = (S::as_simd_f32s(x), S::as_simd_f32s(y), S::as_simd_f32s(z));
    for (((d, x), y), z) in dv.iter_mut().zip(xv).zip(yv).zip(zv) {
        *d = simd.mul_add_f32s(*x, *y, *z);
    }
    if !xt.is_empty() {
        let p = |t| simd.partial_load_f32s(t);
        simd.partial_store_f32s(dt, simd.mul_add_f32s(p(xt), p(yt), p(zt)));
    }
}

#[inline(always)]
fn pow<S: Simd>(simd: S, b: &Block<'_>, d: Id, x: Id, y: Id) {
    // SAFETY: places of one operation are disjoint and hold `n` 32-bit lanes.
    let (d, x, y) = unsafe { (b.get_mut::<f32>(d), b.get::<f32>(x), b.get::<f32>(y)) };
    let (dv, dt) = S::as_mut_simd_f32s(d);
    let ((xv, xt), (yv, yt)) = (S::as_simd_f32s(x), S::as_simd_f32s(y));
    for ((d, x), y) in dv.iter_mut().zip(xv).zip(yv) {
        *d = math::pow(simd, *x, *y);
    }
    if !xt.is_empty() {
        simd.partial_store_f32s(dt, math::pow(simd, simd.partial_load_f32s(xt), simd.partial_load_f32s(yt)));
    }
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
fn cast<S: Simd>(simd: S, b: &Block<'_>, to: Dtype, d: Id, x: Id) {
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
            Dtype::F16 => math1!(simd, b, d, x, convert::round_to_f16),
            Dtype::Bf16 => math1!(simd, b, d, x, convert::round_to_bf16),
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
