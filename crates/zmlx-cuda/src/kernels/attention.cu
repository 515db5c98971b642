// softmax(scale * q @ k.T) @ v over a cache, cut into parts of positions.
//
// A block has a key/value head, up to QUERY_ROWS rows of queries (query heads of the group, tokens) and a part of the
// positions. LANES lanes are a stream: they share a position at a time and keep a running maximum and sum of their own.
// Streams meet by shuffles, warps in shared memory, blocks in `scratch`: the last that arrives adds the parts up, always
// in the same order. Scores are in powers of two.
//
// FRESH: queries, keys and values of this call are rows of products: each block finishes its queries; new keys and values
// are finished by the block whose part they lie in, which writes them to the cache. What the cache held before, and the
// position, are of the step before: they are asked for ahead of the wait.

constexpr int KEY = WIDTH_1, VALUE = WIDTH_2;
constexpr int KEY_UNITS = (KEY / ELEMENTS + LANES - 1) / LANES, VALUE_UNITS = (VALUE / ELEMENTS + LANES - 1) / LANES;
constexpr int STREAMS = WARPS * (32 / LANES);
constexpr int THREADS = 32 * WARPS;
constexpr int GROUP = HEADS / KV_HEADS;
constexpr int ALL_ROWS = GROUP * LENGTH;
constexpr int PIECES = (ALL_ROWS + QUERY_ROWS - 1) / QUERY_ROWS;
constexpr int PART_FLOATS = VALUE + 2;
constexpr float LOWEST = -3.402823466e38f;  // no position yet
constexpr int BLOCKS = SEQUENCES * PIECES * KV_HEADS * SPLITS;

// Running softmax of a stream over the rows of queries.
struct Running {
  float largest[QUERY_ROWS], sum[QUERY_ROWS], values[QUERY_ROWS][VALUE_UNITS * ELEMENTS];
};

// Which token a row of queries is, and which head of the group.
DEVICE int token_of(int row) { return row / GROUP; }

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

// The streams of a warp into one, into the warp's place in `parts`: largest, sum, values.
DEVICE void merge_streams(Running& run, float* parts, int warp, int lane) {
#pragma unroll
  for (int r = 0; r < QUERY_ROWS; r++) {
    float largest = run.largest[r];
#pragma unroll
    for (int n = LANES; n < 32; n *= 2) largest = larger(__shfl_xor_sync(ALL_LANES, largest, n), largest);
    float factor = run.largest[r] == LOWEST ? 0.0f : exp2f(run.largest[r] - largest), sum = run.sum[r] * factor;
#pragma unroll
    for (int n = LANES; n < 32; n *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, n);
    float* to = parts + (warp * QUERY_ROWS + r) * PART_FLOATS;
    bool first = threadIdx.x % 32 < LANES;
    if (threadIdx.x % 32 == 0) {
      to[0] = largest;
      to[1] = sum;
    }
#pragma unroll
    for (int u = 0; u < VALUE_UNITS; u++) {
#pragma unroll
      for (int i = 0; i < ELEMENTS; i++) {
        float v = run.values[r][u * ELEMENTS + i] * factor;
#pragma unroll
        for (int n = LANES; n < 32; n *= 2) v += __shfl_xor_sync(ALL_LANES, v, n);
        int at = (u * LANES + lane) * ELEMENTS + i;
        if (first && at < VALUE) to[2 + at] = v;
      }
    }
  }
}

// Adds up `count` parts of one row: read(part, 0) the largest, 1 the sum, 2 + d a value. Gives {largest, sum, value}.
template <class Read> DEVICE float3 add_parts(int count, int d, Read read) {
  float largest = LOWEST;
  for (int p = 0; p < count; p++) largest = larger(read(p, 0), largest);
  float sum = 0.0f, value = 0.0f;
  for (int p = 0; p < count; p++) {
    float m = read(p, 0), factor = m == LOWEST ? 0.0f : exp2f(m - largest);
    sum += factor * read(p, 1);
    if (factor != 0.0f) value += factor * read(p, 2 + d);
  }
  return make_float3(largest, sum, value);
}

