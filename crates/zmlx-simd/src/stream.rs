//! Copies that bypass the cache: for results that will not be read again soon, a non-temporal store saves reading the
//! destination's cache lines first.

use crate::SimdError;
use crate::error::same_length;

/// Copies `src` to `dst` with non-temporal stores where the machine has them (x86-64), a plain copy elsewhere.
///
/// The stores are ordered before anything this thread writes afterwards, as with a plain copy.
///
/// # Errors
/// [`SimdError::Length`] if the lengths differ.
pub fn stream_copy_bytes(dst: &mut [u8], src: &[u8]) -> Result<(), SimdError> {
    same_length("stream_copy_bytes", dst.len(), src.len())?;
    #[cfg(target_arch = "x86_64")]
    x86::copy(dst, src);
    #[cfg(not(target_arch = "x86_64"))]
    dst.copy_from_slice(src);
    Ok(())
}

/// [`stream_copy_bytes`] without its ordering: for many pieces with one [`fence`] after the last.
///
/// # Errors
/// [`SimdError::Length`] if the lengths differ.
///
/// # Safety
/// The thread must call [`fence`] before it lets anybody else (another thread, or code that hands the memory on) read `dst`.
pub unsafe fn stream_copy_unfenced(dst: &mut [u8], src: &[u8]) -> Result<(), SimdError> {
    same_length("stream_copy_unfenced", dst.len(), src.len())?;
    #[cfg(target_arch = "x86_64")]
    x86::copy_unfenced(dst, src);
    #[cfg(not(target_arch = "x86_64"))]
    dst.copy_from_slice(src);
    Ok(())
}

/// Puts earlier non-temporal stores of this thread before its later ones.
pub fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64.
    unsafe {
        core::arch::x86_64::_mm_sfence();
    }
}

/// [`stream_copy_bytes`] for f32. `dst` needs no more than f32's own alignment.
///
/// # Errors
/// [`SimdError::Length`] if the lengths differ (in elements).
pub fn stream_copy(dst: &mut [f32], src: &[f32]) -> Result<(), SimdError> {
    same_length("stream_copy", dst.len(), src.len())?;
    stream_copy_bytes(pulp::bytemuck::cast_slice_mut(dst), pulp::bytemuck::cast_slice(src))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use core::arch::x86_64::{
        __m128i, __m256i, _mm_loadu_si128, _mm_stream_si128, _mm256_loadu_si256, _mm256_stream_si256,
    };
    use std::sync::OnceLock;

    pub(super) fn copy(dst: &mut [u8], src: &[u8]) {
        copy_unfenced(dst, src);
        // Non-temporal stores are weakly ordered: the fence puts them before later stores (such as a "done" flag).
        super::fence();
    }

    /// Copies equally long slices: plain up to the first aligned address, streaming, then a plain tail.
    pub(super) fn copy_unfenced(dst: &mut [u8], src: &[u8]) {
        static WIDE: OnceLock<bool> = OnceLock::new();
        let wide = *WIDE.get_or_init(|| is_x86_feature_detected!("avx"));
        let step = if wide { 32 } else { 16 };
        let head = dst.as_ptr().align_offset(step).min(dst.len());
        let (dst_head, dst) = dst.split_at_mut(head);
        let (src_head, src) = src.split_at(head);
        dst_head.copy_from_slice(src_head);
        let body = dst.len() / step * step;
        let (dst, dst_tail) = dst.split_at_mut(body);
        let (src, src_tail) = src.split_at(body);
        if wide {
            // SAFETY: AVX was detected; dst starts 32-byte aligned (or is empty), both hold `body` bytes, a multiple of 32.
            unsafe { stream_32(dst, src) };
        } else {
            // SAFETY: SSE2 is part of x86-64; dst starts 16-byte aligned (or is empty), both hold a multiple of 16 bytes.
            unsafe { stream_16(dst, src) };
        }
        dst_tail.copy_from_slice(src_tail);
    }

    /// # Safety
    /// AVX must be available, `dst` must be 32-byte aligned (or empty) and both slices equally long, a multiple of 32.
    #[target_feature(enable = "avx")]
    unsafe fn stream_32(dst: &mut [u8], src: &[u8]) {
        for (d, s) in dst.chunks_exact_mut(32).zip(src.chunks_exact(32)) {
            // SAFETY: d and s are 32 bytes each; d is 32-byte aligned by the function's contract; the load is unaligned.
            unsafe {
                let v = _mm256_loadu_si256(s.as_ptr().cast::<__m256i>());
                _mm256_stream_si256(d.as_mut_ptr().cast::<__m256i>(), v);
            }
        }
    }

    /// # Safety
    /// `dst` must be 16-byte aligned (or empty) and both slices equally long, a multiple of 16.
    unsafe fn stream_16(dst: &mut [u8], src: &[u8]) {
        for (d, s) in dst.chunks_exact_mut(16).zip(src.chunks_exact(16)) {
            // SAFETY: d and s are 16 bytes each; d is 16-byte aligned by the function's contract; the load is unaligned.
            unsafe {
                let v = _mm_loadu_si128(s.as_ptr().cast::<__m128i>());
                _mm_stream_si128(d.as_mut_ptr().cast::<__m128i>(), v);
            }
        }
    }

    #[cfg(test)]
    #[test]
    fn narrow_path_copies() {
        #[repr(align(16))]
        struct Aligned([u8; 160]);
        let src: Vec<u8> = (0..160).collect();
        let mut dst = Aligned([0; 160]);
        // SAFETY: the buffer is 16-byte aligned and 160 is a multiple of 16.
        unsafe { stream_16(&mut dst.0, &src) };
        assert_eq!(dst.0[..], src[..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_offset_and_length() {
        let src: Vec<u8> = (0..400u32).map(|i| (i * 7 + 3) as u8).collect();
        for offset in 0..40 {
            for len in (0..130).chain([255, 256, 257, 300]) {
                let mut dst = vec![0xa5u8; 400];
                stream_copy_bytes(&mut dst[offset..offset + len], &src[5..5 + len]).unwrap();
                assert_eq!(dst[offset..offset + len], src[5..5 + len], "offset {offset} length {len}");
                let outside = dst[..offset].iter().chain(&dst[offset + len..]);
                assert!(outside.into_iter().all(|&b| b == 0xa5), "offset {offset} length {len}");
            }
        }
    }

    #[test]
    fn floats_at_8_byte_alignment() {
        let src: Vec<f32> = (0..1000).map(|i| i as f32 * 0.5).collect();
        let mut dst = vec![0.0f32; 1002];
        stream_copy(&mut dst[2..], &src).unwrap();
        assert_eq!(dst[2..], src[..]);
    }

    #[test]
    fn lengths_must_agree() {
        let error = stream_copy(&mut [0.0; 3], &[0.0; 4]).unwrap_err();
        assert_eq!(error, SimdError::Length { what: "stream_copy", dst: 3, src: 4 });
    }
}
