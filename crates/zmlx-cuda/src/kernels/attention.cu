// softmax(scale * q @ k.T) @ v over a cache, cut into parts of positions: what is around the loop over positions.
//
// Warps of a block meet in shared memory, blocks in `scratch`: the last that arrives adds the parts up, always in the same
// order. Scores are in powers of two.
//
// FRESH: queries, keys and values of this call are rows of products: each block finishes its queries; new keys and values
// are finished by the block whose part they lie in, which writes them to the cache. What the cache held before, and the
// position, are of the step before: they are asked for ahead of the wait.

// Four values of a row, not yet divided by the sum.
struct Sum {
  float largest, sum;
  float4 values;

  DEVICE void add(float factor, float more, const float4& v) {
    sum += factor * more;
    values.x += factor * v.x;
    values.y += factor * v.y;
    values.z += factor * v.z;
    values.w += factor * v.w;
  }
};

// Adds up the warps' parts: values d to d + 3 of a row.
DEVICE Sum add_warps(const Parts& parts, int row, int d) {
  Sum all{LOWEST, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
#pragma unroll
  for (int w = 0; w < WARPS; w++) all.largest = larger(parts.stats(w, row).x, all.largest);
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    float2 s = parts.stats(w, row);
    float factor = s.x == LOWEST ? 0.0f : exp2f(s.x - all.largest);
    if (factor != 0.0f) all.add(factor, s.y, *reinterpret_cast<const float4*>(parts.values(w, row) + d));
  }
  return all;
}

// The result of a row, with the sink's share of the softmax.
DEVICE float4 result(const Sum& all, const float* sinks, int head) {
  float factor = 1.0f, sum = all.sum;
  if (SINKS) {
    constexpr float LOG2_E = 1.4426950408889634f;
    float sink = sinks[head] * LOG2_E, largest = fmaxf(all.largest, sink);
    factor = exp2f(all.largest - largest);
    sum = factor * all.sum + exp2f(sink - largest);
  }
  const float4& v = all.values;
  return make_float4(factor * v.x / sum, factor * v.y / sum, factor * v.z / sum, factor * v.w / sum);
}

// The rows of queries of the piece into `q`, times the scale, and new keys and values that lie in [begin, end) into `fresh`
// (as the cache rounds them) and, by one piece's block, into the cache. A warp does a row.
struct Rows {
  const Call& c;
  float* q;
  KEPT* fresh;
  int sequence, kv_head, piece, position, begin, end;
  bool writes_gates;
  static constexpr int FRESH_ROWS = FRESH ? 2 * LENGTH : 0;

  static constexpr float FACTOR = SCORE_SCALE * 1.4426950408889634f;

  DEVICE void finished_query(int r) const {
    const int row = min(piece * QUERY_ROWS + r, ALL_ROWS - 1), head = kv_head * GROUP + row % GROUP;
    const float* from = c.queries + (static_cast<u64>(sequence * LENGTH + token_of(row)) * HEADS + head) * KEY;
    for (int i = threadIdx.x % 32; i < KEY; i += 32) place_query(q, r, i, from[i] * FACTOR);
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
    ahead.finish(raw, position + t, [&](int i, float x) { place_query(q, r, i, x * FACTOR); });
    if (GATES && writes_gates) {
#pragma unroll
      for (int n = 0; n < OWN; n++) {
        int i = n * 32 + lane;
        if (i < WIDTH_0) c.gates[(token * HEADS + head) * WIDTH_0 + i] = gates[n];
      }
    }
  }

