//! The loop around a function of registers: several registers at a time, side by side.

use pulp::{Simd, WithSimd};

/// Registers that go through a function side by side: enough to keep two units of four cycles' latency half busy by
/// themselves, and still few enough for 16 registers.
const SIDE_BY_SIDE: usize = 4;

/// How far ahead of itself a loop asks for memory, in bytes.
const AHEAD: usize = 1024;

/// A function of N arrays, as a type, so that each gets its own loop (a closure would not inherit the instruction set).
pub trait Lockstep<const N: usize>: Copy {
    /// The function of K registers of each argument.
    fn eval<S: Simd, const K: usize>(self, simd: S, x: [[S::f32s; K]; N]) -> [S::f32s; K];
}

/// An argument of a loop.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// One value an element.
    Lanes(&'a [f32]),
    /// The same value for every element.
    Same(f32),
}

/// `dst[i] = f(src[0][i], ..., src[N-1][i])` as something to dispatch: one call of its own for each function, which keeps
/// compilation in bounds where many functions meet.
#[derive(Debug)]
pub struct Loop<'a, F, const N: usize> {
    f: F,
    dst: &'a mut [f32],
    src: [Source<'a>; N],
    past: bool,
    soon: Option<Soon>,
}

/// Memory that will be read soon: asked for piece by piece while a loop computes, so that both go on together.
#[derive(Debug, Clone, Copy)]
pub struct Soon {
    at: *const u8,
    /// Bytes for each element of the loop.
    size: usize,
}

impl Soon {
    /// As many elements of `size` bytes from `at` as the loop has. A hint: nothing is read that the program could see, and an
    /// address that can't be read does no harm.
    pub fn new(at: *const u8, size: usize) -> Self {
        Self { at, size }
    }
}

impl<'a, F: Lockstep<N>, const N: usize> Loop<'a, F, N> {
    /// The loop over slices.
    ///
    /// # Panics
    /// If they are not equally long.
    pub fn new(f: F, dst: &'a mut [f32], src: [Source<'a>; N]) -> Self {
        for s in src {
            assert!(matches!(s, Source::Same(_)) || matches!(s, Source::Lanes(s) if s.len() == dst.len()));
        }
        Self { f, dst, src, past: false, soon: None }
    }

    /// Asks for other memory on the way.
    pub fn soon(self, soon: Option<Soon>) -> Self {
        Self { soon, ..self }
    }

    /// Stores whole registers past the caches where the machine can, if `yes`.
    ///
    /// # Safety
    /// Then the destination is aligned to 64 bytes, and the thread calls [`crate::stream::fence`] before it lets anybody else
    /// read it.
    pub unsafe fn past(self, yes: bool) -> Self {
        Self { past: yes, ..self }
    }
}

impl<F: Lockstep<N>, const N: usize> WithSimd for Loop<'_, F, N> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // SAFETY: the slices are equally long, and streaming was promised when it was asked for.
        unsafe { run::<S, F, N, SIDE_BY_SIDE>(simd, self.f, self.dst, self.src, self.past, self.soon) }
    }
}

