// Scalars and vectors of Metal's shading language.
#pragma once
#include "simt.h"

#define device
#define constant
#define thread
#define threadgroup
#define kernel
#define METAL_FUNC inline

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;

// half takes a float silently; bfloat, as with Apple's compiler, only through a cast.
#define ZS_FLOAT16(H, TO_BITS, TO_FLOAT, EXPLICIT)                                                  \
  struct H {                                                                                        \
    uint16_t bits;                                                                                  \
    H() = default;                                                                                  \
    EXPLICIT H(float f) : bits(zs::TO_BITS(f)) {}                                                   \
    operator float() const { return zs::TO_FLOAT(bits); }                                           \
    static H of_bits(uint16_t b) { H h; h.bits = b; return h; }                                     \
    H operator-() const { return of_bits(bits ^ 0x8000); }                                          \
    H operator+() const { return *this; }                                                           \
    H& operator++() { return *this = H(float(*this) + 1.0f); }                                      \
  };                                                                                                \
  namespace zs { template <> struct scalar<H> { static constexpr size_t bytes = 2; }; }             \
  ZS_FLOAT16_OP(H, +) ZS_FLOAT16_OP(H, -) ZS_FLOAT16_OP(H, *) ZS_FLOAT16_OP(H, /)

// With a float the result is a float, with an integer it stays 16 bits wide.
#define ZS_FLOAT16_OP(H, OP)                                                                        \
  inline H operator OP(H a, H b) { return H(float(a) OP float(b)); }                                \
  inline H& operator OP##=(H& a, H b) { return a = a OP b; }                                        \
  inline float operator OP(H a, float b) { return float(a) OP b; }                                  \
  inline float operator OP(float a, H b) { return a OP float(b); }                                  \
  template <class T> requires(zs::is_int<T>)                                                        \
  inline H operator OP(H a, T b) { return H(float(a) OP float(b)); }                                \
  template <class T> requires(zs::is_int<T>)                                                        \
  inline H operator OP(T a, H b) { return H(float(a) OP float(b)); }

ZS_FLOAT16(half, half_bits, half_value, )
ZS_FLOAT16(bfloat, bfloat_bits, bfloat_value, explicit)

typedef half float16_t;
typedef bfloat bfloat16_t;
inline half operator""h(long double v) { return half(static_cast<float>(v)); }

namespace zs {
template <> struct limits<half> : float16_limits<half, 0x0400, 0x7bff, 0x1400, 0x7c00, 0x7e00, 11> {};
template <> struct limits<bfloat> : float16_limits<bfloat, 0x0080, 0x7f7f, 0x3c00, 0x7f80, 0x7fc0, 8> {};
}  // namespace zs

namespace metal {

template <class T, int N> struct vec;

// A few components of a vector under one name.
template <class T, int N, int... AT> struct swizzle {
  T e[N];
  operator vec<T, sizeof...(AT)>() const { return vec<T, sizeof...(AT)>(e[AT]...); }
  swizzle& operator=(const vec<T, sizeof...(AT)>& v) {
    int k = 0;
    ((e[AT] = v[k++]), ...);
    return *this;
  }
};

template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    struct { T x, y; };
    struct { T r, g; };
    swizzle<T, 2, 0, 1> xy;
    swizzle<T, 2, 1, 0> yx;
    T e[2];
  };
  vec() = default;
  vec(T a) : x(a), y(a) {}
  vec(T a, T b) : x(a), y(b) {}
  template <class U> requires(!zs::same<T, U>) explicit vec(const vec<U, 2>& v) : x(T(v.x)), y(T(v.y)) {}
  T& operator[](int i) { return e[i]; }
  const T& operator[](int i) const { return e[i]; }
};

template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    struct { T x, y, z; };
    struct { T r, g, b; };
    swizzle<T, 3, 0, 1> xy;
    swizzle<T, 3, 1, 2> yz;
    swizzle<T, 3, 0, 2> xz;
    T e[3];
  };
  vec() = default;
  vec(T a) : x(a), y(a), z(a) {}
  vec(T a, T b, T c) : x(a), y(b), z(c) {}
  vec(const vec<T, 2>& v, T c) : x(v.x), y(v.y), z(c) {}
  template <class U> requires(!zs::same<T, U>) explicit vec(const vec<U, 3>& v) : x(T(v.x)), y(T(v.y)), z(T(v.z)) {}
  T& operator[](int i) { return e[i]; }
  const T& operator[](int i) const { return e[i]; }
};

