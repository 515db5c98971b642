// Products of rows of an affine 4-bit matrix with one or a few rows of x, on tensor cores. The interface is product.cuh's.
//
// mma.m16n8k16: A is codes of 16 rows, B is x. Four lanes share a row. A lane brings units of 32 codes of its own and gives
// them as its share of A: a code q as the bfloat16 16 + q, exact, by placing its bits in the mantissa of 16. Columns of A may
// come in any order as long as those of B do likewise, so lanes need not exchange codes.
//
// Lanes of a row may be in different groups of the quantisation: their sums must not meet. B has eight columns; column 2 j + h
// holds x_h where lane j's codes are and zeros elsewhere. x_0 + x_1 are a float's high and low parts, 8 bits of mantissa each.
// Then lane j of a row has the sums of its own unit in its own registers of C, and scales them by its own scale.
//
// A step is 256 columns: two units a lane and row. A warp's steps go through a ring of DEPTH stages in shared memory, filled
// by asynchronous copies: bytes in flight take no registers. SPLIT warps of a block share the columns: each takes every
// SPLIT-th step, and their sums are added in one order.

constexpr int STEP = 256;
constexpr int UNITS = COLUMNS / CODES;
constexpr int STEPS_A_PART = COLUMNS / STEP;
constexpr int ALL_STEPS = STEPS_A_PART * PARTS;
constexpr int STEPS = (ALL_STEPS + SPLIT - 1) / SPLIT;
constexpr int THREADS = 32 * WARPS;
constexpr int SUB = 8;
constexpr int MATRICES = PAIRED ? 2 : 1;
constexpr int ROWS_A_MATRIX = ROWS_A_LANE / MATRICES;
// Rows of the result that a block makes at once.
constexpr int TILE = WARPS / SPLIT * SUB * ROWS_A_MATRIX;
// A lane's rows 2 p and 2 p + 1 are rows n and n + 8 of one A.
constexpr int PAIRS = ROWS_A_LANE / 2;
constexpr int X_ROWS = TOKENS * PARTS;
// Rows of x are placed by eights of floats; a thread has so many of a row.
constexpr int EIGHTS = COLUMNS / 8;
constexpr int HELD = (EIGHTS + THREADS - 1) / THREADS;
constexpr bool HOLD = HELD == 1;
constexpr int X_QUADS = COLUMNS / 4;
// Scales or biases of a row and step.
constexpr int SCALE_BYTES = STEP / GROUP * static_cast<int>(sizeof(SCALE));
constexpr int STAGE = PAIRS * (2048 + 32 * SCALE_BYTES);
// Independent sums where few rows would make a warp wait for its own products.
constexpr int CHAINS = TOKENS * PAIRS == 1 ? 2 : 1;
static_assert(FORMAT == AFFINE4 && COLUMNS % STEP == 0 && ROWS_A_LANE % 2 == 0, "made for affine codes of 4 bits");

// The shared memory of a block; the host knows its size.
struct Room {
  uint4* x;      // [X_ROWS][COLUMNS / 128][4: eight of a unit][4: unit][2: high, low part]
  uint4* zeros;  // [32]
  u8* ring;      // [WARPS][DEPTH][STAGE]
  float* sums;   // of x, a unit
  float* parts;  // [2][SPLIT][MATRICES * TILE][TOKENS]
  float* norms;  // a float a warp or row
};
DEVICE Room room_of(float* pool) {
  Room r;
  r.x = reinterpret_cast<uint4*>(pool);
  r.zeros = r.x + X_ROWS * X_QUADS;
  r.ring = reinterpret_cast<u8*>(r.zeros + 32);
  r.sums = reinterpret_cast<float*>(r.ring + WARPS * DEPTH * STAGE);
  r.parts = r.sums + X_ROWS * UNITS;
  r.norms = r.parts + 2 * SPLIT * MATRICES * TILE * TOKENS;
  return r;
}

