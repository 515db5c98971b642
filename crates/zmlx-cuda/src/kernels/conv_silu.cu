// out = silu(conv(x)), a causal depthwise convolution over the last TAPS - 1 inputs, kept in `state`
// ([SEQUENCES, TAPS - 1, CHANNELS]), and the call's. `kernel` is [TAPS, CHANNELS]. `columns` says where a row of x holds
// each channel.
DEVICE void conv_silu(const float* x, const int* columns, const float* kernel, const float* bias, float* state, float* out) {
  const int channel = min(static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), CHANNELS - 1), sequence = blockIdx.y;
  const bool writes = blockIdx.x * blockDim.x + threadIdx.x < CHANNELS;
  float* kept = state + static_cast<u64>(sequence) * (TAPS - 1) * CHANNELS + channel;
  zmlx_release();
  // None of it is of the launches before this one: `state` is what the step before left.
  float inputs[TAPS], weights[TAPS];
#pragma unroll
  for (int k = 0; k < TAPS; k++) {
    inputs[k] = k < TAPS - 1 && writes ? kept[k * CHANNELS] : 0.0f;
    weights[k] = kernel[k * CHANNELS + channel];
  }
  const int column = columns[channel];
  const float added = BIAS ? bias[channel] : 0.0f;
  zmlx_wait();
  for (int t = sequence * LENGTH; t < (sequence + 1) * LENGTH; t++) {
    inputs[TAPS - 1] = x[static_cast<u64>(t) * X_WIDTH + column];
    float y = 0.0f;
#pragma unroll
    for (int k = 0; k < TAPS; k++) y += weights[k] * inputs[k];
    if (writes) out[static_cast<u64>(t) * CHANNELS + channel] = silu(y + added);
#pragma unroll
    for (int k = 0; k < TAPS - 1; k++) inputs[k] = inputs[k + 1];
  }
#pragma unroll
  for (int k = 0; k < TAPS - 1; k++) {
    if (writes) kept[k * CHANNELS] = inputs[k];
  }
}
