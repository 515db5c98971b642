//! Symbolic shapes: what is known of an array before anything runs.

use std::fmt;
use std::ops::{Add, Mul, Sub};

use zmlx_mlx::Dtype;

/// The values of the symbols in one call of a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// B: sequences that run together.
    pub batch: i64,
    /// L: positions of this call.
    pub length: i64,
    /// Positions that came before; S is this and L.
    pub position: i64,
}

impl Sizes {
    /// One token of one sequence after `position` others.
    pub fn decode(position: i64) -> Self {
        Self { batch: 1, length: 1, position }
    }

    fn symbols(self) -> [i64; 3] {
        [self.batch, self.length, self.position.saturating_add(self.length)]
    }
}

const NAMES: [&str; 3] = ["B", "L", "S"];

/// One dimension: a polynomial with integer factors in B (batch), L (length of the call) and S (all positions that the
/// sequence then has, those of the call included). Prints as `B`, `2048`, `L+2`, `4*B*L`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Dim {
    /// Powers of the three symbols and the factor: highest powers first, each once, no factor zero.
    terms: Vec<([u8; 3], i64)>,
}

impl Dim {
    /// B, the number of sequences.
    pub fn batch() -> Self {
        Self::symbol(0)
    }

    /// L, the number of positions of the call.
    pub fn length() -> Self {
        Self::symbol(1)
    }

    /// S, the number of positions so far, those of the call included.
    pub fn seen() -> Self {
        Self::symbol(2)
    }

    fn symbol(index: usize) -> Self {
        let mut powers = [0; 3];
        powers[index] = 1;
        Self { terms: vec![(powers, 1)] }
    }

    /// The number, if it has no symbol in it.
    pub fn constant(&self) -> Option<i64> {
        match self.terms.as_slice() {
            [] => Some(0),
            [([0, 0, 0], n)] => Some(*n),
            _ => None,
        }
    }

    /// Whether it is the number `n`.
    pub fn is(&self, n: i64) -> bool {
        self.constant() == Some(n)
    }

    /// One `n`-th of it, if every factor can be divided.
    pub fn divided(&self, n: i64) -> Option<Self> {
        let part =
            |&(powers, factor): &([u8; 3], i64)| (factor.checked_rem(n)? == 0).then(|| (powers, factor / n));
        Some(Self { terms: self.terms.iter().map(part).collect::<Option<_>>()? })
    }

    /// Its value in one call. Saturates instead of wrapping.
    pub fn at(&self, sizes: Sizes) -> i64 {
        let symbols = sizes.symbols();
        let term = |&(powers, factor): &([u8; 3], i64)| {
            let values = symbols.iter().zip(powers).map(|(s, p)| s.saturating_pow(p.into()));
            values.fold(factor, i64::saturating_mul)
        };
        self.terms.iter().map(term).fold(0, i64::saturating_add)
    }

    fn sorted(mut terms: Vec<([u8; 3], i64)>) -> Self {
        terms.sort_by_key(|t| std::cmp::Reverse((t.0.iter().map(|&p| u32::from(p)).sum::<u32>(), t.0)));
        terms.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            if same {
                kept.1 = kept.1.saturating_add(next.1);
            }
            same
        });
        terms.retain(|t| t.1 != 0);
        Self { terms }
    }
}

impl From<i32> for Dim {
    fn from(n: i32) -> Self {
        Self::from(i64::from(n))
    }
}

impl From<i64> for Dim {
    fn from(n: i64) -> Self {
        Self::sorted(vec![([0; 3], n)])
    }
}

impl Add for Dim {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self.terms.extend(other.terms);
        Self::sorted(self.terms)
    }
}

impl Sub for Dim {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self + other * Self::from(-1)
    }
}

impl Mul for Dim {
    type Output = Self;

    fn mul(self, other: Self) -> Self {
        let mut terms = Vec::with_capacity(self.terms.len() * other.terms.len());
        for (p, a) in &self.terms {
            for (q, b) in &other.terms {
                let powers = std::array::from_fn(|i| p[i].saturating_add(q[i]));
                terms.push((powers, a.saturating_mul(*b)));
            }
        }
        Self::sorted(terms)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.terms.is_empty() {
            return f.write_str("0");
        }
        for (index, (powers, factor)) in self.terms.iter().enumerate() {
            if index > 0 && *factor >= 0 {
                f.write_str("+")?;
            }
            let symbols = NAMES.iter().zip(powers).flat_map(|(n, &p)| std::iter::repeat_n(*n, p.into()));
            let symbols = symbols.collect::<Vec<_>>().join("*");
            match (symbols.is_empty(), factor) {
                (true, n) => write!(f, "{n}")?,
                (false, 1) => f.write_str(&symbols)?,
                (false, -1) => write!(f, "-{symbols}")?,
                (false, n) => write!(f, "{n}*{symbols}")?,
            }
        }
        Ok(())
    }
}

