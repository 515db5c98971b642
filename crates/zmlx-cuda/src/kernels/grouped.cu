// Rows sorted by expert, each times its expert's matrix, on tensor cores.
//
// mma.m16n8k16: A is codes of 16 outputs, which become 16-bit floats in registers on the way; B is x, eight rows of it. A warp
// makes 32 outputs of TOKENS rows, a block OUT_WARPS times so many outputs of TOKEN_WARPS times so many rows, all of one
// expert. Codes, 64 columns of them a step, and x go through a ring of STAGES stages in shared memory.
//
// Columns may come in any order as long as those of A and B do likewise. Lane j of the four that share a row of A takes
// columns 16 j to 16 j + 15 of a step: its codes are one piece, and so is its x, which is what it must give as B.
// Rows of A may too: lane g's four are outputs 4 g to 4 g + 3, so that it stores its results in one piece.

constexpr int STEP = 64;
constexpr int STEPS = COLUMNS / STEP;
constexpr int OUT_TILE = 32 * OUT_WARPS;
constexpr int OUT_TILES = (OUTPUTS + OUT_TILE - 1) / OUT_TILE;
constexpr int TOKEN_TILE = TOKENS * TOKEN_WARPS;
constexpr int THREADS = 32 * OUT_WARPS * TOKEN_WARPS;
constexpr int GROUPS = COLUMNS / GROUP;
// Bytes of an output's codes, of a stage's codes, and of a stage.
constexpr int CODE_BYTES = STEP * BITS / 8;
constexpr int CODE_STAGE = OUT_TILE * CODE_BYTES;
constexpr int STAGE = CODE_STAGE + TOKEN_TILE * STEP * 2;
// 16-byte pieces of an output's codes and of a row of x.
constexpr int CODE_PIECES = CODE_BYTES / 16;
constexpr int X_PIECES = STEP * 2 / 16;
static_assert(BITS == 4 || BITS == 8, "codes of 4 or 8 bits");
static_assert(OUT_TILE * CODE_PIECES % THREADS == 0 && TOKEN_TILE * X_PIECES % THREADS == 0, "threads copy alike");

// 1, and what codes are placed in the mantissa of: 2^7 of bfloat16, 2^10 of float16.
constexpr u32 ONES = FLOAT == KIND_BF16 ? 0x3f803f80u : 0x3c003c00u;
constexpr u32 HOLDERS = FLOAT == KIND_BF16 ? 0x43004300u : 0x64006400u;
constexpr u32 MINUS_HOLDERS = HOLDERS | 0x80008000u;

#ifdef __CUDA_ARCH__
// 16 bytes, or zeros.
DEVICE void copy_ahead(u8* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}
DEVICE void close_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the newest STAGES - 2 stages are there.
DEVICE void await_stage() { asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory"); }
// a * b + c of two floats of 16 bits each, rounded once.
DEVICE u32 multiply_add2(u32 a, u32 b, u32 c) {
  u32 v;
  if constexpr (FLOAT == KIND_BF16) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
  }
  return v;
}
// Two floats as 16 bits each, the first in the low half.
DEVICE u32 narrow2(float a, float b) {
  u32 v;
  if constexpr (FLOAT == KIND_BF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
  }
  return v;
}
DEVICE void tensor_multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#define MMA(T)                                                                                                          \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." T "." T ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (FLOAT == KIND_BF16) {
    MMA("bf16");
  } else {
    MMA("f16");
  }
