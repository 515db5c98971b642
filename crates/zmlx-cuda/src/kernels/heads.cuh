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

// Gives each finished element to put(index, value). All lanes of a warp call it.
template <int WHICH, class Put> DEVICE void finish_head(const float* raw, const HeadData& data, int position, Put put) {
  using Spec = HeadSpec<WHICH>;
  const int lane = threadIdx.x % 32;
  float inverse = 1.0f;
  if (Spec::norm) {
    float sum = 0.0f;
    for (int i = lane; i < Spec::width; i += 32) sum += raw[i] * raw[i];
    inverse = 1.0f / sqrtf(warp_sum(sum) / Spec::width + Spec::eps);
  }
  float growth = 1.0f;
  if (Spec::grows) growth = 1.0f + Spec::beta * logf(1.0f + floorf(static_cast<float>(position) / Spec::context));
  auto normed = [&](int i) { return Spec::norm ? raw[i] * inverse * (Spec::weighted ? data.weight[i] : 1.0f) : raw[i]; };
  const float* angles = data.angles + static_cast<u64>(position) * (2 * Spec::half);
  for (int i = lane; i < Spec::half; i += 32) {
    int a = Spec::traditional ? 2 * i : i, b = Spec::traditional ? 2 * i + 1 : i + Spec::half;
    float x = normed(a) * Spec::magnitude, y = normed(b) * Spec::magnitude;
    float c = angles[i], s = angles[Spec::half + i];
    put(a, (x * c - y * s) * growth);
    put(b, (x * s + y * c) * growth);
  }
  for (int i = 2 * Spec::half + lane; i < Spec::width; i += 32) put(i, normed(i) * growth);
}