/// The dimensions of an array. Prints as `[B, L, 2048]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Shape(pub Vec<Dim>);

impl Shape {
    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// The last dimension.
    pub fn last(&self) -> Option<&Dim> {
        self.0.last()
    }

    /// Number of elements.
    pub fn elements(&self) -> Dim {
        self.0.iter().cloned().fold(Dim::from(1), Mul::mul)
    }

    /// The same with another last dimension.
    pub fn with_last(&self, last: impl Into<Dim>) -> Self {
        let mut dims = self.0.clone();
        dims.pop();
        dims.push(last.into());
        Self(dims)
    }

    /// The index of an axis, which counts from the end if negative.
    pub fn axis(&self, axis: i32) -> Option<usize> {
        let index = if axis < 0 { i64::from(axis) + self.rank() as i64 } else { axis.into() };
        usize::try_from(index).ok().filter(|&i| i < self.rank())
    }

    /// The shape that two arrays have together: dimensions are aligned at the end, and a dimension of 1 repeats.
    pub fn broadcast(&self, other: &Self) -> Option<Self> {
        let rank = self.rank().max(other.rank());
        let padded = |s: &Self| -> Vec<Dim> {
            std::iter::repeat_n(Dim::from(1), rank - s.rank()).chain(s.0.iter().cloned()).collect()
        };
        let pairs = padded(self).into_iter().zip(padded(other));
        let one = |(a, b): (Dim, Dim)| if a == b || b.is(1) { Some(a) } else { a.is(1).then_some(b) };
        pairs.map(one).collect::<Option<_>>().map(Self)
    }
}

impl From<&[i32]> for Shape {
    fn from(dims: &[i32]) -> Self {
        Self(dims.iter().map(|&d| Dim::from(d)).collect())
    }
}

impl<const N: usize> From<[Dim; N]> for Shape {
    fn from(dims: [Dim; N]) -> Self {
        Self(dims.into())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        write!(f, "[{}]", dims.join(", "))
    }
}

/// The dtype of a value of a graph, which does not say what dtype it will run in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DtypeSpec {
    /// The floating-point dtype that the model is run in.
    Activation,
    /// Always this one.
    Fixed(Dtype),
}

impl DtypeSpec {
    /// Indices and token ids.
    pub const INDEX: Self = Self::Fixed(Dtype::Uint32);

    /// float32 whatever the model runs in.
    pub const F32: Self = Self::Fixed(Dtype::Float32);

    /// The dtype, when the model runs in `activation`.
    pub fn resolve(self, activation: Dtype) -> Dtype {
        match self {
            Self::Activation => activation,
            Self::Fixed(dtype) => dtype,
        }
    }

    /// Whether it holds real numbers.
    pub fn is_float(self) -> bool {
        self.resolve(Dtype::Float32).is_float()
    }

    /// Whether it holds integers that can serve as indices.
    pub fn is_index(self) -> bool {
        !self.is_float() && !matches!(self, Self::Fixed(Dtype::Bool | Dtype::Complex64))
    }

    /// The dtype of arithmetic between the two, as MLX promotes them. `None` where it hangs on the dtype that the model
    /// runs in, or is not needed by any op here (integers of different kinds).
    pub fn promote(self, other: Self) -> Option<Self> {
        match (self, other) {
            (a, b) if a == b => Some(a),
            (a, b) if !b.is_float() && a.is_float() => Some(a),
            (a, b) if a.is_float() && b.is_float() => (a == Self::F32 || b == Self::F32)
                .then_some(Self::F32)
                .filter(|_| ![a, b].contains(&Self::Fixed(Dtype::Float64))),
            (a, b) if !a.is_float() && b.is_float() => Some(b),
            _ => None,
        }
    }
}

impl fmt::Display for DtypeSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Activation => f.write_str("activation"),
            Self::Fixed(dtype) => dtype.fmt(f),
        }
    }
}

