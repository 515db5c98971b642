// Types and operations that both dialects build on. Included before kernel text; no standard header beyond integers,
// so that a name the real compilers do not know is unknown here too.
#pragma once
#include "abi.h"

// Not instrumented: the runtime has checked what these touch, or they touch only the thread's own stack.
#define ZS_RAW __attribute__((no_sanitize("thread", "undefined"), noinline))

namespace zs {

template <class T> struct id { using type = T; };
template <class A, class B> inline constexpr bool same = false;
template <class A> inline constexpr bool same<A, A> = true;
template <class T> inline constexpr bool is_int =
    same<T, bool> || same<T, char> || same<T, signed char> || same<T, unsigned char> || same<T, short> ||
    same<T, unsigned short> || same<T, int> || same<T, unsigned> || same<T, long> || same<T, unsigned long> ||
    same<T, long long> || same<T, unsigned long long>;
template <class T> inline constexpr bool is_number = is_int<T> || same<T, float> || same<T, double>;

// IEEE binary16, rounded to nearest even.
inline uint16_t half_bits(float f) {
  uint32_t b = __builtin_bit_cast(uint32_t, f), sign = b >> 16 & 0x8000, m = b & 0x7fffffff;
  if (m > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (m >> 13 & 0x1ff));
  if (m >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (m < 0x38800000) {
    // Adding 0.5 leaves the 10 bits of a subnormal, rounded, in the low bits of the sum.
    float r = __builtin_bit_cast(float, m) + 0.5f;
    return static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, r) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((m - 0x38000000 + 0xfff + (m >> 13 & 1)) >> 13));
}

inline float half_value(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, m = h & 0x7fff;
  if (m >= 0x7c00) return __builtin_bit_cast(float, sign | 0x7f800000 | (m & 0x3ff) << 13);
  if (m >= 0x400) return __builtin_bit_cast(float, sign | ((m << 13) + 0x38000000));
  float f = static_cast<float>(m) * 0x1p-24f;
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, f));
}

