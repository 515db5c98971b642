// A warp for each token's logits.
DEVICE void route(const float* logits, const float* choice_bias, int* indices, float* weights) {
  __shared__ float room[GROUPS > 0 ? EXPERTS : 1];
  zmlx_release();
  zmlx_wait();
  const int t = blockIdx.x;
  select([&](int e) { return logits[t * EXPERTS + e]; }, choice_bias, room, indices + t * K, weights + t * K);
}