#ifdef __CUDA_ARCH__
DEVICE u32 shared_address(const void* p) {
  u32 at;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(at) : "l"(p));
  return at;
}
template <int BYTES> DEVICE void copy_ahead(u8* to, const u8* from) {
  if constexpr (BYTES % 16 == 0) {
#pragma unroll
    for (int i = 0; i < BYTES; i += 16) {
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(shared_address(to + i)), "l"(from + i)
                   : "memory");
    }
  } else {
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2;" :: "r"(shared_address(to)), "l"(from), "n"(BYTES)
                 : "memory");
  }
}
DEVICE void close_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until the oldest of DEPTH stages is there.
DEVICE void await_stage() { asm volatile("cp.async.wait_group %0;" :: "n"(DEPTH - 1) : "memory"); }
// Two floats as bfloat16, the first in the low half.
DEVICE u32 bfloats(float a, float b) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
  return v;
}
DEVICE void multiply_add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#else
template <int BYTES> DEVICE void copy_ahead(u8* to, const u8* from) {
  for (int i = 0; i < BYTES; i += 4) *reinterpret_cast<u32*>(to + i) = *reinterpret_cast<const u32*>(from + i);
}
DEVICE void close_stage() {}
DEVICE void await_stage() {}
DEVICE u32 bfloats(float a, float b) { return static_cast<u32>(float_to_bfloat(b)) << 16 | float_to_bfloat(a); }
DEVICE void multiply_add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  u64 low[32], high[32], b[32];
  zs::gather(static_cast<u64>(a1) << 32 | a0, low);
  zs::gather(static_cast<u64>(a3) << 32 | a2, high);
  zs::gather(static_cast<u64>(b1) << 32 | b0, b);
  const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; i++) {
    for (int k = 0; k < 4; k++) {
      int shift = i / 2 * 32, at = (column + i % 2) * 4 + k;
      u32 a = static_cast<u32>(low[row * 4 + k] >> shift), d = static_cast<u32>(high[row * 4 + k] >> shift);
      u32 x = static_cast<u32>(b[at]), y = static_cast<u32>(b[at] >> 32);
      c[i] += __uint_as_float(a << 16) * __uint_as_float(x << 16) +
              __uint_as_float(a & 0xffff0000u) * __uint_as_float(x & 0xffff0000u);
      c[i] += __uint_as_float(d << 16) * __uint_as_float(y << 16) +
              __uint_as_float(d & 0xffff0000u) * __uint_as_float(y & 0xffff0000u);
    }
  }
}
#endif

DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Codes i and i + 4 of a word as 16 + q.
DEVICE u32 code_pair(u32 w, int i) { return ((i == 0 ? w << 3 : w >> (4 * i - 3)) & 0x00780078u) | 0x41804180u; }

struct Eight {
  float4 a, b;
};

// Where eight `i` of a row begins: neighbours are in different units, so that the places that they go to are in
// different banks.
DEVICE int eight_at(int i) { return i / 16 * 32 + i % 4 * 8 + i / 4 % 4 * 2; }

DEVICE Eight load_eight(const float* x, int i) {
  const float4* at = reinterpret_cast<const float4*>(x) + eight_at(i);
  return Eight{at[0], at[1]};
}

// What place_x takes along from before the wait: the norm's weights of the thread's eights.
struct Ahead {
  const float* weight;
  Eight held[HOLD ? HELD : 1];
};
DEVICE float4 as_floats(uint4 v) {
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}
DEVICE Ahead ahead(const float* weight) {
  Ahead all;
  all.weight = weight;
  if (NORM && NORM_WEIGHT && HOLD) {
#pragma unroll
    for (int n = 0; n < HELD; n++) {
      int i = threadIdx.x + n * THREADS;
      const uint4* at = reinterpret_cast<const uint4*>(weight) + eight_at(i < EIGHTS ? i : 0);
      all.held[HOLD ? n : 0] = Eight{as_floats(load_weights(at)), as_floats(load_weights(at + 1))};
    }
  }
  return all;
}

