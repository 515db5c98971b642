//! An order the compiler must keep: for four AVX registers; elsewhere its own choice stands.

use pulp::Simd;

/// Computes all registers before anything that uses one of them. Emits no instruction.
#[inline(always)]
pub(crate) fn together<S: Simd, const K: usize>(x: &mut [S::f32s; K]) {
    #[cfg(target_arch = "x86_64")]
    if core::any::TypeId::of::<S>() == core::any::TypeId::of::<pulp::x86::V3>() {
        // SAFETY: V3's registers are 32 bytes; a value of the type shows that the machine has AVX.
        unsafe {
            let at: *mut core::arch::x86_64::__m256 = x.as_mut_ptr().cast();
            if K == 4 {
                x86::quad(at);
            }
        }
    }
    let _ = x;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::{asm, x86_64::__m256};

    /// # Safety
    /// `x` points to four values.
    #[target_feature(enable = "avx")]
    #[inline]
    pub(super) unsafe fn quad(x: *mut __m256) {
        // SAFETY: nothing is executed; the values stay.
        unsafe {
            let (mut a, mut b, mut c, mut d) = (*x, *x.add(1), *x.add(2), *x.add(3));
            asm!("/*{a}{b}{c}{d}*/", a = inout(ymm_reg) a, b = inout(ymm_reg) b, c = inout(ymm_reg) c, d = inout(ymm_reg) d,
                options(nomem, nostack, preserves_flags));
            (*x, *x.add(1), *x.add(2), *x.add(3)) = (a, b, c, d);
        }
    }
}
