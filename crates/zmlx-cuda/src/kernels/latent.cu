// softmax(scale (q . c + q_pe . k_pe)) @ c over a cache of latents c and rotary keys k_pe, in parts of positions.
//
// All heads share the cache, so a block has a few rows of queries (heads, tokens) and a part of the positions. A warp takes
// every WARPS-th position, POSITIONS of them at a time; its lanes share the columns and keep their columns of queries,
// latents and sums in registers, so that a latent is loaded once for its score and its share of the sum. The products of
// POSITIONS * QUERY_ROWS pairs are added over the lanes in one exchange that halves the pairs a lane has in each step: every pair
// ends in two lanes. Scores are in powers of two.
//
// What the rows see of a part goes to `parts`, with the largest score and the sum of the exponentials in `stats`; the
// products that read the result add the parts up. Rotary parts of queries, and latents and keys of the call, are rows of
// products: they are finished on the way, and the block whose part they lie in appends them to the cache.

constexpr int QUERY_ROWS = 4, POSITIONS = 4;
constexpr int ALL_ROWS = HEADS * LENGTH;
constexpr int PIECES = (ALL_ROWS + QUERY_ROWS - 1) / QUERY_ROWS;
constexpr int UNITS = (LATENT / ELEMENTS + 31) / 32, COLUMNS = UNITS * ELEMENTS;
constexpr int PAIRS = (ROPE / 2 + 31) / 32;
constexpr int THREADS = 32 * WARPS;
constexpr int ROUND = WARPS * POSITIONS;
constexpr bool SMALL = sizeof(CACHE) == 2;
constexpr float LOWEST = -3.402823466e38f;  // no position yet
constexpr float FACTOR = SCORE_SCALE * 1.4426950408889634f;

struct Call {
  const float *queries, *pe, *compressed;  // rows of products
  const float* norm;
  const float *angles_q, *angles_k;
  const int* position;
  int capacity;
  CACHE *latents, *keys;
  float *parts, *stats;
};

// A lane's columns of queries, times the scale.
struct Query {
  float latent[QUERY_ROWS][COLUMNS], pe[QUERY_ROWS][2 * PAIRS];
};
// A lane's columns of a position, as the cache has them; two neighbours of 16 bits are one word.
struct Key {
  uint4 latent[UNITS];
  u32 pe[PAIRS][2];
};
// `largest` and `sum`: of the row and the position of a round whose scores the lane gets.
struct Running {
  float largest, sum, values[QUERY_ROWS][COLUMNS];
};

DEVICE int column_of(int unit, int lane) { return (unit * 32 + lane) * ELEMENTS; }

// The columns of pair `i` of a rotary part. What is not turned is paired too.
DEVICE int2 columns_of(int i) {
  if (TRADITIONAL || i >= HALF) return make_int2(2 * i, 2 * i + 1);
  return make_int2(i, i + HALF);
}

// Pair `i` of a row, turned.
DEVICE float2 turned(const float* row, const float* angles, int position, int i) {
  int2 at = columns_of(i);
  float x = row[at.x], y = row[at.y];
  if (i >= HALF) return make_float2(x, y);
  const float* a = angles + static_cast<u64>(position) * (2 * HALF);
  float c = a[i], s = a[HALF + i];
  x *= MAGNITUDE;
  y *= MAGNITUDE;
  return make_float2(x * c - y * s, x * s + y * c);
}

DEVICE u32 bits_of(u16 v) { return v; }
DEVICE u32 bits_of(float v) { return __float_as_uint(v); }

// Both of a pair, as `load_pair` or `fresh_key` left them.
DEVICE float2 pair_of(const u32 (&w)[2]) {
  if (!SMALL) return make_float2(__uint_as_float(w[0]), __uint_as_float(w[1]));
  return make_float2(widen<CACHE_KIND>(static_cast<u16>(w[0])),
                     widen<CACHE_KIND>(static_cast<u16>(TRADITIONAL ? w[0] >> 16 : w[1])));
}

DEVICE void load_pair(const CACHE* row, int i, u32 (&to)[2]) {
  if (SMALL && TRADITIONAL) {
    to[0] = *reinterpret_cast<const u32*>(row + 2 * i);
    return;
  }
  int2 at = columns_of(i);
  to[0] = bits_of(row[at.x]);
  to[1] = bits_of(row[at.y]);
}

