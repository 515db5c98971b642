// out[t, h] = w[h] @ x[t, h]: each head has a matrix of its own. Blocks of a column of the grid have one head.
//
// Rows of x lie somewhere in memory, or are parts of attention over latents, which are added up first: with M the largest
// score m of all parts, x = sum(exp(m - M) a) / sum(exp(m - M) l). Each block of a head does that for itself.

constexpr int X_QUADS_HEAD = COLUMNS / 4;
// Threads that share a quad of x: they take every GROUPS-th part.
constexpr int GROUPS = SPLITS == 0 || THREADS < X_QUADS_HEAD ? 1 : THREADS / X_QUADS_HEAD;
constexpr float LOWEST = -3.402823466e38f;  // nothing lies in that part

struct Mixed {
  float4* values;  // [TOKENS][GROUPS][COLUMNS / 4]
  float* factors;  // [TOKENS][SPLITS]
};

// What each part counts.
DEVICE void place_factors(const float* stats, const Mixed& mixed, int head) {
  const int lane = threadIdx.x % 32;
  for (int t = threadIdx.x / 32; t < TOKENS; t += WARPS) {
    const float2* own = reinterpret_cast<const float2*>(stats) + (t * HEADS + head) * SPLITS;
    float most = LOWEST, sum = 0.0f;
    for (int p = lane; p < SPLITS; p += 32) most = larger(own[p].x, most);
    most = warp_largest(most);
    auto factor = [&](int p) { return own[p].x == LOWEST ? 0.0f : exp2f(own[p].x - most); };
    for (int p = lane; p < SPLITS; p += 32) sum += factor(p) * own[p].y;
    const float inverse = 1.0f / warp_sum(sum);
    for (int p = lane; p < SPLITS; p += 32) mixed.factors[t * SPLITS + p] = factor(p) * inverse;
  }
}

// Adds parts up, several loads at once.
DEVICE void place_mixed(const float* parts, const Mixed& mixed, int head) {
  constexpr int AT_ONCE = 8;
  for (int i = threadIdx.x; i < TOKENS * GROUPS * X_QUADS_HEAD; i += THREADS) {
    int d = i % X_QUADS_HEAD, group = i / X_QUADS_HEAD % GROUPS, t = i / X_QUADS_HEAD / GROUPS;
    const float4* own = reinterpret_cast<const float4*>(parts) + static_cast<u64>(t * HEADS + head) * SPLITS * X_QUADS_HEAD;
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int first = group; first < SPLITS; first += AT_ONCE * GROUPS) {
      float4 v[AT_ONCE];
      float factor[AT_ONCE];
#pragma unroll
      for (int n = 0; n < AT_ONCE; n++) {
        int p = first + n * GROUPS;
        factor[n] = p < SPLITS ? mixed.factors[t * SPLITS + p] : 0.0f;
        v[n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (factor[n] != 0.0f) v[n] = own[static_cast<u64>(p) * X_QUADS_HEAD + d];
      }
#pragma unroll
      for (int n = 0; n < AT_ONCE; n++) {
        total.x += factor[n] * v[n].x;
        total.y += factor[n] * v[n].y;
        total.z += factor[n] * v[n].z;
        total.w += factor[n] * v[n].w;
      }
    }
    mixed.values[i] = total;
  }
}

// The groups' sums to the first group's place.
DEVICE void join_groups(const Mixed& mixed) {
  for (int i = threadIdx.x; i < TOKENS * X_QUADS_HEAD; i += THREADS) {
    float4* own = mixed.values + i / X_QUADS_HEAD * GROUPS * X_QUADS_HEAD + i % X_QUADS_HEAD;
    float4 total = own[0];
    for (int g = 1; g < GROUPS; g++) {
      float4 v = own[g * X_QUADS_HEAD];
      total = make_float4(total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w);
    }
    own[0] = total;
  }
}

DEVICE Matrix of_head(Matrix m, int head) {
  m.codes += static_cast<u64>(head) * ROWS * UNITS * 4;
  if (FORMAT <= MXFP4) {
    m.scales += static_cast<u64>(head) * ROWS * (COLUMNS / GROUP);
    if (AFFINE) m.biases += static_cast<u64>(head) * ROWS * (COLUMNS / GROUP);
  }
  return m;
}

// Brings the rows of a head: as they are, or their parts added up.
struct RowsOfHead {
  static constexpr bool MEETS = false, REHEARSES = false;
  const float *x, *stats;
  Mixed mixed;
  int head;

  DEVICE void early() {}
  DEVICE void fetch() {}
  DEVICE void place(const Room& room, bool) {
    if (SPLITS > 0) {
      place_factors(stats, mixed, head);
      __syncthreads();
      place_mixed(x, mixed, head);
      __syncthreads();
      if (GROUPS > 1) {
        join_groups(mixed);
        __syncthreads();
      }
    }
#pragma unroll 1
    for (int t = 0; t < TOKENS; t++) {
      const float* row = SPLITS > 0 ? reinterpret_cast<const float*>(mixed.values) + t * GROUPS * COLUMNS
                                    : x + static_cast<u64>(t) * X_TOKEN + head * X_HEAD;
      place_row(row, 1.0f, nullptr, t, room);
    }
  }
  DEVICE float factor(const Room&) { return 1.0f; }
};

DEVICE void head_products(const float* x, const float* stats, Matrix all, float* out) {
  extern __shared__ __align__(16) float pool[];
  Room room = room_of(pool);
  const int head = blockIdx.y;
  const Matrix m = of_head(all, head);
  constexpr int TILES = (ROWS + TILE - 1) / TILE;
  // Behind the room of a product, which ends with norms that are not used here.
  Mixed mixed;
  mixed.values = reinterpret_cast<float4*>(pool + MIXED_AT);
  mixed.factors = reinterpret_cast<float*>(mixed.values + (SPLITS == 0 ? 0 : TOKENS * GROUPS * X_QUADS_HEAD));
  products<true, TILE * TOKENS>(
      TILES, room, [&](int, int, int, int) { return m; },
      [&](int tile, int local) { return static_cast<u64>(min(tile * TILE + local, ROWS - 1)); },
      RowsOfHead{x, stats, mixed, head}, [](int, int) { return 0; },
      [&](int tile, int i, auto total, int) {
        int local = i / TOKENS, t = i % TOKENS, r = tile * TILE + local;
        if (r < ROWS) out[(t * HEADS + head) * ROWS + r] = total(0, local, t);
      });
}