#undef MMA
}
#else
DEVICE void copy_ahead(u8* to, const void* from, bool there) {
  *reinterpret_cast<uint4*>(to) = there ? *static_cast<const uint4*>(from) : make_uint4(0u, 0u, 0u, 0u);
}
DEVICE void close_stage() {}
DEVICE void await_stage() {}
DEVICE float low_float(u32 v) { return widen<FLOAT>(static_cast<u16>(v)); }
DEVICE float high_float(u32 v) { return widen<FLOAT>(static_cast<u16>(v >> 16)); }
DEVICE u32 narrow2(float a, float b) {
  u16 low, high;
  narrow<FLOAT>(a, &low);
  narrow<FLOAT>(b, &high);
  return static_cast<u32>(high) << 16 | low;
}
DEVICE u32 multiply_add2(u32 a, u32 b, u32 c) {
  return narrow2(fmaf(low_float(a), low_float(b), low_float(c)), fmaf(high_float(a), high_float(b), high_float(c)));
}
DEVICE void tensor_multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  u64 low[32], high[32], b[32];
  zs::gather(static_cast<u64>(a[1]) << 32 | a[0], low);
  zs::gather(static_cast<u64>(a[3]) << 32 | a[2], high);
  zs::gather(static_cast<u64>(b1) << 32 | b0, b);
  const int row = threadIdx.x % 32 / 4 * 4, column = threadIdx.x % 4 * 8;
  auto both = [](u32 v, u32 w) { return low_float(v) * low_float(w) + high_float(v) * high_float(w); };
  for (int i = 0; i < 4; i++) {
    for (int k = 0; k < 4; k++) {
      int shift = i / 2 * 32, at = column + i % 2 * 4 + k;
      c[i] += both(static_cast<u32>(low[row + k] >> shift), static_cast<u32>(b[at])) +
              both(static_cast<u32>(high[row + k] >> shift), static_cast<u32>(b[at] >> 32));
    }
  }
}
#endif

// Two neighbouring codes of 8 bits, minus what each is too large by, to be added to HOLDERS + them.
DEVICE u32 too_large(u32 bytes) {
  // 2^7 has room for seven bits; a code with the eighth is right as it is.
  return FLOAT == KIND_BF16 ? (~bytes & 0x00800080u) * 0x186u : MINUS_HOLDERS;
}

// Eight codes, neighbours in pairs, as floats: scale * q + bias, rounded once. `words`: one of 4-bit codes, or two of 8-bit codes.
DEVICE void dequantize(u32 first, u32 second, u32 scale, u32 bias, u32 (&to)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u32 held, less;
    if constexpr (BITS == 4) {
      u32 pair = __byte_perm(first, first >> 4, i | (4 + i) << 8);
      held = (pair & 0x000f000fu) | HOLDERS;
      less = MINUS_HOLDERS;
    } else {
      u32 pair = __byte_perm(i < 2 ? first : second, 0u, (i % 2 * 2) | 4 << 4 | (i % 2 * 2 + 1) << 8 | 4 << 12);
      held = FLOAT == KIND_BF16 ? (pair & 0x007f007fu) | HOLDERS : pair | HOLDERS;
      less = too_large(pair);
    }
    to[i] = multiply_add2(multiply_add2(held, ONES, less), scale, bias);
  }
}

// What lanes bring of scales or biases a step: a group's, or two groups' where 64 columns have two.
constexpr bool TWO_GROUPS = GROUP == 32;
DEVICE u32 bring_scales(const u16* row, int step) {
  if constexpr (TWO_GROUPS) return reinterpret_cast<const u32*>(row)[step];
  return row[step * STEP / GROUP];
}

