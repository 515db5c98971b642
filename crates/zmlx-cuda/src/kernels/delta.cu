// The gated delta rule of a head: S = g S; S = S + beta (v - S k) k^T; y = S q. Rows of S ([VALUE, KEY]) are independent: a
// block has ROWS of them, a warp HELD, which it holds from before the wait: the step before has written them. `y` goes to `out`, which the norm comes for after this.
// `places` says where a row holds each head's a, b and z: [3, HEADS].
DEVICE void delta(const float* mixed, const float* a, const float* b, const int* places, const float* a_log,
                  const float* dt_bias, float* state, float* out) {
  __shared__ float q[KEY], k[KEY];
  const int head = blockIdx.y % HEADS, sequence = blockIdx.y / HEADS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int shared_head = head / (HEADS / KEY_HEADS);
  constexpr int EACH = (KEY + 31) / 32, HELD = (ROWS + WARPS - 1) / WARPS;
  constexpr u64 WIDTH = 2 * KEY_HEADS * KEY + HEADS * VALUE;
  const int first = blockIdx.x * ROWS + warp, end = min(static_cast<int>(blockIdx.x + 1) * ROWS, VALUE);
  float* rows = state + static_cast<u64>(sequence * HEADS + head) * VALUE * KEY;
  zmlx_release();
  float held[HELD][EACH];
#pragma unroll
  for (int n = 0; n < HELD; n++) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      int r = first + n * WARPS, i = lane + 32 * j;
      held[n][j] = r < end && i < KEY ? rows[static_cast<u64>(r) * KEY + i] : 0.0f;
    }
  }
  const int place_a = places[head], place_b = places[HEADS + head];
  const float bias = dt_bias[head], rate = -expf(a_log[head]);
  zmlx_wait();
  for (int t = sequence * LENGTH; t < (sequence + 1) * LENGTH; t++) {
    const float* row = mixed + t * WIDTH;
    const float x = a[static_cast<u64>(t) * A_WIDTH + place_a] + bias;
    const float beta = sigmoid(b[static_cast<u64>(t) * B_WIDTH + place_b]);
    float value[HELD];
#pragma unroll
    for (int n = 0; n < HELD; n++) {
      value[n] = first + n * WARPS < end ? row[2 * KEY_HEADS * KEY + head * VALUE + first + n * WARPS] : 0.0f;
    }
    if (warp < 2) {
      const float* from = row + (warp == 0 ? 0 : KEY_HEADS * KEY) + shared_head * KEY;
      float own[EACH], sum = 0.0f;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        own[j] = lane + 32 * j < KEY ? from[lane + 32 * j] : 0.0f;
        sum += own[j] * own[j];
      }
      float factor = (warp == 0 ? SCALE_Q : SCALE_K) / sqrtf(warp_sum(sum) / KEY + (warp == 0 ? EPS_Q : EPS_K));
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        if (lane + 32 * j < KEY) (warp == 0 ? q : k)[lane + 32 * j] = own[j] * factor;
      }
    }
    __syncthreads();
    float softplus = (x > 0.0f ? x : 0.0f) + log1pf(expf(-fabsf(x)));
    float g = isnan(x) ? x : expf(rate * softplus);
#pragma unroll
    for (int n = 0; n < HELD; n++) {
      const int r = first + n * WARPS;
      if (r >= end) break;
      float product = 0.0f, y = 0.0f;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        if (lane + 32 * j < KEY) product += held[n][j] * k[lane + 32 * j];
      }
      float change = (value[n] - g * warp_sum(product)) * beta;
#pragma unroll
      for (int j = 0; j < EACH; j++) {
        int i = lane + 32 * j;
        if (i >= KEY) continue;
        held[n][j] = fmaf(change, k[i], g * held[n][j]);
        y += held[n][j] * q[i];
      }
      y = warp_sum(y);
      if (lane == 0) out[(static_cast<u64>(t) * HEADS + head) * VALUE + r] = y;
    }
    // All are done with q and k before the next token's.
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < HELD; n++) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      int r = first + n * WARPS, i = lane + 32 * j;
      if (r < end && i < KEY) rows[static_cast<u64>(r) * KEY + i] = held[n][j];
    }
  }
}
