// out[slot, r] = act(x[t] . gate[e, r] + bg[e, r]) * (x[t] . up[e, r] + bu[e, r]) for the expert e of each of a token's K
// slots; blockIdx.y is the token.
DEVICE Matrix expert(const Matrix& m, int e) {
  Matrix one = m;
  one.codes += static_cast<u64>(e) * ROWS * UNITS * 4;
  if (FORMAT <= MXFP4) {
    u64 groups = static_cast<u64>(e) * ROWS * (COLUMNS / GROUP);
    one.scales += groups;
    if (AFFINE) one.biases += groups;
  }
  return one;
}

DEVICE void experts_up(const float* x, const float* norm, const int* indices, Matrix gate, Matrix up, const float* gate_bias,
                       const float* up_bias, float* out) {
  extern __shared__ __align__(16) float pool[];
  Room room = room_of(pool);
  constexpr int TILES = (ROWS + TILE - 1) / TILE;
  const int token = blockIdx.y;
  products<false>(
      TILES * K, room,
      [&](int tile, int, int m, int) { return expert(m == 0 ? gate : up, indices[token * K + tile / TILES]); },
      [&](int tile, int local) { return static_cast<u64>(min(tile % TILES * TILE + local, ROWS - 1)); },
      [&] { place_x(x + token * COLUMNS, norm, room); }, [](int) { return 1.0f; },
      [&](int tile, auto total) {
        int slot = token * K + tile / TILES;
        for (int i = threadIdx.x; i < TILE; i += THREADS) {
          int r = tile % TILES * TILE + i;
          if (r >= ROWS) continue;
          float g = total(0, i, 0), u = total(MATRICES - 1, i, 0);
          if (BIAS) g += gate_bias[indices[slot] * ROWS + r];
          if (BIAS2) u += up_bias[indices[slot] * ROWS + r];
          out[slot * ROWS + r] = gated<ACTIVATION>(g, u, ALPHA, LIMIT);
        }
      });
}

// out[t, r] = sum over slots of score * (x[slot] . down[e, r] + bias[e, r]) + residuals; blockIdx.y is the token. All experts
// of a row are one block's, which adds them in one order.
DEVICE void experts_down(const float* x, const int* indices, const float* scores, Matrix down, const float* bias,
                         const float* residual, const float* residual2, const float* residual3, float* out) {
  extern __shared__ __align__(16) float pool[];
  Room room = room_of(pool);
  constexpr int TILES = (ROWS + TILE - 1) / TILE;
  const int token = blockIdx.y;
  products<false>(
      TILES, room, [&](int, int, int, int part) { return expert(down, indices[token * K + part]); },
      [&](int tile, int local) { return static_cast<u64>(min(tile * TILE + local, ROWS - 1)); },
      [&] { place_x(x + token * K * COLUMNS, nullptr, room); }, [&](int part) { return scores[token * K + part]; },
      [&](int tile, auto total) {
        for (int i = threadIdx.x; i < TILE; i += THREADS) {
          int r = tile * TILE + i;
          if (r >= ROWS) continue;
          float y = total(0, i, 0);
          if (BIAS) {
            for (int s = 0; s < K; s++) y += scores[token * K + s] * bias[indices[token * K + s] * ROWS + r];
          }
          if (RESIDUALS > 0) y += residual[token * ROWS + r];
          if (RESIDUALS > 1) y += residual2[token * ROWS + r];
          if (RESIDUALS > 2) y += residual3[token * ROWS + r];
          out[token * ROWS + r] = y;
        }
      });
}
