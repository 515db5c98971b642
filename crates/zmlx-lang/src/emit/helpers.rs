//! Helper functions that texts use, written once each, only where used.

use std::collections::BTreeSet;

use super::Dialect;

/// A helper function, in the order of the text: what a helper uses comes before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Helper {
    IsNan,
    IsInf,
    Max,
    Min,
    Sign,
    Expm1,
    Log1p,
    Erf,
    Gelu,
    Mish,
    Softplus,
    ToI32,
    ToU32,
    ToI64,
    ToU64,
    DivI32,
    DivI64,
    Shuffle64,
    Above,
    Below,
    Philox,
    Vector,
}

impl Helper {
    fn needs(self, dialect: Dialect) -> &'static [Self] {
        match self {
            Self::Max | Self::Min | Self::ToI32 | Self::ToU32 | Self::ToI64 | Self::ToU64 => &[Self::IsNan],
            Self::Above | Self::Below | Self::Erf => &[Self::IsNan],
            Self::Gelu if dialect == Dialect::Metal => &[Self::IsNan, Self::Erf],
            Self::Softplus if dialect == Dialect::Metal => &[Self::Log1p],
            _ => &[],
        }
    }

    fn text(self, dialect: Dialect) -> String {
        let metal = dialect == Dialect::Metal;
        match self {
            Self::IsNan => ISNAN.to_owned(),
            Self::IsInf => ISINF.to_owned(),
            Self::Max => extreme("max", '>', dialect),
            Self::Min => extreme("min", '<', dialect),
            Self::Sign => SIGN.to_owned(),
            Self::Expm1 => EXPM1.to_owned(),
            Self::Log1p => LOG1P.to_owned(),
            Self::Erf => ERF.to_owned(),
            Self::Gelu => GELU.replace("ERF", if metal { "zk_erf" } else { "erff" }),
            Self::Mish => MISH.to_owned(),
            Self::Softplus => SOFTPLUS.replace("LOG1P", if metal { "zk_log1p" } else { "log1pf" }),
            Self::ToI32 => {
                saturate("int", "zk_to_i32", "(-2147483647 - 1)", "2147483647", "2147483648.0f", true)
            }
            Self::ToU32 => saturate("uint32_t", "zk_to_u32", "0u", "4294967295u", "4294967296.0f", false),
            Self::ToI64 => saturate(
                "int64_t",
                "zk_to_i64",
                "(-int64_t(9223372036854775807) - 1)",
                "int64_t(9223372036854775807)",
                "9223372036854775808.0f",
                true,
            ),
            Self::ToU64 => saturate(
                "uint64_t",
                "zk_to_u64",
                "uint64_t(0)",
                "uint64_t(18446744073709551615u)",
                "18446744073709551616.0f",
                false,
            ),
            Self::DivI32 => DIV.replace("$T", "int").replace("$U", "uint32_t"),
            Self::DivI64 => DIV.replace("$T", "int64_t").replace("$U", "uint64_t"),
            Self::Shuffle64 => SHUFFLE64.to_owned(),
            Self::Above => POSITION.replace("$name", "zk_above").replace('$', ">"),
            Self::Below => POSITION.replace("$name", "zk_below").replace('$', "<"),
            Self::Philox => PHILOX.replace("MULHI", if metal { "metal::mulhi" } else { "__umulhi" }),
            Self::Vector => VECTOR.to_owned(),
        }
    }
}

/// On CUDA one instruction, where there is one: row kernels in 16-bit types are bound by how many they issue.
fn extreme(name: &str, relation: char, dialect: Dialect) -> String {
    let choice = format!("  return a {relation} b || zk_isnan(a) ? a : b;\n");
    let body = match dialect {
        Dialect::Metal => choice,
        Dialect::Cuda => format!(
            "#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800\n  float r;\n  \
             asm(\"{name}.NaN.f32 %0, %1, %2;\" : \"=f\"(r) : \"f\"(a), \"f\"(b));\n  return r;\n\
             #else\n{choice}#endif\n"
        ),
    };
    format!("// NaN if either is.\nFN float zk_{name}(float a, float b) {{\n{body}}}\n")
}

fn saturate(ty: &str, name: &str, low: &str, high: &str, limit: &str, signed: bool) -> String {
    let least = if signed { format!("-{limit}") } else { "0.0f".to_owned() };
    let nan = if signed { "zk_isnan(a) ? 0 : " } else { "" };
    // For unsigned types NaN fails the comparison with 0 and so gives 0.
    let below = if signed { format!("a <= {least} ? {low}") } else { format!("!(a > {least}) ? {low}") };
    format!(
        "// Toward zero, saturating; 0 for NaN.\nFN {ty} {name}(float a) {{\n  \
         return {nan}a >= {limit} ? {high} : {below} : {ty}(a);\n}}\n"
    )
}

