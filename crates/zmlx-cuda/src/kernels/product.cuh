// Products of rows of a quantised matrix with one or a few rows of x.
//
// A lane loads units of 16 bytes: CODES neighbouring codes of one row. LANES lanes share a row, a warp works on 32 / LANES
// times ROWS_A_LANE rows at once, and SPLIT warps of a block share the columns: each takes every SPLIT-th chunk of LANES
// units. Their sums meet in shared memory and are added in one order.
//
// Units are copied to shared memory, DEPTH steps of a thread ahead, where only the thread that asked for them reads them: what
// is on its way costs no registers, and waiting for x is not waiting for weights.
//
// Rows of x lie in shared memory as float4 ("quads"), in the order in which lanes read them. Affine codes become floats where
// they are: bits p .. p + 3 of a word, the others masked out, are the subnormal number q 2^(p - 149), which is exact, and x
// holds x 2^(77 - p) in its place. So each product is q x 2^-72, rounded as q x is, for an integer instruction (and a shift
// of half a word) and a fused multiply-add a code. Multiply-adds take subnormal numbers at full speed unless the text is
// compiled to flush them, which it must not be. |x| may be as large as 2^50; below 2^-54 products lose bits. The sum of x
// a unit, for the biases, is made once.

constexpr int UNITS = COLUMNS / CODES;
constexpr int CHUNKS = (UNITS + LANES - 1) / LANES;
// Chunks of all rows of x that one row of the result takes: several where experts are added up.
constexpr int ALL_CHUNKS = CHUNKS * PARTS;
constexpr int STEPS = (ALL_CHUNKS + SPLIT - 1) / SPLIT;
constexpr int THREADS = 32 * WARPS;
constexpr int SUB = 32 / LANES;
constexpr int MATRICES = PAIRED ? 2 : 1;
constexpr int ROWS_A_MATRIX = ROWS_A_LANE / MATRICES;
// Rows of the result that a block makes at once.
constexpr int TILE = WARPS / SPLIT * SUB * ROWS_A_MATRIX;
constexpr int X_ROWS = TOKENS * PARTS;
constexpr int X_QUADS = CHUNKS * LANES * QUADS;
constexpr int X_UNITS = CHUNKS * LANES;

// The shared memory of a block; the host knows its size.
struct Room {
  float4* x;
  float* sums;   // of x, a unit
  float* parts;  // [2][SPLIT][MATRICES * TILE][TOKENS]
  float* norms;  // a float a warp or row
  uint4* codes;  // [DEPTH][ROWS_A_LANE][THREADS]
  u32* scales;   // the words that hold them, then those of the biases: [DEPTH][ROWS_A_LANE][THREADS] each
};
DEVICE Room room_of(float* pool) {
  constexpr int UNITS_HELD = DEPTH * ROWS_A_LANE * THREADS;
  Room r;
  r.codes = reinterpret_cast<uint4*>(pool);
  r.scales = reinterpret_cast<u32*>(r.codes + UNITS_HELD);
  pool = reinterpret_cast<float*>(r.scales + (FORMAT > MXFP4 ? 0 : AFFINE ? 2 * UNITS_HELD : UNITS_HELD));
  r.x = reinterpret_cast<float4*>(pool);
  r.sums = pool + X_ROWS * X_QUADS * 4;
  r.parts = r.sums + (AFFINE ? X_ROWS * X_UNITS : 0);
  r.norms = r.parts + 2 * SPLIT * MATRICES * TILE * TOKENS;
  return r;
}

DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
DEVICE float masked(u32 v, u32 mask) { return __uint_as_float(v & mask); }
// What takes products with codes back to their size.
constexpr float CODE_FACTOR = AFFINE ? 0x1p72f : FORMAT == MXFP4 ? 0x1p14f : 1.0f;

