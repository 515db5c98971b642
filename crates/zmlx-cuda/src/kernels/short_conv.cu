// [b, c, x] = x . w + bias, then c * conv(b * x): a causal depthwise convolution of the last TAPS - 1 inputs, which are kept
// in `state` ([SEQUENCES, TAPS - 1, CHANNELS]), and the call's. The three rows of a channel are a block's.
DEVICE void short_conv(const float* x, const float* norm, Matrix w, const float* bias, const float* kernel,
                       const float* conv_bias, float* state, float* out) {
  extern __shared__ __align__(16) float pool[];
  Room room = room_of(pool);
  static_assert(TILE % 3 == 0, "three rows a channel");
  constexpr int EACH = TILE / 3, TILES = (CHANNELS + EACH - 1) / EACH;
  // What a channel has besides its products: the inputs that are kept, and its kernel.
  struct Channel {
    float inputs[TAPS], kernel[TAPS];
    float bias[3], conv_bias;
  };
  products<true, EACH * SEQUENCES>(
      TILES, room, [&](int, int, int, int) { return w; },
      [&](int tile, int local) {
        return static_cast<u64>(local % 3 * CHANNELS + min(tile * EACH + local / 3, CHANNELS - 1));
      },
      RowsOfX(x, norm, nullptr),
      [&](int tile, int i) {
        int sequence = i / EACH, channel = min(tile * EACH + i % EACH, CHANNELS - 1);
        const float* kept = state + static_cast<u64>(sequence) * (TAPS - 1) * CHANNELS + channel;
        Channel c;
#pragma unroll
        for (int k = 0; k < TAPS; k++) {
          c.inputs[k] = k < TAPS - 1 ? kept[k * CHANNELS] : 0.0f;
          c.kernel[k] = kernel[channel * TAPS + k];
        }
#pragma unroll
        for (int p = 0; p < 3; p++) c.bias[p] = BIAS ? bias[p * CHANNELS + channel] : 0.0f;
        c.conv_bias = CONV_BIAS ? conv_bias[channel] : 0.0f;
        return c;
      },
      [&](int tile, int i, auto total, Channel c) {
        int local = i % EACH, sequence = i / EACH, channel = tile * EACH + local;
        if (channel >= CHANNELS) return;
        float* kept = state + static_cast<u64>(sequence) * (TAPS - 1) * CHANNELS + channel;
        for (int t = sequence * LENGTH; t < (sequence + 1) * LENGTH; t++) {
          auto part = [&](int p) { return total(0, 3 * local + p, t) + c.bias[p]; };
          c.inputs[TAPS - 1] = part(0) * part(2);
          float y = c.conv_bias;
#pragma unroll
          for (int k = 0; k < TAPS; k++) y += c.kernel[k] * c.inputs[k];
          out[static_cast<u64>(t) * CHANNELS + channel] = part(1) * y;
#pragma unroll
          for (int k = 0; k < TAPS - 1; k++) c.inputs[k] = c.inputs[k + 1];
        }
#pragma unroll
        for (int k = 0; k < TAPS - 1; k++) kept[k * CHANNELS] = c.inputs[k];
      });
}