// The result of a row, with the sink's share of the softmax.
DEVICE float result(const float3& all, const float* sinks, int head) {
  if (!SINKS) return all.z / all.y;
  constexpr float LOG2_E = 1.4426950408889634f;
  float sink = sinks[head] * LOG2_E, largest = fmaxf(all.x, sink), factor = exp2f(all.x - largest);
  return factor * all.z / (factor * all.y + exp2f(sink - largest));
}

struct Call {
  const float *queries, *keys, *values;  // rows of products; queries alone where not FRESH
  HeadData q, k, v;
  const int* position;
  int capacity;
  const float* sinks;
  CACHE *cached_keys, *cached_values;
  float *gates, *scratch, *out;
  u32* arrived;
};

// The rows of queries of the piece into `q`, times the scale, and new keys and values that lie in [begin, end) into `fresh`
// ([LENGTH][KEY + VALUE], as the cache rounds them) and, by one piece's block, into the cache. A warp does a row.
struct Rows {
  const Call& c;
  float *q, *fresh;
  int sequence, kv_head, piece, position, begin, end;
  bool writes_gates;
  static constexpr int FRESH_ROWS = FRESH ? 2 * LENGTH : 0;

  static constexpr float FACTOR = SCORE_SCALE * 1.4426950408889634f;

  DEVICE void finished_query(int r) const {
    const int row = min(piece * QUERY_ROWS + r, ALL_ROWS - 1), head = kv_head * GROUP + row % GROUP;
    const float* from = c.queries + (static_cast<u64>(sequence * LENGTH + token_of(row)) * HEADS + head) * KEY;
    for (int i = threadIdx.x % 32; i < KEY; i += 32) q[r * KEY + i] = from[i] * FACTOR;
  }

  DEVICE void query(int r, const HeadAhead<0>& ahead) const {
    constexpr int STRIDE = GATES ? 2 * WIDTH_0 : WIDTH_0, OWN = (WIDTH_0 + 31) / 32;
    const int row = min(piece * QUERY_ROWS + r, ALL_ROWS - 1), t = token_of(row), head = kv_head * GROUP + row % GROUP;
    const int token = sequence * LENGTH + t, lane = threadIdx.x % 32;
    const float* raw = c.queries + static_cast<u64>(token) * STRIDE_0 + head * STRIDE;
    float gates[OWN];
#pragma unroll
    for (int n = 0; n < OWN; n++) {
      int i = n * 32 + lane;
      gates[n] = GATES && writes_gates && i < WIDTH_0 ? raw[WIDTH_0 + i] : 0.0f;
    }
    ahead.finish(raw, position + t, [&](int i, float x) { q[r * KEY + i] = x * FACTOR; });
    if (GATES && writes_gates) {
#pragma unroll
      for (int n = 0; n < OWN; n++) {
        int i = n * 32 + lane;
        if (i < WIDTH_0) c.gates[(token * HEADS + head) * WIDTH_0 + i] = gates[n];
      }
    }
  }

  DEVICE bool takes(int t) const { return position + t >= begin && position + t < end; }
  template <class Ahead> DEVICE void append(const Ahead& ahead, const float* raw, CACHE* cached, float* copy, int t) const {
    ahead.finish(raw, position + t, [&](int i, float x) {
      CACHE v;
      narrow<CACHE_KIND>(x, &v);
      if (piece == 0) cached[i] = v;
      copy[i] = widen<CACHE_KIND>(v);
    });
  }
  DEVICE u64 place(int t) const { return static_cast<u64>(sequence * KV_HEADS + kv_head) * c.capacity + position + t; }
  DEVICE void key(int t, const HeadAhead<1>& ahead) const {
    if (!takes(t)) return;
    const float* raw = c.keys + static_cast<u64>(sequence * LENGTH + t) * STRIDE_1 + kv_head * KEY;
    append(ahead, raw, c.cached_keys + place(t) * KEY, fresh + t * (KEY + VALUE), t);
  }
  DEVICE void value(int t, const HeadAhead<2>& ahead) const {
    if (!takes(t)) return;
    const float* raw = c.values + static_cast<u64>(sequence * LENGTH + t) * STRIDE_2 + kv_head * VALUE;
    append(ahead, raw, c.cached_values + place(t) * VALUE, fresh + t * (KEY + VALUE) + KEY, t);
  }

