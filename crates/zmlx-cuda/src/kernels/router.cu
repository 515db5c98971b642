// Logits of all experts, spread over blocks; the last block to arrive chooses.
DEVICE void router(const float* x, const float* norm, Matrix w, const float* bias, const float* choice_bias, float* logits,
                   u32* arrived, int* indices, float* weights) {
  extern __shared__ __align__(16) float pool[];
  Room room = room_of(pool);
  constexpr int TILES = (EXPERTS + TILE - 1) / TILE;
  products<true, TILE * TOKENS>(
      TILES, room, [&](int, int, int, int) { return w; },
      [&](int tile, int local) { return static_cast<u64>(min(tile * TILE + local, EXPERTS - 1)); },
      RowsOfX(x, norm, nullptr),
      [&](int tile, int i) { return BIAS ? bias[min(tile * TILE + i / TOKENS, EXPERTS - 1)] : 0.0f; },
      [&](int tile, int i, auto total, float added) {
        int r = tile * TILE + i / TOKENS, t = i % TOKENS;
        if (r < EXPERTS) publish(logits + t * EXPERTS + r, total(0, i / TOKENS, t) + added);
      });
  if (!last_block(arrived, gridDim.x)) return;
  for (int t = threadIdx.x / 32; t < TOKENS; t += WARPS) {
    __syncwarp();
    select([&](int e) { return published(logits + t * EXPERTS + e); }, choice_bias, pool + threadIdx.x / 32 * EXPERTS,
           indices + t * K, weights + t * K);
  }
}