/// K registers at a time; what is left at the end goes through the same code, filled up with zeros.
///
/// # Safety
/// The slices are equally long; for `past` see [`Loop::past`].
#[inline(always)]
unsafe fn run<S: Simd, F: Lockstep<N>, const N: usize, const K: usize>(
    simd: S,
    f: F,
    dst: &mut [f32],
    src: [Source<'_>; N],
    past: bool,
    soon: Option<Soon>,
) {
    let n = dst.len();
    let step = K * S::F32_LANES;
    let (whole, left) = (n / step, n % step);
    // What is left goes through the same code as the rest, from and to buffers of one step.
    let zero = [simd.splat_f32s(0.0); K];
    let (mut last, mut held) = ([zero; N], zero);
    let mut from = [core::ptr::null::<[S::f32s; K]>(); N];
    let mut stride = [1; N];
    for j in 0..N {
        match src[j] {
            Source::Same(v) => {
                last[j] = [simd.splat_f32s(v); K];
                (from[j], stride[j]) = (&raw const last[j], 0);
            }
            Source::Lanes(lanes) => {
                from[j] = lanes.as_ptr().cast();
                if left > 0 {
                    // SAFETY: registers are plain floats, and `left` of them fit into K registers.
                    unsafe {
                        let rest = lanes.as_ptr().add(whole * step);
                        core::ptr::copy_nonoverlapping(rest, (&raw mut last[j]).cast(), left);
                    }
                }
            }
        }
    }
    // What each argument's turn asks for: a line that is there already, again and again; or, in a loop over more than the
    // caches hold, what the argument needs soon (the machine's own prediction starts anew at every page); or the caller's wish.
    // Nothing is asked for right before it is read: that would hide the pattern from the machine.
    let mut ahead = [Soon::new((&raw const last).cast(), 0); N];
    for j in 0..N {
        if past && stride[j] == 1 {
            ahead[j] = Soon::new(from[j].cast::<u8>().wrapping_add(AHEAD), 4);
        }
    }
    ahead[0] = soon.unwrap_or(ahead[0]);
    let mut to: *mut [S::f32s; K] = dst.as_mut_ptr().cast();
    let (mut steps, mut past) = (whole, past);
    for rest in [false, true] {
        if rest {
            if left == 0 {
                return;
            }
            to = &raw mut held;
            for j in 0..N {
                from[j] = &raw const last[j];
            }
            (steps, past) = (1, false);
        }
        for i in 0..steps {
            let mut x = [zero; N];
            for a in &ahead {
                prefetch(a.at.wrapping_add(i * step * a.size), step * 4);
            }
            // SAFETY: `steps` steps lie inside the slices (and one inside the buffers); whole steps keep the alignment that
            // `past` promises.
            unsafe {
                for j in 0..N {
                    x[j] = from[j].add(i * stride[j]).read_unaligned();
                }
                let y = f.eval(simd, x);
                let to = to.add(i);
                if past {
                    for (k, y) in y.iter().enumerate() {
                        store_past::<S>(to.cast::<S::f32s>().add(k), *y);
                    }
                } else {
                    to.write_unaligned(y);
                }
            }
        }
    }
    // SAFETY: `left` floats of the last step, into the end of the slice.
    unsafe {
        core::ptr::copy_nonoverlapping((&raw const held).cast(), dst.as_mut_ptr().add(whole * step), left);
    }
}

/// Asks for `bytes` bytes of memory.
#[inline(always)]
fn prefetch(at: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..bytes.div_ceil(64) {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(64 * line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, bytes);
}

/// Stores a register past the caches where the machine can.
///
/// # Safety
/// `to` is aligned to the register's size and may be written; a fence must follow before others read it.
#[inline(always)]
unsafe fn store_past<S: Simd>(to: *mut S::f32s, v: S::f32s) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::any::TypeId;
        use core::arch::x86_64::{_mm_stream_ps, _mm256_stream_ps, _mm512_stream_ps};
        let to: *mut f32 = to.cast();
        // SAFETY: a register of this size exists only where its instructions do; the same bits in the same size, aligned
        // as the caller promises.
        unsafe {
            match size_of::<S::f32s>() {
                16 if !S::IS_SCALAR => return _mm_stream_ps(to, core::mem::transmute_copy(&v)),
                32 if TypeId::of::<S>() == TypeId::of::<pulp::x86::V3>() => {
                    return _mm256_stream_ps(to, core::mem::transmute_copy(&v));
                }
                64 if TypeId::of::<S>() == TypeId::of::<pulp::x86::V4>() => {
                    return _mm512_stream_ps(to, core::mem::transmute_copy(&v));
                }
                _ => {}
            }
        }
    }
    // SAFETY: as the caller promises.
    unsafe { to.write_unaligned(v) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{available, stream};

    #[derive(Clone, Copy)]
    struct TimesPlus;

    impl Lockstep<3> for TimesPlus {
        #[inline(always)]
        fn eval<S: Simd, const K: usize>(self, simd: S, [x, y, z]: [[S::f32s; K]; 3]) -> [S::f32s; K] {
            crate::math::add(simd, crate::math::mul(simd, x, y), z)
        }
    }

    #[repr(align(64))]
    struct Aligned([f32; 320]);

    #[test]
    fn every_length_and_way_to_store() {
        let x: Vec<f32> = (0..300).map(|i| i as f32).collect();
        let z: Vec<f32> = (0..300).map(|i| 1000.0 - i as f32).collect();
        for arch in available() {
            for n in 0..300 {
                for past in [false, true] {
                    for soon in
                        [None, Some(Soon::new(x.as_ptr().cast(), 4)), Some(Soon::new(core::ptr::null(), 2))]
                    {
                        let mut out = Aligned([-1.0; 320]);
                        let (dst, rest) = out.0.split_at_mut(n);
                        let src = [Source::Lanes(&x[..n]), Source::Same(2.0), Source::Lanes(&z[..n])];
                        // SAFETY: the buffer is aligned, and this thread alone reads it, after the fence.
                        arch.1.dispatch(unsafe { Loop::new(TimesPlus, dst, src).past(past) }.soon(soon));
                        stream::fence();
                        assert!(
                            dst.iter().enumerate().all(|(i, d)| *d == 1000.0 + i as f32),
                            "{} {n}",
                            arch.0
                        );
                        assert!(rest.iter().all(|r| *r == -1.0), "{} {n} wrote past the end", arch.0);
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "Lanes")]
    fn lengths_must_agree() {
        let mut dst = [0.0; 4];
        let (x, same) = (Source::Lanes(&[0.0; 3]), Source::Same(0.0));
        let _ = Loop::new(TimesPlus, &mut dst, [x, same, same]);
    }
}
