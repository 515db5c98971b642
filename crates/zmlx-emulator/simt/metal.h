// Metal's standard library, as far as kernels here use it. What Apple's headers do not have (erf, expm1) is not here.
#pragma once
#include "metal_types.h"

namespace metal {

// A function of floats, for half and bfloat through float, for vectors by component.
#define ZS_VEC1(F)                                                                                   \
  template <class T, int N> inline vec<T, N> F(const vec<T, N>& a) {                                 \
    vec<T, N> r;                                                                                     \
    for (int i = 0; i < N; i++) r[i] = F(a[i]);                                                      \
    return r;                                                                                        \
  }
#define ZS_VEC2(F)                                                                                   \
  template <class T, int N> inline vec<T, N> F(const vec<T, N>& a, const vec<T, N>& b) {             \
    vec<T, N> r;                                                                                     \
    for (int i = 0; i < N; i++) r[i] = F(a[i], b[i]);                                                \
    return r;                                                                                        \
  }                                                                                                  \
  template <class T, int N> inline vec<T, N> F(const vec<T, N>& a, typename zs::id<T>::type b) {     \
    return F(a, vec<T, N>(b));                                                                       \
  }
#define ZS_VEC3(F)                                                                                   \
  template <class T, int N>                                                                          \
  inline vec<T, N> F(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {                   \
    vec<T, N> r;                                                                                     \
    for (int i = 0; i < N; i++) r[i] = F(a[i], b[i], c[i]);                                          \
    return r;                                                                                        \
  }
#define ZS_FLOAT1(F, E)                                                                              \
  inline float F(float x) { return E; }                                                              \
  inline half F(half x) { return half(F(float(x))); }                                                \
  inline bfloat F(bfloat x) { return bfloat(F(float(x))); }                                          \
  ZS_VEC1(F)
#define ZS_FLOAT2(F, E)                                                                              \
  inline float F(float x, float y) { return E; }                                                     \
  inline half F(half x, half y) { return half(F(float(x), float(y))); }                              \
  inline bfloat F(bfloat x, bfloat y) { return bfloat(F(float(x), float(y))); }                      \
  ZS_VEC2(F)
#define ZS_FLOAT3(F, E)                                                                              \
  inline float F(float x, float y, float z) { return E; }                                            \
  inline half F(half x, half y, half z) { return half(F(float(x), float(y), float(z))); }            \
  inline bfloat F(bfloat x, bfloat y, bfloat z) { return bfloat(F(float(x), float(y), float(z))); }  \
  ZS_VEC3(F)
#define ZS_INT_TYPES(M) M(char) M(signed char) M(uchar) M(short) M(ushort) M(int) M(uint) M(long) M(ulong)

#define ZS_MATH(F) ZS_FLOAT1(F, __builtin_##F##f(x))
ZS_MATH(exp) ZS_MATH(exp2) ZS_MATH(log) ZS_MATH(log2) ZS_MATH(log10) ZS_MATH(sqrt) ZS_MATH(sin) ZS_MATH(cos)
ZS_MATH(tan) ZS_MATH(asin) ZS_MATH(acos) ZS_MATH(atan) ZS_MATH(sinh) ZS_MATH(cosh) ZS_MATH(tanh) ZS_MATH(asinh)
ZS_MATH(acosh) ZS_MATH(atanh) ZS_MATH(floor) ZS_MATH(ceil) ZS_MATH(trunc) ZS_MATH(round) ZS_MATH(rint) ZS_MATH(fabs)
ZS_FLOAT1(exp10, __builtin_powf(10.0f, x))
ZS_FLOAT1(rsqrt, 1.0f / __builtin_sqrtf(x))
ZS_FLOAT1(abs, __builtin_fabsf(x))
ZS_FLOAT1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
ZS_FLOAT1(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f)
ZS_FLOAT1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
ZS_FLOAT2(pow, __builtin_powf(x, y))
ZS_FLOAT2(powr, __builtin_powf(x, y))
ZS_FLOAT2(atan2, __builtin_atan2f(x, y))
ZS_FLOAT2(fmod, __builtin_fmodf(x, y))
ZS_FLOAT2(fmin, __builtin_fminf(x, y))
ZS_FLOAT2(fmax, __builtin_fmaxf(x, y))
ZS_FLOAT2(min, __builtin_fminf(x, y))
ZS_FLOAT2(max, __builtin_fmaxf(x, y))
ZS_FLOAT2(fdim, __builtin_fdimf(x, y))
ZS_FLOAT2(copysign, __builtin_copysignf(x, y))
ZS_FLOAT2(step, y < x ? 0.0f : 1.0f)
ZS_FLOAT3(fma, __builtin_fmaf(x, y, z))
ZS_FLOAT3(clamp, __builtin_fminf(__builtin_fmaxf(x, y), z))
ZS_FLOAT3(mix, x + (y - x) * z)
inline float ldexp(float x, int k) { return __builtin_ldexpf(x, k); }
inline float smoothstep(float a, float b, float x) {
  float t = saturate((x - a) / (b - a));
  return t * t * (3.0f - 2.0f * t);
}

#define ZS_INT_FUNCTIONS(T)                                                                          \
  inline T min(T a, T b) { return b < a ? b : a; }                                                   \
  inline T max(T a, T b) { return a < b ? b : a; }                                                   \
  inline T clamp(T v, T low, T high) { return min(max(v, low), high); }                              \
  inline T abs(T v) { return static_cast<T>(v < 0 ? 0 - v : v); }                                           \
  inline T popcount(T v) { return static_cast<T>(__builtin_popcountll(uint64_t(v) << (64 - 8 * sizeof(T)))); }    \
  inline T clz(T v) {                                                                                \
    return static_cast<T>(v ? __builtin_clzll(uint64_t(v) << (64 - 8 * sizeof(T))) : int(8 * sizeof(T)));         \
  }                                                                                                  \
  inline T ctz(T v) { return static_cast<T>(v ? __builtin_ctzll(uint64_t(v)) : int(8 * sizeof(T))); }
ZS_INT_TYPES(ZS_INT_FUNCTIONS)
ZS_VEC1(popcount) ZS_VEC1(clz) ZS_VEC1(ctz)
using zs::mulhi;
using zs::reverse_bits;
inline uint rotate(uint v, uint n) { return v << (n & 31) | v >> (-n & 31); }

#define ZS_TEST(F, E)                                                                                \
  inline bool F(float x) { return E; }                                                               \
  template <class T, int N> inline vec<bool, N> F(const vec<T, N>& a) {                              \
    vec<bool, N> r;                                                                                  \
    for (int i = 0; i < N; i++) r[i] = F(float(a[i]));                                               \
    return r;                                                                                        \
  }
ZS_TEST(isnan, __builtin_isnan(x))
ZS_TEST(isinf, __builtin_isinf(x))
ZS_TEST(isfinite, __builtin_isfinite(x))
ZS_TEST(isnormal, __builtin_isnormal(x))
ZS_TEST(signbit, __builtin_signbit(x))

// select(a, b, c) is c ? b : a.
template <class T> requires(zs::is_number<T> || is_floating_point_v<T>) inline T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N> inline vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<bool, N>& c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <int N> inline bool any(const vec<bool, N>& a) { bool r = false; for (int i = 0; i < N; i++) r |= a[i]; return r; }
template <int N> inline bool all(const vec<bool, N>& a) { bool r = true; for (int i = 0; i < N; i++) r &= a[i]; return r; }
template <class T, int N> inline T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T r = a[0] * b[0];
  for (int i = 1; i < N; i++) r += a[i] * b[i];
  return r;
}
template <class T, int N> inline T length(const vec<T, N>& a) { return sqrt(dot(a, a)); }

namespace precise { using namespace metal; }
namespace fast { using namespace metal; }

// Barriers.
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
inline void threadgroup_barrier(mem_flags f, int line = __builtin_LINE()) {
  zs_barrier(uint(f) >> 1 & 1, uint(f) & 1, line);
}
inline void simdgroup_barrier(mem_flags f, int line = __builtin_LINE()) {
  zs_simd_barrier(uint(f) >> 1 & 1, uint(f) & 1, zs::ALL, line);
}

// Across a simdgroup: numbers of at most 32 bits, and vectors of them by component.
template <class T> concept SimdNumber = (zs::is_int<T> && sizeof(T) <= 4 && !zs::same<T, bool>) || is_floating_point_v<T>;

#define ZS_SIMD_REDUCE(F, E)                                                                         \
  template <SimdNumber T> inline T F(T v, int line = __builtin_LINE()) {                             \
    return zs::reduce(v, [](T a, T b) -> T { return static_cast<T>(E); }, zs::ALL, line);                              \
  }                                                                                                  \
  template <class T, int N> inline vec<T, N> F(vec<T, N> v, int line = __builtin_LINE()) {           \
    for (int i = 0; i < N; i++) v[i] = F(v[i], line);                                                \
    return v;                                                                                        \
  }
ZS_SIMD_REDUCE(simd_sum, a + b)
ZS_SIMD_REDUCE(simd_product, a * b)
ZS_SIMD_REDUCE(simd_max, max(a, b))
ZS_SIMD_REDUCE(simd_min, min(a, b))
ZS_SIMD_REDUCE(simd_and, a & b)
ZS_SIMD_REDUCE(simd_or, a | b)
ZS_SIMD_REDUCE(simd_xor, a ^ b)

#define ZS_SIMD_SCAN(F, E, START, INCLUSIVE)                                                         \
  template <SimdNumber T> inline T F(T v, int line = __builtin_LINE()) {                             \
    return zs::scan(v, T(START), [](T a, T b) -> T { return static_cast<T>(E); }, INCLUSIVE, line);                    \
  }
ZS_SIMD_SCAN(simd_prefix_exclusive_sum, a + b, 0.0f, false)
ZS_SIMD_SCAN(simd_prefix_inclusive_sum, a + b, 0.0f, true)
ZS_SIMD_SCAN(simd_prefix_exclusive_product, a * b, 1.0f, false)
ZS_SIMD_SCAN(simd_prefix_inclusive_product, a * b, 1.0f, true)

// `keep`: the lane where the source would lie outside the simdgroup.
#define ZS_SIMD_SHUFFLE(F, ARG, FROM)                                                                \
  template <SimdNumber T> ZS_RAW T F(T v, ARG n, int line = __builtin_LINE()) {                      \
    uint lane = zs_thread()->lane;                                                                   \
    return zs::shuffle(v, FROM, zs::ALL, line);                                                      \
  }                                                                                                  \
  template <class T, int N> inline vec<T, N> F(vec<T, N> v, ARG n, int line = __builtin_LINE()) {    \
    for (int i = 0; i < N; i++) v[i] = F(v[i], n, line);                                             \
    return v;                                                                                        \
  }
ZS_SIMD_SHUFFLE(simd_shuffle, ushort, n + 0 * lane)
ZS_SIMD_SHUFFLE(simd_broadcast, ushort, n + 0 * lane)
ZS_SIMD_SHUFFLE(simd_shuffle_xor, ushort, lane ^ n)
ZS_SIMD_SHUFFLE(simd_shuffle_down, ushort, lane + n < 32 ? lane + n : lane)
ZS_SIMD_SHUFFLE(simd_shuffle_up, ushort, lane >= n ? lane - n : lane)
ZS_SIMD_SHUFFLE(simd_shuffle_rotate_down, ushort, (lane + n) & 31)
ZS_SIMD_SHUFFLE(simd_shuffle_rotate_up, ushort, (lane - n) & 31)
template <SimdNumber T> ZS_RAW T simd_shuffle_and_fill_down(T v, T fill, ushort n, int line = __builtin_LINE()) {
  T r = simd_shuffle_down(v, n, line);
  return zs_thread()->lane + n < 32 ? r : fill;
}
template <SimdNumber T> ZS_RAW T simd_shuffle_and_fill_up(T v, T fill, ushort n, int line = __builtin_LINE()) {
  T r = simd_shuffle_up(v, n, line);
  return zs_thread()->lane >= n ? r : fill;
}

struct simd_vote {
  typedef ulong vote_t;
  vote_t votes, active;
  explicit operator vote_t() const { return votes; }
  bool all() const { return votes == active; }
  bool any() const { return votes != 0; }
};
ZS_RAW inline simd_vote simd_ballot(bool v, int line = __builtin_LINE()) {
  uint active, votes = zs::ballot(v, zs::ALL, line, &active);
  return {votes, active};
}
inline bool simd_all(bool v, int line = __builtin_LINE()) { return simd_ballot(v, line).all(); }
inline bool simd_any(bool v, int line = __builtin_LINE()) { return simd_ballot(v, line).any(); }
inline simd_vote simd_active_threads_mask(int line = __builtin_LINE()) { return simd_ballot(true, line); }
ZS_RAW inline bool simd_is_first(int line = __builtin_LINE()) {
  uint active, votes = zs::ballot(true, zs::ALL, line, &active);
  return uint(__builtin_ctz(votes)) == zs_thread()->lane;
}
template <SimdNumber T> ZS_RAW T simd_broadcast_first(T v, int line = __builtin_LINE()) {
  uint64_t bits[32];
  uint active = zs_simd(zs::SHUFFLE, zs::ALL, zs::pack(v), bits, line);
  return zs::unpack<T>(bits[__builtin_ctz(active)]);
}

// Atomics: one order, and the types that Metal has.
enum memory_order { memory_order_relaxed };
template <class T> struct atomic {
  static_assert(zs::same<T, int> || zs::same<T, uint> || zs::same<T, float> || zs::same<T, bool> || zs::same<T, ulong>,
                "Metal has atomics of int, uint, float, bool and ulong only");
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;

#define ZS_ATOMIC(F, CAN, E)                                                                         \
  template <class T> ZS_RAW T F(volatile atomic<T>* p, typename zs::id<T>::type v, memory_order) {   \
    static_assert(CAN, "Metal has no such atomic operation on this type");                           \
    return zs::atomic_update(&p->value, [v](T a) -> T { return static_cast<T>(E); });                                  \
  }
#define ZS_INT32 (zs::same<T, int> || zs::same<T, uint>)
ZS_ATOMIC(atomic_fetch_add_explicit, (ZS_INT32 || zs::same<T, float>), a + v)
ZS_ATOMIC(atomic_fetch_sub_explicit, (ZS_INT32 || zs::same<T, float>), a - v)
ZS_ATOMIC(atomic_fetch_max_explicit, ZS_INT32, a < v ? v : a)
ZS_ATOMIC(atomic_fetch_min_explicit, ZS_INT32, v < a ? v : a)
ZS_ATOMIC(atomic_fetch_and_explicit, ZS_INT32, a & v)
ZS_ATOMIC(atomic_fetch_or_explicit, ZS_INT32, a | v)
ZS_ATOMIC(atomic_fetch_xor_explicit, ZS_INT32, a ^ v)
ZS_ATOMIC(atomic_exchange_explicit, (!zs::same<T, ulong>), (static_cast<void>(a), v))
template <class T> ZS_RAW T atomic_load_explicit(const volatile atomic<T>* p, memory_order) { return zs::atomic_read(&p->value); }
template <class T> ZS_RAW void atomic_store_explicit(volatile atomic<T>* p, typename zs::id<T>::type v, memory_order) {
  zs::atomic_write(&p->value, T(v));
}
template <class T>
ZS_RAW bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* p, T* expected, typename zs::id<T>::type v, memory_order,
                                                  memory_order) {
  T want = *expected;
  T old = zs::atomic_update(&p->value, [want, v](T a) -> T { return __builtin_memcmp(&a, &want, sizeof(T)) ? a : T(v); });
  *expected = old;
  return !__builtin_memcmp(&old, &want, sizeof(T));
}

}  // namespace metal

