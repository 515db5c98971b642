//! The operations of the language, as one table.

use serde::{Deserialize, Serialize};

/// What an operation accepts and gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signature {
    /// Floats to a float; integers and booleans are converted first.
    Float,
    /// Operands meet in their common type, which must be a number; the result has it.
    Number,
    /// Operands meet in their common type, which must be an integer (or bool for and, or, xor); the result has it.
    Integer,
    /// Operands meet in their common type; the result is a boolean.
    Compare,
    /// A float to a boolean.
    FloatTest,
    /// Booleans (numbers count as `!= 0`) to a boolean.
    Logic,
    /// A boolean, then two operands that meet in their common type, which is the result's.
    Select,
}

macro_rules! ops {
    ($($name:ident $text:literal $arity:literal $signature:ident $cost:literal $doc:literal;)*) => {
        /// An operation on values.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Op { $(#[doc = $doc] $name,)* }

        impl Op {
            /// Every operation.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The name as a function of the language.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Number of operands.
            pub fn arity(self) -> usize {
                match self { $(Self::$name => $arity,)* }
            }

            /// What it accepts and gives.
            pub fn signature(self) -> Signature {
                match self { $(Self::$name => Signature::$signature,)* }
            }

            /// Cost in multiplications, roughly: for counts of work and for choosing between saving and recomputing.
            pub fn cost(self) -> u32 {
                match self { $(Self::$name => $cost,)* }
            }

            /// Formula and rules, one line.
            pub fn doc(self) -> &'static str {
                match self { $(Self::$name => $doc,)* }
            }
        }
    };
}

ops! {
    Neg "neg" 1 Number 1 "`-x`";
    Abs "abs" 1 Number 1 "`|x|`";
    Sign "sign" 1 Number 1 "-1, 0 or 1; NaN for NaN";
    Exp "exp" 1 Float 10 "`e^x`";
    Exp2 "exp2" 1 Float 10 "`2^x`";
    Log "log" 1 Float 12 "natural logarithm";
    Log2 "log2" 1 Float 12 "logarithm to base 2";
    Log10 "log10" 1 Float 12 "logarithm to base 10";
    Log1p "log1p" 1 Float 14 "`log(1 + x)`, accurate near 0";
    Expm1 "expm1" 1 Float 14 "`e^x - 1`, accurate near 0";
    Sqrt "sqrt" 1 Float 5 "square root";
    Rsqrt "rsqrt" 1 Float 8 "`1 / sqrt(x)`";
    Sin "sin" 1 Float 15 "sine, radians";
    Cos "cos" 1 Float 15 "cosine, radians";
    Tan "tan" 1 Float 25 "tangent, radians";
    Asin "asin" 1 Float 20 "inverse sine";
    Acos "acos" 1 Float 20 "inverse cosine";
    Atan "atan" 1 Float 20 "inverse tangent";
    Tanh "tanh" 1 Float 16 "hyperbolic tangent";
    Sigmoid "sigmoid" 1 Float 15 "`1 / (1 + e^-x)`";
    Silu "silu" 1 Float 16 "`x * sigmoid(x)`";
    GeluTanh "gelu_tanh" 1 Float 20 "`0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`";
    GeluErf "gelu" 1 Float 25 "`0.5 x (1 + erf(x / sqrt(2)))`";
    Softplus "softplus" 1 Float 25 "`log(1 + e^x)`, without overflow";
    Mish "mish" 1 Float 18 "`x * tanh(log(1 + e^x))`";
    Erf "erf" 1 Float 20 "error function";
    Floor "floor" 1 Float 1 "largest integer not above";
    Ceil "ceil" 1 Float 1 "smallest integer not below";
    Trunc "trunc" 1 Float 1 "rounds toward zero";
    Round "round" 1 Float 1 "nearest integer, ties to even";
    IsNan "isnan" 1 FloatTest 1 "whether x is NaN";
    IsInf "isinf" 1 FloatTest 1 "whether x is an infinity";
    Not "not" 1 Logic 1 "logical not";
    BitNot "bitnot" 1 Integer 1 "bitwise complement; logical not for bool";
    Popcount "popcount" 1 Integer 2 "number of set bits";
    Add "add" 2 Number 1 "`a + b`; integers wrap";
    Sub "sub" 2 Number 1 "`a - b`; integers wrap";
    Mul "mul" 2 Number 1 "`a * b`; integers wrap";
    Div "div" 2 Float 5 "`a / b`; integers are converted to f32 first";
    FloorDiv "floordiv" 2 Number 8 "`floor(a / b)`; an integer divided by 0 gives 0";
    Rem "rem" 2 Number 8 "`a - b * floor(a / b)`, the sign of b; an integer by 0 gives 0";
    Pow "pow" 2 Float 35 "`a^b` by the rules of C's powf";
    Min "min" 2 Number 1 "the smaller; NaN if either is NaN";
    Max "max" 2 Number 1 "the larger; NaN if either is NaN";
    Lt "lt" 2 Compare 1 "`a < b`";
    Le "le" 2 Compare 1 "`a <= b`";
    Gt "gt" 2 Compare 1 "`a > b`";
    Ge "ge" 2 Compare 1 "`a >= b`";
    Eq "eq" 2 Compare 1 "`a == b`";
    Ne "ne" 2 Compare 1 "`a != b`";
    And "and" 2 Logic 1 "logical and (both sides are computed)";
    Or "or" 2 Logic 1 "logical or (both sides are computed)";
    BitAnd "bitand" 2 Integer 1 "bitwise and";
    BitOr "bitor" 2 Integer 1 "bitwise or";
    BitXor "bitxor" 2 Integer 1 "bitwise exclusive or";
    Shl "shl" 2 Integer 1 "shift left; a count outside 0 .. bits-1 gives 0";
    Shr "shr" 2 Integer 1 "shift right, arithmetic when signed; a count outside 0 .. bits-1 gives 0, or -1 for negative numbers";
    Fma "fma" 3 Float 1 "`a * b + c` with one rounding";
    Select "select" 3 Select 1 "`condition ? a : b` (both sides are computed)";
}

