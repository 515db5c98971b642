// Logits of all experts, spread over blocks; the last block to arrive chooses.
DEVICE void router(const float* x, const float* norm, Matrix w, const float* bias, const float* choice_bias, float* logits,
                   u32* arrived, int* indices, float* weights) {
  extern __shared__ __align__(16) float pool[];
  Room room = room_of(pool);
  constexpr int TILES = (EXPERTS + TILE - 1) / TILE;
  products<true>(
      TILES, room, [&](int, int, int, int) { return w; },
      [&](int tile, int local) { return static_cast<u64>(min(tile * TILE + local, EXPERTS - 1)); },
      [&] { place_x(x, norm, room); }, [](int) { return 1.0f; },
      [&](int tile, auto total) {
        for (int i = threadIdx.x; i < TILE * TOKENS; i += THREADS) {
          int r = tile * TILE + i / TOKENS, t = i % TOKENS;
          if (r >= EXPERTS) continue;
          float y = total(0, i / TOKENS, t);
          if (BIAS) y += bias[r];
          publish(logits + t * EXPERTS + r, y);
        }
      });
  if (!last_block(arrived, gridDim.x)) return;
  for (int t = threadIdx.x / 32; t < TOKENS; t += WARPS) {
    __syncwarp();
    select([&](int e) { return published(logits + t * EXPERTS + e); }, choice_bias, pool + threadIdx.x / 32 * EXPERTS,
           indices + t * K, weights + t * K);
  }
}
