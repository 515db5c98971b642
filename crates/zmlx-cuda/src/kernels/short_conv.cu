// [b, c, x] = x . w + bias, then c * conv(b * x): a causal depthwise convolution of the last TAPS - 1 inputs, which are kept
// in `state` ([SEQUENCES, TAPS - 1, CHANNELS]), and the call's. The three rows of a channel are a block's.
DEVICE void short_conv(const float* x, const float* norm, Matrix w, const float* bias, const float* kernel,
                       const float* conv_bias, float* state, float* out) {
  extern __shared__ __align__(16) float pool[];
  Room room = room_of(pool);
  static_assert(TILE % 3 == 0, "three rows a channel");
  constexpr int EACH = TILE / 3, TILES = (CHANNELS + EACH - 1) / EACH;
  products<true>(
      TILES, room, [&](int, int, int, int) { return w; },
      [&](int tile, int local) {
        return static_cast<u64>(local % 3 * CHANNELS + min(tile * EACH + local / 3, CHANNELS - 1));
      },
      [&] { place_x(x, norm, room); }, [](int) { return 1.0f; },
      [&](int tile, auto total) {
        for (int i = threadIdx.x; i < EACH * SEQUENCES; i += THREADS) {
          int local = i % EACH, sequence = i / EACH, channel = tile * EACH + local;
          if (channel >= CHANNELS) continue;
          float* kept = state + static_cast<u64>(sequence) * (TAPS - 1) * CHANNELS + channel;
          auto part = [&](int p, int t) {
            return total(0, 3 * local + p, t) + (BIAS ? bias[p * CHANNELS + channel] : 0.0f);
          };
          float inputs[TAPS];
#pragma unroll
          for (int k = 0; k < TAPS - 1; k++) inputs[k] = kept[k * CHANNELS];
          for (int t = sequence * LENGTH; t < (sequence + 1) * LENGTH; t++) {
            inputs[TAPS - 1] = part(0, t) * part(2, t);
            float y = 0.0f;
#pragma unroll
            for (int k = 0; k < TAPS; k++) y += kernel[channel * TAPS + k] * inputs[k];
            if (CONV_BIAS) y += conv_bias[channel];
            out[static_cast<u64>(t) * CHANNELS + channel] = part(1, t) * y;
#pragma unroll
            for (int k = 0; k < TAPS - 1; k++) inputs[k] = inputs[k + 1];
          }
#pragma unroll
          for (int k = 0; k < TAPS - 1; k++) kept[k * CHANNELS] = inputs[k];
        }
      });
}
