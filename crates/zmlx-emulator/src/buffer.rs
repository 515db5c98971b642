//! Arrays that go into kernels and come out of them.

use half::{bf16, f16};

/// Element types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// One byte, 0 or 1.
    Bool,
    /// 8-bit unsigned.
    U8,
    /// 16-bit unsigned.
    U16,
    /// 32-bit unsigned.
    U32,
    /// 64-bit unsigned.
    U64,
    /// 8-bit signed.
    I8,
    /// 16-bit signed.
    I16,
    /// 32-bit signed.
    I32,
    /// 64-bit signed.
    I64,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE binary32.
    F32,
}

impl Dtype {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 => 8,
        }
    }

    /// The name in signatures that MLX writes for Metal.
    pub fn metal(self) -> &'static str {
        match self {
            Self::F16 => "float16_t",
            Self::Bf16 => "bfloat16_t",
            other => other.cuda(),
        }
    }

    /// The name in signatures that MLX writes for CUDA.
    pub fn cuda(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::U8 => "uint8_t",
            Self::U16 => "uint16_t",
            Self::U32 => "uint32_t",
            Self::U64 => "uint64_t",
            Self::I8 => "int8_t",
            Self::I16 => "int16_t",
            Self::I32 => "int32_t",
            Self::I64 => "int64_t",
            Self::F16 => "__half",
            Self::Bf16 => "__nv_bfloat16",
            Self::F32 => "float",
        }
    }
}

/// An array in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Buffer {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions; none for a scalar.
    pub shape: Vec<usize>,
    /// Elements from one index to the next on each axis; row-major when absent.
    pub strides: Option<Vec<i64>>,
    /// Elements by which the data starts after a 256-byte boundary, as a slice of a larger array does.
    pub offset: usize,
    /// The elements, in the machine's byte order.
    pub data: Vec<u8>,
}

impl Buffer {
    /// A buffer of bytes as they are.
    pub fn from_bytes(dtype: Dtype, data: Vec<u8>, shape: &[usize]) -> Self {
        Self { dtype, shape: shape.to_vec(), strides: None, offset: 0, data }
    }

    /// Values converted to `dtype`: rounded to nearest even for 16-bit floats, truncated and clamped for integers,
    /// `!= 0` for bool.
    pub fn from_f32(dtype: Dtype, values: &[f32], shape: &[usize]) -> Self {
        let mut data = Vec::with_capacity(values.len() * dtype.size());
        for &v in values {
            match dtype {
                Dtype::Bool => data.push(u8::from(v != 0.0)),
                Dtype::U8 => data.push(v as u8),
                Dtype::U16 => data.extend((v as u16).to_ne_bytes()),
                Dtype::U32 => data.extend((v as u32).to_ne_bytes()),
                Dtype::U64 => data.extend((v as u64).to_ne_bytes()),
                Dtype::I8 => data.extend((v as i8).to_ne_bytes()),
                Dtype::I16 => data.extend((v as i16).to_ne_bytes()),
                Dtype::I32 => data.extend((v as i32).to_ne_bytes()),
                Dtype::I64 => data.extend((v as i64).to_ne_bytes()),
                Dtype::F16 => data.extend(f16::from_f32(v).to_ne_bytes()),
                Dtype::Bf16 => data.extend(bf16::from_f32(v).to_ne_bytes()),
                Dtype::F32 => data.extend(v.to_ne_bytes()),
            }
        }
        Self::from_bytes(dtype, data, shape)
    }

    /// 32-bit unsigned values.
    pub fn from_u32(values: &[u32], shape: &[usize]) -> Self {
        Self::from_bytes(Dtype::U32, values.iter().flat_map(|v| v.to_ne_bytes()).collect(), shape)
    }

    /// 32-bit signed values.
    pub fn from_i32(values: &[i32], shape: &[usize]) -> Self {
        Self::from_bytes(Dtype::I32, values.iter().flat_map(|v| v.to_ne_bytes()).collect(), shape)
    }

    /// The same data with these strides; the caller's data must reach as far as they do.
    pub fn with_strides(mut self, strides: &[i64]) -> Self {
        self.strides = Some(strides.to_vec());
        self
    }

    /// The same data, starting `elements` after a 256-byte boundary.
    pub fn with_offset(mut self, elements: usize) -> Self {
        self.offset = elements;
        self
    }

    /// Elements that the data holds.
    pub fn len(&self) -> usize {
        self.data.len() / self.dtype.size()
    }

    /// Whether the data is empty.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Strides given, or those of the row-major order.
    pub fn strides_or_row_major(&self) -> Vec<i64> {
        if let Some(strides) = &self.strides {
            return strides.clone();
        }
        let mut strides = vec![1i64; self.shape.len()];
        for i in (1..self.shape.len()).rev() {
            strides[i - 1] = strides[i] * self.shape[i] as i64;
        }
        strides
    }

    fn elements<const N: usize>(&self) -> impl Iterator<Item = [u8; N]> + '_ {
        self.data.chunks_exact(N).map(|c| {
            let mut e = [0; N];
            e.copy_from_slice(c);
            e
        })
    }

    /// The elements as f32 (64-bit and 32-bit integers round).
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::Bool | Dtype::U8 => self.data.iter().map(|&v| f32::from(v)).collect(),
            Dtype::I8 => self.elements().map(|e| f32::from(i8::from_ne_bytes(e))).collect(),
            Dtype::U16 => self.elements().map(|e| f32::from(u16::from_ne_bytes(e))).collect(),
            Dtype::I16 => self.elements().map(|e| f32::from(i16::from_ne_bytes(e))).collect(),
            Dtype::U32 => self.elements().map(|e| u32::from_ne_bytes(e) as f32).collect(),
            Dtype::I32 => self.elements().map(|e| i32::from_ne_bytes(e) as f32).collect(),
            Dtype::U64 => self.elements().map(|e| u64::from_ne_bytes(e) as f32).collect(),
            Dtype::I64 => self.elements().map(|e| i64::from_ne_bytes(e) as f32).collect(),
            Dtype::F16 => self.elements().map(|e| f16::from_ne_bytes(e).to_f32()).collect(),
            Dtype::Bf16 => self.elements().map(|e| bf16::from_ne_bytes(e).to_f32()).collect(),
            Dtype::F32 => self.elements().map(f32::from_ne_bytes).collect(),
        }
    }

    /// The bits of 32-bit elements; empty for other widths.
    pub fn to_u32(&self) -> Vec<u32> {
        if self.dtype.size() == 4 { self.elements().map(u32::from_ne_bytes).collect() } else { Vec::new() }
    }

    /// The elements as i64 (floats truncate and clamp).
    pub fn to_i64(&self) -> Vec<i64> {
        match self.dtype {
            Dtype::U32 => self.elements().map(|e| i64::from(u32::from_ne_bytes(e))).collect(),
            Dtype::I32 => self.elements().map(|e| i64::from(i32::from_ne_bytes(e))).collect(),
            Dtype::U64 => self.elements().map(|e| u64::from_ne_bytes(e) as i64).collect(),
            Dtype::I64 => self.elements().map(i64::from_ne_bytes).collect(),
            _ => self.to_f32().into_iter().map(|v| v as i64).collect(),
        }
    }
}
