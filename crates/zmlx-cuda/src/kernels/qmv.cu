// out[t, r] = sigmoid(gate[t]) * (x[t] . w[r] + bias[r]) + residual[t, r], or act(x[t] . w[r] + bias[r]) * (x[t] . w2[r] + bias2[r]).
// Rows of several matrices may follow one another.
struct Rows {
  Matrix first, second, third;
};

// The matrix that row `r` of all belongs to, starting so that `r` is its row in it.
DEVICE Matrix back(Matrix m, int rows) {
  m.codes -= static_cast<u64>(rows) * UNITS * 4;
  if (FORMAT <= MXFP4) {
    m.scales -= static_cast<u64>(rows) * (COLUMNS / GROUP);
    if (AFFINE) m.biases -= static_cast<u64>(rows) * (COLUMNS / GROUP);
  }
  return m;
}

DEVICE void qmv(const float* x, const float* norm, Rows w, const float* bias, const float* bias2, const float* gate,
                const float* residual, float* out, Next next) {
  extern __shared__ __align__(16) float pool[];
  Room room = room_of(pool);
  constexpr int TILES = (ROWS + TILE - 1) / TILE;
  // Threads of a block are a multiple of the rows of x wherever keys are kept: a thread meets one row only.
  u64 best = 0;
  products<true, TILE * TOKENS>(
      TILES, room,
      [&](int tile, int local, int m, int) {
        if (PAIRED) return m == 0 ? w.first : w.second;
        int r = min(tile * TILE + local, ROWS - 1);
        if (ROWS > ROWS_1 + ROWS_0 && r >= ROWS_0 + ROWS_1) return back(w.third, ROWS_0 + ROWS_1);
        if (ROWS > ROWS_0 && r >= ROWS_0) return back(w.second, ROWS_0);
        return w.first;
      },
      [&](int tile, int local) { return static_cast<u64>(min(tile * TILE + local, ROWS - 1)); },
      RowsOfX(x, norm, nullptr),
      [&](int tile, int i) {
        int t = i % TOKENS, r = min(tile * TILE + i / TOKENS, ROWS - 1);
        float4 besides = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (BIAS) besides.x = bias[r];
        if (BIAS2) besides.y = bias2[r];
        if (GATE) besides.z = gate[t];
        if (RESIDUAL) besides.w = residual[t * ROWS + r];
        return besides;
      },
      [&](int tile, int i, auto total, float4 besides) {
        int local = i / TOKENS, t = i % TOKENS, r = tile * TILE + local;
        if (r >= ROWS) return;
        float y = total(0, local, t);
        if (BIAS) y += besides.x;
        if (PAIRED) y = gated<ACTIVATION>(y, total(MATRICES - 1, local, t) + besides.y, ALPHA, LIMIT);
        if (GATE) y *= sigmoid(besides.z);
        if (RESIDUAL) y += besides.w;
        out[t * ROWS + r] = y;
        if (ARGMAX) {
          u64 key = key_of(y, static_cast<u32>(r));
          best = key > best ? key : best;
        }
      });
  if (ARGMAX) {
    for (int t = 0; t < TOKENS; t++) offer(next, threadIdx.x % TOKENS == t ? best : u64(0), t);
    if (last_block(next.arrived, gridDim.x)) advance(next);
  }
}