/// The text of the helpers and of what they use.
pub(super) fn write(used: &BTreeSet<Helper>, dialect: Dialect) -> String {
    let mut all = used.clone();
    for h in used {
        all.extend(h.needs(dialect));
    }
    let mut text = String::new();
    for h in all {
        text.push_str(&h.text(dialect));
    }
    let spellings = [
        ("FN", dialect.pick("inline", "__device__ inline")),
        ("BITS", dialect.bits_of_float()),
        ("MATH_EXP", dialect.pick("metal::precise::exp", "expf")),
        ("MATH_LOG", dialect.pick("metal::precise::log", "logf")),
        ("MATH_ABS", dialect.pick("metal::fabs", "fabsf")),
        ("MATH_FMA", dialect.pick("metal::fma", "fmaf")),
    ];
    for (from, to) in spellings {
        text = text.replace(from, to);
    }
    text
}

const ISNAN: &str = "\
FN bool zk_isnan(float a) {
  return (BITS(a) & 0x7fffffffu) > 0x7f800000u;
}
";

const ISINF: &str = "\
FN bool zk_isinf(float a) {
  return (BITS(a) & 0x7fffffffu) == 0x7f800000u;
}
";

const SIGN: &str = "\
FN float zk_sign(float a) {
  return a > 0.0f ? 1.0f : a < 0.0f ? -1.0f : a;
}
";

// Taylor's series near 0, where exp(a) - 1 would cancel; its first term left out is 1e-8 of the result.
const EXPM1: &str = "\
FN float zk_expm1(float a) {
  if (!(MATH_ABS(a) < 0.5f)) return MATH_EXP(a) - 1.0f;
  float p = MATH_FMA(a, 2.4801587e-5f, 1.9841270e-4f);
  p = MATH_FMA(a, p, 1.3888889e-3f);
  p = MATH_FMA(a, p, 8.3333333e-3f);
  p = MATH_FMA(a, p, 4.1666667e-2f);
  p = MATH_FMA(a, p, 1.6666667e-1f);
  p = MATH_FMA(a, p, 0.5f);
  return MATH_FMA(a * a, p, a);
}
";

// log(u) with u = 1 + a rounded, times a / (u - 1), which takes the rounding back out (Kahan).
const LOG1P: &str = "\
FN float zk_log1p(float a) {
  const float u = 1.0f + a;
  const float d = u - 1.0f;
  if (d == 0.0f || u == a) return d == 0.0f ? a : MATH_LOG(u);
  return MATH_LOG(u) * (a / d);
}
";

// |a| < 1: Taylor's series. Beyond: 1 - exp(-a^2) p(1 / (1 + |a|/2)), where p interpolates erfc(x) exp(x^2) at the
// Chebyshev points of 1 <= x <= 4.2 within 4e-10 of its value.
const ERF: &str = "\
FN float zk_erf(float a) {
  const float x = MATH_ABS(a);
  if (x < 1.0f) {
    const float s = a * a;
    float p = -1.229055530e-09f;
    p = MATH_FMA(s, p, 1.480719282e-08f);
    p = MATH_FMA(s, p, -1.636584469e-07f);
    p = MATH_FMA(s, p, 1.646211437e-06f);
    p = MATH_FMA(s, p, -1.492565036e-05f);
    p = MATH_FMA(s, p, 1.205533298e-04f);
    p = MATH_FMA(s, p, -8.548327023e-04f);
    p = MATH_FMA(s, p, 5.223977625e-03f);
    p = MATH_FMA(s, p, -2.686617065e-02f);
    p = MATH_FMA(s, p, 1.128379167e-01f);
    p = MATH_FMA(s, p, -3.761263890e-01f);
    p = MATH_FMA(s, p, 1.283791671e-01f);
    return MATH_FMA(a, p, a);
  }
  const float t = 1.0f / MATH_FMA(x, 0.5f, 1.0f);
  float p = 1.699322866e-02f;
  p = MATH_FMA(t, p, 5.201382560e-02f);
  p = MATH_FMA(t, p, -3.554684160e-01f);
  p = MATH_FMA(t, p, 4.505856772e-01f);
  p = MATH_FMA(t, p, -3.563353717e-02f);
  p = MATH_FMA(t, p, 3.217831623e-01f);
  p = MATH_FMA(t, p, 2.658592547e-01f);
  p = MATH_FMA(t, p, 2.840830541e-01f);
  p = MATH_FMA(t, p, -1.058098394e-04f);
  const float r = x > 4.2f ? 1.0f : MATH_FMA(-MATH_EXP(-x * x), p, 1.0f);
  return zk_isnan(a) ? a : a < 0.0f ? -r : r;
}
";

