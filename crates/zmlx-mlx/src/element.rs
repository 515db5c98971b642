use half::{bf16, f16};

use crate::Dtype;

/// A complex number of two float32, as MLX stores it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Complex64 {
    pub re: f32,
    pub im: f32,
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that an array can be made from and read as.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// The dtype it corresponds to.
    const DTYPE: Dtype;

    /// Copies `len` elements out of an array's buffer.
    ///
    /// # Safety
    /// `data` points to `len` elements of dtype `DTYPE` (or `len` is 0).
    #[doc(hidden)]
    unsafe fn read(data: *const u8, len: usize) -> Vec<Self>;
}

/// An [`Element`] for which every bit pattern is a value, so that a buffer can be borrowed as a slice of it.
/// All but `bool`.
pub trait Plain: Element {}

macro_rules! plain {
    ($($ty:ty => $dtype:ident),* $(,)?) => {$(
        impl sealed::Sealed for $ty {}
        impl Element for $ty {
            const DTYPE: Dtype = Dtype::$dtype;
            unsafe fn read(data: *const u8, len: usize) -> Vec<Self> {
                let mut out = Vec::with_capacity(len);
                // SAFETY: the caller gives `len` readable elements; the vector has room for them, and they may be
                // unaligned in the source because this copies bytes. Every bit pattern is a value of the type.
                unsafe {
                    if len > 0 {
                        std::ptr::copy_nonoverlapping(data, out.as_mut_ptr() as *mut u8, len * size_of::<Self>());
                    }
                    out.set_len(len);
                }
                out
            }
        }
        impl Plain for $ty {}
    )*};
}

plain! {
    u8 => Uint8, u16 => Uint16, u32 => Uint32, u64 => Uint64,
    i8 => Int8, i16 => Int16, i32 => Int32, i64 => Int64,
    f16 => Float16, bf16 => Bfloat16, f32 => Float32, f64 => Float64,
    Complex64 => Complex64,
}

impl sealed::Sealed for bool {}
impl Element for bool {
    const DTYPE: Dtype = Dtype::Bool;
    unsafe fn read(data: *const u8, len: usize) -> Vec<Self> {
        // A `view` op can leave any byte in a bool array, so bytes are compared and not reinterpreted.
        // SAFETY: the caller gives `len` readable bytes.
        (0..len).map(|i| unsafe { *data.add(i) } != 0).collect()
    }
}
