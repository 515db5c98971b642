// softmax(scale * q @ k.T) @ v over a cache, cut into parts of positions.
//
// A block has a key/value head, up to QUERY_ROWS rows of queries (query heads of the group, tokens) and a part of the
// positions. LANES lanes are a stream: they share a position at a time and keep a running maximum and sum of their own.
// Streams meet by shuffles, warps in shared memory, blocks in `scratch`: the last that arrives adds the parts up, always
// in the same order. Scores are in powers of two.
//
// FRESH: queries, keys and values of this call are rows of products: each block finishes its queries; new keys and values
// are finished by the block whose part they lie in, which writes them to the cache.

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

// One more position for all rows. `valid`: the stream has one at all.
DEVICE void add_position(Running& run, const float* q, const float (&k)[KEY_UNITS][ELEMENTS],
                         const float (&v)[VALUE_UNITS][ELEMENTS], int lane, int piece, int at, int position, bool valid) {
#pragma unroll
  for (int r = 0; r < QUERY_ROWS; r++) {
    float score = 0.0f;
#pragma unroll
    for (int u = 0; u < KEY_UNITS; u++) {
      int first = (u * LANES + lane) * ELEMENTS;
      if (first < KEY) {
#pragma unroll
        for (int i = 0; i < ELEMENTS; i += 4) {
          float4 x = *reinterpret_cast<const float4*>(q + r * KEY + first + i);
          score = fmaf(x.x, k[u][i], fmaf(x.y, k[u][i + 1], fmaf(x.z, k[u][i + 2], fmaf(x.w, k[u][i + 3], score))));
        }
      }
    }
#pragma unroll
    for (int n = LANES / 2; n > 0; n /= 2) score += __shfl_xor_sync(ALL_LANES, score, n);
    int t = token_of(piece * QUERY_ROWS + r);
    bool seen = valid && at <= position + t && (WINDOW == 0 || at > position + t - WINDOW);
    if (seen) {
      float largest = larger(score, run.largest[r]);
      float keep = run.largest[r] == LOWEST ? 0.0f : exp2f(run.largest[r] - largest), weight = exp2f(score - largest);
      run.largest[r] = largest;
      run.sum[r] = run.sum[r] * keep + weight;
#pragma unroll
      for (int u = 0; u < VALUE_UNITS; u++) {
#pragma unroll
        for (int i = 0; i < ELEMENTS; i++) {
          run.values[r][u * ELEMENTS + i] = fmaf(weight, v[u][i], run.values[r][u * ELEMENTS + i] * keep);
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

// Query rows of the piece into `q`, times the scale.
DEVICE void place_queries(const Call& c, float* q, int sequence, int kv_head, int piece, int position, bool writes_gates) {
  constexpr int STRIDE = FRESH && GATES ? 2 * WIDTH_0 : WIDTH_0;
  constexpr float FACTOR = SCORE_SCALE * 1.4426950408889634f;
  for (int r = threadIdx.x / 32; r < QUERY_ROWS; r += WARPS) {
    int row = min(piece * QUERY_ROWS + r, ALL_ROWS - 1), t = token_of(row), head = kv_head * GROUP + row % GROUP;
    int token = sequence * LENGTH + t;
    if (FRESH) {
      const float* raw = c.queries + static_cast<u64>(token) * STRIDE_0 + head * STRIDE;
      finish_head<0>(raw, c.q, position + t, [&](int i, float x) { q[r * KEY + i] = x * FACTOR; });
      if (GATES && writes_gates) {
        for (int i = threadIdx.x % 32; i < WIDTH_0; i += 32) c.gates[(token * HEADS + head) * WIDTH_0 + i] = raw[WIDTH_0 + i];
      }
    } else {
      const float* from = c.queries + (static_cast<u64>(token) * HEADS + head) * KEY;
      for (int i = threadIdx.x % 32; i < KEY; i += 32) q[r * KEY + i] = from[i] * FACTOR;
    }
  }
}

// New keys and values that lie in [begin, end) into `fresh` ([LENGTH][KEY + VALUE], as the cache rounds them) and, by one
// piece's block, into the cache.
DEVICE void place_fresh(const Call& c, float* fresh, int sequence, int kv_head, int position, int begin, int end, bool writes) {
  for (int job = threadIdx.x / 32; job < 2 * LENGTH; job += WARPS) {
    int t = job / 2, at = position + t, token = sequence * LENGTH + t;
    if (at < begin || at >= end) continue;
    u64 place = static_cast<u64>(sequence * KV_HEADS + kv_head) * c.capacity + at;
    auto put = [&](CACHE* cached, float* copy, int i, float x) {
      CACHE v;
      narrow<CACHE_KIND>(x, &v);
      if (writes) cached[i] = v;
      copy[i] = widen<CACHE_KIND>(v);
    };
    if (job % 2 == 0) {
      finish_head<1>(c.keys + static_cast<u64>(token) * STRIDE_1 + kv_head * KEY, c.k, at,
                     [&](int i, float x) { put(c.cached_keys + place * KEY, fresh + t * (KEY + VALUE), i, x); });
    } else {
      finish_head<2>(c.values + static_cast<u64>(token) * STRIDE_2 + kv_head * VALUE, c.v, at,
                     [&](int i, float x) { put(c.cached_values + place * VALUE, fresh + t * (KEY + VALUE) + KEY, i, x); });
    }
  }
}

// A unit of a row of keys or values that lie in shared memory as floats.
template <int N, int WIDTH> DEVICE void from_shared(const float* row, int lane, float (&to)[N][ELEMENTS]) {
#pragma unroll
  for (int u = 0; u < N; u++) {
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
      int at = (u * LANES + lane) * ELEMENTS + i;
      to[u][i] = at < WIDTH ? row[at] : 0.0f;
    }
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

// Positions [begin, end) that are in the cache.
DEVICE void add_cached(const Call& c, Running& run, const float* q, int sequence, int kv_head, int piece, int position,
                       int begin, int end, int stream, int lane) {
  const u64 base = static_cast<u64>(sequence * KV_HEADS + kv_head) * c.capacity;
  for (int first = begin; first < end; first += STREAMS * UNROLL) {
    uint4 k[UNROLL][KEY_UNITS], v[UNROLL][VALUE_UNITS];
#pragma unroll
    for (int n = 0; n < UNROLL; n++) {
      int at = first + n * STREAMS + stream;
      from_cache<KEY_UNITS, KEY>(c.cached_keys + (base + at) * KEY, lane, at < end, k[n]);
      from_cache<VALUE_UNITS, VALUE>(c.cached_values + (base + at) * VALUE, lane, at < end, v[n]);
    }
#pragma unroll
    for (int n = 0; n < UNROLL; n++) {
      float key[KEY_UNITS][ELEMENTS], value[VALUE_UNITS][ELEMENTS];
#pragma unroll
      for (int u = 0; u < KEY_UNITS; u++) unpack(k[n][u], key[u]);
#pragma unroll
      for (int u = 0; u < VALUE_UNITS; u++) unpack(v[n][u], value[u]);
      int at = first + n * STREAMS + stream;
      add_position(run, q, key, value, lane, piece, at, position, at < end);
    }
  }
}

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
  zmlx_wait();
  const int split = blockIdx.x, kv_head = blockIdx.y, sequence = blockIdx.z / PIECES, piece = blockIdx.z % PIECES;
  const int position = *c.position, stop = position + LENGTH;
  const int start = WINDOW == 0 ? 0 : max(0, position + 1 - WINDOW);
  // Positions a part: as many as make use of all blocks, but not so few that a part is all overhead.
  const int each = max((stop - start + SPLITS - 1) / SPLITS, LEAST), parts_used = (stop - start + each - 1) / each;
  if (split >= parts_used) return;
  const int begin = start + split * each, end = min(begin + each, stop);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % LANES, stream = warp * (32 / LANES) + threadIdx.x % 32 / LANES;
  place_queries(c, q, sequence, kv_head, piece, position, split == 0);
  if (FRESH) place_fresh(c, fresh, sequence, kv_head, position, begin, end, piece == 0);
  __syncthreads();
  moment(MOMENT_PLACED);
  Running run;
#pragma unroll
  for (int r = 0; r < QUERY_ROWS; r++) {
    run.largest[r] = LOWEST;
    run.sum[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < VALUE_UNITS * ELEMENTS; i++) run.values[r][i] = 0.0f;
  }
  add_cached(c, run, q, sequence, kv_head, piece, position, begin, FRESH ? min(end, position) : end, stream, lane);
  if (FRESH) {
    for (int first = max(begin, position); first < end; first += STREAMS) {
      int at = first + stream, t = min(at, end - 1) - position;
      float key[KEY_UNITS][ELEMENTS], value[VALUE_UNITS][ELEMENTS];
      from_shared<KEY_UNITS, KEY>(fresh + t * (KEY + VALUE), lane, key);
      from_shared<VALUE_UNITS, VALUE>(fresh + t * (KEY + VALUE) + KEY, lane, value);
      add_position(run, q, key, value, lane, piece, at, position, at < end);
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
