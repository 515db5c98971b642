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

// `logit(e)` to the chosen experts and their weights, in ascending order of rank. `room`: EXPERTS floats of the warp's own
// where there are groups.
template <class Logit>
DEVICE void select(Logit logit, const float* choice_bias, float* room, int* indices, float* weights) {
  const int lane = threadIdx.x % 32;
  float score[EACH], rank[EACH];
  float most = -CUDA_INFINITY, sum = 0.0f;
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    score[j] = lane + 32 * j < EXPERTS ? logit(lane + 32 * j) : -CUDA_INFINITY;
    if (lane + 32 * j < EXPERTS) most = larger(score[j], most);
  }
  if (SCORES == SCORES_SOFTMAX) {
    most = warp_largest(most);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      score[j] = lane + 32 * j < EXPERTS ? expf(score[j] - most) : 0.0f;
      sum += score[j];
    }
    float inverse = 1.0f / warp_sum(sum);
#pragma unroll
    for (int j = 0; j < EACH; j++) score[j] *= inverse;
  }
#pragma unroll
  for (int j = 0; j < EACH; j++) {
    int e = lane + 32 * j;
    if (SCORES == SCORES_SIGMOID) score[j] = sigmoid(score[j]);
    rank[j] = score[j];
    if (CHOICE_BIAS && e < EXPERTS) rank[j] += choice_bias[e];
  }
  if (GROUPS > 0) drop_groups(rank, room, lane);
  // Keys above zero; zero is taken or absent.
  u32 key[EACH];
#pragma unroll
  for (int j = 0; j < EACH; j++) key[j] = lane + 32 * j < EXPERTS ? ordered(rank[j]) : 0u;
  float chosen_weight = 0.0f;
  int chosen = 0;
  for (int place = K - 1; place >= 0; place--) {
    u32 best = 0u;
#pragma unroll
    for (int j = 0; j < EACH; j++) best = max(best, key[j]);
    best = __reduce_max_sync(ALL_LANES, best);
    // The lane's own candidate, with its score: arrays are never indexed by what is known at run time only.
    constexpr u32 NONE = TIES_HIGHER ? 0u : 0xffffffffu;
    u32 mine = NONE;
    float value = 0.0f;
    bool found = false;
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      bool takes = key[j] == best && lane + 32 * j < EXPERTS && (TIES_HIGHER || !found);
      mine = takes ? lane + 32 * j : mine;
      value = takes ? score[j] : value;
      found = found || takes;
    }
    u32 e = TIES_HIGHER ? __reduce_max_sync(ALL_LANES, mine) : __reduce_min_sync(ALL_LANES, mine);
#pragma unroll
    for (int j = 0; j < EACH; j++) key[j] = static_cast<u32>(lane + 32 * j) == e ? 0u : key[j];
    value = __shfl_sync(ALL_LANES, value, static_cast<int>(e % 32));
    if (lane == place) {
      chosen = static_cast<int>(e);
      chosen_weight = value;
    }
  }
  if (SCORES == SCORES_OF_CHOSEN) {
    float largest = warp_largest(lane < K ? chosen_weight : -CUDA_INFINITY);
    chosen_weight = lane < K ? expf(chosen_weight - largest) : 0.0f;
    chosen_weight *= 1.0f / warp_sum(chosen_weight);
  }
  if (RENORMALISE) {
    float total = 0.0f;
    for (int i = 0; i < K; i++) total += __shfl_sync(ALL_LANES, chosen_weight, i);
    chosen_weight /= total + RENORMALISE_EPS;
  }
  if (lane < K) {
    indices[lane] = chosen;
    weights[lane] = chosen_weight * WEIGHT_SCALE;
  }
}