DEVICE void place_query(const Call& c, Query& q, int sequence, int piece, int position, int lane) {
#pragma unroll
  for (int r = 0; r < QUERY_ROWS; r++) {
    int row = min(piece * QUERY_ROWS + r, ALL_ROWS - 1), t = row / HEADS, head = row % HEADS;
    u64 token = static_cast<u64>(sequence) * LENGTH + t;
    const float* from = c.queries + (token * HEADS + head) * LATENT;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
#pragma unroll
      for (int i = 0; i < ELEMENTS; i += 4) {
        int at = column_of(u, lane) + i;
        float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (at < LATENT) v = *reinterpret_cast<const float4*>(from + at);
        float* to = q.latent[r] + u * ELEMENTS + i;
        to[0] = v.x * FACTOR;
        to[1] = v.y * FACTOR;
        to[2] = v.z * FACTOR;
        to[3] = v.w * FACTOR;
      }
    }
    const float* pe = c.pe + token * PE_TOKEN + head * PE_HEAD;
#pragma unroll
    for (int n = 0; n < PAIRS; n++) {
      int i = n * 32 + lane;
      float2 v = make_float2(0.0f, 0.0f);
      if (2 * i < ROPE) v = turned(pe, c.angles_q, position + t, i);
      q.pe[r][2 * n] = v.x * FACTOR;
      q.pe[r][2 * n + 1] = v.y * FACTOR;
    }
  }
}

// The positions that a warp takes in a round, zeros where they are not below `stop`.
DEVICE void load_keys(const Call& c, Key (&keys)[POSITIONS], u64 base, int at, int stop, int lane) {
#pragma unroll
  for (int n = 0; n < POSITIONS; n++, at += WARPS) {
    const CACHE *latent = c.latents + (base + at) * LATENT, *pe = c.keys + (base + at) * ROPE;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      keys[n].latent[u] = make_uint4(0u, 0u, 0u, 0u);
      if (at < stop && column_of(u, lane) < LATENT) keys[n].latent[u] = load_cache(latent + column_of(u, lane));
    }
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
      keys[n].pe[p][0] = keys[n].pe[p][1] = 0u;
      if (at < stop && 2 * (p * 32 + lane) < ROPE) load_pair(pe, p * 32 + lane, keys[n].pe[p]);
    }
  }
}

// Token `t` of the call, finished and rounded as the cache has it; `writes`: and appended to it.
DEVICE Key fresh_key(const Call& c, int sequence, u64 base, int position, int t, int lane, bool writes) {
  const float* row = c.compressed + (static_cast<u64>(sequence) * LENGTH + t) * COMPRESSED;
  const int at = position + t;
  float x[COLUMNS], sum = 0.0f;
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
      int column = column_of(u, lane) + i;
      x[u * ELEMENTS + i] = column < LATENT ? row[column] : 0.0f;
      sum += x[u * ELEMENTS + i] * x[u * ELEMENTS + i];
    }
  }
  const float inverse = 1.0f / sqrtf(warp_sum(sum) / LATENT + EPS);
  Key key;
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    u32 w[4] = {0u, 0u, 0u, 0u};
    int first = column_of(u, lane);
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
      CACHE v;
      float weight = WEIGHTED && first < LATENT ? c.norm[first + i] : 1.0f;
      narrow<CACHE_KIND>(x[u * ELEMENTS + i] * inverse * weight, &v);
      if (SMALL) w[i / 2] |= bits_of(v) << (16 * (i % 2));
      else w[i % 4] = bits_of(v);
    }
    key.latent[u] = make_uint4(w[0], w[1], w[2], w[3]);
    if (writes && first < LATENT) *reinterpret_cast<uint4*>(c.latents + (base + at) * LATENT + first) = key.latent[u];
  }
#pragma unroll
  for (int n = 0; n < PAIRS; n++) {
    int i = n * 32 + lane;
    key.pe[n][0] = key.pe[n][1] = 0u;
    if (2 * i >= ROPE) continue;
    float2 v = turned(row + LATENT, c.angles_k, at, i);
    CACHE a, b;
    narrow<CACHE_KIND>(v.x, &a);
    narrow<CACHE_KIND>(v.y, &b);
    key.pe[n][0] = SMALL && TRADITIONAL ? bits_of(a) | bits_of(b) << 16 : bits_of(a);
    key.pe[n][1] = bits_of(b);
    if (writes) {
      int2 to = columns_of(i);
      c.keys[(base + at) * ROPE + to.x] = a;
      c.keys[(base + at) * ROPE + to.y] = b;
    }
  }
  return key;
}