  DEVICE bool takes(int t) const { return position + t >= begin && position + t < end; }
  template <class Ahead> DEVICE void append(const Ahead& ahead, const float* raw, CACHE* cached, KEPT* copy, int t) const {
    ahead.finish(raw, position + t, [&](int i, float x) {
      CACHE v;
      narrow<CACHE_KIND>(x, &v);
      if (piece == 0) cached[i] = v;
      copy[i] = kept(v);
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
  constexpr int QUADS = VALUE / 4, AT_ONCE = 12;
  for (int i = threadIdx.x; i < QUERY_ROWS * QUADS; i += THREADS) {
    int r = i / QUADS, d = i % QUADS;
    Sum all{LOWEST, 0.0f, make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
    for (int p = 0; p < count; p++) all.largest = larger(largest[p * QUERY_ROWS + r], all.largest);
#pragma unroll 1
    for (int first = 0; first < count; first += AT_ONCE) {
      float4 v[AT_ONCE];
#pragma unroll
      for (int n = 0; n < AT_ONCE; n++) {
        int p = min(first + n, count - 1);
        v[n] = published4(c.scratch + ((unit + p) * QUERY_ROWS + r) * VALUE + 4 * d);
      }
#pragma unroll
      for (int n = 0; n < AT_ONCE; n++) {
        float m = largest[min(first + n, count - 1) * QUERY_ROWS + r];
        float factor = first + n >= count || m == LOWEST ? 0.0f : exp2f(m - all.largest);
        if (factor != 0.0f) all.add(factor, sums[(first + n) * QUERY_ROWS + r], v[n]);
      }
    }
    store(r, 4 * d, all);
  }
}

DEVICE void attend(Call c) {
  extern __shared__ __align__(16) KEPT pool[];
  float* const room = reinterpret_cast<float*>(pool);
  float* q = room;
  KEPT* fresh = reinterpret_cast<KEPT*>(q + QUERY_FLOATS);
  const Parts parts{reinterpret_cast<float*>(fresh + (FRESH ? LENGTH * (KEY + VALUE) : 0))};
  zmlx_release();
  const int split = blockIdx.x, kv_head = blockIdx.y, sequence = blockIdx.z / PIECES, piece = blockIdx.z % PIECES;
  const int position = *c.position, stop = position + LENGTH;
  const int start = WINDOW == 0 ? 0 : max(0, position + 1 - WINDOW);
  // Positions a part: as many as make use of all blocks, but not so few that a part is all overhead.
  const int each = max((stop - start + SPLITS - 1) / SPLITS, LEAST), parts_used = (stop - start + each - 1) / each;
  if (split >= parts_used) return;
  const int begin = start + split * each, end = min(begin + each, stop), warp = threadIdx.x / 32;
  Loop loop(c, static_cast<u64>(sequence * KV_HEADS + kv_head) * c.capacity, piece, begin);
  loop.load(min(end, position));
  const Rows rows{c, q, fresh, sequence, kv_head, piece, position, begin, end, split == 0};
  rows.row(warp, [] { zmlx_wait(); });
  for (int job = warp + WARPS; job < QUERY_ROWS + Rows::FRESH_ROWS; job += WARPS) rows.row(job, [] {});
  __syncthreads();
  moment(MOMENT_PLACED);
  // Without FRESH the launch before has written the call's own.
  if (!FRESH && begin + Loop::FIRST > position) loop.load(end);
  loop.run(q, fresh, position, FRESH ? min(end, position) : end, end);
  loop.merge(parts);
  __syncthreads();
  moment(MOMENT_SUMMED);
  // Warps to one part, in `scratch` or, where there is only one, to the result.
  const u64 unit = (static_cast<u64>(blockIdx.z) * KV_HEADS + kv_head) * SPLITS;
  auto store = [&](int r, int d, const Sum& all) {
    int row = piece * QUERY_ROWS + r, head = kv_head * GROUP + row % GROUP;
    if (row >= ALL_ROWS) return;
    float* to = c.out + (static_cast<u64>(sequence * LENGTH + token_of(row)) * HEADS + head) * VALUE + d;
    float4 y = result(all, c.sinks, head);
    to[0] = y.x;
    to[1] = y.y;
    to[2] = y.z;
    to[3] = y.w;
  };
  for (int i = threadIdx.x; i < QUERY_ROWS * (VALUE / 4); i += THREADS) {
    int r = i / (VALUE / 4), d = i % (VALUE / 4) * 4;
    Sum all = add_warps(parts, r, d);
    if (parts_used == 1) {
      store(r, d, all);
      continue;
    }
    u64 at = (unit + split) * QUERY_ROWS + r;
    float* to = c.scratch + at * VALUE + d;
    publish(to, all.values.x);
    publish(to + 1, all.values.y);
    publish(to + 2, all.values.z);
    publish(to + 3, all.values.w);
    if (d == 0) {
      publish(stats_of(c) + 2 * at, all.largest);
      publish(stats_of(c) + 2 * at + 1, all.sum);
    }
  }
  if (parts_used == 1) return;
  if (!last_block(c.arrived + blockIdx.z * KV_HEADS + kv_head, parts_used)) return;
  add_blocks(c, room, unit, parts_used, store);
}
