// Scalars and vectors of CUDA C++.
#pragma once
#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __constant__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define ZS_VECTOR(T, NAME, ALIGN)                                                                     \
  struct NAME##1 { T x; };                                                                            \
  struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                                                  \
  struct NAME##3 { T x, y, z; };                                                                      \
  struct alignas(ALIGN) NAME##4 { T x, y, z, w; };                                                    \
  inline NAME##1 make_##NAME##1(T x) { return {x}; }                                                  \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                                          \
  inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }                                  \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }                          \
  template <> struct zs::scalar<NAME##2> { static constexpr size_t bytes = sizeof(NAME##2); };        \
  template <> struct zs::scalar<NAME##4> { static constexpr size_t bytes = sizeof(NAME##4); };
ZS_VECTOR(float, float, 16)
ZS_VECTOR(double, double, 16)
ZS_VECTOR(int, int, 16)
ZS_VECTOR(unsigned, uint, 16)
ZS_VECTOR(short, short, 8)
ZS_VECTOR(unsigned short, ushort, 8)
ZS_VECTOR(signed char, char, 4)
ZS_VECTOR(unsigned char, uchar, 4)
ZS_VECTOR(long long, longlong, 16)
ZS_VECTOR(unsigned long long, ulonglong, 16)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

// As in cuda_fp16.h, 16-bit floats convert silently both ways; a mixed `h + 1.0f` is ambiguous there and here.
#define ZS_FLOAT16_OP(H, OP)                                                                          \
  inline H operator OP(H a, H b) { return H(float(a) OP float(b)); }                                  \
  inline H& operator OP##=(H& a, H b) { return a = a OP b; }
#define ZS_FLOAT16_COMPARE(H, OP) inline bool operator OP(H a, H b) { return float(a) OP float(b); }
#define ZS_FLOAT16(H, TO_BITS, TO_FLOAT)                                                              \
  struct alignas(2) H {                                                                               \
    uint16_t bits;                                                                                    \
    H() = default;                                                                                    \
    H(float f) : bits(zs::TO_BITS(f)) {}                                                              \
    H(double f) : H(float(f)) {}                                                                      \
    template <class T> requires(zs::is_int<T>) H(T v) : H(float(v)) {}                                \
    operator float() const { return zs::TO_FLOAT(bits); }                                             \
    static H of_bits(uint16_t b) { H h; h.bits = b; return h; }                                       \
    H operator-() const { return of_bits(bits ^ 0x8000); }                                            \
  };                                                                                                  \
  struct alignas(4) H##_pair { H x, y; };                                                             \
  template <> struct zs::scalar<H> { static constexpr size_t bytes = 2; };                            \
  ZS_FLOAT16_OP(H, +) ZS_FLOAT16_OP(H, -) ZS_FLOAT16_OP(H, *) ZS_FLOAT16_OP(H, /)                     \
  ZS_FLOAT16_COMPARE(H, <) ZS_FLOAT16_COMPARE(H, <=) ZS_FLOAT16_COMPARE(H, >) ZS_FLOAT16_COMPARE(H, >=) \
  ZS_FLOAT16_COMPARE(H, ==) ZS_FLOAT16_COMPARE(H, !=)                                                 \
  inline H __hadd(H a, H b) { return a + b; }                                                         \
  inline H __hsub(H a, H b) { return a - b; }                                                         \
  inline H __hmul(H a, H b) { return a * b; }                                                         \
  inline H __hdiv(H a, H b) { return a / b; }                                                         \
  inline H __hneg(H a) { return -a; }                                                                 \
  inline H __habs(H a) { return H::of_bits(a.bits & 0x7fff); }                                        \
  inline H __hmax(H a, H b) { return H(__builtin_fmaxf(a, b)); }                                      \
  inline H __hmin(H a, H b) { return H(__builtin_fminf(a, b)); }                                      \
  inline H __hfma(H a, H b, H c) { return H(__builtin_fmaf(a, b, c)); }                               \
  inline bool __hisnan(H a) { return __builtin_isnan(float(a)); }                                     \
  inline H hexp(H a) { return H(__builtin_expf(a)); }                                                 \
  inline H hlog(H a) { return H(__builtin_logf(a)); }                                                 \
  inline H hsqrt(H a) { return H(__builtin_sqrtf(a)); }

ZS_FLOAT16(__half, half_bits, half_value)
ZS_FLOAT16(__nv_bfloat16, bfloat_bits, bfloat_value)
typedef __half half;
typedef __half_pair __half2, half2;
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat16_pair __nv_bfloat162, nv_bfloat162;

inline __half __float2half(float f) { return __half(f); }
inline __half __float2half_rn(float f) { return __half(f); }
inline float __half2float(__half h) { return h; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float22half2_rn(float2 f) { return {__half(f.x), __half(f.y)}; }
inline float2 __half22float2(__half2 h) { return {h.x, h.y}; }
inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short b) { return __half::of_bits(b); }
inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
inline float __bfloat162float(__nv_bfloat16 h) { return h; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { return {__nv_bfloat16(f.x), __nv_bfloat16(f.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 h) { return {h.x, h.y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short b) { return __nv_bfloat16::of_bits(b); }

namespace zs {
template <> struct limits<__half> : float16_limits<__half, 0x0400, 0x7bff, 0x1400, 0x7c00, 0x7e00, 11> {};
template <> struct limits<__nv_bfloat16> : float16_limits<__nv_bfloat16, 0x0080, 0x7f7f, 0x3c00, 0x7f80, 0x7fc0, 8> {};
}  // namespace zs

namespace cuda::std {
template <class T> struct numeric_limits : zs::limits<T> {};
template <class T, size_t N> struct array {
  T e[N];
  T& operator[](size_t i) { return e[i]; }
  const T& operator[](size_t i) const { return e[i]; }
  T* data() { return e; }
  const T* data() const { return e; }
  static constexpr size_t size() { return N; }
};
template <class A, class B> inline constexpr bool is_same_v = zs::same<A, B>;
template <class T> inline constexpr bool is_integral_v = zs::is_int<T>;
template <class T> inline constexpr bool is_floating_point_v = zs::same<T, float> || zs::same<T, double>;
template <bool C, class A, class B> struct conditional { typedef A type; };
template <class A, class B> struct conditional<false, A, B> { typedef B type; };
template <bool C, class A, class B> using conditional_t = typename conditional<C, A, B>::type;
template <bool C, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool C, class T = void> using enable_if_t = typename enable_if<C, T>::type;
}  // namespace cuda::std