// Sums over the lanes of 2 * N values: ends with one a lane. The indices are constants for the compiler, else it would put
// the values in memory.
template <int N> DEVICE void halve(float (&v)[POSITIONS * QUERY_ROWS], int lane) {
  const bool high = lane & (2 * N);
#pragma unroll
  for (int i = 0; i < N; i++) {
    float keep = high ? v[i + N] : v[i], give = high ? v[i] : v[i + N];
    v[i] = keep + __shfl_xor_sync(ALL_LANES, give, 2 * N);
  }
}

// Sums over the lanes of POSITIONS * QUERY_ROWS values: lane l gets value l / 2.
DEVICE float exchange(float (&v)[POSITIONS * QUERY_ROWS], int lane) {
  halve<8>(v, lane);
  halve<4>(v, lane);
  halve<2>(v, lane);
  halve<1>(v, lane);
  return v[0] + __shfl_xor_sync(ALL_LANES, v[0], 1);
}

// Adds positions at, at + WARPS, ... below `stop` to all rows. The lane has the scores of row (lane / 2) % 4 with the
// position lane / 8 of them; what a row sees ends at `seen`.
DEVICE void add_positions(Running& run, const Query& q, const Key (&keys)[POSITIONS], int at, int stop, int seen, int lane) {
  float scores[POSITIONS * QUERY_ROWS];
#pragma unroll
  for (int n = 0; n < POSITIONS; n++) {
#pragma unroll
    for (int r = 0; r < QUERY_ROWS; r++) scores[n * QUERY_ROWS + r] = 0.0f;
    if (at + n * WARPS >= stop) continue;
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      float k[ELEMENTS];
      unpack(keys[n].latent[u], k);
#pragma unroll
      for (int i = 0; i < ELEMENTS; i++) {
#pragma unroll
        for (int r = 0; r < QUERY_ROWS; r++) {
          scores[n * QUERY_ROWS + r] = fmaf(q.latent[r][u * ELEMENTS + i], k[i], scores[n * QUERY_ROWS + r]);
        }
      }
    }
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
      float2 k = pair_of(keys[n].pe[p]);
#pragma unroll
      for (int r = 0; r < QUERY_ROWS; r++) {
        float& s = scores[n * QUERY_ROWS + r];
        s = fmaf(q.pe[r][2 * p], k.x, fmaf(q.pe[r][2 * p + 1], k.y, s));
      }
    }
  }
  const float score = exchange(scores, lane);
  const int own = at + lane / 8 * WARPS;
  const bool sees = own < stop && own < seen;
  float largest = larger(sees ? score : LOWEST, run.largest);
  largest = larger(__shfl_xor_sync(ALL_LANES, largest, 8), largest);
  largest = larger(__shfl_xor_sync(ALL_LANES, largest, 16), largest);
  const float keep = run.largest == LOWEST ? 0.0f : exp2f(run.largest - largest);
  const float weight = sees ? exp2f(score - largest) : 0.0f;
  run.sum = run.sum * keep + weight;
  run.largest = largest;
  if (__any_sync(ALL_LANES, keep != 1.0f)) {
#pragma unroll
    for (int r = 0; r < QUERY_ROWS; r++) {
      float factor = __shfl_sync(ALL_LANES, keep, 2 * r);
#pragma unroll
      for (int i = 0; i < COLUMNS; i++) run.values[r][i] *= factor;
    }
  }
#pragma unroll
  for (int n = 0; n < POSITIONS; n++) {
    if (at + n * WARPS >= stop) continue;
    float w[QUERY_ROWS];
#pragma unroll
    for (int r = 0; r < QUERY_ROWS; r++) w[r] = __shfl_sync(ALL_LANES, weight, 2 * (n * QUERY_ROWS + r));
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      float v[ELEMENTS];
      unpack(keys[n].latent[u], v);
#pragma unroll
      for (int i = 0; i < ELEMENTS; i++) {
#pragma unroll
        for (int r = 0; r < QUERY_ROWS; r++) {
          run.values[r][u * ELEMENTS + i] = fmaf(w[r], v[i], run.values[r][u * ELEMENTS + i]);
        }
      }
    }
  }
}

// Where a part of a row is.
DEVICE u64 part_at(int sequence, int row, int split) {
  return (static_cast<u64>(sequence) * ALL_ROWS + row) * SPLITS + split;
}

// Quads of a warp's row in shared memory: those of all lanes side by side, so that no bank is met twice.
constexpr int SLOTS = COLUMNS / 4 * 32;
DEVICE int column_of_slot(int slot) {
  constexpr int EACH = ELEMENTS / 4;
  return column_of(slot / 32 / EACH, slot % 32) + slot / 32 % EACH * 4;
}

