//! Lanes as bits: literals, repeated values, and from lanes to storage.

use zmlx_lang::{Const, Dtype, Ty};
use zmlx_simd::convert;

pub(super) fn add_bits(a: u64, b: u64, ty: Ty) -> u64 {
    match ty {
        Ty::F32 => u64::from((f32::from_bits(a as u32) + f32::from_bits(b as u32)).to_bits()),
        Ty::Bool => a | b,
        _ => a.wrapping_add(b),
    }
}

pub(super) fn const_bits(c: Const, ty: Ty) -> u64 {
    match (c, ty) {
        (Const::Bool(b), Ty::Bool) => u64::from(if b { u32::MAX } else { 0 }),
        (c, Ty::F32) => u64::from((c.as_f64() as f32).to_bits()),
        (Const::Int(v), Ty::I64 | Ty::U64) => v as u64,
        (Const::Int(v), Ty::Bool) => u64::from(if v != 0 { u32::MAX } else { 0 }),
        (Const::Int(v), _) => u64::from(v as u32),
        (c, _) => c.as_f64() as i64 as u64,
    }
}

/// # Safety
/// `to` has room for `n` lanes of `ty`.
pub(super) unsafe fn splat(to: *mut u8, n: usize, bits: u64, ty: Ty) {
    // SAFETY: as the caller promises.
    unsafe {
        if matches!(ty, Ty::I64 | Ty::U64) {
            std::slice::from_raw_parts_mut(to as *mut u64, n).fill(bits);
        } else {
            std::slice::from_raw_parts_mut(to as *mut u32, n).fill(bits as u32);
        }
    }
}

/// One lane's bits as an element's bytes, of which the dtype's size counts.
pub(super) fn narrow(bits: u64, ty: Ty, dtype: Dtype) -> [u8; 8] {
    let float = f32::from_bits(bits as u32);
    let value = match (ty, dtype) {
        (Ty::Bool, _) => u64::from(bits != 0),
        (_, Dtype::F16) => u64::from(half::f16::from_f32(float).to_bits()),
        (_, Dtype::Bf16) => u64::from(half::bf16::from_f32(float).to_bits()),
        _ => bits,
    };
    value.to_le_bytes()
}

pub(super) fn narrow_floats(floats: &[f32], out: &mut [u8], dtype: Dtype) {
    for (f, o) in floats.iter().zip(out.chunks_exact_mut(2)) {
        o.copy_from_slice(&narrow(u64::from(f.to_bits()), Ty::F32, dtype)[..2]);
    }
}

pub(super) fn narrow_block(lanes: &[u8], ty: Ty, out: &mut [u8], dtype: Dtype) {
    // SAFETY: any bits are a value of these types.
    unsafe {
        if let (Dtype::F16, (&[], floats, &[])) = (dtype, lanes.align_to::<f32>())
            && let (&mut [], halves, &mut []) = out.align_to_mut::<half::f16>()
        {
            let _ = convert::f32_to_f16(floats, halves);
            return;
        }
        if let (Dtype::Bf16, (&[], floats, &[])) = (dtype, lanes.align_to::<f32>())
            && let (&mut [], halves, &mut []) = out.align_to_mut::<half::bf16>()
        {
            let _ = convert::f32_to_bf16(floats, halves);
            return;
        }
    }
    let lane = if matches!(ty, Ty::I64 | Ty::U64) { 8 } else { 4 };
    for (l, o) in lanes.chunks_exact(lane).zip(out.chunks_exact_mut(dtype.size())) {
        let mut bits = [0; 8];
        bits[..lane].copy_from_slice(l);
        o.copy_from_slice(&narrow(u64::from_le_bytes(bits), ty, dtype)[..dtype.size()]);
    }
}