template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    struct { T x, y, z, w; };
    struct { T r, g, b, a; };
    swizzle<T, 4, 0, 1> xy;
    swizzle<T, 4, 2, 3> zw;
    swizzle<T, 4, 1, 0> yx;
    swizzle<T, 4, 1, 2> yz;
    swizzle<T, 4, 0, 2> xz;
    swizzle<T, 4, 1, 3> yw;
    swizzle<T, 4, 0, 1> lo;
    swizzle<T, 4, 2, 3> hi;
    swizzle<T, 4, 0, 1, 2> xyz;
    swizzle<T, 4, 3, 2, 1, 0> wzyx;
    T e[4];
  };
  vec() = default;
  vec(T v) : x(v), y(v), z(v), w(v) {}
  vec(T p, T q, T s, T t) : x(p), y(q), z(s), w(t) {}
  vec(const vec<T, 2>& p, const vec<T, 2>& q) : x(p.x), y(p.y), z(q.x), w(q.y) {}
  vec(const vec<T, 2>& p, T s, T t) : x(p.x), y(p.y), z(s), w(t) {}
  vec(const vec<T, 3>& p, T t) : x(p.x), y(p.y), z(p.z), w(t) {}
  template <class U> requires(!zs::same<T, U>)
  explicit vec(const vec<U, 4>& v) : x(T(v.x)), y(T(v.y)), z(T(v.z)), w(T(v.w)) {}
  T& operator[](int i) { return e[i]; }
  const T& operator[](int i) const { return e[i]; }
};

#define ZS_VEC_OP(OP)                                                                                          \
  template <class T, int N> inline vec<T, N> operator OP(const vec<T, N>& a, const vec<T, N>& b) {             \
    vec<T, N> r;                                                                                               \
    for (int i = 0; i < N; i++) r[i] = T(a[i] OP b[i]);                                                        \
    return r;                                                                                                  \
  }                                                                                                            \
  template <class T, int N> inline vec<T, N> operator OP(const vec<T, N>& a, typename zs::id<T>::type b) {     \
    return a OP vec<T, N>(b);                                                                                  \
  }                                                                                                            \
  template <class T, int N> inline vec<T, N> operator OP(typename zs::id<T>::type a, const vec<T, N>& b) {     \
    return vec<T, N>(a) OP b;                                                                                  \
  }                                                                                                            \
  template <class T, int N> inline vec<T, N>& operator OP##=(vec<T, N>& a, const vec<T, N>& b) {               \
    return a = a OP b;                                                                                         \
  }                                                                                                            \
  template <class T, int N> inline vec<T, N>& operator OP##=(vec<T, N>& a, typename zs::id<T>::type b) {       \
    return a = a OP vec<T, N>(b);                                                                              \
  }
ZS_VEC_OP(+) ZS_VEC_OP(-) ZS_VEC_OP(*) ZS_VEC_OP(/) ZS_VEC_OP(%) ZS_VEC_OP(&) ZS_VEC_OP(|) ZS_VEC_OP(^)
ZS_VEC_OP(<<) ZS_VEC_OP(>>)

#define ZS_VEC_COMPARE(OP)                                                                                     \
  template <class T, int N> inline vec<bool, N> operator OP(const vec<T, N>& a, const vec<T, N>& b) {          \
    vec<bool, N> r;                                                                                            \
    for (int i = 0; i < N; i++) r[i] = a[i] OP b[i];                                                           \
    return r;                                                                                                  \
  }                                                                                                            \
  template <class T, int N> inline vec<bool, N> operator OP(const vec<T, N>& a, typename zs::id<T>::type b) {  \
    return a OP vec<T, N>(b);                                                                                  \
  }
ZS_VEC_COMPARE(<) ZS_VEC_COMPARE(<=) ZS_VEC_COMPARE(>) ZS_VEC_COMPARE(>=) ZS_VEC_COMPARE(==) ZS_VEC_COMPARE(!=)

template <class T, int N> inline vec<T, N> operator-(const vec<T, N>& a) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = -a[i];
  return r;
}
template <class T, int N> inline vec<T, N> operator~(const vec<T, N>& a) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = ~a[i];
  return r;
}

#define ZS_VECTORS(T) typedef vec<T, 2> T##2; typedef vec<T, 3> T##3; typedef vec<T, 4> T##4;
ZS_VECTORS(float) ZS_VECTORS(half) ZS_VECTORS(bfloat) ZS_VECTORS(int) ZS_VECTORS(uint) ZS_VECTORS(short)
ZS_VECTORS(ushort) ZS_VECTORS(char) ZS_VECTORS(uchar) ZS_VECTORS(long) ZS_VECTORS(ulong) ZS_VECTORS(bool)

template <class T> using numeric_limits = zs::limits<T>;
template <class A, class B> inline constexpr bool is_same_v = zs::same<A, B>;
template <class A, class B> struct is_same { static constexpr bool value = zs::same<A, B>; };
template <class T> inline constexpr bool is_integral_v = zs::is_int<T>;
template <class T> inline constexpr bool is_floating_point_v =
    zs::same<T, float> || zs::same<T, half> || zs::same<T, bfloat>;
template <bool C, class A, class B> struct conditional { typedef A type; };
template <class A, class B> struct conditional<false, A, B> { typedef B type; };
template <bool C, class A, class B> using conditional_t = typename conditional<C, A, B>::type;
template <bool C, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool C, class T = void> using enable_if_t = typename enable_if<C, T>::type;

}  // namespace metal

template <class T, int N> struct zs::scalar<metal::vec<T, N>> { static constexpr size_t bytes = sizeof(T); };

template <class T, class U> ZS_RAW T as_type(U v) {
  static_assert(sizeof(T) == sizeof(U), "as_type needs types of one size");
  T r;
  __builtin_memcpy(&r, &v, sizeof(T));
  return r;
}