// Where experts' rows begin, and their tiles: [EXPERTS + 1] each. All threads call it.
DEVICE void index_experts(const u32* experts, int rows, int* first, int* tiles) {
  for (int e = threadIdx.x; e <= EXPERTS; e += THREADS) {
    int low = 0, high = rows;
    while (low < high) {
      int middle = low + (high - low) / 2;
      if (experts[middle] < static_cast<u32>(e)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    first[e] = low;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    int before = 0;
    for (int base = 0; base < EXPERTS; base += 32) {
      int e = base + static_cast<int>(threadIdx.x);
      int own = e < EXPERTS ? (first[e + 1] - first[e] + TOKEN_TILE - 1) / TOKEN_TILE : 0;
      int sum = own;
#pragma unroll
      for (int n = 1; n < 32; n *= 2) {
        int other = __shfl_up_sync(ALL_LANES, sum, n);
        if (static_cast<int>(threadIdx.x) >= n) sum += other;
      }
      if (e < EXPERTS) tiles[e] = before + sum - own;
      before += __shfl_sync(ALL_LANES, sum, 31);
    }
    if (threadIdx.x == 0) tiles[EXPERTS] = before;
  }
  __syncthreads();
}

// The expert whose tiles `tile` is among.
DEVICE int expert_of(int tile, const int* tiles) {
  int low = 0, high = EXPERTS;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (tiles[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// A block's share: some outputs of one expert for some of its rows.
struct Share {
  const u16* x;       // the first row
  const u8* codes;    // of the expert
  const u16* scales;  // of the expert
  const u16* biases;  // of the expert
  u16* out;           // of the first row
  int count;          // rows
  int output;         // the first one
};

// Copies a step's codes and x. Outputs are placed so that the rows of A that a warp reads at once are neighbours.
DEVICE void bring(const Share& share, int step, u8* stage) {
  constexpr int CODE_ROWS = THREADS / CODE_PIECES, X_ROWS = THREADS / X_PIECES;
  const int code_row = threadIdx.x / CODE_PIECES, code_piece = threadIdx.x % CODE_PIECES;
#pragma unroll
  for (int n = 0; n < OUT_TILE / CODE_ROWS; n++) {
    int row = code_row + n * CODE_ROWS;
    int place = row / 32 * 32 + row % 4 * 8 + row % 32 / 4;
    u64 output = OUTPUTS % OUT_TILE == 0 ? share.output + row : min(share.output + row, OUTPUTS - 1);
    copy_ahead(stage + place * CODE_BYTES + code_piece * 16,
               share.codes + output * (COLUMNS * BITS / 8) + (step * CODE_BYTES + code_piece * 16), true);
  }
  const int x_row = threadIdx.x / X_PIECES, x_piece = threadIdx.x % X_PIECES;
  const u16* from = share.x + static_cast<u64>(x_row) * COLUMNS + (step * STEP + x_piece * 8);
#pragma unroll
  for (int n = 0; n < TOKEN_TILE / X_ROWS; n++) {
    int row = x_row + n * X_ROWS;
    // Two rows that are read at once meet in no bank. Where no row is, nothing is read.
    copy_ahead(stage + CODE_STAGE + row * (STEP * 2) + (x_piece ^ (row & 1)) * 16, from + n * X_ROWS * COLUMNS,
               row < share.count);
  }
}

// Adds a step's products. `scale` and `bias`: of the lane's four outputs, twice in a word.
DEVICE void add_step(const u8* stage, int out_warp, int token_warp, int active, const u32 (&scale)[4], const u32 (&bias)[4],
                     float (&sums)[2][TOKENS / 8][4]) {
  const int g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
  const u8* codes = stage + (out_warp * 32 + g) * CODE_BYTES + j * (CODE_BYTES / 4);
  const u8* x = stage + CODE_STAGE + (token_warp * TOKENS + g) * (STEP * 2);
  u32 words[4][BITS / 2];
#pragma unroll
  for (int r = 0; r < 4; r++) {
    const u8* at = codes + r * 8 * CODE_BYTES;
    if constexpr (BITS == 4) {
      uint2 v = *reinterpret_cast<const uint2*>(at);
      words[r][0] = v.x, words[r][1] = v.y;
    } else {
      uint4 v = *reinterpret_cast<const uint4*>(at);
      words[r][0] = v.x, words[r][1] = v.y, words[r][2] = v.z, words[r][3] = v.w;
    }
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    u32 a[2][2][4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
      u32 pairs[4];
      constexpr int WORDS = BITS / 4;
      dequantize(words[r][h * WORDS], words[r][h * WORDS + WORDS - 1], scale[r], bias[r], pairs);
#pragma unroll
      for (int i = 0; i < 4; i++) a[r / 2][i / 2][i % 2 * 2 + r % 2] = pairs[i];
    }
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n += 2) {
      if (n % 4 == 0 && n * 8 >= active) break;
      uint4 b[2];
#pragma unroll
      for (int m = 0; m < 2; m++) {
        b[m] = *reinterpret_cast<const uint4*>(x + (n + m) * 8 * (STEP * 2) + ((2 * j + h) ^ (g & 1)) * 16);
      }
#pragma unroll
      for (int t = 0; t < 2; t++) {
#pragma unroll
        for (int m = 0; m < 2; m++) tensor_multiply_add(sums[t][n + m], a[t][0], b[m].x, b[m].y);
      }
#pragma unroll
      for (int t = 0; t < 2; t++) {
#pragma unroll
        for (int m = 0; m < 2; m++) tensor_multiply_add(sums[t][n + m], a[t][1], b[m].z, b[m].w);
      }
    }
  }
}

DEVICE void multiply_share(const Share& share, u8* ring) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
  const int out_warp = warp % OUT_WARPS, token_warp = warp / OUT_WARPS;
  const int active = share.count - token_warp * TOKENS;
  const u64 own = min(share.output + out_warp * 32 + 4 * g + j, OUTPUTS - 1);
  const u16* scales = share.scales + own * GROUPS;
  const u16* biases = share.biases + own * GROUPS;
  float sums[2][TOKENS / 8][4] = {};
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < STEPS) bring(share, s, ring + s * STAGE);
    close_stage();
  }
  u32 next_scale = bring_scales(scales, 0), next_bias = bring_scales(biases, 0);
  int slot = 0, slot_to_come = STAGES - 1;
#pragma unroll 1
  for (int step = 0; step < STEPS; step++) {
    await_stage();
    __syncthreads();
    if (step + STAGES - 1 < STEPS) bring(share, step + STAGES - 1, ring + slot_to_come * STAGE);
    close_stage();
    u32 scale[4], bias[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int half = TWO_GROUPS && j >= 2 ? 0x3232 : 0x1010;
      u32 s = __shfl_sync(ALL_LANES, next_scale, 4 * g + r), b = __shfl_sync(ALL_LANES, next_bias, 4 * g + r);
      scale[r] = __byte_perm(s, s, half);
      bias[r] = __byte_perm(b, b, half);
    }
    if (step + 1 < STEPS) next_scale = bring_scales(scales, step + 1), next_bias = bring_scales(biases, step + 1);
    add_step(ring + slot * STAGE, out_warp, token_warp, active, scale, bias, sums);
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    slot_to_come = slot_to_come + 1 == STAGES ? 0 : slot_to_come + 1;
  }
  const int output = share.output + out_warp * 32 + 4 * g;
  if (output < OUTPUTS) {
#pragma unroll
    for (int n = 0; n < TOKENS / 8; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int token = token_warp * TOKENS + n * 8 + 2 * j + i;
        if (token < share.count) {
          uint2 v = make_uint2(narrow2(sums[0][n][i], sums[0][n][2 + i]), narrow2(sums[1][n][i], sums[1][n][2 + i]));
          *reinterpret_cast<uint2*>(share.out + static_cast<u64>(token) * OUTPUTS + output) = v;
        }
      }
    }
  }
  // The ring is free for the next share.
  __syncthreads();
}

