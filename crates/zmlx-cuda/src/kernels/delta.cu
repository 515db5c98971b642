// The gated delta rule of a head: S = g S; S = S + beta (v - S k) k^T; y = S q. Rows of S ([VALUE, KEY]) are independent: a
// block has ROWS of them, a warp one at a time. `y` goes to `out`, which the norm comes for after this.
// `places` says where a row holds each head's a, b and z: [3, HEADS].
DEVICE void delta(const float* mixed, const float* a, const float* b, const int* places, const float* a_log,
                  const float* dt_bias, float* state, float* out) {
  __shared__ float q[KEY], k[KEY];
  zmlx_release();
  zmlx_wait();
  const int head = blockIdx.y % HEADS, sequence = blockIdx.y / HEADS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int shared_head = head / (HEADS / KEY_HEADS);
  constexpr int EACH = (KEY + 31) / 32;
  constexpr u64 WIDTH = 2 * KEY_HEADS * KEY + HEADS * VALUE;
  for (int t = sequence * LENGTH; t < (sequence + 1) * LENGTH; t++) {
    const float* row = mixed + t * WIDTH;
    if (warp < 2) {
      const float* from = row + (warp == 0 ? 0 : KEY_HEADS * KEY) + shared_head * KEY;
      float sum = 0.0f;
      for (int i = lane; i < KEY; i += 32) sum += from[i] * from[i];
      float factor = (warp == 0 ? SCALE_Q : SCALE_K) / sqrtf(warp_sum(sum) / KEY + (warp == 0 ? EPS_Q : EPS_K));
      for (int i = lane; i < KEY; i += 32) (warp == 0 ? q : k)[i] = from[i] * factor;
    }
    __syncthreads();
    float x = a[static_cast<u64>(t) * A_WIDTH + places[head]] + dt_bias[head];
    float beta = sigmoid(b[static_cast<u64>(t) * B_WIDTH + places[HEADS + head]]);
    float softplus = (x > 0.0f ? x : 0.0f) + log1pf(expf(-fabsf(x)));
    float g = isnan(x) ? x : expf(-expf(a_log[head]) * softplus);
    for (int r = blockIdx.x * ROWS + warp; r < min(static_cast<int>(blockIdx.x + 1) * ROWS, VALUE); r += WARPS) {
      float* s = state + (static_cast<u64>(sequence * HEADS + head) * VALUE + r) * KEY;
      float held[EACH], product = 0.0f, y = 0.0f;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        int i = lane + 32 * j;
        held[j] = i < KEY ? s[i] : 0.0f;
        if (i < KEY) product += held[j] * k[i];
      }
      float change = (row[2 * KEY_HEADS * KEY + head * VALUE + r] - g * warp_sum(product)) * beta;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        int i = lane + 32 * j;
        if (i >= KEY) continue;
        held[j] = fmaf(change, k[i], g * held[j]);
        s[i] = held[j];
        y += held[j] * q[i];
      }
      y = warp_sum(y);
      if (lane == 0) out[(static_cast<u64>(t) * HEADS + head) * VALUE + r] = y;
    }
    // All are done with q and k before the next token's.
    __syncthreads();
  }
}