const GELU: &str = "\
FN float zk_gelu(float a) {
  return 0.5f * a * (1.0f + ERF(0.70710678f * a));
}
";

const MISH: &str = "\
// a tanh(log(1 + e)) with e = exp(a): tanh of a logarithm is a quotient of polynomials.
FN float zk_mish(float a) {
  const float e = MATH_EXP(a);
  const float n = e * (e + 2.0f);
  return a > 20.0f ? a : a * (n / (n + 2.0f));
}
";

const SOFTPLUS: &str = "\
FN float zk_softplus(float a) {
  return (a > 0.0f ? a : 0.0f) + LOG1P(MATH_EXP(-MATH_ABS(a)));
}
";

const DIV: &str = "\
// Toward -infinity; 0 for a divisor of 0. The unsigned negation wraps.
FN $T zk_floordiv($T a, $T b) {
  if (b == 0) return 0;
  if (b == -1) return $T($U(0) - $U(a));
  const $T q = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? q - 1 : q;
}
FN $T zk_rem($T a, $T b) {
  if (b == 0 || b == -1) return 0;
  const $T r = a % b;
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
";

const SHUFFLE64: &str = "\
// Metal moves 32 bits between threads at a time.
inline uint64_t zk_join(uint32_t low, uint32_t high) {
  return uint64_t(low) | uint64_t(high) << 32;
}
template <typename T> inline T zk_shuffle_xor(T v, ushort mask) {
  const uint64_t w = uint64_t(v);
  return T(zk_join(simd_shuffle_xor(uint32_t(w), mask), simd_shuffle_xor(uint32_t(w >> 32), mask)));
}
template <typename T> inline T zk_shuffle_up(T v, ushort delta) {
  const uint64_t w = uint64_t(v);
  return T(zk_join(simd_shuffle_up(uint32_t(w), delta), simd_shuffle_up(uint32_t(w >> 32), delta)));
}
template <typename T> inline T zk_shuffle(T v, ushort lane) {
  const uint64_t w = uint64_t(v);
  return T(zk_join(simd_shuffle(uint32_t(w), lane), simd_shuffle(uint32_t(w >> 32), lane)));
}
";

const POSITION: &str = "\
// Whether a at place i goes before b at place j: NaN first, then the value, then the place.
FN bool $name(float a, uint32_t i, float b, uint32_t j) {
  const bool m = zk_isnan(a), n = zk_isnan(b);
  if (m || n) return m && (!n || i < j);
  return a $ b || (a == b && i < j);
}
template <typename T> FN bool $name(T a, uint32_t i, T b, uint32_t j) {
  return a $ b || (a == b && i < j);
}
";

const PHILOX: &str = "\
// Word i % 4 of Philox4x32-10 at counter i / 4.
FN uint32_t zk_random(uint64_t i, uint64_t seed) {
  uint32_t a = uint32_t(i >> 2), b = uint32_t(i >> 34), c = 0, d = 0;
  uint32_t k = uint32_t(seed), l = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t ah = MULHI(0xD2511F53u, a), al = 0xD2511F53u * a;
    const uint32_t ch = MULHI(0xCD9E8D57u, c), cl = 0xCD9E8D57u * c;
    a = ch ^ b ^ k;
    b = cl;
    c = ah ^ d ^ l;
    d = al;
    k += 0x9E3779B9u;
    l += 0xBB67AE85u;
  }
  const uint32_t word = uint32_t(i) & 3;
  return word == 0 ? a : word == 1 ? b : word == 2 ? c : d;
}
";

const VECTOR: &str = "\
// N consecutive elements, at most 16 bytes an access.
template <typename T, int N> struct alignas(sizeof(T) * N) zk_pack {
  T v[N];
};
template <typename T, int N> struct zk_width {
  static constexpr int value = sizeof(T) * N > 16 ? int(16 / sizeof(T)) : N;
};
template <int N, typename T> __device__ inline bool zk_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * zk_width<T, N>::value) == 0;
}
template <int N, typename T> __device__ inline void zk_load(const T* p, T* r) {
  constexpr int W = zk_width<T, N>::value;
#pragma unroll
  for (int i = 0; i < N; i += W) {
    const zk_pack<T, W> w = *reinterpret_cast<const zk_pack<T, W>*>(p + i);
#pragma unroll
    for (int j = 0; j < W; ++j) r[i + j] = w.v[j];
  }
}
template <int N, typename T> __device__ inline void zk_store(T* p, const T* r) {
  constexpr int W = zk_width<T, N>::value;
#pragma unroll
  for (int i = 0; i < N; i += W) {
    zk_pack<T, W> w;
#pragma unroll
    for (int j = 0; j < W; ++j) w.v[j] = r[i + j];
    *reinterpret_cast<zk_pack<T, W>*>(p + i) = w;
  }
}
";