  // Row `job` of all, before the wait and after it.
  template <class Wait> DEVICE void row(int job, Wait wait) const {
    if (!FRESH) {
      wait();
      if (job < QUERY_ROWS) finished_query(job);
    } else if (job < QUERY_ROWS) {
      const int t = token_of(min(piece * QUERY_ROWS + job, ALL_ROWS - 1));
      const HeadAhead<0> ahead(c.q, position + t);
      wait();
      query(job, ahead);
    } else if (job < QUERY_ROWS + FRESH_ROWS) {
      const int t = (job - QUERY_ROWS) / 2;
      if ((job - QUERY_ROWS) % 2 == 0) {
        const HeadAhead<1> ahead(c.k, position + t);
        wait();
        key(t, ahead);
      } else {
        const HeadAhead<2> ahead(c.v, position + t);
        wait();
        value(t, ahead);
      }
    } else {
      wait();
    }
  }
};

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

// Largest and sum of each row of each part stand after all values.
DEVICE float* stats_of(const Call& c) { return c.scratch + static_cast<u64>(BLOCKS) * QUERY_ROWS * VALUE; }

// The parts of all blocks: their statistics first, then values, several loads at once.
template <class Store> DEVICE void add_blocks(const Call& c, float* room, u64 unit, int count, Store store) {
  float *largest = room, *sums = largest + SPLITS * QUERY_ROWS;
  for (int i = threadIdx.x; i < count * QUERY_ROWS; i += THREADS) {
    largest[i] = published(stats_of(c) + 2 * (unit * QUERY_ROWS + i));
    sums[i] = published(stats_of(c) + 2 * (unit * QUERY_ROWS + i) + 1);
  }
  __syncthreads();
  constexpr int QUADS = VALUE / 4;
  for (int i = threadIdx.x; i < QUERY_ROWS * QUADS; i += THREADS) {
    int r = i / QUADS, d = i % QUADS;
    float most = LOWEST, sum = 0.0f;
    for (int p = 0; p < count; p++) most = larger(largest[p * QUERY_ROWS + r], most);
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int first = 0; first < count; first += 8) {
      float4 v[8];
#pragma unroll
      for (int n = 0; n < 8; n++) {
        int p = min(first + n, count - 1);
        v[n] = published4(c.scratch + ((unit + p) * QUERY_ROWS + r) * VALUE + 4 * d);
      }
#pragma unroll
      for (int n = 0; n < 8; n++) {
        float m = largest[min(first + n, count - 1) * QUERY_ROWS + r];
        float factor = first + n >= count || m == LOWEST ? 0.0f : exp2f(m - most);
        if (factor != 0.0f) {
          sum += factor * sums[(first + n) * QUERY_ROWS + r];
          total.x += factor * v[n].x;
          total.y += factor * v[n].y;
          total.z += factor * v[n].z;
          total.w += factor * v[n].w;
        }
      }
    }
    store(r, 4 * d, make_float3(most, sum, total.x));
    store(r, 4 * d + 1, make_float3(most, sum, total.y));
    store(r, 4 * d + 2, make_float3(most, sum, total.z));
    store(r, 4 * d + 3, make_float3(most, sum, total.w));
  }
}