// What the warps have of the rows, as one part.
DEVICE void store_part(const Call& c, const Running& run, float* pool, int sequence, int piece, int split) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float4* values = reinterpret_cast<float4*>(pool);
  float2* stats = reinterpret_cast<float2*>(pool + WARPS * QUERY_ROWS * SLOTS * 4);
  float sum = run.sum + __shfl_xor_sync(ALL_LANES, run.sum, 8);
  sum += __shfl_xor_sync(ALL_LANES, sum, 16);
  if (lane < 2 * QUERY_ROWS && lane % 2 == 0) stats[warp * QUERY_ROWS + lane / 2] = make_float2(run.largest, sum);
#pragma unroll
  for (int r = 0; r < QUERY_ROWS; r++) {
#pragma unroll
    for (int i = 0; i < COLUMNS; i += 4) {
      values[(warp * QUERY_ROWS + r) * SLOTS + i / 4 * 32 + lane] =
          make_float4(run.values[r][i], run.values[r][i + 1], run.values[r][i + 2], run.values[r][i + 3]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < QUERY_ROWS * SLOTS; i += THREADS) {
    int r = i / SLOTS, slot = i % SLOTS, row = piece * QUERY_ROWS + r;
    if (row >= ALL_ROWS || column_of_slot(slot) >= LATENT) continue;
    float largest = LOWEST, total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) largest = larger(stats[w * QUERY_ROWS + r].x, largest);
    float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      float2 s = stats[w * QUERY_ROWS + r];
      float factor = s.x == LOWEST ? 0.0f : exp2f(s.x - largest);
      float4 v = values[(w * QUERY_ROWS + r) * SLOTS + slot];
      total += factor * s.y;
      sums.x += factor * v.x;
      sums.y += factor * v.y;
      sums.z += factor * v.z;
      sums.w += factor * v.w;
    }
    u64 at = part_at(sequence, row, split);
    *reinterpret_cast<float4*>(c.parts + at * LATENT + column_of_slot(slot)) = sums;
    if (slot == 0) *reinterpret_cast<float2*>(c.stats + 2 * at) = make_float2(largest, total);
  }
}

DEVICE void latent_attend(Call c) {
  extern __shared__ __align__(16) float pool[];
  zmlx_release();
  zmlx_wait();
  const int split = blockIdx.x, piece = blockIdx.y, sequence = blockIdx.z;
  const int position = *c.position, stop = position + LENGTH, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Positions a part: as many as make use of all blocks, but not so few that a part is all overhead; warps have alike.
  const int each = (max((stop + SPLITS - 1) / SPLITS, LEAST) + WARPS - 1) / WARPS * WARPS;
  const int begin = split * each, end = min(begin + each, stop), cached = min(end, position);
  if (begin >= stop) {
    // Nothing lies here, and whoever adds the parts up must know it.
    int row = piece * QUERY_ROWS + static_cast<int>(threadIdx.x);
    if (threadIdx.x < QUERY_ROWS && row < ALL_ROWS) {
      *reinterpret_cast<float2*>(c.stats + 2 * part_at(sequence, row, split)) = make_float2(LOWEST, 0.0f);
    }
    return;
  }
  const u64 base = static_cast<u64>(sequence) * c.capacity;
  Key keys[POSITIONS], next[POSITIONS] = {};
  load_keys(c, keys, base, begin + warp, cached, lane);
  Query q;
  place_query(c, q, sequence, piece, position, lane);
  Running run = {};
  run.largest = LOWEST;
  // The row that the lane has scores of sees its own token and those before it.
  const int seen = position + min(piece * QUERY_ROWS + lane / 2 % QUERY_ROWS, ALL_ROWS - 1) / HEADS + 1;
  int token = max(begin - position, 0) + warp;
#pragma unroll 1
  for (int first = begin;; first += ROUND) {
    int at = first + warp, limit = cached;
    if (first >= cached) {
      // What the cache has is done; then tokens of the call, one at a time.
      at = position + token;
      if (at >= end) break;
      keys[0] = fresh_key(c, sequence, base, position, token, lane, piece == 0);
      limit = at + 1;
      token += WARPS;
    } else if (SMALL) {
      load_keys(c, next, base, at + ROUND, cached, lane);
    }
    add_positions(run, q, keys, at, limit, seen, lane);
    if (SMALL) {
#pragma unroll
      for (int n = 0; n < POSITIONS; n++) keys[n] = next[n];
    } else {
      load_keys(c, keys, base, first + ROUND + warp, cached, lane);
    }
  }
  store_part(c, run, pool, sequence, piece, split);
}
