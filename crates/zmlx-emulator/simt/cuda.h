// CUDA's built-in variables and functions, as far as kernels here use them.
#pragma once
#include "cuda_types.h"

ZS_RAW inline uint3 zs_dim(const ZsDim& d) { return {d.x, d.y, d.z}; }
ZS_RAW inline uint3 zs_thread_index() { return zs_dim(zs_thread()->local); }
ZS_RAW inline uint3 zs_block_index() { return zs_dim(zs_thread()->group); }
ZS_RAW inline dim3 zs_block_dim() { const ZsDim& d = zs_thread()->group_size; return {d.x, d.y, d.z}; }
ZS_RAW inline dim3 zs_grid_dim() { const ZsDim& d = zs_thread()->groups; return {d.x, d.y, d.z}; }
#define threadIdx (zs_thread_index())
#define blockIdx (zs_block_index())
#define blockDim (zs_block_dim())
#define gridDim (zs_grid_dim())
#define warpSize 32

// Functions of one float: the C name, and the overload for float of the name without f.
#define ZS_MATH1(F)                                                                                   \
  extern "C" float F##f(float) noexcept;                                                              \
  extern "C" double F(double) noexcept;                                                               \
  inline float F(float x) { return __builtin_##F##f(x); }
#define ZS_MATH2(F)                                                                                   \
  extern "C" float F##f(float, float) noexcept;                                                       \
  extern "C" double F(double, double) noexcept;                                                       \
  inline float F(float x, float y) { return __builtin_##F##f(x, y); }
ZS_MATH1(exp) ZS_MATH1(exp2) ZS_MATH1(expm1) ZS_MATH1(log) ZS_MATH1(log2) ZS_MATH1(log10) ZS_MATH1(log1p)
ZS_MATH1(sqrt) ZS_MATH1(cbrt) ZS_MATH1(sin) ZS_MATH1(cos) ZS_MATH1(tan) ZS_MATH1(asin) ZS_MATH1(acos) ZS_MATH1(atan)
ZS_MATH1(sinh) ZS_MATH1(cosh) ZS_MATH1(tanh) ZS_MATH1(asinh) ZS_MATH1(acosh) ZS_MATH1(atanh) ZS_MATH1(erf)
ZS_MATH1(erfc) ZS_MATH1(lgamma) ZS_MATH1(tgamma) ZS_MATH1(floor) ZS_MATH1(ceil) ZS_MATH1(trunc) ZS_MATH1(round)
ZS_MATH1(rint) ZS_MATH1(nearbyint) ZS_MATH1(fabs)
ZS_MATH2(pow) ZS_MATH2(atan2) ZS_MATH2(fmod) ZS_MATH2(remainder) ZS_MATH2(fmin) ZS_MATH2(fmax) ZS_MATH2(fdim)
ZS_MATH2(copysign) ZS_MATH2(hypot)
extern "C" float fmaf(float, float, float) noexcept;
inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
inline float ldexpf(float x, int k) { return __builtin_ldexpf(x, k); }
inline float exp10f(float x) { return __builtin_powf(10.0f, x); }
inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool signbit(float x) { return __builtin_signbit(x); }
inline void sincosf(float x, float* s, float* c) { *s = __builtin_sinf(x); *c = __builtin_cosf(x); }
inline float __saturatef(float x) { return __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f); }

// Roundings stated in the name; the approximate ones are exact here.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __frsqrt_rn(float a) { return 1.0f / __builtin_sqrtf(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return __builtin_expf(x); }
inline float __exp10f(float x) { return exp10f(x); }
inline float __logf(float x) { return __builtin_logf(x); }
inline float __log2f(float x) { return __builtin_log2f(x); }
inline float __sinf(float x) { return __builtin_sinf(x); }
inline float __cosf(float x) { return __builtin_cosf(x); }
inline float __powf(float x, float y) { return __builtin_powf(x, y); }
inline float __tanhf(float x) { return __builtin_tanhf(x); }
inline int __float2int_rn(float x) { return static_cast<int>(__builtin_rintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(__builtin_floorf(x)); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(__builtin_rintf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }

#define ZS_MIN_MAX(T) inline T min(T a, T b) { return b < a ? b : a; } inline T max(T a, T b) { return a < b ? b : a; }
ZS_MIN_MAX(int) ZS_MIN_MAX(unsigned) ZS_MIN_MAX(long) ZS_MIN_MAX(unsigned long) ZS_MIN_MAX(long long)
ZS_MIN_MAX(unsigned long long)
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline int abs(int a) { return a < 0 ? -a : a; }
inline float abs(float a) { return __builtin_fabsf(a); }
inline unsigned umin(unsigned a, unsigned b) { return min(a, b); }
inline unsigned umax(unsigned a, unsigned b) { return max(a, b); }
inline unsigned __umulhi(unsigned a, unsigned b) { return zs::mulhi(uint32_t(a), uint32_t(b)); }
inline int __mulhi(int a, int b) { return zs::mulhi(int32_t(a), int32_t(b)); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return zs::mulhi(uint64_t(a), uint64_t(b)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll(static_cast<unsigned long long>(v)) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __brev(unsigned v) { return zs::reverse_bits(v); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  uint64_t all = uint64_t(y) << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= static_cast<unsigned>(all >> 8 * (s >> 4 * i & 7) & 0xff) << 8 * i;
  return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
  return static_cast<unsigned>((uint64_t(high) << 32 | low) << (n & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
  return static_cast<unsigned>((uint64_t(high) << 32 | low) >> (n & 31));
}
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }

// Barriers and warps.
inline void __syncthreads(int line = __builtin_LINE()) { zs_barrier(1, 1, line); }
inline void __syncwarp(unsigned mask = zs::ALL, int line = __builtin_LINE()) { zs_simd_barrier(1, 1, mask, line); }
inline void __threadfence() {}
inline void __threadfence_block() {}
// `width` cuts the warp into equal parts; a source outside the part means the lane itself.
#define ZS_SHUFFLE(F, ARG, FROM)                                                                      \
  template <class T> ZS_RAW T F(unsigned mask, T v, ARG n, int width = 32, int line = __builtin_LINE()) { \
    unsigned lane = zs_thread()->lane, first = lane & ~unsigned(width - 1), end = first + width;      \
    return zs::shuffle(v, FROM, mask, line);                                                          \
  }
ZS_SHUFFLE(__shfl_sync, int, (first + (unsigned(n) & unsigned(width - 1))) | (end & 0))
ZS_SHUFFLE(__shfl_up_sync, unsigned, lane >= first + n ? lane - n : lane | (end & 0))
ZS_SHUFFLE(__shfl_down_sync, unsigned, lane + n < end ? lane + n : lane)
ZS_SHUFFLE(__shfl_xor_sync, int, (lane ^ unsigned(n)) < end ? lane ^ unsigned(n) : lane)
inline unsigned __ballot_sync(unsigned mask, int v, int line = __builtin_LINE()) { return zs::ballot(v != 0, mask, line); }
inline int __any_sync(unsigned mask, int v, int line = __builtin_LINE()) { return zs::ballot(v != 0, mask, line) != 0; }
ZS_RAW inline int __all_sync(unsigned mask, int v, int line = __builtin_LINE()) {
  uint32_t active, votes = zs::ballot(v != 0, mask, line, &active);
  return votes == active;
}
ZS_RAW inline unsigned __activemask(int line = __builtin_LINE()) { return zs::ballot(true, zs::ALL, line); }
#define ZS_REDUCE(F, T, E)                                                                            \
  inline T F(unsigned mask, T v, int line = __builtin_LINE()) {                                       \
    return zs::reduce(v, [](T a, T b) -> T { return static_cast<T>(E); }, mask, line);                                  \
  }
ZS_REDUCE(__reduce_add_sync, int, unsigned(a) + unsigned(b)) ZS_REDUCE(__reduce_add_sync, unsigned, a + b)
ZS_REDUCE(__reduce_max_sync, int, max(a, b)) ZS_REDUCE(__reduce_max_sync, unsigned, max(a, b))
ZS_REDUCE(__reduce_min_sync, int, min(a, b)) ZS_REDUCE(__reduce_min_sync, unsigned, min(a, b))
ZS_REDUCE(__reduce_or_sync, unsigned, a | b) ZS_REDUCE(__reduce_and_sync, unsigned, a & b)

// Atomics.
#define ZS_ATOMIC(F, T, E) \
  inline T F(T* p, T v) { return zs::atomic_update(p, [v](T a) -> T { return static_cast<T>(E); }); }
ZS_ATOMIC(atomicAdd, int, unsigned(a) + unsigned(v)) ZS_ATOMIC(atomicAdd, unsigned, a + v)
ZS_ATOMIC(atomicAdd, unsigned long long, a + v) ZS_ATOMIC(atomicAdd, float, a + v)
ZS_ATOMIC(atomicAdd, double, a + v) ZS_ATOMIC(atomicAdd, __half, a + v) ZS_ATOMIC(atomicAdd, __nv_bfloat16, a + v)
ZS_ATOMIC(atomicSub, int, unsigned(a) - unsigned(v)) ZS_ATOMIC(atomicSub, unsigned, a - v)
ZS_ATOMIC(atomicMax, int, max(a, v)) ZS_ATOMIC(atomicMax, unsigned, max(a, v))
ZS_ATOMIC(atomicMax, unsigned long long, max(a, v))
ZS_ATOMIC(atomicMin, int, min(a, v)) ZS_ATOMIC(atomicMin, unsigned, min(a, v))
ZS_ATOMIC(atomicMin, unsigned long long, min(a, v))
ZS_ATOMIC(atomicAnd, unsigned, a & v) ZS_ATOMIC(atomicOr, unsigned, a | v) ZS_ATOMIC(atomicXor, unsigned, a ^ v)
ZS_ATOMIC(atomicExch, int, (static_cast<void>(a), v)) ZS_ATOMIC(atomicExch, unsigned, (static_cast<void>(a), v))
ZS_ATOMIC(atomicExch, float, (static_cast<void>(a), v))
ZS_ATOMIC(atomicExch, unsigned long long, (static_cast<void>(a), v))
#define ZS_CAS(T) \
  inline T atomicCAS(T* p, T want, T v) { return zs::atomic_update(p, [want, v](T a) -> T { return a == want ? v : a; }); }
ZS_CAS(int) ZS_CAS(unsigned) ZS_CAS(unsigned long long)

#define CUDART_INF_F (__builtin_inff())
#define CUDART_NAN_F (__builtin_nanf(""))

namespace cooperative_groups {
struct thread_block {
  ZS_RAW static unsigned thread_rank() { return zs_thread()->index; }
  ZS_RAW static unsigned size() { const ZsDim& d = zs_thread()->group_size; return d.x * d.y * d.z; }
  static unsigned num_threads() { return size(); }
  static dim3 dim_threads() { return blockDim; }
  ZS_RAW static dim3 group_index() { const ZsDim& d = zs_thread()->group; return {d.x, d.y, d.z}; }
  ZS_RAW static dim3 thread_index() { const ZsDim& d = zs_thread()->local; return {d.x, d.y, d.z}; }
  static void sync(int line = __builtin_LINE()) { zs_barrier(1, 1, line); }
};
struct grid_group {
  ZS_RAW static unsigned long long block_rank() {
    const ZsThread& t = *zs_thread();
    return (uint64_t(t.group.z) * t.groups.y + t.group.y) * t.groups.x + t.group.x;
  }
  static unsigned long long thread_rank() { return block_rank() * thread_block::size() + thread_block::thread_rank(); }
  static dim3 block_index() { return thread_block::group_index(); }
  static dim3 dim_blocks() { return gridDim; }
  static unsigned long long size() { dim3 g = gridDim; return uint64_t(g.x) * g.y * g.z * thread_block::size(); }
};
inline thread_block this_thread_block() { return {}; }
inline grid_group this_grid() { return {}; }

// Part of a warp.
template <unsigned N> struct thread_block_tile {
  static_assert(N <= 32 && (N & (N - 1)) == 0, "tiles are of at most a warp");
  ZS_RAW static unsigned thread_rank() { return zs_thread()->index % N; }
  ZS_RAW static unsigned meta_group_rank() { return zs_thread()->index / N; }
  static unsigned meta_group_size() { return (thread_block::size() + N - 1) / N; }
  static constexpr unsigned size() { return N; }
  static constexpr unsigned num_threads() { return N; }
  ZS_RAW static unsigned mask() { return (N == 32 ? zs::ALL : (1u << N % 32) - 1) << (zs_thread()->lane & ~(N - 1)); }
  static void sync(int line = __builtin_LINE()) { __syncwarp(mask(), line); }
  template <class T> static T shfl(T v, int from, int line = __builtin_LINE()) { return __shfl_sync(mask(), v, from, N, line); }
  template <class T> static T shfl_up(T v, unsigned n, int line = __builtin_LINE()) { return __shfl_up_sync(mask(), v, n, N, line); }
  template <class T> static T shfl_down(T v, unsigned n, int line = __builtin_LINE()) { return __shfl_down_sync(mask(), v, n, N, line); }
  template <class T> static T shfl_xor(T v, int n, int line = __builtin_LINE()) { return __shfl_xor_sync(mask(), v, n, N, line); }
  static bool any(bool v, int line = __builtin_LINE()) { return __any_sync(mask(), v, line); }
  static bool all(bool v, int line = __builtin_LINE()) { return __all_sync(mask(), v, line); }
  ZS_RAW static unsigned ballot(bool v, int line = __builtin_LINE()) {
    return __ballot_sync(mask(), v, line) >> (zs_thread()->lane & ~(N - 1));
  }
};
template <unsigned N> inline thread_block_tile<N> tiled_partition(const thread_block&) { return {}; }
template <class T> struct plus { T operator()(T a, T b) const { return a + b; } };
template <class T> struct greater { T operator()(T a, T b) const { return a < b ? b : a; } };
template <class T> struct less { T operator()(T a, T b) const { return b < a ? b : a; } };
template <unsigned N, class T, class F>
inline T reduce(const thread_block_tile<N>& tile, T v, F f, int line = __builtin_LINE()) {
  return zs::reduce(v, f, tile.mask(), line);
}
}  // namespace cooperative_groups

#include "mlx_device.cuh"