DEVICE void attend(Call c) {
  extern __shared__ __align__(16) float pool[];
  float *q = pool, *fresh = q + QUERY_ROWS * KEY, *parts = fresh + (FRESH ? LENGTH * (KEY + VALUE) : 0);
  zmlx_release();
  const int split = blockIdx.x, kv_head = blockIdx.y, sequence = blockIdx.z / PIECES, piece = blockIdx.z % PIECES;
  const int position = *c.position, stop = position + LENGTH;
  const int start = WINDOW == 0 ? 0 : max(0, position + 1 - WINDOW);
  // Positions a part: as many as make use of all blocks, but not so few that a part is all overhead.
  const int each = max((stop - start + SPLITS - 1) / SPLITS, LEAST), parts_used = (stop - start + each - 1) / each;
  if (split >= parts_used) return;
  const int begin = start + split * each, end = min(begin + each, stop);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % LANES, stream = warp * (32 / LANES) + threadIdx.x % 32 / LANES;
  // Without FRESH the launch before has written the call's own.
  const int cached = FRESH ? min(end, position) : end, before = min(end, position);
  const u64 base = static_cast<u64>(sequence * KV_HEADS + kv_head) * c.capacity;
  Round round;
  round.load_keys(c, base, begin + stream, before, lane);
  round.load_values(c, base, begin + stream, before, lane);
  const Rows rows{c, q, fresh, sequence, kv_head, piece, position, begin, end, split == 0};
  rows.row(warp, [] { zmlx_wait(); });
  for (int job = warp + WARPS; job < QUERY_ROWS + Rows::FRESH_ROWS; job += WARPS) rows.row(job, [] {});
  __syncthreads();
  moment(MOMENT_PLACED);
  if (!FRESH && begin + STREAMS * UNROLL > position) {
    round.load_keys(c, base, begin + stream, end, lane);
    round.load_values(c, base, begin + stream, end, lane);
  }
  Running run;
#pragma unroll
  for (int r = 0; r < QUERY_ROWS; r++) {
    run.largest[r] = LOWEST;
    run.sum[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUE_UNITS * ELEMENTS; i++) run.values[r][i] = 0.0f;
  }
#pragma unroll 1
  for (int first = begin; first < cached; first += STREAMS * UNROLL) {
    Round now = round;
    round.load_keys(c, base, first + STREAMS * UNROLL + stream, cached, lane);
    round.load_values(c, base, first + STREAMS * UNROLL + stream, cached, lane);
    add_positions<UNROLL>(
        run, q, [&](int n, int u, float (&to)[ELEMENTS]) { unpack(now.k[n][u], to); },
        [&](int n, int u, float (&to)[ELEMENTS]) { unpack(now.v[n][u], to); }, lane, piece, first + stream, position, cached);
  }
  if (FRESH) {
#pragma unroll 1
    for (int first = max(begin, position); first < end; first += STREAMS) {
      int at = first + stream, t = min(at, end - 1) - position;
      const float* row = fresh + t * (KEY + VALUE);
      add_positions<1>(
          run, q, [&](int, int u, float (&to)[ELEMENTS]) { from_shared<KEY>(row, u, lane, to); },
          [&](int, int u, float (&to)[ELEMENTS]) { from_shared<VALUE>(row + KEY, u, lane, to); }, lane, piece, at, position, end);
    }
  }
  merge_streams(run, parts, warp, lane);
  __syncthreads();
  moment(MOMENT_SUMMED);
  // Warps to one part, in `scratch` or, where there is only one, to the result.
  const u64 unit = (static_cast<u64>(blockIdx.z) * KV_HEADS + kv_head) * SPLITS;
  auto store = [&](int r, int d, const float3& all) {
    int row = piece * QUERY_ROWS + r, head = kv_head * GROUP + row % GROUP;
    if (row < ALL_ROWS) {
      c.out[(static_cast<u64>(sequence * LENGTH + token_of(row)) * HEADS + head) * VALUE + d] = result(all, c.sinks, head);
    }
  };
  for (int i = threadIdx.x; i < QUERY_ROWS * VALUE; i += THREADS) {
    int r = i / VALUE, d = i % VALUE;
    float3 all = add_parts(WARPS, d, [&](int w, int f) { return parts[(w * QUERY_ROWS + r) * PART_FLOATS + f]; });
    if (parts_used == 1) {
      store(r, d, all);
    } else {
      u64 at = (unit + split) * QUERY_ROWS + r;
      publish(c.scratch + at * VALUE + d, all.z);
      if (d == 0) {
        publish(stats_of(c) + 2 * at, all.x);
        publish(stats_of(c) + 2 * at + 1, all.y);
      }
    }
  }
  if (parts_used == 1) return;
  if (!last_block(c.arrived + blockIdx.z * KV_HEADS + kv_head, parts_used)) return;
  add_blocks(c, pool, unit, parts_used, store);
}
