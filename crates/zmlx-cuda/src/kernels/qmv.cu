// out[t, r] = sigmoid(gate[t]) * (x[t] . w[r] + bias[r]) + residual[t, r], or act(x[t] . w[r] + bias[r]) * (x[t] . w2[r] + bias2[r]).
DEVICE void qmv(const float* x, const float* norm, Matrix first, Matrix second, const float* bias, const float* bias2,
                const float* gate, const float* residual, float* out) {
  extern __shared__ __align__(16) float pool[];
  Room room = room_of(pool);
  constexpr int TILES = (ROWS + TILE - 1) / TILE;
  products<true>(
      TILES, room, [&](int, int m, int) { return m == 0 ? first : second; },
      [&](int tile, int local) { return static_cast<u64>(min(tile * TILE + local, ROWS - 1)); },
      [&] { place_x(x, norm, room); }, [](int) { return 1.0f; },
      [&](int tile, int local, int t, float y, float other) {
        int r = tile * TILE + local;
        if (r >= ROWS) return;
        if (BIAS) y += bias[r];
        if (PAIRED) {
          if (BIAS2) other += bias2[r];
          y = gated<ACTIVATION>(y, other, ALPHA, LIMIT);
        }
        if (GATE) y *= sigmoid(gate[t]);
        if (RESIDUAL) y += residual[t * ROWS + r];
        out[t * ROWS + r] = y;
      });
}
