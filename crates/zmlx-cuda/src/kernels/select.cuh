// Choosing experts: a warp ranks the logits of a token. Lane l holds experts l, l + 32, ...

enum Scores { SCORES_SIGMOID = 0, SCORES_SOFTMAX = 1, SCORES_OF_CHOSEN = 2 };
constexpr int EACH = (EXPERTS + 31) / 32;

// Sets the ranks of groups that are not kept to zero: those with the smallest sums of their two largest ranks.
DEVICE void drop_groups(float (&rank)[EACH], float* room, int lane) {
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    if (lane + 32 * j < EXPERTS) room[lane + 32 * j] = rank[j];
  }
  __syncwarp();
  constexpr int SIZE = GROUPS > 0 ? EXPERTS / GROUPS : 1;
  u32 key = 0xffffffffu;
  if (lane < GROUPS) {
    float first = -CUDA_INFINITY, second = -CUDA_INFINITY;
    for (int i = 0; i < SIZE; i++) {
      float r = room[lane * SIZE + i];
      if (r > first || isnan(r)) {
        second = first;
        first = r;
      } else if (r > second) {
        second = r;
      }
    }
    key = min(ordered(first + second), 0xfffffffeu);
  }
  bool kept = lane < GROUPS;
  for (int left = GROUPS; left > KEEP; left--) {
    u32 lowest = __reduce_min_sync(ALL_LANES, kept ? key : 0xffffffffu);
    u32 those = __ballot_sync(ALL_LANES, kept && key == lowest);
    if (lane == __ffs(static_cast<int>(those)) - 1) kept = false;
  }
  u32 stay = __ballot_sync(ALL_LANES, kept);
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int e = lane + 32 * j;
    if (e < EXPERTS && !(stay >> (e / SIZE) & 1u)) rank[j] = 0.0f;
  }
}

// The factor that makes exponents of `logits` less the largest, which is `most` afterwards, a softmax over all.
DEVICE float softmax_of(const float (&logits)[EACH], float& most) {
  most = -CUDA_INFINITY;
#pragma unroll
  for (int j = 0; j < EACH; j++) most = larger(logits[j], most);
  most = warp_largest(most);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < EACH; j++) sum += threadIdx.x % 32 + 32 * j < EXPERTS ? expf(logits[j] - most) : 0.0f;
  return 1.0f / warp_sum(sum);
}

// A lane's keys, the highest first; of equal ones that which a tie prefers.
struct Sorted {
  u32 key[EACH];
  int expert[EACH];

  DEVICE explicit Sorted(const u32 (&keys)[EACH], int lane) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      int from = TIES_HIGHER ? EACH - 1 - j : j;
      key[j] = keys[from];
      expert[j] = lane + 32 * from;
    }
#pragma unroll
    for (int pass = 0; pass < EACH; pass++) {
#pragma unroll
      for (int j = pass % 2; j + 1 < EACH; j += 2) {
        bool swaps = key[j + 1] > key[j];
        u32 high = swaps ? key[j + 1] : key[j], low = swaps ? key[j] : key[j + 1];
        int first = swaps ? expert[j + 1] : expert[j], second = swaps ? expert[j] : expert[j + 1];
        key[j] = high;
        key[j + 1] = low;
        expert[j] = first;
        expert[j + 1] = second;
      }
    }
  }
  DEVICE void pop() {
#pragma unroll
    for (int j = 0; j + 1 < EACH; j++) {
      key[j] = key[j + 1];
      expert[j] = expert[j + 1];
    }
    key[EACH - 1] = 0u;
  }
};

