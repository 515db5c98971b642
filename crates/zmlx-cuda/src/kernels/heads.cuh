// What heads of queries, keys and values go through after their product: norm, rotary embedding, growth. A warp works on
// a head. Constants by kind (0 queries, 1 keys, 2 values): HEAD_NORM_q, ...

template <int WHICH> struct HeadSpec;
template <> struct HeadSpec<0> {
  static constexpr bool norm = NORM_0, weighted = WEIGHTED_0, traditional = TRADITIONAL_0, grows = GROWS_0;
  static constexpr int half = HALF_0, width = WIDTH_0;
  static constexpr float eps = EPS_0, magnitude = MAGNITUDE_0, beta = BETA_0, context = CONTEXT_0;
};
template <> struct HeadSpec<1> {
  static constexpr bool norm = NORM_1, weighted = WEIGHTED_1, traditional = TRADITIONAL_1, grows = GROWS_1;
  static constexpr int half = HALF_1, width = WIDTH_1;
  static constexpr float eps = EPS_1, magnitude = MAGNITUDE_1, beta = BETA_1, context = CONTEXT_1;
};
template <> struct HeadSpec<2> {
  static constexpr bool norm = NORM_2, weighted = WEIGHTED_2, traditional = TRADITIONAL_2, grows = GROWS_2;
  static constexpr int half = HALF_2, width = WIDTH_2;
  static constexpr float eps = EPS_2, magnitude = MAGNITUDE_2, beta = BETA_2, context = CONTEXT_2;
};

// Norm weights and the table of angles ([positions, cosines then sines]) of one kind.
struct HeadData {
  const float* weight;
  const float* angles;
};

// What a lane needs of weights and angles to finish a head of that kind: none of it depends on launches before this one.
template <int WHICH> struct HeadAhead {
  using Spec = HeadSpec<WHICH>;
  static constexpr int PAIRS = (Spec::half + 31) / 32, REST = (Spec::width - 2 * Spec::half + 31) / 32;
  // Not empty where there are none.
  float cosines[PAIRS + 1], sines[PAIRS + 1], weights[PAIRS + 1][2], rest[REST + 1];

  static DEVICE int2 places(int i) {
    return Spec::traditional ? make_int2(2 * i, 2 * i + 1) : make_int2(i, i + Spec::half);
  }

  DEVICE HeadAhead(const HeadData& data, int position) {
    const float* angles = data.angles + static_cast<u64>(position) * (2 * Spec::half);
#pragma unroll
    for (int n = 0; n < PAIRS; n++) {
      int i = n * 32 + threadIdx.x % 32;
      bool valid = Spec::half % 32 == 0 || i < Spec::half;
      int2 at = places(i);
      cosines[n] = valid ? load_weights(angles + i) : 0.0f;
      sines[n] = valid ? load_weights(angles + Spec::half + i) : 0.0f;
      weights[n][0] = Spec::weighted && valid ? load_weights(data.weight + at.x) : 1.0f;
      weights[n][1] = Spec::weighted && valid ? load_weights(data.weight + at.y) : 1.0f;
    }
#pragma unroll
    for (int n = 0; n < REST; n++) {
      int i = 2 * Spec::half + n * 32 + threadIdx.x % 32;
      rest[n] = Spec::weighted && i < Spec::width ? load_weights(data.weight + i) : 1.0f;
    }
  }

  // Gives each finished element of a head to put(index, value). All lanes of a warp call it.
  template <class Put> DEVICE void finish(const float* raw, int position, Put put) const {
    const int lane = threadIdx.x % 32;
    float pairs[PAIRS + 1][2], others[REST + 1], sum = 0.0f;
    // All loads first: what is put may lie in the same memory as far as the compiler knows.
#pragma unroll
    for (int n = 0; n < PAIRS; n++) {
      int i = n * 32 + lane;
      bool valid = Spec::half % 32 == 0 || i < Spec::half;
      int2 at = places(i);
      pairs[n][0] = valid ? raw[at.x] : 0.0f;
      pairs[n][1] = valid ? raw[at.y] : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < REST; n++) {
      int i = 2 * Spec::half + n * 32 + lane;
      others[n] = i < Spec::width ? raw[i] : 0.0f;
    }
    float inverse = 1.0f;
    if (Spec::norm) {
#pragma unroll
      for (int n = 0; n < PAIRS; n++) sum += pairs[n][0] * pairs[n][0] + pairs[n][1] * pairs[n][1];
#pragma unroll
      for (int n = 0; n < REST; n++) sum += others[n] * others[n];
      inverse = 1.0f / sqrtf(warp_sum(sum) / Spec::width + Spec::eps);
    }
    float growth = 1.0f;
    if (Spec::grows) growth = 1.0f + Spec::beta * logf(1.0f + floorf(static_cast<float>(position) / Spec::context));
    auto normed = [&](float x, float weight) { return Spec::norm ? x * inverse * weight : x; };
#pragma unroll
    for (int n = 0; n < PAIRS; n++) {
      int i = n * 32 + lane;
      if (Spec::half % 32 != 0 && i >= Spec::half) continue;
      int2 at = places(i);
      float x = normed(pairs[n][0], weights[n][0]) * Spec::magnitude, y = normed(pairs[n][1], weights[n][1]) * Spec::magnitude;
      put(at.x, (x * cosines[n] - y * sines[n]) * growth);
      put(at.y, (x * sines[n] + y * cosines[n]) * growth);
    }
#pragma unroll
    for (int n = 0; n < REST; n++) {
      int i = 2 * Spec::half + n * 32 + lane;
      if (i < Spec::width) put(i, normed(others[n], rest[n]) * growth);
    }
  }
};