impl Op {
    /// The operation of a function name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|op| op.name() == name)
    }
}

/// A reduction over the row (the last axis). Sums of booleans count in `i32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReduceOp {
    /// Sum; 0 for an empty row.
    Sum,
    /// Product; 1 for an empty row.
    Prod,
    /// Largest; NaN if any is NaN; the type's least value (-inf) for an empty row.
    Max,
    /// Smallest; NaN if any is NaN; the type's largest value (inf) for an empty row.
    Min,
    /// Position of the largest, `u32`; the first of equals; the first NaN if there is one; 0 for an empty row.
    ArgMax,
    /// Position of the smallest, by the same rules.
    ArgMin,
}

impl ReduceOp {
    /// Every reduction.
    pub const ALL: [Self; 6] = [Self::Sum, Self::Prod, Self::Max, Self::Min, Self::ArgMax, Self::ArgMin];

    /// The name as a function of the language.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sum => "row_sum",
            Self::Prod => "row_prod",
            Self::Max => "row_max",
            Self::Min => "row_min",
            Self::ArgMax => "row_argmax",
            Self::ArgMin => "row_argmin",
        }
    }
}

/// A running reduction along the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScanOp {
    /// Running sum.
    Sum,
    /// Running product.
    Prod,
    /// Running maximum; NaN from the first NaN on.
    Max,
    /// Running minimum; NaN from the first NaN on.
    Min,
}

impl ScanOp {
    /// Every scan.
    pub const ALL: [Self; 4] = [Self::Sum, Self::Prod, Self::Max, Self::Min];

    /// The name as a function of the language; `_exclusive` and `_reverse` may follow, in this order.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sum => "cumsum",
            Self::Prod => "cumprod",
            Self::Max => "cummax",
            Self::Min => "cummin",
        }
    }
}