// Floats for codes 4 q .. 4 q + 3 of a unit.
DEVICE float4 decode(const uint4& v, int q) {
  if (FORMAT == AFFINE4) {
    u32 w = word(v, q / 2) >> 16 * (q % 2);
    return make_float4(masked(w, 0xfu), masked(w, 0xf0u), masked(w, 0xf00u), masked(w, 0xf000u));
  }
  if (FORMAT == AFFINE8) {
    u32 w = word(v, q), h = w >> 16;
    return make_float4(masked(w, 0xffu), masked(w, 0xff00u), masked(h, 0xffu), masked(h, 0xff00u));
  }
  if (FORMAT == MXFP4) {
    // Sign and magnitude of an e2m1 at the top of a binary16 are its value over 2^14; two at a time.
    u32 w = word(v, q / 2), s = 16 * (q % 2), m = 0x0e000e00u, n = 0x80008000u;
    u32 a = (w << 12 & n) | (w << 9 & m), b = (w << 8 & n) | (w << 5 & m);
    u32 c = (w << 4 & n) | (w << 1 & m), d = (w & n) | (w >> 3 & m);
    return make_float4(half_to_float(static_cast<u16>(a >> s)), half_to_float(static_cast<u16>(b >> s)),
                       half_to_float(static_cast<u16>(c >> s)), half_to_float(static_cast<u16>(d >> s)));
  }
  if (FORMAT == DENSE16) {
    u32 a = word(v, 2 * q), b = word(v, 2 * q + 1);
    if (DENSE_KIND == KIND_F16) {
      return make_float4(half_to_float(static_cast<u16>(a)), half_to_float(static_cast<u16>(a >> 16)),
                         half_to_float(static_cast<u16>(b)), half_to_float(static_cast<u16>(b >> 16)));
    }
    return make_float4(__uint_as_float(a << 16), __uint_as_float(a & 0xffff0000u), __uint_as_float(b << 16),
                       __uint_as_float(b & 0xffff0000u));
  }
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// What decode's floats are multiplied with.
DEVICE float4 prescaled(float4 x) {
  if (FORMAT == AFFINE4) return make_float4(0x1p77f * x.x, 0x1p73f * x.y, 0x1p69f * x.z, 0x1p65f * x.w);
  if (FORMAT == AFFINE8) return make_float4(0x1p77f * x.x, 0x1p69f * x.y, 0x1p77f * x.z, 0x1p69f * x.w);
  return x;
}

// Scales and biases of groups are copied as the words of 32 bits that they lie in. Not WORDS: those of some matrix end within
// a word, and are loaded when they are needed.
template <class T> DEVICE const void* word_around(const T* p) {
  return reinterpret_cast<const void*>(reinterpret_cast<u64>(p) & ~u64(3));
}
template <class T> DEVICE float in_word(u32 word, u32 byte) {
  if constexpr (sizeof(T) == 4) return __uint_as_float(word);
  else return scale_value(static_cast<T>(word >> 8 * byte));
}
// Where rows of groups are whole words, a unit alone says where in its word a scale is (the host sees to where they begin).
constexpr bool WHOLE_WORDS = COLUMNS / GROUP * sizeof(SCALE) % 4 == 0;

// Quad `i` of the part of x that all lanes read at once: spread so that neither writing nor reading it meets a bank twice.
DEVICE int quad_at(int chunk, int q, int lane) { return (chunk * QUADS + q) * LANES + (lane ^ (q % 8)); }

// A quad of a row into its place. All lanes of a warp call it, with neighbouring quads.
DEVICE void place_quad(float4 v, int row, int i, const Room& room) {
  const int unit = i / QUADS, q = i % QUADS;
  room.x[row * X_QUADS + quad_at(unit / LANES, q, unit % LANES)] = prescaled(v);
  if (AFFINE) {
    // The quads of a unit lie in neighbouring lanes.
    float sum = v.x + v.y + (v.z + v.w);
#pragma unroll
    for (int n = 1; n < QUADS; n *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, n);
    if (q == 0) room.sums[row * X_UNITS + unit] = sum;
  }
}

DEVICE float4 times(float4 v, float f) { return make_float4(v.x * f, v.y * f, v.z * f, v.w * f); }
DEVICE float4 times(float4 v, float4 w) { return make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w); }
DEVICE float square_sum(float4 v) { return v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w); }

