// The loop over positions on tensor cores (mma.m16n8k16), for caches of 16 bits.
//
// A warp takes SET positions at a time, WARPS sets a round. Lane 4 g + t is in group g.
//   S = Q K^T: rows g and g + 8 of A are the high and the low part of row g of the queries, so that the sum of a lane's two
//     rows of C is the product with twice the bits. Column g of B is a position. Columns of A may come in any order as long
//     as rows of B do likewise: a lane gives 16 bytes of a row of keys as they lie in memory to two multiplications.
//   O^T = V^T P^T: rows g and g + 8 of A are neighbouring values; a lane has four positions of 8 neighbours of each 64. What
//     B wants of weights is what C had of scores: row g of the queries at the lane's four positions. High and low parts are
//     two multiplications.
// Rows of queries that are not there repeat the last one; nothing of them is written.

constexpr int SET = 16, ROUND = SET * WARPS;
constexpr int KEY_UNITS = KEY / 32, VALUE_UNITS = VALUE / 64;
// Sets asked for ahead, and chains of multiplications a tile of eight scores: as registers permit. Blocks of heads up to 128
// wide make do with half of a multiprocessor's, so that they begin while blocks of the launch before are still there.
constexpr int AHEAD = KEY <= 64 && VALUE <= 64 ? 2 : 1;
constexpr int CHAINS = KEY > 64 && KEY <= 128 ? 1 : 2;
// Rows of queries lie an odd multiple of 64 bytes apart: eight lanes that read at once meet no bank twice.
constexpr int QUERY_STRIDE = KEY % 64 == 0 ? KEY + 32 : KEY;
constexpr int QUERY_FLOATS = QUERY_ROWS * QUERY_STRIDE;
static_assert(CACHE_KIND != KIND_F32 && KEY % 32 == 0 && VALUE % 64 == 0 && QUERY_ROWS <= 8, "made for these");

using KEPT = CACHE;
DEVICE CACHE kept(CACHE v) { return v; }

#ifdef __CUDA_ARCH__
// Two floats in 16 bits each, the first in the low half.
DEVICE u32 pair_of(float a, float b) {
  u32 v;
  if (CACHE_KIND == KIND_F16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
  }
  return v;
}
DEVICE void multiply_add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (CACHE_KIND == KIND_F16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}
// 16 bytes of a cache, or zeros.
DEVICE uint4 load_cache_if(const CACHE* p, bool valid) {
  uint4 v;
  asm volatile(
      "{ .reg .pred valid; setp.ne.u32 valid, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
      "@valid ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(p), "r"(static_cast<u32>(valid)) : "memory");
  return v;
}
DEVICE void fetch_ahead(const CACHE* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }
#else
DEVICE u32 pair_of(float a, float b) {
  u16 low, high;
  narrow<CACHE_KIND>(a, &low);
  narrow<CACHE_KIND>(b, &high);
  return static_cast<u32>(high) << 16 | low;
}
// Columns 2 k, 2 k + 1 of A's row and as many rows of B's column.
DEVICE float product_of(u32 a, u32 b) {
  return widen<CACHE_KIND>(static_cast<u16>(a)) * widen<CACHE_KIND>(static_cast<u16>(b)) +
         widen<CACHE_KIND>(static_cast<u16>(a >> 16)) * widen<CACHE_KIND>(static_cast<u16>(b >> 16));
}
DEVICE void multiply_add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  u64 low[32], high[32], b[32];
  zs::gather(static_cast<u64>(a1) << 32 | a0, low);
  zs::gather(static_cast<u64>(a3) << 32 | a2, high);
  zs::gather(static_cast<u64>(b1) << 32 | b0, b);
  const int row = threadIdx.x % 32 / 4 * 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; i++) {
    for (int k = 0; k < 4; k++) {
      int shift = i / 2 * 32, at = (column + i % 2) * 4 + k;
      c[i] += product_of(static_cast<u32>(low[row + k] >> shift), static_cast<u32>(b[at]));
      c[i] += product_of(static_cast<u32>(high[row + k] >> shift), static_cast<u32>(b[at] >> 32));
    }
  }
}
DEVICE uint4 load_cache_if(const CACHE* p, bool valid) { return valid ? load_cache(p) : make_uint4(0u, 0u, 0u, 0u); }
DEVICE void fetch_ahead(const CACHE*) {}
#endif

DEVICE float low_of(u32 pair) { return widen<CACHE_KIND>(static_cast<u16>(pair)); }
DEVICE float high_of(u32 pair) { return widen<CACHE_KIND>(static_cast<u16>(pair >> 16)); }
// What two floats have beyond their 16 bits.
DEVICE u32 rest_of(float a, float b, u32 pair) { return pair_of(a - low_of(pair), b - high_of(pair)); }
DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// High parts of all rows, then low parts.
DEVICE void place_query(float* q, int row, int i, float x) {
  CACHE* at = reinterpret_cast<CACHE*>(q) + row * QUERY_STRIDE + i;
  u32 high = pair_of(x, 0.0f);
  at[0] = static_cast<CACHE>(high);
  at[QUERY_ROWS * QUERY_STRIDE] = static_cast<CACHE>(rest_of(x, 0.0f, high));
}

