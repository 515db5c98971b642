// out = silu(conv(x)), a causal depthwise convolution over the last TAPS - 1 inputs, kept in `state`
// ([SEQUENCES, TAPS - 1, CHANNELS]), and the call's. `kernel` is [TAPS, CHANNELS]. `columns` says where a row of x holds
// each channel.
DEVICE void conv_silu(const float* x, const int* columns, const float* kernel, const float* bias, float* state, float* out) {
  zmlx_release();
  zmlx_wait();
  const int channel = blockIdx.x * blockDim.x + threadIdx.x, sequence = blockIdx.y;
  if (channel >= CHANNELS) return;
  float* kept = state + static_cast<u64>(sequence) * (TAPS - 1) * CHANNELS + channel;
  float inputs[TAPS];
#pragma unroll
  for (int k = 0; k < TAPS - 1; k++) inputs[k] = kept[k * CHANNELS];
  for (int t = sequence * LENGTH; t < (sequence + 1) * LENGTH; t++) {
    inputs[TAPS - 1] = x[static_cast<u64>(t) * X_WIDTH + columns[channel]];
    float y = 0.0f;
#pragma unroll
    for (int k = 0; k < TAPS; k++) y += kernel[k * CHANNELS + channel] * inputs[k];
    if (BIAS) y += bias[channel];
    out[static_cast<u64>(t) * CHANNELS + channel] = silu(y);
#pragma unroll
    for (int k = 0; k < TAPS - 1; k++) inputs[k] = inputs[k + 1];
  }
#pragma unroll
  for (int k = 0; k < TAPS - 1; k++) kept[k * CHANNELS] = inputs[k];
}
