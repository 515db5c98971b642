//! Matrices as checkpoints store them, and their products with activations.
//!
//! A product of a quantised matrix holds the activations of each group as 16-bit integers with one f32 scale, multiplies
//! integers exactly, and applies both scales once a group in f32. With `q` the stored codes, `s` and `b` scale and bias of
//! a group, `x = d * i` its activations: `y = sum over groups of s * d * sum(q * i) + b * d * sum(i)`. The only error
//! beyond f32 rounding is that of `i`: at most half of 1/32767 of the largest activation of the group.
//!
//! In a wide matrix that is as much as adding up in f32 loses. In narrow ones it would be the larger error, and where results
//! are compared with one another it could choose something else: there activations are sums of two such integers.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod decode;
mod dense;
mod pack;
#[cfg(target_arch = "x86_64")]
mod panel;
mod portable;
mod product;

use crate::memory::{Bytes, OutOfMemory};

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::{F16, F32, load_scales, size};
pub(crate) use dense::dot_f32;
pub(crate) use pack::Raw;
pub use pack::{Activations, Layout, Rows};
#[cfg(target_arch = "x86_64")]
pub(crate) use product::has_avx2;
pub use product::{Scratch, Tokens};

/// How scales and biases of groups are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleFormat {
    /// bfloat16
    Bf16,
    /// IEEE half
    F16,
    /// float32
    F32,
    /// A power of two, `2^(byte - 127)`; 255 is NaN.
    E8m0,
    /// An 8-bit float with 4 exponent bits.
    E4m3,
}

/// How the elements of a quantised matrix are coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// Unsigned integers of that many bits, low bits first; `w = scale * q + bias`.
    Affine(u32),
    /// 4-bit floats e2m1; `w = scale * q`.
    E2m1,
    /// 8-bit floats e4m3; `w = scale * q`.
    E4m3,
}

impl Coding {
    /// Bits an element.
    pub fn bits(self) -> u32 {
        match self {
            Self::Affine(bits) => bits,
            Self::E2m1 => 4,
            Self::E4m3 => 8,
        }
    }
}

/// Elements of a matrix that is not quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    /// float32
    F32,
    /// IEEE half
    F16,
    /// bfloat16
    Bf16,
}

impl Float {
    /// Bytes an element.
    pub fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }
}

/// What a matrix is made of, in bytes held by `B`.
#[derive(Debug, Clone)]
pub enum Data<B = Bytes> {
    /// Rows of floats.
    Dense {
        /// The elements, row after row.
        elements: B,
        /// Their type.
        float: Float,
    },
    /// Rows of packed codes.
    Quantized {
        /// The codes, row after row, as MLX packs them: little-endian, low bits first.
        codes: B,
        /// A scale a group.
        scales: B,
        /// A bias a group (affine only).
        biases: Option<B>,
        /// How codes are coded.
        coding: Coding,
        /// How scales and biases are stored.
        scale: ScaleFormat,
        /// Elements that share a scale.
        group: usize,
    },
}

impl Data<&[u8]> {
    /// The same, copied.
    fn copied(&self) -> Result<Data, OutOfMemory> {
        Ok(match self {
            Self::Dense { elements, float } => {
                Data::Dense { elements: Bytes::copy_of(elements)?, float: *float }
            }
            Self::Quantized { codes, scales, biases, coding, scale, group } => Data::Quantized {
                codes: Bytes::copy_of(codes)?,
                scales: Bytes::copy_of(scales)?,
                biases: biases.map(Bytes::copy_of).transpose()?,
                coding: *coding,
                scale: *scale,
                group: *group,
            },
        })
    }
}

impl<B> Data<B> {
    /// Bytes of a row of `columns` elements with its scales and biases.
    pub fn row_bytes(&self, columns: usize) -> usize {
        match self {
            Self::Dense { float, .. } => columns * float.bytes(),
            Self::Quantized { coding, scale, group, biases, .. } => {
                let groups = columns / group * scale.bytes();
                columns * coding.bits() as usize / 8 + groups * (1 + usize::from(biases.is_some()))
            }
        }
    }

    /// How its elements are coded, without them.
    pub fn coding(&self) -> Data<()> {
        match self {
            Self::Dense { float, .. } => Data::Dense { elements: (), float: *float },
            Self::Quantized { biases, coding, scale, group, .. } => Data::Quantized {
                codes: (),
                scales: (),
                biases: biases.as_ref().map(|_| ()),
                coding: *coding,
                scale: *scale,
                group: *group,
            },
        }
    }
}