// One row of x into its place, times `factor` and the norm's weights.
DEVICE void place_row(const float* x, float factor, const float* weight, int row, const Room& room) {
  for (int i = threadIdx.x; i < X_QUADS; i += THREADS) {
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (i / QUADS < UNITS) {
      v = times(reinterpret_cast<const float4*>(x)[i], factor);
      if (NORM && NORM_WEIGHT) v = times(v, __ldg(reinterpret_cast<const float4*>(weight) + i));
    }
    place_quad(v, row, i, room);
  }
}

// How rows of x come to shared memory, in three steps, so that what is on its way overlaps: `early` asks for what does not
// depend on launches before, `fetch` for the rows, ahead of weights that could not be asked for earlier (what is asked for
// first comes first), and `place` puts them down. A row that is normalised alone is put down as it is: its products are
// multiplied with `factor` in the end, so that nobody waits for the sum of squares. `scores`: a factor a row of x.
constexpr int X_ALL = X_ROWS * X_QUADS;
constexpr int X_EACH = (X_ALL + THREADS - 1) / THREADS;
constexpr bool X_HELD = X_EACH <= 12 && (!NORM || X_ROWS == 1);
constexpr int X_KEPT = X_HELD ? X_EACH : 1;
constexpr bool FACTOR_LATER = NORM && X_ROWS == 1;

// Past the first-level cache where they have been read in a rehearsal: it may hold what was there before.
DEVICE float4 load_rows(const float4* p) { return REHEARSED ? load_anew(p) : load_now(p); }
DEVICE float load_rows(const float* p) { return REHEARSED ? load_anew(p) : *p; }

struct RowsOfX {
  // Whether rows are placed, and all threads meet, before weights are known.
  static constexpr bool MEETS = false;
  // Whether a rehearsal is possible: all that is read after it is read past the first-level cache.
  static constexpr bool REHEARSES = X_HELD;
  const float* x;
  const float* weight;
  const float* scores;
  float4 v[X_KEPT], w[X_KEPT];
  float score[X_KEPT];

  DEVICE RowsOfX(const float* rows, const float* norm, const float* factors) : x(rows), weight(norm), scores(factors) {}

  DEVICE void early() {
    if (!X_HELD || !NORM || !NORM_WEIGHT) return;
#pragma unroll
    for (int k = 0; k < X_KEPT; k++) {
      int i = threadIdx.x + k * THREADS;
      w[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (i / QUADS < UNITS) w[k] = load_weights(reinterpret_cast<const float4*>(weight) + i);
    }
  }

  DEVICE void fetch() {
    if (!X_HELD) return;
#pragma unroll
    for (int k = 0; k < X_KEPT; k++) {
      int i = threadIdx.x + k * THREADS, row = i / X_QUADS, quad = i % X_QUADS;
      v[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      score[k] = 1.0f;
      if (i < X_ALL && quad / QUADS < UNITS) {
        v[k] = load_rows(reinterpret_cast<const float4*>(x + row * COLUMNS) + quad);
        if (scores != nullptr) score[k] = load_rows(scores + row);
      }
    }
  }

  // The caller's barrier comes after it. `real`: this is no rehearsal.
  DEVICE void place(const Room& room, bool real) {
    if (X_HELD) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < X_KEPT; k++) {
        int i = threadIdx.x + k * THREADS;
        if (i - static_cast<int>(threadIdx.x % 32) >= X_ALL) break;
        if (NORM) sum += square_sum(v[k]);
        float4 quad = NORM && NORM_WEIGHT ? times(v[k], w[k]) : scores != nullptr ? times(v[k], score[k]) : v[k];
        if (X_ALL % 32 == 0 || i < X_ALL) place_quad(quad, i / X_QUADS, i % X_QUADS, room);
      }
      if (NORM) {
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) room.norms[threadIdx.x / 32] = sum;
      }
      return;
    }
    if (NORM) {
      for (int row = threadIdx.x / 32; row < X_ROWS; row += WARPS) {
        float sum = 0.0f;
        const float4* from = reinterpret_cast<const float4*>(x + row * COLUMNS);
        for (int i = threadIdx.x % 32; i < COLUMNS / 4; i += 32) sum += square_sum(from[i]);
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) room.norms[row] = 1.0f / sqrtf(sum / COLUMNS + EPS);
      }
      __syncthreads();
    }
    for (int row = 0; row < X_ROWS; row++) {
      float by = NORM && !FACTOR_LATER ? room.norms[row] : scores != nullptr ? scores[row] : 1.0f;
      place_row(x + row * COLUMNS, by, weight, row, room);
    }
  }

  // After that barrier.
  DEVICE float factor(const Room& room) {
    if (!FACTOR_LATER) return 1.0f;
    if (!X_HELD) return room.norms[0];
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) total += room.norms[i];
    return 1.0f / sqrtf(total / COLUMNS + EPS);
  }
};

