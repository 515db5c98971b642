// The loop over positions on ordinary floats: any cache, any width.
//
// LANES lanes are a stream: they share a position at a time and keep a running maximum and sum of their own. Streams meet
// by shuffles.

constexpr int KEY_UNITS = (KEY / ELEMENTS + LANES - 1) / LANES, VALUE_UNITS = (VALUE / ELEMENTS + LANES - 1) / LANES;
constexpr int STREAMS = WARPS * (32 / LANES);
constexpr int QUERY_FLOATS = QUERY_ROWS * KEY;

DEVICE void place_query(float* q, int row, int i, float x) { q[row * KEY + i] = x; }

using KEPT = float;
DEVICE float kept(CACHE v) { return widen<CACHE_KIND>(v); }

// Running softmax of a stream over the rows of queries.
struct Running {
  float largest[QUERY_ROWS], sum[QUERY_ROWS], values[QUERY_ROWS][VALUE_UNITS * ELEMENTS];
};

// Up to N more positions for all rows, STREAMS apart, the first of them `at`. key(n), value(n): their elements; those from
// `end` on do not count.
template <int N, class KeyOf, class ValueOf>
DEVICE void add_positions(Running& run, const float* q, KeyOf key, ValueOf value, int lane, int piece, int at, int position, int end) {
  float scores[N][QUERY_ROWS] = {};
#pragma unroll
  for (int u = 0; u < KEY_UNITS; u++) {
    int first = (u * LANES + lane) * ELEMENTS;
    float k[N][ELEMENTS];
#pragma unroll
    for (int n = 0; n < N; n++) key(n, u, k[n]);
    if (KEY % (LANES * ELEMENTS) != 0 && first >= KEY) continue;
#pragma unroll
    for (int r = 0; r < QUERY_ROWS; r++) {
#pragma unroll
      for (int i = 0; i < ELEMENTS; i += 4) {
        float4 x = *reinterpret_cast<const float4*>(q + r * KEY + first + i);
#pragma unroll
        for (int n = 0; n < N; n++) {
          float& s = scores[n][r];
          s = fmaf(x.x, k[n][i], fmaf(x.y, k[n][i + 1], fmaf(x.z, k[n][i + 2], fmaf(x.w, k[n][i + 3], s))));
        }
      }
    }
  }
#pragma unroll
  for (int off = LANES / 2; off > 0; off /= 2) {
#pragma unroll
    for (int r = 0; r < QUERY_ROWS; r++) {
#pragma unroll
      for (int n = 0; n < N; n++) scores[n][r] += __shfl_xor_sync(ALL_LANES, scores[n][r], off);
    }
  }
#pragma unroll
  for (int r = 0; r < QUERY_ROWS; r++) {
    const int own = position + token_of(piece * QUERY_ROWS + r);
    float largest = run.largest[r];
#pragma unroll
    for (int n = 0; n < N; n++) {
      int there = at + n * STREAMS;
      bool seen = there < end && there <= own && (WINDOW == 0 || there > own - WINDOW);
      // NaN, which comparisons let through, stays.
      if (!seen) scores[n][r] = LOWEST;
      largest = larger(scores[n][r], largest);
    }
    float keep = run.largest[r] == LOWEST ? 0.0f : exp2f(run.largest[r] - largest);
    run.largest[r] = largest;
    run.sum[r] *= keep;
#pragma unroll
    for (int i = 0; i < VALUE_UNITS * ELEMENTS; i++) run.values[r][i] *= keep;
#pragma unroll
    for (int n = 0; n < N; n++) {
      scores[n][r] = scores[n][r] == LOWEST ? 0.0f : exp2f(scores[n][r] - largest);
      run.sum[r] += scores[n][r];
    }
  }
#pragma unroll
  for (int n = 0; n < N; n++) {
#pragma unroll
    for (int u = 0; u < VALUE_UNITS; u++) {
      float v[ELEMENTS];
      value(n, u, v);
#pragma unroll
      for (int r = 0; r < QUERY_ROWS; r++) {
#pragma unroll
        for (int i = 0; i < ELEMENTS; i++) {
          run.values[r][u * ELEMENTS + i] = fmaf(scores[n][r], v[i], run.values[r][u * ELEMENTS + i]);
        }
      }
    }
  }
}