inline uint16_t bfloat_bits(float f) {
  uint32_t b = __builtin_bit_cast(uint32_t, f);
  if ((b & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(b >> 16 | 0x40);
  return static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

inline float bfloat_value(uint16_t b) { return __builtin_bit_cast(float, static_cast<uint32_t>(b) << 16); }

// Values across a simdgroup travel as 64 bits.
template <class T> ZS_RAW uint64_t pack(T v) {
  static_assert(sizeof(T) <= 8, "too wide for a simdgroup operation");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &v, sizeof(T));
  return bits;
}
template <class T> ZS_RAW T unpack(uint64_t bits) {
  T v;
  __builtin_memcpy(&v, &bits, sizeof(T));
  return v;
}

enum SimdKind : uint32_t { REDUCE = 1, SCAN, SHUFFLE, VOTE };
constexpr uint32_t ALL = 0xffffffffu;

// Combines by halves, as the hardware's butterflies do, so that rounding has its shape.
template <class T, class F> ZS_RAW T reduce(T v, F f, uint32_t mask, int line) {
  uint64_t bits[32];
  uint32_t active = zs_simd(REDUCE, mask, pack(v), bits, line);
  T a[32];
  for (int i = 0; i < 32; i++) a[i] = unpack<T>(bits[i]);
  for (int half = 16; half; half >>= 1) {
    for (int i = 0; i < half; i++) {
      bool low = active >> i & 1, high = active >> (i + half) & 1;
      if (low && high) a[i] = f(a[i], a[i + half]);
      else if (high) { a[i] = a[i + half]; active |= 1u << i; }
    }
  }
  return a[0];
}

// Over the lanes below this one, and this one where `inclusive`.
template <class T, class F> ZS_RAW T scan(T v, T start, F f, bool inclusive, int line) {
  uint64_t bits[32];
  uint32_t active = zs_simd(SCAN, ALL, pack(v), bits, line), lane = zs_thread()->lane;
  T sum = start;
  for (uint32_t i = 0; i < lane + inclusive; i++) {
    if (active >> i & 1) sum = f(sum, unpack<T>(bits[i]));
  }
  return sum;
}

// The value of lane `from`; undefined, so refused, where that lane takes no part.
template <class T> ZS_RAW T shuffle(T v, uint32_t from, uint32_t mask, int line) {
  uint64_t bits[32];
  uint32_t active = zs_simd(SHUFFLE, mask, pack(v), bits, line);
  if (from > 31 || !(active >> from & 1)) zs_undefined("a shuffle reads a lane that takes no part in it", line);
  return unpack<T>(bits[from]);
}

// The values of all lanes: what twins of instructions that mix a warp's registers are made of.
ZS_RAW inline void gather(unsigned long long v, unsigned long long (&all)[32], int line = __builtin_LINE()) {
  uint64_t bits[32];
  if (zs_simd(SHUFFLE, ALL, v, bits, line) != ALL) zs_undefined("a lane takes no part in an instruction of a whole warp", line);
  for (int i = 0; i < 32; i++) all[i] = bits[i];
}

ZS_RAW inline uint32_t ballot(bool v, uint32_t mask, int line, uint32_t* active_lanes = nullptr) {
  uint64_t bits[32];
  uint32_t active = zs_simd(VOTE, mask, v, bits, line), votes = 0;
  for (int i = 0; i < 32; i++) votes |= (active >> i & 1 && bits[i] ? 1u : 0u) << i;
  if (active_lanes) *active_lanes = active;
  return votes;
}

template <class T, class F> ZS_RAW T atomic_update(volatile T* p, F f) {
  zs_atomic(p, sizeof(T), 3);
  T old = const_cast<const T&>(*p);
  const_cast<T&>(*p) = f(old);
  return old;
}
template <class T> ZS_RAW T atomic_read(const volatile T* p) {
  zs_atomic(p, sizeof(T), 2);
  return const_cast<const T&>(*p);
}
template <class T> ZS_RAW void atomic_write(volatile T* p, T v) {
  zs_atomic(p, sizeof(T), 5);
  const_cast<T&>(*p) = v;
}

// Elements of a shared array, for the race check: its scalars, at most 4 bytes where they are not whole vectors.
template <class T> struct scalar { static constexpr size_t bytes = sizeof(T) > 4 && !is_number<T> ? 4 : sizeof(T); };
template <class T, size_t N> struct scalar<T[N]> : scalar<T> {};

// One array in a group's shared memory; K tells declarations apart.
template <class A, int K> ZS_RAW A& shared(const char* name) {
  static uint32_t slot[2];
  return *static_cast<A*>(zs_shared(slot, name, sizeof(A), alignof(A), scalar<A>::bytes));
}

template <class T> struct limits;
template <class T, T LOW, T HIGH> struct int_limits {
  static constexpr T min() { return LOW; }
  static constexpr T lowest() { return LOW; }
  static constexpr T max() { return HIGH; }
  static constexpr bool is_signed = LOW != 0;
  static constexpr int digits = sizeof(T) * 8 - (LOW != 0);
};
template <> struct limits<bool> : int_limits<bool, false, true> {};
template <> struct limits<char> : int_limits<char, -128, 127> {};
template <> struct limits<signed char> : int_limits<signed char, -128, 127> {};
template <> struct limits<unsigned char> : int_limits<unsigned char, 0, 255> {};
template <> struct limits<short> : int_limits<short, -32768, 32767> {};
template <> struct limits<unsigned short> : int_limits<unsigned short, 0, 65535> {};
template <> struct limits<int> : int_limits<int, -2147483647 - 1, 2147483647> {};
template <> struct limits<unsigned> : int_limits<unsigned, 0u, 0xffffffffu> {};
template <> struct limits<long> : int_limits<long, -0x7fffffffffffffffl - 1, 0x7fffffffffffffffl> {};
template <> struct limits<unsigned long> : int_limits<unsigned long, 0ul, 0xfffffffffffffffful> {};
template <> struct limits<long long> : int_limits<long long, -0x7fffffffffffffffll - 1, 0x7fffffffffffffffll> {};
template <> struct limits<unsigned long long> : int_limits<unsigned long long, 0ull, 0xffffffffffffffffull> {};
template <> struct limits<float> {
  static constexpr float min() { return __FLT_MIN__; }
  static constexpr float lowest() { return -__FLT_MAX__; }
  static constexpr float max() { return __FLT_MAX__; }
  static constexpr float epsilon() { return __FLT_EPSILON__; }
  static constexpr float infinity() { return __builtin_inff(); }
  static constexpr float quiet_NaN() { return __builtin_nanf(""); }
  static constexpr bool is_signed = true;
  static constexpr int digits = 24;
};

// Limits of a 16-bit float, from its bits.
template <class H, uint16_t MIN, uint16_t MAX, uint16_t EPS, uint16_t INF, uint16_t NOT, int DIGITS> struct float16_limits {
  static H min() { return H::of_bits(MIN); }
  static H lowest() { return H::of_bits(MAX | 0x8000); }
  static H max() { return H::of_bits(MAX); }
  static H epsilon() { return H::of_bits(EPS); }
  static H infinity() { return H::of_bits(INF); }
  static H quiet_NaN() { return H::of_bits(NOT); }
  static constexpr bool is_signed = true;
  static constexpr int digits = DIGITS;
};

// High words of products, bits in reverse: instructions that hardware has.
inline uint32_t mulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t(a) * b >> 32); }
inline int32_t mulhi(int32_t a, int32_t b) { return static_cast<int32_t>(int64_t(a) * b >> 32); }
inline uint64_t mulhi(uint64_t a, uint64_t b) { return static_cast<uint64_t>((unsigned __int128)a * b >> 64); }
inline uint32_t reverse_bits(uint32_t v) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) r |= (v >> i & 1u) << (31 - i);
  return r;
}

}  // namespace zs

#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 0xffffffffu
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define INFINITY (__builtin_inff())
#define NAN (__builtin_nanf(""))
