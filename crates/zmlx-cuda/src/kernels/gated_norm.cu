// out = silu(z) * rms_norm(out), a warp a head of a row.
DEVICE void gated_norm(const float* z, const int* places, const float* weight, float* out) {
  constexpr int EACH = (VALUE + 31) / 32;
  const int t = blockIdx.y, head = blockIdx.x, lane = threadIdx.x % 32;
  float* y = out + (static_cast<u64>(t) * HEADS + head) * VALUE;
  zmlx_release();
  const float* gate = z + static_cast<u64>(t) * Z_WIDTH + places[2 * HEADS + head];
  float own[EACH], gates[EACH], weights[EACH], sum = 0.0f;
#pragma unroll
  for (int j = 0; j < EACH; j++) weights[j] = WEIGHT && lane + 32 * j < VALUE ? weight[lane + 32 * j] : 1.0f;
  zmlx_wait();
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    bool valid = lane + 32 * j < VALUE;
    own[j] = valid ? y[lane + 32 * j] : 0.0f;
    gates[j] = valid ? gate[lane + 32 * j] : 0.0f;
    sum += own[j] * own[j];
  }
  float inverse = 1.0f / sqrtf(warp_sum(sum) / VALUE + EPS);
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    if (lane + 32 * j < VALUE) y[lane + 32 * j] = own[j] * inverse * weights[j] * silu(gates[j]);
  }
}