// The experts of the K highest keys, ascending: that of place `p` in lane p. Keys are above zero; zero is taken or absent.
DEVICE int pick(u32 (&key)[EACH], int lane) {
  int chosen = 0;
  // With more keys than that a lane has no registers to sort them.
  if (EACH <= 8) {
    Sorted sorted(key, lane);
    bool tied = false;
    // Whose first key is the highest of all takes it off; who that was is found out beside that.
#pragma unroll
    for (int place = K - 1; place >= 0; place--) {
      bool takes = sorted.key[0] == __reduce_max_sync(ALL_LANES, sorted.key[0]);
      u32 those = __ballot_sync(ALL_LANES, takes);
      int e = __shfl_sync(ALL_LANES, sorted.expert[0], __ffs(static_cast<int>(those)) - 1);
      tied = tied || (those & (those - 1u)) != 0u;
      if (lane == place) chosen = e;
      if (takes) sorted.pop();
    }
    if (!tied) return chosen;
  }
  // One by one, each as a tie prefers.
#pragma unroll 1
  for (int place = K - 1; place >= 0; place--) {
    u32 best = 0u;
#pragma unroll
    for (int j = 0; j < EACH; j++) best = max(best, key[j]);
    best = __reduce_max_sync(ALL_LANES, best);
    u32 mine = TIES_HIGHER ? 0u : 0xffffffffu;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      u32 e = key[j] == best ? static_cast<u32>(lane + 32 * j) : mine;
      mine = TIES_HIGHER ? max(mine, e) : min(mine, e);
    }
    u32 e = TIES_HIGHER ? __reduce_max_sync(ALL_LANES, mine) : __reduce_min_sync(ALL_LANES, mine);
#pragma unroll
    for (int j = 0; j < EACH; j++) key[j] = static_cast<u32>(lane + 32 * j) == e ? 0u : key[j];
    if (lane == place) chosen = static_cast<int>(e);
  }
  return chosen;
}

// What experts of so many logits a lane are ranked by, and the choice: the expert of place `p` in lane p. A softmax
// over all keeps the order of logits. `room`: EXPERTS floats of the warp's own where there are groups.
DEVICE int choose(const float (&logits)[EACH], const float* choice_bias, float* room) {
  const int lane = threadIdx.x % 32;
  u32 key[EACH];
  float rank[EACH];
  constexpr bool OF_SCORES = SCORES == SCORES_SOFTMAX && (CHOICE_BIAS || GROUPS > 0);
  float factor = 1.0f, most = 0.0f;
  if (OF_SCORES) factor = softmax_of(logits, most);
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int e = lane + 32 * j;
    rank[j] = SCORES == SCORES_SIGMOID ? sigmoid(logits[j]) : OF_SCORES ? expf(logits[j] - most) * factor : logits[j];
    if (CHOICE_BIAS && e < EXPERTS) rank[j] += choice_bias[e];
  }
  if (GROUPS > 0) drop_groups(rank, room, lane);
#pragma unroll
  for (int j = 0; j < EACH; j++) key[j] = lane + 32 * j < EXPERTS ? ordered(rank[j]) : 0u;
  return pick(key, lane);
}

template <class Logit> DEVICE void load_logits(Logit logit, float (&logits)[EACH]) {
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int e = threadIdx.x % 32 + 32 * j;
    logits[j] = e < EXPERTS ? logit(e) : -CUDA_INFINITY;
  }
}

// Lane p's weight, of the expert of place p, whose logit is `own`.
DEVICE float weigh(const float (&logits)[EACH], float own) {
  const int lane = threadIdx.x % 32;
  float weight = lane < K ? own : -CUDA_INFINITY;
  if (SCORES == SCORES_SIGMOID) weight = sigmoid(weight);
  if (SCORES == SCORES_SOFTMAX) {
    float most, factor = softmax_of(logits, most);
    weight = expf(weight - most) * factor;
  }
  if (SCORES == SCORES_OF_CHOSEN) {
    float largest = warp_largest(weight);
    weight = lane < K ? expf(weight - largest) : 0.0f;
    weight *= 1.0f / warp_sum(weight);
  }
  if (RENORMALISE) {
    float total = 0.0f;
    for (int i = 0; i < K; i++) total += __shfl_sync(ALL_LANES, weight, i);
    weight /= total + RENORMALISE_EPS;
  }
  return weight * WEIGHT_SCALE;
}

// `logit(e)` to the chosen experts and their weights, in ascending order of rank.
template <class Logit>
DEVICE void select(Logit logit, const float* choice_bias, float* room, int* indices, float* weights) {
  const int lane = threadIdx.x % 32;
  float logits[EACH];
  load_logits(logit, logits);
  const int chosen = choose(logits, choice_bias, room);
  const float weight = weigh(logits, logit(chosen));
  if (lane < K) {
    indices[lane] = chosen;
    weights[lane] = weight;
  }
}