using namespace metal;

// What MLX puts before every kernel of its own and others' (mlx/backend/metal/kernels/utils.h), where bodies may use it.
template <class T> struct Limits {
  static constexpr T max = zs::limits<T>::max(), min = zs::limits<T>::lowest();
  static constexpr T finite_max = zs::limits<T>::max(), finite_min = zs::limits<T>::lowest();
};
template <> struct Limits<float> {
  static constexpr float max = INFINITY, min = -INFINITY, finite_max = FLT_MAX, finite_min = -FLT_MAX;
};
#define ZS_LIMITS16(H)                                                                               \
  template <> struct Limits<H> {                                                                     \
    static inline const H max = zs::limits<H>::infinity(), min = -zs::limits<H>::infinity();         \
    static inline const H finite_max = zs::limits<H>::max(), finite_min = zs::limits<H>::lowest();   \
  };
ZS_LIMITS16(half)
ZS_LIMITS16(bfloat)
template <class T, class U> inline T ceildiv(T n, U m) { return (n + m - 1) / m; }
inline float log1p(float x) { return __builtin_log1pf(x); }
inline bfloat log1p(bfloat x) { return bfloat(__builtin_log1pf(float(x))); }
template <class T = int64_t> inline T elem_to_loc(T elem, const int* shape, const int64_t* strides, int ndim) {
  T at = 0;
  for (int i = ndim; i-- > 0;) {
    at += elem % shape[i] * T(strides[i]);
    elem /= shape[i];
  }
  return at;
}
#define HALF_MAX (zs::limits<half>::max())
#define M_PI_F 3.14159265358979323846f
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.69314718055994530942f
#define M_LOG2E_F 1.44269504088896340736f
#define M_SQRT2_F 1.41421356237309504880f
#define MAXFLOAT __FLT_MAX__
#define double Metal_has_no_double