// One unit of each of a lane's rows, in place `slot` of the copies.
struct Step {
  uint4 codes[ROWS_A_LANE];
  float scales[ROWS_A_LANE], biases[ROWS_A_LANE];
};

// Adds the products of a step to the lane's sums. `at`: its chunk.
DEVICE void add_step(const Step& step, int at, int lane, const Room& room, float (&sums)[TOKENS][ROWS_A_LANE]) {
  const int part = PARTS == 1 ? 0 : at / CHUNKS, c = PARTS == 1 ? at : at % CHUNKS;
  float a[TOKENS][ROWS_A_LANE] = {};
#pragma unroll
  for (int q = 0; q < QUADS; q++) {
    float4 w[ROWS_A_LANE];
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++) w[r] = decode(step.codes[r], q);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      float4 x = room.x[(t * PARTS + part) * X_QUADS + quad_at(c, q, lane)];
#pragma unroll
      for (int r = 0; r < ROWS_A_LANE; r++) {
        a[t][r] = fmaf(w[r].x, x.x, fmaf(w[r].y, x.y, fmaf(w[r].z, x.z, fmaf(w[r].w, x.w, a[t][r]))));
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    float sum = AFFINE ? room.sums[(t * PARTS + part) * X_UNITS + c * LANES + lane] : 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++) {
      float y = FORMAT <= MXFP4 ? a[t][r] * CODE_FACTOR * step.scales[r] : a[t][r];
      sums[t][r] += AFFINE ? fmaf(step.biases[r], sum, y) : y;
    }
  }
}

// Sums of the lanes of a row: ends with row `r` of the lane's rows in the lanes whose high bits are `r`.
DEVICE void sum_lanes(float (&v)[ROWS_A_LANE], int lane) {
  int n = ROWS_A_LANE;
#pragma unroll
  for (int off = LANES / 2; off > 0; off /= 2) {
    if (n > 1) {
      n /= 2;
      bool high = lane & off;
#pragma unroll
      for (int i = 0; i < ROWS_A_LANE / 2; i++) {
        if (i < n) {
          float other = __shfl_xor_sync(ALL_LANES, high ? v[i] : v[i + n], off);
          v[i] = (high ? v[i + n] : v[i]) + other;
        }
      }
    } else {
      v[0] += __shfl_xor_sync(ALL_LANES, v[0], off);
    }
  }
}

// Waits until all groups of the thread but the last `count`, less than DEPTH, have come.
DEVICE void wait_all_but(int count) {
  if (DEPTH > 7 && count == 7) wait_groups<7>();
  else if (DEPTH > 6 && count == 6) wait_groups<6>();
  else if (DEPTH > 5 && count == 5) wait_groups<5>();
  else if (DEPTH > 4 && count == 4) wait_groups<4>();
  else if (DEPTH > 3 && count == 3) wait_groups<3>();
  else if (DEPTH > 2 && count == 2) wait_groups<2>();
  else if (DEPTH > 1 && count == 1) wait_groups<1>();
  else wait_groups<0>();
}

