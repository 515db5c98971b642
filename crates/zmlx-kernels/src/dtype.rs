//! Dtypes of MLX and of the language.

use zmlx_lang::Dtype as Lang;
use zmlx_mlx::Dtype as Mlx;

/// The language's dtype; `None` for `float64` and `complex64`.
pub(crate) fn to_lang(dtype: Mlx) -> Option<Lang> {
    Some(match dtype {
        Mlx::Bool => Lang::Bool,
        Mlx::Uint8 => Lang::U8,
        Mlx::Uint16 => Lang::U16,
        Mlx::Uint32 => Lang::U32,
        Mlx::Uint64 => Lang::U64,
        Mlx::Int8 => Lang::I8,
        Mlx::Int16 => Lang::I16,
        Mlx::Int32 => Lang::I32,
        Mlx::Int64 => Lang::I64,
        Mlx::Float16 => Lang::F16,
        Mlx::Bfloat16 => Lang::Bf16,
        Mlx::Float32 => Lang::F32,
        Mlx::Float64 | Mlx::Complex64 => return None,
    })
}

pub(crate) fn to_mlx(dtype: Lang) -> Mlx {
    match dtype {
        Lang::Bool => Mlx::Bool,
        Lang::U8 => Mlx::Uint8,
        Lang::U16 => Mlx::Uint16,
        Lang::U32 => Mlx::Uint32,
        Lang::U64 => Mlx::Uint64,
        Lang::I8 => Mlx::Int8,
        Lang::I16 => Mlx::Int16,
        Lang::I32 => Mlx::Int32,
        Lang::I64 => Mlx::Int64,
        Lang::F16 => Mlx::Float16,
        Lang::Bf16 => Mlx::Bfloat16,
        Lang::F32 => Mlx::Float32,
    }
}

/// A shape of MLX as the language takes it.
pub(crate) fn shape_of(shape: &[i32]) -> Vec<usize> {
    shape.iter().map(|d| usize::try_from(*d).unwrap_or(0)).collect()
}

/// A shape as MLX takes it; dimensions beyond its range become one that MLX refuses by size.
pub(crate) fn to_shape(shape: &[usize]) -> Vec<i32> {
    shape.iter().map(|d| i32::try_from(*d).unwrap_or(i32::MAX)).collect()
}