// The streams of a warp into one, into the warp's place in `parts`.
DEVICE void merge_streams(Running& run, const Parts& parts, int warp, int lane) {
#pragma unroll
  for (int r = 0; r < QUERY_ROWS; r++) {
    float largest = run.largest[r];
#pragma unroll
    for (int n = LANES; n < 32; n *= 2) largest = larger(__shfl_xor_sync(ALL_LANES, largest, n), largest);
    float factor = run.largest[r] == LOWEST ? 0.0f : exp2f(run.largest[r] - largest), sum = run.sum[r] * factor;
#pragma unroll
    for (int n = LANES; n < 32; n *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, n);
    float* to = parts.values(warp, r);
    bool first = threadIdx.x % 32 < LANES;
    if (threadIdx.x % 32 == 0) parts.stats(warp, r) = make_float2(largest, sum);
#pragma unroll
    for (int u = 0; u < VALUE_UNITS; u++) {
#pragma unroll
      for (int i = 0; i < ELEMENTS; i++) {
        float v = run.values[r][u * ELEMENTS + i] * factor;
#pragma unroll
        for (int n = LANES; n < 32; n *= 2) v += __shfl_xor_sync(ALL_LANES, v, n);
        int at = (u * LANES + lane) * ELEMENTS + i;
        if (first && at < VALUE) to[at] = v;
      }
    }
  }
}

// A unit of a row of keys or values that lies in shared memory as floats.
template <int WIDTH> DEVICE void from_shared(const float* row, int unit, int lane, float (&to)[ELEMENTS]) {
#pragma unroll
  for (int i = 0; i < ELEMENTS; i++) {
    int at = (unit * LANES + lane) * ELEMENTS + i;
    to[i] = at < WIDTH ? row[at] : 0.0f;
  }
}

template <int N, int WIDTH> DEVICE void from_cache(const CACHE* row, int lane, bool valid, uint4 (&to)[N]) {
#pragma unroll
  for (int u = 0; u < N; u++) {
    int at = (u * LANES + lane) * ELEMENTS;
    to[u] = make_uint4(0u, 0u, 0u, 0u);
    if (valid && at < WIDTH) to[u] = load_cache(row + at);
  }
}

// The positions that a stream takes in a round: first + stream, and on in steps of STREAMS; zeros from `end` on.
struct Round {
  uint4 k[UNROLL][KEY_UNITS], v[UNROLL][VALUE_UNITS];

  DEVICE void load_keys(const Call& c, u64 base, int at, int end, int lane) {
#pragma unroll
    for (int n = 0; n < UNROLL; n++, at += STREAMS) {
      from_cache<KEY_UNITS, KEY>(c.cached_keys + (base + at) * KEY, lane, at < end, k[n]);
    }
  }
  DEVICE void load_values(const Call& c, u64 base, int at, int end, int lane) {
#pragma unroll
    for (int n = 0; n < UNROLL; n++, at += STREAMS) {
      from_cache<VALUE_UNITS, VALUE>(c.cached_values + (base + at) * VALUE, lane, at < end, v[n]);
    }
  }
};

struct Loop {
  const Call& c;
  u64 base;
  int piece, begin, warp, lane, stream;
  Round round;
  Running state;

  DEVICE Loop(const Call& c, u64 base, int piece, int begin) : c(c), base(base), piece(piece), begin(begin) {
    warp = threadIdx.x / 32;
    lane = threadIdx.x % LANES;
    stream = warp * (32 / LANES) + threadIdx.x % 32 / LANES;
  }

  // Positions that load() asks for.
  static constexpr int FIRST = STREAMS * UNROLL;
  DEVICE void load(int limit) {
    round.load_keys(c, base, begin + stream, limit, lane);
    round.load_values(c, base, begin + stream, limit, lane);
  }

  // The cache has positions below `cached`, `fresh` those from `position` on.
  DEVICE void run(const float* q, const KEPT* fresh, int position, int cached, int end) {
#pragma unroll
    for (int r = 0; r < QUERY_ROWS; r++) {
      state.largest[r] = LOWEST;
      state.sum[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < VALUE_UNITS * ELEMENTS; i++) state.values[r][i] = 0.0f;
    }
#pragma unroll 1
    for (int first = begin; first < cached; first += FIRST) {
      Round now = round;
      round.load_keys(c, base, first + FIRST + stream, cached, lane);
      round.load_values(c, base, first + FIRST + stream, cached, lane);
      add_positions<UNROLL>(
          state, q, [&](int n, int u, float (&to)[ELEMENTS]) { unpack(now.k[n][u], to); },
          [&](int n, int u, float (&to)[ELEMENTS]) { unpack(now.v[n][u], to); }, lane, piece, first + stream, position, cached);
    }
    if (!FRESH) return;
#pragma unroll 1
    for (int first = max(begin, position); first < end; first += STREAMS) {
      int at = first + stream, t = min(at, end - 1) - position;
      const float* row = fresh + t * (KEY + VALUE);
      add_positions<1>(
          state, q, [&](int, int u, float (&to)[ELEMENTS]) { from_shared<KEY>(row, u, lane, to); },
          [&](int, int u, float (&to)[ELEMENTS]) { from_shared<VALUE>(row + KEY, u, lane, to); }, lane, piece, at, position, end);
    }
  }

  DEVICE void merge(const Parts& parts) { merge_streams(state, parts, warp, lane); }
};