DEVICE float4 scaled(float4 v, float factor, float4 w) {
  return make_float4(v.x * factor * w.x, v.y * factor * w.y, v.z * factor * w.z, v.w * factor * w.w);
}

// Splits eight floats and puts them where B is read from. All lanes of a warp call it.
DEVICE void place_eight(Eight v, int i, int row, const Room& room) {
  float4 a = v.a, b = v.b;
  auto pack = [](float4 a, float4 b) {
    return make_uint4(bfloats(a.x, b.x), bfloats(a.y, b.y), bfloats(a.z, b.z), bfloats(a.w, b.w));
  };
  auto low = [](u32 v) { return __uint_as_float(v << 16); };
  auto high = [](u32 v) { return __uint_as_float(v & 0xffff0000u); };
  uint4 first = pack(a, b);
  float4 rest_a = make_float4(a.x - low(first.x), a.y - low(first.y), a.z - low(first.z), a.w - low(first.w));
  float4 rest_b = make_float4(b.x - high(first.x), b.y - high(first.y), b.z - high(first.z), b.w - high(first.w));
  uint4 second = pack(rest_a, rest_b);
  auto sum_of = [&](u32 f, u32 s) { return (low(f) + low(s)) + (high(f) + high(s)); };
  float sum = (sum_of(first.x, second.x) + sum_of(first.y, second.y)) + (sum_of(first.z, second.z) + sum_of(first.w, second.w));
  int chunk = i / 16, q = i / 4 % 4, j = i % 4;
  uint4* to = room.x + row * X_QUADS + (chunk * 4 + q) * 8 + j * 2;
  // Odd ones begin with the other part: eight lanes that write at once meet no bank twice.
  to[q % 2] = q % 2 ? second : first;
  to[1 - q % 2] = q % 2 ? first : second;
  sum += __shfl_xor_sync(ALL_LANES, sum, 4);
  sum += __shfl_xor_sync(ALL_LANES, sum, 8);
  if (q == 0) room.sums[row * UNITS + chunk * 4 + j] = sum;
}

DEVICE float square_sum(float4 v) { return v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w); }

DEVICE Eight normed(Eight v, float factor, const Ahead& norm, int n, int i) {
  if (!NORM) return v;
  const float4 one = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
  Eight w{one, one};
  if (NORM_WEIGHT) w = HOLD ? norm.held[HOLD ? n : 0] : load_eight(norm.weight, i);
  return Eight{scaled(v.a, factor, w.a), scaled(v.b, factor, w.b)};
}

// All rows of x into shared memory, normalised if they are to be. The caller's barrier comes after it.
DEVICE void place_x(const float* x, const Ahead& norm, const Room& room) {
  if (NORM && X_ROWS == 1) {
    Eight mine[HOLD ? HELD : 1];
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < HELD; n++) {
      int i = threadIdx.x + n * THREADS;
      if (i >= EIGHTS) break;
      Eight v = load_eight(x, i);
      if (HOLD) mine[HOLD ? n : 0] = v;
      sum += square_sum(v.a) + square_sum(v.b);
    }
    float factor = 1.0f / sqrtf(block_sum<WARPS>(sum, room.norms) / COLUMNS + EPS);
#pragma unroll
    for (int n = 0; n < HELD; n++) {
      int i = threadIdx.x + n * THREADS;
      if (i >= EIGHTS) break;
      place_eight(normed(HOLD ? mine[HOLD ? n : 0] : load_eight(x, i), factor, norm, n, i), i, 0, room);
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
    float factor = NORM ? room.norms[row] : 1.0f;
#pragma unroll
    for (int n = 0; n < HELD; n++) {
      int i = threadIdx.x + n * THREADS;
      if (i >= EIGHTS) break;
      place_eight(normed(load_eight(x + row * COLUMNS, i), factor, norm, n, i), i, row, room);
    }
  }
}

