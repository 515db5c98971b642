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

// Where a token's choice comes from, and where it goes for those after this launch.
struct Choice {
  const float *logits, *bias;
  int* indices;
  float* weights;
};

#if SELECTS
// Rows of x, and with them the choice, which every block makes for itself: the first warp does while the others place x.
struct RowsAndChoice : RowsOfX {
  static constexpr bool MEETS = true;
  Choice choice;
  int* chosen;
  bool tells;

  DEVICE RowsAndChoice(const RowsOfX& rows, const Choice& c, int* to, bool tell) : RowsOfX(rows), choice(c), chosen(to), tells(tell) {}
  DEVICE float logit(int e) const { return load_rows(choice.logits + e); }
  DEVICE void place(const Room& room, bool real) {
    __shared__ float ranks[GROUPS > 0 ? EXPERTS : 1];
    if (threadIdx.x < 32) {
      float logits[EACH];
      load_logits([&](int e) { return logit(e); }, logits);
      const int e = choose(logits, choice.bias, ranks);
      if (threadIdx.x < K) chosen[threadIdx.x] = e;
      if (real && tells) {
        const float weight = weigh(logits, logit(e));
        if (threadIdx.x < K) {
          choice.indices[threadIdx.x] = e;
          choice.weights[threadIdx.x] = weight;
        }
      }
    }
    RowsOfX::place(room, real);
  }
};
#endif

DEVICE void experts_up(const float* x, const float* norm, const int* indices, Choice choice, Matrix gate, Matrix up,
                       const float* gate_bias, const float* up_bias, float* out) {
  extern __shared__ __align__(16) float pool[];
  Room room = room_of(pool);
  constexpr int TILES = (ROWS + TILE - 1) / TILE;
  const int token = blockIdx.y;
  const RowsOfX plain(x + token * COLUMNS, norm, nullptr);
#if SELECTS
  __shared__ int chosen[K];
  const Choice own{choice.logits + token * EXPERTS, choice.bias, choice.indices + token * K, choice.weights + token * K};
  const RowsAndChoice rows(plain, own, chosen, blockIdx.x == 0);
#else
  const RowsOfX rows = plain;
  const int* chosen = indices + token * K;
#endif
  products<false, TILE>(
      TILES * K, room,
      [&](int tile, int, int m, int) { return expert(m == 0 ? gate : up, chosen[tile / TILES]); },
      [&](int tile, int local) { return static_cast<u64>(min(tile % TILES * TILE + local, ROWS - 1)); }, rows,
      [&](int tile, int i) {
        float2 biases = make_float2(0.0f, 0.0f);
        int r = min(tile % TILES * TILE + i, ROWS - 1);
        if (BIAS || BIAS2) {
          int e = chosen[tile / TILES];
          if (BIAS) biases.x = gate_bias[e * ROWS + r];
          if (BIAS2) biases.y = up_bias[e * ROWS + r];
        }
        return biases;
      },
      [&](int tile, int i, auto total, float2 biases) {
        int r = tile % TILES * TILE + i;
        if (r >= ROWS) return;
        float g = total(0, i, 0) + biases.x, u = total(MATRICES - 1, i, 0) + biases.y;
        out[(token * K + tile / TILES) * ROWS + r] = gated<ACTIVATION>(g, u, ALPHA, LIMIT);
      });
}

// out[t, r] = sum over slots of score * (x[slot] . down[e, r] + bias[e, r]) + residuals; blockIdx.y is the token. All experts
// of a row are one block's, which adds them in one order; x is multiplied with its score when it is placed.
DEVICE void experts_down(const float* x, const int* indices, const float* scores, Matrix down, const float* bias,
                         const float* residual, const float* residual2, const float* residual3, float* out) {
  extern __shared__ __align__(16) float pool[];
  Room room = room_of(pool);
  constexpr int TILES = (ROWS + TILE - 1) / TILE;
  const int token = blockIdx.y;
  products<false, TILE>(
      TILES, room, [&](int, int, int, int part) { return expert(down, indices[token * K + part]); },
      [&](int tile, int local) { return static_cast<u64>(min(tile * TILE + local, ROWS - 1)); },
      RowsOfX(x + token * K * COLUMNS, nullptr, scores + token * K),
      [&](int tile, int i) {
        int r = min(tile * TILE + i, ROWS - 1);
        float biases = 0.0f, residuals = 0.0f;
        if (BIAS) {
          for (int s = 0; s < K; s++) biases += scores[token * K + s] * bias[indices[token * K + s] * ROWS + r];
        }
        if (RESIDUALS > 0) residuals += residual[token * ROWS + r];
        if (RESIDUALS > 1) residuals += residual2[token * ROWS + r];
        if (RESIDUALS > 2) residuals += residual3[token * ROWS + r];
        return make_float2(biases, residuals);
      },
      [&](int tile, int i, auto total, float2 besides) {
        int r = tile * TILE + i;
        if (r < ROWS) out[token * ROWS + r] = total(0, i, 0) + besides.x + besides.y;
      });
}