impl Data {
    /// The same, borrowed.
    pub fn as_slices(&self) -> Data<&[u8]> {
        match self {
            Self::Dense { elements, float } => Data::Dense { elements, float: *float },
            Self::Quantized { codes, scales, biases, coding, scale, group } => Data::Quantized {
                codes,
                scales,
                biases: biases.as_deref(),
                coding: *coding,
                scale: *scale,
                group: *group,
            },
        }
    }
}

/// A stack of `experts` matrices `[rows, columns]` (a plain matrix is a stack of one), multiplied as `x @ w.T`.
#[derive(Debug, Clone)]
pub struct Matrix {
    data: Stored,
    /// How many integers its products take for an activation.
    terms: usize,
    /// The stored row that is its first.
    first: usize,
    experts: usize,
    rows: usize,
    columns: usize,
}

/// How a matrix is held.
#[derive(Debug, Clone)]
pub(crate) enum Stored {
    Rows(Data),
    #[cfg(target_arch = "x86_64")]
    Panels(panel::Panels),
    /// Nothing: what is multiplied with it elsewhere is known by its number.
    Outline {
        coding: Data<()>,
        weight: usize,
    },
}

/// What there is to know of a matrix whose elements are held elsewhere, by a GPU for one.
#[derive(Debug, Clone, Copy)]
pub struct Outline<'a> {
    /// The caller's number of the weight.
    pub weight: usize,
    /// How its elements are coded.
    pub coding: &'a Data<()>,
    /// The weight's row that is the matrix's first.
    pub first: usize,
}

/// Widest matrix of which activations are sums of two integers.
const NARROW: usize = 512;

fn terms(columns: usize, exact: bool) -> usize {
    if exact || columns <= NARROW { 2 } else { 1 }
}

/// Why bytes do not make a matrix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// The sizes do not fit together.
    #[error("{what}: expected {expected} bytes, found {found}")]
    Size {
        /// Which part.
        what: &'static str,
        /// Bytes that the shape asks for.
        expected: usize,
        /// Bytes that are there.
        found: usize,
    },
    /// A setting that the products do not know.
    #[error("no CPU product for {0}")]
    Unsupported(String),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
}

impl Matrix {
    /// Puts a matrix together and checks that its parts have the sizes that the shape asks for.
    ///
    /// # Errors
    /// [`MatrixError`], for parts of the wrong size and for settings that have no product here.
    pub fn new(data: Data, experts: usize, rows: usize, columns: usize) -> Result<Self, MatrixError> {
        check(&data, experts, rows, columns)?;
        let terms = terms(columns, false);
        Ok(Self { data: Stored::Rows(data), terms, first: 0, experts, rows, columns })
    }

    /// Copies a matrix into the order that products read fastest on this processor, on all threads. `exact`: whether its
    /// products may not round activations more than float32 does.
    ///
    /// # Errors
    /// As [`Self::new`]; [`MatrixError::Memory`] if there is no room.
    pub fn copied(
        data: &Data<&[u8]>,
        experts: usize,
        rows: usize,
        columns: usize,
        exact: bool,
    ) -> Result<Self, MatrixError> {
        check(data, experts, rows, columns)?;
        let terms = terms(columns, exact);
        #[cfg(target_arch = "x86_64")]
        if let Data::Quantized {
            codes,
            scales,
            biases: Some(biases),
            coding: Coding::Affine(4),
            scale,
            group,
        } = data
            && product::has_avx2()
            && rows.is_multiple_of(panel::ROWS)
        {
            let panels =
                panel::Panels::new((codes, scales, biases), experts * rows, columns, *group, *scale)?;
            return Ok(Self { data: Stored::Panels(panels), terms, first: 0, experts, rows, columns });
        }
        Ok(Self { data: Stored::Rows(data.copied()?), terms, first: 0, experts, rows, columns })
    }

    /// A matrix of which only shape and coding are here, so that stages can be written for a device that holds the weight
    /// `weight` itself. Its products on the CPU are NaN.
    ///
    /// # Errors
    /// [`MatrixError::Unsupported`] for codings that [`Self::new`] would not take.
    pub fn outlined(
        coding: Data<()>,
        weight: usize,
        experts: usize,
        rows: usize,
        columns: usize,
    ) -> Result<Self, MatrixError> {
        if let Data::Quantized { biases, coding, scale, group, .. } = &coding {
            check_coding(*coding, *scale, *group, biases.is_some(), columns)?;
        }
        Ok(Self { data: Stored::Outline { coding, weight }, terms: 1, first: 0, experts, rows, columns })
    }