// What a lane has of a set: k[n]: position 8 n + g, of each 32 elements those from 8 t; v[i]: positions 2 t, 2 t + 1,
// 2 t + 8, 2 t + 9, of each 64 elements those from 8 g.
struct Set {
  uint4 k[2][KEY_UNITS], v[4][VALUE_UNITS];
};
DEVICE int place_of(int i) { return i / 2 * 8 + i % 2; }

struct Queries {
  uint4 high, low;
};

struct Loop {
  const CACHE *keys, *values;
  // The lane's row of queries, its token, and the position of that.
  int warp, g, t, row, token, begin, own;
  Set sets[AHEAD];
  float largest = LOWEST, sum = 0.0f;
  float out[VALUE / 16][4] = {};

  DEVICE Loop(const Call& c, u64 base, int piece, int begin) : begin(begin) {
    warp = threadIdx.x / 32;
    g = threadIdx.x % 32 / 4;
    t = threadIdx.x % 4;
    row = min(g, QUERY_ROWS - 1);
    token = token_of(min(piece * QUERY_ROWS + row, ALL_ROWS - 1));
    keys = c.cached_keys + (base + g) * KEY + 8 * t;
    values = c.cached_values + (base + 2 * t) * VALUE + 8 * g;
  }

  DEVICE void load_keys(Set& set, int at, int limit) const {
    const CACHE* p = keys + static_cast<u64>(at) * KEY;
#pragma unroll
    for (int n = 0; n < 2; n++) {
#pragma unroll
      for (int u = 0; u < KEY_UNITS; u++) set.k[n][u] = load_cache_if(p + 8 * n * KEY + 32 * u, at + 8 * n + g < limit);
    }
  }
  DEVICE void load_values(Set& set, int at, int limit) const {
    const CACHE* p = values + static_cast<u64>(at) * VALUE;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      bool valid = at + 2 * t + place_of(i) < limit;
#pragma unroll
      for (int u = 0; u < VALUE_UNITS; u++) set.v[i][u] = load_cache_if(p + place_of(i) * VALUE + 64 * u, valid);
    }
  }
  // A set into the second-level cache, 128 bytes a lane and turn.
  DEVICE void fetch(int at, int limit) const {
    const int own = threadIdx.x % 32 / 2, half = threadIdx.x % 2 * 64;
    if (at + own >= limit) return;
    const CACHE* k = keys - g * KEY - 8 * t + static_cast<u64>(at + own) * KEY;
    const CACHE* v = values - 2 * t * VALUE - 8 * g + static_cast<u64>(at + own) * VALUE;
#pragma unroll
    for (int i = 0; i < KEY; i += 128) {
      if (KEY % 128 == 0 || i + half < KEY) fetch_ahead(k + i + half);
    }
#pragma unroll
    for (int i = 0; i < VALUE; i += 128) {
      if (VALUE % 128 == 0 || i + half < VALUE) fetch_ahead(v + i + half);
    }
  }

  // Positions that load() asks for.
  static constexpr int FIRST = ROUND * AHEAD;
  DEVICE void load(int limit) {
#pragma unroll
    for (int n = 0; n < AHEAD; n++) {
      load_keys(sets[n], begin + warp * SET + n * ROUND, limit);
      load_values(sets[n], begin + warp * SET + n * ROUND, limit);
    }
    if (AHEAD == 1) fetch(begin + warp * SET + ROUND, limit);
  }

  DEVICE Queries queries(const float* q, int u) const {
    const CACHE* at = reinterpret_cast<const CACHE*>(q) + row * QUERY_STRIDE + 32 * u + 8 * t;
    return Queries{*reinterpret_cast<const uint4*>(at),
                   *reinterpret_cast<const uint4*>(at + QUERY_ROWS * QUERY_STRIDE)};
  }

  // Puts what `fresh` has of the set in its place.
  DEVICE void take_fresh(Set& set, const KEPT* fresh, int at, int position, int end) const {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      int there = at + 8 * n + g;
      if (there < position || there >= end) continue;
      const KEPT* k = fresh + (there - position) * (KEY + VALUE) + 8 * t;
#pragma unroll
      for (int u = 0; u < KEY_UNITS; u++) set.k[n][u] = *reinterpret_cast<const uint4*>(k + 32 * u);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int there = at + 2 * t + place_of(i);
      if (there < position || there >= end) continue;
      const KEPT* v = fresh + (there - position) * (KEY + VALUE) + KEY + 8 * g;
#pragma unroll
      for (int u = 0; u < VALUE_UNITS; u++) set.v[i][u] = *reinterpret_cast<const uint4*>(v + 64 * u);
    }
  }

  // Scores of the lane's row at the lane's four positions.
  DEVICE void score(const float* q, const Set& set, float (&s)[4]) const {
    float c[2][CHAINS][4] = {};
#pragma unroll
    for (int u = 0; u < KEY_UNITS; u++) {
      Queries x = queries(q, u);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const uint4& k = set.k[n][u];
        multiply_add(c[n][0], x.high.x, x.low.x, x.high.y, x.low.y, k.x, k.y);
        multiply_add(c[n][CHAINS - 1], x.high.z, x.low.z, x.high.w, x.low.w, k.z, k.w);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float high = c[i / 2][0][i % 2], low = c[i / 2][0][i % 2 + 2];
      if (CHAINS == 2) {
        high += c[i / 2][CHAINS - 1][i % 2];
        low += c[i / 2][CHAINS - 1][i % 2 + 2];
      }
      s[i] = high + low;
    }
  }

  // Scores to weights, against a maximum that may grow.
  DEVICE void weigh(float (&s)[4], int at, int end) {
    float most = largest;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int there = at + 2 * t + place_of(i);
      // NaN, which comparisons let through, stays.
      if (there >= end || there > own || (WINDOW != 0 && there <= own - WINDOW)) s[i] = LOWEST;
      most = larger(s[i], most);
    }
    most = larger(__shfl_xor_sync(ALL_LANES, most, 1), most);
    most = larger(__shfl_xor_sync(ALL_LANES, most, 2), most);
    if (__any_sync(ALL_LANES, most != largest)) {
      float keep = largest == LOWEST ? 0.0f : exp2f(largest - most);
      largest = most;
      sum *= keep;
      // Columns of the accumulators are rows 2 t and 2 t + 1 of the queries.
      float first = __shfl_sync(ALL_LANES, keep, 8 * t), second = __shfl_sync(ALL_LANES, keep, 8 * t + 4);
#pragma unroll
      for (int j = 0; j < VALUE / 16; j++) {
        out[j][0] *= first;
        out[j][1] *= second;
        out[j][2] *= first;
        out[j][3] *= second;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      s[i] = s[i] == LOWEST ? 0.0f : exp2f(s[i] - largest);
      sum += s[i];
    }
  }

  DEVICE void add_values(const Set& set, const float (&s)[4]) {
    const u32 high[2] = {pair_of(s[0], s[1]), pair_of(s[2], s[3])};
    const u32 low[2] = {rest_of(s[0], s[1], high[0]), rest_of(s[2], s[3], high[1])};
#pragma unroll
    for (int j = 0; j < VALUE / 16; j++) {
      u32 v[4];
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = word(set.v[i][j / 4], j % 4);
      // Low halves of all four positions, then high halves.
      u32 a0 = __byte_perm(v[0], v[1], 0x5410), a1 = __byte_perm(v[0], v[1], 0x7632);
      u32 a2 = __byte_perm(v[2], v[3], 0x5410), a3 = __byte_perm(v[2], v[3], 0x7632);
      multiply_add(out[j], a0, a1, a2, a3, high[0], high[1]);
      multiply_add(out[j], a0, a1, a2, a3, low[0], low[1]);
    }
  }

  // The cache has positions below `cached`, `fresh` those from `position` on.
  DEVICE void run(const float* q, const KEPT* fresh, int position, int cached, int end) {
    own = position + token;
#pragma unroll 1
    for (int first = begin + warp * SET; first < end; first += FIRST) {
#pragma unroll
      for (int n = 0; n < AHEAD; n++) {
        const int at = first + n * ROUND;
        if (at >= end) break;
        Set& set = sets[n];
        if (FRESH && at + SET > position) take_fresh(set, fresh, at, position, end);
        float s[4];
        score(q, set, s);
        // Keys are used up, values not yet.
        load_keys(set, at + FIRST, cached);
        weigh(s, at, end);
        add_values(set, s);
        load_values(set, at + FIRST, cached);
        if (AHEAD == 1) fetch(at + 2 * ROUND, cached);
      }
    }
  }

  DEVICE void merge(const Parts& parts) {
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    if (t == 0 && g < QUERY_ROWS) parts.stats(warp, g) = make_float2(largest, sum);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (2 * t + h >= QUERY_ROWS) continue;
      float* row = parts.values(warp, 2 * t + h) + 8 * g;
#pragma unroll
      for (int u = 0; u < VALUE_UNITS; u++) {
        auto four = [&](int j) { return make_float4(out[j][h], out[j][2 + h], out[j + 1][h], out[j + 1][2 + h]); };
        float4 a = four(4 * u), b = four(4 * u + 2);
        // Half of the lanes begin with the second four: eight lanes that write at once meet no bank twice.
        const int swap = t / 2;
        float4* p = reinterpret_cast<float4*>(row + 64 * u);
        p[swap] = swap ? b : a;
        p[1 - swap] = swap ? a : b;
      }
    }
  }
};