// out[r] = x[r] @ w[experts[r]].T
DEVICE void grouped(const u16* x, const u32* experts, const u32* codes, const u16* scales, const u16* biases, u16* out,
                    int rows) {
  extern __shared__ __align__(16) u8 pool[];
  int* first = reinterpret_cast<int*>(pool + STAGES * STAGE);
  int* tiles = first + EXPERTS + 1;
  index_experts(experts, rows, first, tiles);
  const int all = tiles[EXPERTS] * OUT_TILES;
  for (int i = blockIdx.x; i < all; i += gridDim.x) {
    const int tile = i / OUT_TILES, e = expert_of(tile, tiles);
    const u64 row = first[e] + (tile - tiles[e]) * TOKEN_TILE, matrix = static_cast<u64>(e) * OUTPUTS;
    Share share;
    share.x = x + row * COLUMNS;
    share.codes = reinterpret_cast<const u8*>(codes) + matrix * (COLUMNS * BITS / 8);
    share.scales = scales + matrix * GROUPS;
    share.biases = biases + matrix * GROUPS;
    share.out = out + row * OUTPUTS;
    share.count = min(first[e + 1] - static_cast<int>(row), TOKEN_TILE);
    share.output = i % OUT_TILES * OUT_TILE;
    multiply_share(share, pool);
  }
}