    /// What was given to [`Self::outlined`]; nothing for a matrix that has its elements.
    pub fn outline(&self) -> Option<Outline<'_>> {
        match &self.data {
            Stored::Outline { coding, weight } => {
                Some(Outline { weight: *weight, coding, first: self.first })
            }
            _ => None,
        }
    }

    /// Some rows of a plain matrix as a matrix of their own, which shares its bytes; `None` if it is a stack, has no such
    /// rows, or its products cannot begin or end there (see [`Self::granule`]).
    pub fn part(&self, rows: std::ops::Range<usize>) -> Option<Self> {
        let granule = self.granule();
        let fits = rows.start < rows.end && rows.end <= self.rows && self.experts == 1;
        let whole = rows.start.is_multiple_of(granule) && rows.end.is_multiple_of(granule);
        (fits && whole).then(|| Self { first: self.first + rows.start, rows: rows.len(), ..self.clone() })
    }

    /// Number of stacked matrices.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Rows of each, the width of a product.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns, the width of the activations.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Products want ranges of rows that begin and end at multiples of this (the last may end earlier).
    pub fn granule(&self) -> usize {
        match &self.data {
            Stored::Rows(_) | Stored::Outline { .. } => 1,
            #[cfg(target_arch = "x86_64")]
            Stored::Panels(_) => panel::ROWS,
        }
    }

    /// Bytes of one row of one matrix with its scales.
    pub fn row_bytes(&self) -> usize {
        match &self.data {
            Stored::Rows(data) => data.row_bytes(self.columns),
            Stored::Outline { coding, .. } => coding.row_bytes(self.columns),
            #[cfg(target_arch = "x86_64")]
            Stored::Panels(p) => {
                panel::Panels::size(panel::ROWS, self.columns, p.group, p.scale) / panel::ROWS
            }
        }
    }

    /// How its products take activations.
    pub fn layout(&self) -> Layout {
        match &self.data {
            Stored::Rows(Data::Quantized { coding, group, .. }) if *coding != Coding::E4m3 => {
                Layout::Integers { group: *group, terms: self.terms }
            }
            Stored::Rows(_) | Stored::Outline { .. } => Layout::Floats,
            #[cfg(target_arch = "x86_64")]
            Stored::Panels(p) => Layout::Bytes { group: p.group, terms: self.terms },
        }
    }
}

/// Whether the parts have the sizes that the shape asks for.
fn check<B: std::ops::Deref<Target = [u8]>>(
    data: &Data<B>,
    experts: usize,
    rows: usize,
    columns: usize,
) -> Result<(), MatrixError> {
    let overflow = || MatrixError::Unsupported(format!("{experts} x {rows} x {columns} elements"));
    let elements = experts.checked_mul(rows).and_then(|n| n.checked_mul(columns)).ok_or_else(overflow)?;
    let size = |what, expected: usize, found: usize| {
        if expected == found { Ok(()) } else { Err(MatrixError::Size { what, expected, found }) }
    };
    match &data {
        Data::Dense { elements: bytes, float } => {
            size("elements", elements.checked_mul(float.bytes()).ok_or_else(overflow)?, bytes.len())?;
        }
        Data::Quantized { codes, scales, biases, coding, scale, group } => {
            let (bits, group) = (coding.bits() as usize, *group);
            check_coding(*coding, *scale, group, biases.is_some(), columns)?;
            size("codes", elements.checked_mul(bits).ok_or_else(overflow)? / 8, codes.len())?;
            let groups = elements / group * scale.bytes();
            size("scales", groups, scales.len())?;
            if let Some(biases) = biases {
                size("biases", groups, biases.len())?;
            }
        }
    }
    Ok(())
}

/// Whether there are products with elements coded like that.
fn check_coding(
    coding: Coding,
    scale: ScaleFormat,
    group: usize,
    biases: bool,
    columns: usize,
) -> Result<(), MatrixError> {
    let affine = matches!(coding, Coding::Affine(_));
    let known = match (coding, scale) {
        (Coding::Affine(b), ScaleFormat::Bf16 | ScaleFormat::F16 | ScaleFormat::F32) => {
            matches!(b, 2 | 3 | 4 | 5 | 6 | 8) && matches!(group, 32 | 64 | 128)
        }
        (Coding::E2m1 | Coding::E4m3, ScaleFormat::E8m0) => group == 32,
        (Coding::E2m1, ScaleFormat::E4m3) => group == 16,
        _ => false,
    };
    if known && columns != 0 && columns.is_multiple_of(group) && affine == biases {
        return Ok(());
    }
    Err(MatrixError::Unsupported(format!(
        "{coding:?} with {scale:?} scales in groups of {group}, {columns} columns{}",
        if affine && !biases { ", without biases" } else { "" }
    )))
}

impl ScaleFormat {
    /// Bytes a scale.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::E8m0 | Self::E4m3 => 1,
        }
    }
}