// Works on the tiles blockIdx.x, blockIdx.x + gridDim.x, ... of TILE rows, of which a thread finishes every THREADS-th of
// RESULTS results.
//   matrix(tile, local, m, part): matrix m (0, 1 where paired) for row `local` of a tile and a part of x;
//   row(tile, local): the row of it. rows: brings x. EARLY: weights do not depend on the launch before.
//   prepare(tile, i): what result i takes from memory besides, asked for ahead. finish(tile, i, total, prepared):
//   total(m, local, t) is a row's product with a row of x.
template <bool EARLY, int RESULTS, class MatrixOf, class RowOf, class Rows, class Prepare, class Finish>
DEVICE void products(int tiles, const Room& room, MatrixOf matrix, RowOf row, Rows rows, Prepare prepare, Finish finish) {
  const int warp = threadIdx.x / 32, group = warp / SPLIT, split = warp % SPLIT;
  const int sub = threadIdx.x % 32 / LANES, lane = threadIdx.x % LANES;
  constexpr int HELD = ROWS_A_LANE * THREADS;
  auto local_of = [&](int r) { return (group * ROWS_A_MATRIX + r % ROWS_A_MATRIX) * SUB + sub; };
  // gives(m, row, unit, r): the matrix, row and unit of each row of a lane in a step; unit is negative where there is none.
  auto each_unit = [&](int tile, int step, auto gives) {
    const int at = split + step * SPLIT, part = at / CHUNKS, unit = at % CHUNKS * LANES + lane;
    const bool valid = unit < UNITS && at < ALL_CHUNKS;
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++) {
      Matrix m = matrix(tile, local_of(r), r / ROWS_A_MATRIX, at < ALL_CHUNKS ? part : 0);
      gives(m, row(tile, local_of(r)), valid ? unit : -1, r);
    }
  };
  // Copies that were asked for: up to this step of this tile.
  int copied_tile = blockIdx.x, copied_step = 0, copied_slot = 0;
  auto copy_next = [&] {
    if (copied_tile < tiles) {
      each_unit(copied_tile, copied_step, [&](const Matrix& m, u64 row, int unit, int r) {
        const int to = copied_slot * HELD + r * THREADS + threadIdx.x, from = max(unit, 0);
        copy_16(room.codes + to, reinterpret_cast<const uint4*>(m.codes) + row * UNITS + from, unit >= 0);
        if (FORMAT <= MXFP4 && WORDS) {
          const u64 group = row * (COLUMNS / GROUP) + from * CODES / GROUP;
          copy_4(room.scales + to, word_around(m.scales + group), unit >= 0);
          if (AFFINE) copy_4(room.scales + DEPTH * HELD + to, word_around(m.biases + group), unit >= 0);
        }
      });
      if (++copied_step == STEPS) {
        copied_step = 0;
        copied_tile += gridDim.x;
      }
    }
    // Empty groups count too.
    end_group();
    copied_slot = copied_slot + 1 == DEPTH ? 0 : copied_slot + 1;
  };
  // Weights that depend on the launch before begin slowly: nobody may stand in a queue of copies while x could be placed, or
  // products be made.
  int ahead = 0;
  auto copy_up_to = [&](int count) {
#pragma unroll 1
    for (; ahead < count; ahead++) copy_next();
  };
  const int first = min(static_cast<int>(threadIdx.x), RESULTS - 1);
  zmlx_release();
  int tile = blockIdx.x;
  rows.early();
  if (EARLY) copy_up_to(DEPTH);
  decltype(prepare(0, 0)) prepared;
  // Brings rows, and what else the first tile takes. A rehearsal places what rows held before, which nobody looks at: the
  // instructions are at hand then when the launches before are complete, which is worth a microsecond. It writes nothing that
  // other launches may still read.
  auto bring = [&](bool real) {
    rows.fetch();
    if (Rows::MEETS) {
      rows.place(room, real);
      __syncthreads();
    }
    if (real) {
      prepared = prepare(min(tile, tiles - 1), first);
      if (!EARLY) copy_up_to(1);
    }
    if (!Rows::MEETS) {
      rows.place(room, real);
      __syncthreads();
    }
    return rows.factor(room);
  };
  float factor = 1.0f;
  if (REHEARSED && Rows::REHEARSES) {
    // One loop, so that the instructions are the same.
#pragma unroll 1
    for (int pass = 0; pass < 2; pass++) {
      if (pass == 1) zmlx_wait();
      factor = bring(pass == 1);
      // Nobody places rows while others still read the factor.
      if (pass == 0) __syncthreads();
    }
  } else {
    zmlx_wait();
    factor = bring(true);
  }
  moment(MOMENT_PLACED);
  int slot = 0;
  for (int round = 0; tile < tiles; round ^= 1) {
    float sums[TOKENS][ROWS_A_LANE] = {};
    int next = tile + gridDim.x;
#pragma unroll 1
    for (int n = 0; n < STEPS; n++) {
      if (EARLY) {
        wait_groups<DEPTH - 1>();
      } else {
        copy_up_to(min(ahead + 1, DEPTH));
        wait_all_but(ahead - 1);
      }
      Step step;
#pragma unroll
      for (int r = 0; r < ROWS_A_LANE; r++) step.codes[r] = room.codes[slot * HELD + r * THREADS + threadIdx.x];
      if (FORMAT <= MXFP4 && WHOLE_WORDS) {
        const u32 byte = ((split + n * SPLIT) % CHUNKS * LANES + lane) * CODES / GROUP * sizeof(SCALE) % 4;
#pragma unroll
        for (int r = 0; r < ROWS_A_LANE; r++) {
          const u32* from = room.scales + slot * HELD + r * THREADS + threadIdx.x;
          step.scales[r] = in_word<SCALE>(from[0], byte);
          if (AFFINE) step.biases[r] = in_word<SCALE>(from[DEPTH * HELD], byte);
        }
      } else if (FORMAT <= MXFP4) {
        each_unit(tile, n, [&](const Matrix& m, u64 row, int unit, int r) {
          const u64 group = row * (COLUMNS / GROUP) + max(unit, 0) * CODES / GROUP;
          if (!WORDS) {
            step.scales[r] = unit < 0 ? 0.0f : scale_value(load_weights(m.scales + group));
            if (AFFINE) step.biases[r] = unit < 0 ? 0.0f : scale_value(load_weights(m.biases + group));
            return;
          }
          const u32* from = room.scales + slot * HELD + r * THREADS + threadIdx.x;
          step.scales[r] = in_word<SCALE>(from[0], reinterpret_cast<u64>(m.scales + group) & 3u);
          if (AFFINE) step.biases[r] = in_word<SCALE>(from[DEPTH * HELD], reinterpret_cast<u64>(m.biases + group) & 3u);
        });
      }
      const int at = split + n * SPLIT;
      if (ALL_CHUNKS % SPLIT == 0 || at < ALL_CHUNKS) add_step(step, at, lane, room, sums);
      slot = slot + 1 == DEPTH ? 0 : slot + 1;
      copy_next();
    }
    float* parts = room.parts + round * SPLIT * MATRICES * TILE * TOKENS;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
      sum_lanes(sums[t], lane);
      // The high bits of the lane in its row say which of the lane's rows it has.
      constexpr int EACH = LANES / ROWS_A_LANE;
      int r = lane / EACH, local = (group * ROWS_A_MATRIX + r % ROWS_A_MATRIX) * SUB + sub;
      if (lane % EACH == 0) parts[(split * MATRICES * TILE + r / ROWS_A_MATRIX * TILE + local) * TOKENS + t] = sums[t][0];
    }
    __syncthreads();
    auto total = [&](int m, int local, int t) {
      float total = 0.0f;
#pragma unroll
      for (int p = 0; p < SPLIT; p++) total += parts[((p * MATRICES + m) * TILE + local) * TOKENS + t];
      return FACTOR_LATER ? total * factor : total;
    };
    if (static_cast<int>(threadIdx.x) < RESULTS) finish(tile, static_cast<int>(threadIdx.x), total, prepared);
    if (RESULTS > THREADS) {
      for (int i = threadIdx.x + THREADS; i < RESULTS; i += THREADS) finish(tile, i, total, prepare(tile, i));
    }
    tile = next;
    if (tile < tiles) prepared = prepare(tile, first);
  }
  moment(MOMENT_SUMMED);
}