// Where a lane reads its share of B: eight lanes have something to read, the others read zeros.
struct Share {
  const uint4* at;
  int on;
};
DEVICE Share share_of(const Room& room) {
  const int column = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
  if (column / 2 == j) return Share{room.x + column, 1};
  return Share{room.zeros + (column / 2 + 1) % 4 * 2, 0};
}

// Adds a step's products to the lane's sums.
template <class Weigh>
DEVICE void add_step(const u8* stage, int step, const Share& share, const Room& room, Weigh weigh,
                     float (&sums)[TOKENS][ROWS_A_LANE]) {
  const int lane = threadIdx.x % 32, j = lane % 4;
  const int part = PARTS == 1 ? 0 : step / STEPS_A_PART, s = PARTS == 1 ? step : step % STEPS_A_PART;
  const float score = weigh(part);
#pragma unroll
  for (int c = 0; c < 2; c++) {
    const int chunk = 2 * s + c;
    uint4 w[ROWS_A_LANE];
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++) w[r] = reinterpret_cast<const uint4*>(stage)[(r * 2 + c) * 32 + lane];
    float all[TOKENS][PAIRS][CHAINS][4] = {};
#pragma unroll
    for (int q = 0; q < 4; q++) {
      uint4 x[TOKENS];
#pragma unroll
      for (int t = 0; t < TOKENS; t++) x[t] = share.at[share.on * ((t * PARTS + part) * X_QUADS + chunk * 32) + q * 8];
#pragma unroll
      for (int p = 0; p < PAIRS; p++) {
        u32 v = word(w[2 * p], q), u = word(w[2 * p + 1], q);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          u32 a0 = code_pair(v, 2 * m), a1 = code_pair(u, 2 * m), a2 = code_pair(v, 2 * m + 1), a3 = code_pair(u, 2 * m + 1);
#pragma unroll
          for (int t = 0; t < TOKENS; t++) {
            multiply_add(all[t][p][m % CHAINS], a0, a1, a2, a3, m ? x[t].z : x[t].x, m ? x[t].w : x[t].y);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++) {
      const int p = r / 2, h = r % 2;
      const u8* at = stage + PAIRS * 2048 + (p * 32 + lane / 4 * 4 + 2 * h) * SCALE_BYTES;
      const int group = (c * 4 + j) * 32 / GROUP;
      float scale = scale_value(reinterpret_cast<const SCALE*>(at)[group]);
      float bias = scale_value(reinterpret_cast<const SCALE*>(at + SCALE_BYTES)[group]);
      float base = fmaf(-16.0f, scale, bias);
#pragma unroll
      for (int t = 0; t < TOKENS; t++) {
        float total = all[t][p][0][2 * h] + all[t][p][0][2 * h + 1];
        if (CHAINS == 2) total += all[t][p][CHAINS - 1][2 * h] + all[t][p][CHAINS - 1][2 * h + 1];
        float sum = room.sums[(t * PARTS + part) * UNITS + chunk * 4 + j];
        sums[t][r] = fmaf(score, fmaf(scale, total, base * sum), sums[t][r]);
      }
    }
  }
}

// See product.cuh.
template <bool EARLY, class MatrixOf, class RowOf, class Begin, class Weigh, class Finish>
DEVICE void products(int tiles, const Room& room, MatrixOf matrix, RowOf row, Begin begin, Weigh weigh, Finish finish) {
  const int warp = threadIdx.x / 32, group = warp / SPLIT, split = warp % SPLIT, lane = threadIdx.x % 32, j = lane % 4;
  auto local_of = [&](int r) { return (group * ROWS_A_MATRIX + r % ROWS_A_MATRIX) * SUB + lane / 4; };
  u8* const ring = room.ring + warp * DEPTH * STAGE;
  // What is copied next: a step of a tile, from these rows.
  int to_come = blockIdx.x, step_to_come = 0;
  const u8* codes[ROWS_A_LANE];
  const u8* scales[PAIRS];
  auto aim = [&](int part) {
    const SCALE* of[2];
#pragma unroll
    for (int r = 0; r < ROWS_A_LANE; r++) {
      Matrix m = matrix(to_come, local_of(r), r / ROWS_A_MATRIX, part);
      u64 at = row(to_come, local_of(r));
      codes[r] = reinterpret_cast<const u8*>(reinterpret_cast<const uint4*>(m.codes) + at * UNITS + j);
      of[r % 2] = (j % 2 ? m.biases : m.scales) + at * (COLUMNS / GROUP);
      if (r % 2) scales[r / 2] = reinterpret_cast<const u8*>(j / 2 ? of[1] : of[0]);
    }
  };
  auto bring = [&](int slot) {
    if (to_come < tiles) {
      int step = split + step_to_come * SPLIT;
      if (ALL_STEPS % SPLIT == 0 || step < ALL_STEPS) {
        if (PARTS > 1 || step_to_come == 0) aim(PARTS == 1 ? 0 : step / STEPS_A_PART);
        int s = PARTS == 1 ? step : step % STEPS_A_PART;
        u8* stage = ring + slot * STAGE;
#pragma unroll
        for (int r = 0; r < ROWS_A_LANE; r++) {
#pragma unroll
          for (int c = 0; c < 2; c++) copy_ahead<16>(stage + ((r * 2 + c) * 32 + lane) * 16, codes[r] + s * 128 + c * 64);
        }
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
          copy_ahead<SCALE_BYTES>(stage + PAIRS * 2048 + (p * 32 + lane) * SCALE_BYTES, scales[p] + s * SCALE_BYTES);
        }
      }
      if (++step_to_come == STEPS) {
        step_to_come = 0;
        to_come += gridDim.x;
      }
    }
    close_stage();
  };
  auto fill = [&] {
#pragma unroll 1
    for (int slot = 0; slot < DEPTH; slot++) bring(slot);
  };
  zmlx_release();
  if (EARLY) fill();
  if (threadIdx.x < 32) room.zeros[threadIdx.x] = make_uint4(0u, 0u, 0u, 0u);
  zmlx_wait();
  if (!EARLY) fill();
  begin();
  __syncthreads();
  const Share share = share_of(room);
  int slot = 0;
  for (int tile = blockIdx.x, round = 0; tile < tiles; tile += gridDim.x, round ^= 1) {
    float sums[TOKENS][ROWS_A_LANE] = {};
#pragma unroll 1
    for (int k = 0; k < STEPS; k++) {
      await_stage();
      // Scales come through another lane's copies.
      __syncwarp();
      int step = split + k * SPLIT;
      if (ALL_STEPS % SPLIT == 0 || step < ALL_STEPS) add_step(ring + slot * STAGE, step, share, room, weigh, sums);
      __syncwarp();
      bring(slot);
      slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
    float* parts = room.parts + round * SPLIT * MATRICES * TILE * TOKENS;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
      for (int r = 0; r < ROWS_A_LANE; r++) {
        float v = sums[t][r];
        v += __shfl_xor_sync(ALL_LANES, v, 1);
        v += __shfl_xor_sync(ALL_LANES, v, 2);
        if (j == r % 4) parts[((split * MATRICES + r / ROWS_A_MATRIX) * TILE + local_of(r)) * TOKENS + t] = v;
      }
    }
    __syncthreads();
    finish(tile, [&](int m, int local, int t) {
      float total = 0.0f;
#pragma unroll
      for (int p = 0; p < SPLIT; p++) total += parts[((p * MATRICES + m) * TILE + local) * TOKENS + t];
      return total;
    });
  }
}