/// Shape and dtype of a value. Prints as `[B, L, 2048] activation`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Type {
    /// The dimensions.
    pub shape: Shape,
    /// The element type.
    pub dtype: DtypeSpec,
}

impl Type {
    /// A type.
    pub fn new(shape: impl Into<Shape>, dtype: DtypeSpec) -> Self {
        Self { shape: shape.into(), dtype }
    }

    /// Bytes of its elements in a call of `sizes`, in a model that runs in `activation`.
    pub fn bytes(&self, sizes: Sizes, activation: Dtype) -> u64 {
        let elements = u64::try_from(self.shape.elements().at(sizes)).unwrap_or(0);
        elements.saturating_mul(self.dtype.resolve(activation).size() as u64)
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.shape, self.dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_print_add_multiply_and_divide() {
        let (b, l, s) = (Dim::batch(), Dim::length(), Dim::seen());
        let cases = [
            (Dim::from(2048), "2048"),
            (Dim::from(0), "0"),
            (l.clone() + Dim::from(2), "L+2"),
            (l.clone() + Dim::from(2) - Dim::from(2), "L"),
            (l.clone() - l.clone(), "0"),
            (b.clone() * l.clone() * Dim::from(4), "4*B*L"),
            (Dim::from(1) - s.clone(), "-S+1"),
            ((l.clone() + Dim::from(1)) * (l.clone() - Dim::from(1)), "L*L-1"),
            (s.clone() * Dim::from(3) + l.clone() * Dim::from(2), "2*L+3*S"),
        ];
        for (dim, text) in &cases {
            assert_eq!(dim.to_string(), *text);
        }
        assert_eq!(cases[5].0.divided(2).map(|d| d.to_string()).as_deref(), Some("2*B*L"));
        assert_eq!(cases[5].0.divided(3), None);
        assert_eq!(cases[5].0.divided(0), None);
        let sizes = Sizes { batch: 2, length: 5, position: 7 };
        assert_eq!((cases[2].0.at(sizes), cases[5].0.at(sizes), cases[6].0.at(sizes)), (7, 40, -11));
        assert_eq!(Dim::from(i64::MAX) * Dim::from(4), Dim::from(i64::MAX), "no wrapping");
    }

    #[test]
    fn shapes_broadcast_as_mlx_does() {
        let shape = |dims: &[i32]| Shape::from(dims);
        let bl = |last: i32| Shape::from([Dim::batch(), Dim::length(), Dim::from(last)]);
        let cases = [
            (bl(8), shape(&[8]), Some("[B, L, 8]")),
            (bl(8), bl(1), Some("[B, L, 8]")),
            (shape(&[1]), bl(4), Some("[B, L, 4]")),
            (bl(8), bl(4), None),
            (shape(&[]), bl(4), Some("[B, L, 4]")),
            (shape(&[2, 1]), shape(&[3]), Some("[2, 3]")),
            (bl(8), Shape::from([Dim::seen(), Dim::from(8)]), None),
        ];
        for (a, b, expected) in cases {
            assert_eq!(a.broadcast(&b).map(|s| s.to_string()).as_deref(), expected, "{a} and {b}");
        }
        assert_eq!(
            (bl(8).axis(-1), bl(8).axis(2), bl(8).axis(-4), bl(8).axis(3)),
            (Some(2), Some(2), None, None)
        );
    }

    #[test]
    fn dtypes_promote_or_say_that_it_is_open() {
        let fixed = DtypeSpec::Fixed;
        let a = DtypeSpec::Activation;
        let cases = [
            (a, a, Some(a)),
            (a, DtypeSpec::F32, Some(DtypeSpec::F32)),
            (DtypeSpec::INDEX, a, Some(a)),
            (a, DtypeSpec::INDEX, Some(a)),
            (a, fixed(Dtype::Float16), None),
            (fixed(Dtype::Float16), DtypeSpec::F32, Some(DtypeSpec::F32)),
            (DtypeSpec::F32, fixed(Dtype::Float64), None),
            (DtypeSpec::INDEX, fixed(Dtype::Int64), None),
        ];
        for (x, y, expected) in cases {
            assert_eq!(x.promote(y), expected, "{x} with {y}");
        }
        let t = Type::new([Dim::batch(), Dim::from(6)], a);
        assert_eq!(t.to_string(), "[B, 6] activation");
        assert_eq!(t.bytes(Sizes::decode(9), Dtype::Bfloat16), 12);
    }
}
