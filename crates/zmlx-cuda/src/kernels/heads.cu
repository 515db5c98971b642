// Rows of products to heads: queries to `queries`, keys and values to the cache. One block of a warp for a head of a row.
// Queries may come with gates, the second half of each head, which go to `gates` as they are.
DEVICE void heads(const float* raw_q, const float* raw_k, const float* raw_v, HeadData q, HeadData k, HeadData v,
                  const int* position, int capacity, float* queries, float* gates, CACHE* keys, CACHE* values) {
  zmlx_release();
  // The position is written at the end of a step only.
  const int row = blockIdx.y, lane = threadIdx.x % 32, at = *position + row % LENGTH;
  int head = blockIdx.x;
  if (head < HEADS) {
    constexpr int STRIDE = GATES ? 2 * WIDTH_0 : WIDTH_0;
    const HeadAhead<0> ahead(q, at);
    zmlx_wait();
    const float* raw = raw_q + static_cast<u64>(row) * STRIDE_0 + head * STRIDE;
    float* to = queries + (static_cast<u64>(row) * HEADS + head) * WIDTH_0;
    ahead.finish(raw, at, [&](int i, float x) { to[i] = x; });
    if (GATES) {
      for (int i = lane; i < WIDTH_0; i += 32) gates[(static_cast<u64>(row) * HEADS + head) * WIDTH_0 + i] = raw[WIDTH_0 + i];
    }
    return;
  }
  head -= HEADS;
  u64 place = static_cast<u64>(row / LENGTH * KV_HEADS + head % KV_HEADS) * capacity + at;
  if (head < KV_HEADS) {
    const HeadAhead<1> ahead(k, at);
    zmlx_wait();
    CACHE* to = keys + place * WIDTH_1;
    ahead.finish(raw_k + static_cast<u64>(row) * STRIDE_1 + head * WIDTH_1, at,
                 [&](int i, float x) { narrow<CACHE_KIND>(x, to + i); });
  } else {
    const HeadAhead<2> ahead(v, at);
    zmlx_wait();
    CACHE* to = values + place * WIDTH_2;
    ahead.finish(raw_v + static_cast<u64>(row) * STRIDE_2 + (head - KV_HEADS) * WIDTH_2, at,
                 [&](int i, float x) { narrow<CACHE_KIND>(x, to + i); });
  }
}
