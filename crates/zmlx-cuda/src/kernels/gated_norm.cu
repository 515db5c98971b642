// out = silu(z) * rms_norm(out), a warp a head of a row.
DEVICE void gated_norm(const float* z, const int* places, const float* weight, float* out) {
  zmlx_release();
  zmlx_wait();
  const int t = blockIdx.y, head = blockIdx.x, lane = threadIdx.x % 32;
  float* y = out + (static_cast<u64>(t) * HEADS + head) * VALUE;
  const float* gate = z + static_cast<u64>(t) * Z_WIDTH + places[2 * HEADS + head];
  float sum = 0.0f;
  for (int i = lane; i < VALUE; i += 32) sum += y[i] * y[i];
  float inverse = 1.0f / sqrtf(warp_sum(sum) / VALUE + EPS);
  for (int i = lane; i < VALUE; i += 32) y[i] = y[i] * inverse * (WEIGHT ? weight[i] : 1.0f) * silu(gate[i]);
}
