//! Elements at computed places: coordinates, loads, and from storage to lanes.

use zmlx_lang::{Bounds, Dtype, Id};
use zmlx_simd::convert;

use super::exec::{Block, mask};

/// An input that is read at computed places.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Table<'a> {
    pub bytes: &'a [u8],
    pub shape: &'a [usize],
}

/// A load outside its array, in checked mode.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct OutOfBounds {
    pub input: usize,
    pub at: Vec<i32>,
}

/// The element number of coordinates in an array, by the rule for places outside; `None` gives zero.
#[inline(always)]
pub(super) fn element(
    shape: &[usize],
    bounds: Bounds,
    coordinate: impl Fn(usize) -> i32,
) -> Result<Option<usize>, ()> {
    let mut at = 0;
    for (k, &len) in shape.iter().enumerate() {
        let c = i64::from(coordinate(k));
        let inside = c >= 0 && (c as u64) < len as u64;
        let c = match bounds {
            _ if inside => c as usize,
            Bounds::Clamp if len > 0 => c.clamp(0, len as i64 - 1) as usize,
            Bounds::Clamp | Bounds::Zero => return Ok(None),
            Bounds::Checked => return Err(()),
        };
        at = at * len + c;
    }
    Ok(Some(at))
}

/// The frequent case of a block that reads one run of consecutive elements inside the array. `false`: it is not that.
#[inline(always)]
fn load_run(b: &Block<'_>, d: Id, table: Table<'_>, dtype: Dtype, at: &[Id]) -> bool {
    // SAFETY: coordinates are `n` lanes of `i32`, checked when types were decided.
    let lanes = |k: usize| unsafe { b.get::<i32>(at[k]) };
    let Some((&len, outer)) = table.shape.split_last() else { return false };
    let mut start = 0;
    for (k, &len) in outer.iter().enumerate() {
        let c = lanes(k);
        if c[0] < 0 || c[0] as usize >= len || c.iter().any(|v| *v != c[0]) {
            return false;
        }
        start = start * len + c[0] as usize;
    }
    let c = lanes(outer.len());
    let first = c[0];
    let consecutive = c.iter().enumerate().all(|(i, v)| v.wrapping_sub(first) as usize == i);
    if first < 0 || !consecutive || first as usize + b.n > len {
        return false;
    }
    let start = (start * len + first as usize) * dtype.size();
    let bytes = &table.bytes[start..start + b.n * dtype.size()];
    // SAFETY: the place holds `n` lanes of the dtype's compute type.
    unsafe { convert_in(bytes, dtype, b.lanes[d.index()], b.n) };
    true
}

#[inline(always)]
pub(super) fn load(b: &Block<'_>, d: Id, input: usize, at: &[Id], bounds: Bounds) -> Result<(), OutOfBounds> {
    let table = b.tables[input];
    let dtype = b.program.inputs[input].dtype;
    if load_run(b, d, table, dtype, at) {
        return Ok(());
    }
    // SAFETY: coordinates are `n` lanes of `i32`, checked when types were decided.
    let coordinate = |k: usize, i: usize| unsafe { b.get::<i32>(at[k])[i] };
    for i in 0..b.n {
        let place = element(table.shape, bounds, |k| coordinate(k, i))
            .map_err(|()| OutOfBounds { input, at: (0..at.len()).map(|k| coordinate(k, i)).collect() })?;
        let bits = place.map_or(0, |e| widen(&table.bytes[e * dtype.size()..], dtype));
        // SAFETY: the place holds `n` lanes of the dtype's compute type.
        unsafe {
            if dtype.size() == 8 {
                b.get_mut::<u64>(d)[i] = bits;
            } else {
                b.get_mut::<u32>(d)[i] = bits as u32;
            }
        }
    }
    Ok(())
}

/// The lane bits of the element that `bytes` starts with.
#[inline(always)]
pub(super) fn widen(bytes: &[u8], dtype: Dtype) -> u64 {
    let two = || u16::from_le_bytes([bytes[0], bytes[1]]);
    let four = || u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    match dtype {
        Dtype::Bool => u64::from(mask(bytes[0] != 0)),
        Dtype::U8 => u64::from(bytes[0]),
        Dtype::I8 => u64::from(i32::from(bytes[0] as i8) as u32),
        Dtype::U16 => u64::from(two()),
        Dtype::I16 => u64::from(i32::from(two() as i16) as u32),
        Dtype::F16 => u64::from(half::f16::from_bits(two()).to_f32().to_bits()),
        Dtype::Bf16 => u64::from(u32::from(two()) << 16),
        Dtype::U32 | Dtype::I32 | Dtype::F32 => u64::from(four()),
        Dtype::U64 | Dtype::I64 => u64::from_le_bytes([
            bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7],
        ]),
    }
}

/// Elements of a storage type to lanes.
///
/// # Safety
/// `to` has room for `n` lanes of the dtype's compute type; `bytes` holds `n` elements.
pub(super) unsafe fn convert_in(bytes: &[u8], dtype: Dtype, to: *mut u8, n: usize) {
    // SAFETY: as the caller promises; half types are read as unaligned bytes below when they are not aligned.
    unsafe {
        if dtype.compute().storage() == dtype && dtype != Dtype::Bool {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, n * dtype.size());
            return;
        }
        let floats = || std::slice::from_raw_parts_mut(to as *mut f32, n);
        if dtype == Dtype::F16
            && let (&[], halves, &[]) = bytes.align_to::<half::f16>()
        {
            let _ = convert::f16_to_f32(halves, floats());
            return;
        }
        if dtype == Dtype::Bf16
            && let (&[], halves, &[]) = bytes.align_to::<half::bf16>()
        {
            let _ = convert::bf16_to_f32(halves, floats());
            return;
        }
        let size = dtype.size();
        if size == 8 {
            let out = std::slice::from_raw_parts_mut(to as *mut u64, n);
            out.iter_mut().zip(bytes.chunks_exact(size)).for_each(|(o, b)| *o = widen(b, dtype));
        } else {
            let out = std::slice::from_raw_parts_mut(to as *mut u32, n);
            out.iter_mut().zip(bytes.chunks_exact(size)).for_each(|(o, b)| *o = widen(b, dtype) as u32);
        }
    }
}
