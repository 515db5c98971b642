// Stages without a product, a block a row. `x` and `out` may be the same memory.
DEVICE void rms_norm(const float* x, const float* weight, float* out) {
  __shared__ float room[WARPS];
  zmlx_release();
  zmlx_wait();
  const u64 row = static_cast<u64>(blockIdx.x) * WIDTH;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < WIDTH; i += 32 * WARPS) sum += x[row + i] * x[row + i];
  float inverse = 1.0f / sqrtf(block_sum<WARPS>(sum, room) / WIDTH + EPS);
  for (int i = threadIdx.x; i < WIDTH; i += 32 * WARPS) out[row + i] = x[row + i] * inverse * (WEIGHT ? weight[i] : 1.0f);
}

DEVICE void layer_norm(const float* x, const float* weight, const float* bias, float* out) {
  __shared__ float room[WARPS], room2[WARPS];
  zmlx_release();
  zmlx_wait();
  const u64 row = static_cast<u64>(blockIdx.x) * WIDTH;
  float sum = 0.0f, squares = 0.0f;
  for (int i = threadIdx.x; i < WIDTH; i += 32 * WARPS) sum += x[row + i];
  float mean = block_sum<WARPS>(sum, room) / WIDTH;
  for (int i = threadIdx.x; i < WIDTH; i += 32 * WARPS) squares += (x[row + i] - mean) * (x[row + i] - mean);
  float inverse = 1.0f / sqrtf(block_sum<WARPS>(squares, room2) / WIDTH + EPS);
  for (int i = threadIdx.x; i < WIDTH; i += 32 * WARPS) {
    out[row + i] = (x[row + i] - mean) * inverse * (WEIGHT ? weight[i] : 1.0f) + (BIAS ? bias[i] : 0.0f);
  }
}

DEVICE void softmax(const float* x, float* out) {
  __shared__ float room[WARPS], room2[WARPS];
  zmlx_release();
  zmlx_wait();
  const u64 row = static_cast<u64>(blockIdx.x) * WIDTH;
  float most = -CUDA_INFINITY, sum = 0.0f;
  for (int i = threadIdx.x; i < WIDTH; i += 32 * WARPS) most = larger(x[row + i], most);
  most = warp_largest(most);
  if (threadIdx.x % 32 == 0) room2[threadIdx.x / 32] = most;
  __syncthreads();
  for (int i = 0; i < WARPS; i++) most = larger(room2[i], most);
  for (int i = threadIdx.x; i < WIDTH; i += 32 * WARPS) sum += expf(x[row + i] - most);
  float inverse = 1.0f / block_sum<WARPS>(sum, room);
  for (int i = threadIdx.x; i < WIDTH; i += 32 * WARPS) out[row + i] = expf(x[row + i] - most) * inverse;
}

DEVICE void add(const float* a, const float* b, float* out) {
  zmlx_release();
  zmlx_wait();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < WIDTH) out[i] = a[i] + b[i];
}

// x = x * sigmoid(gate).
DEVICE void sigmoid_gate(float* x, const float* gate) {
  zmlx_release();
  zmlx_wait();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < WIDTH) x[i] *= sigmoid(gate[i]);
}
