// One row a warp. A lane has the elements of columns lane, lane + 32, ...: N of them in registers, or any number read
// again when N is 0. Each round takes the warp's first candidate; the lane that had it looks for its next one.
unsigned lane = thread_id % 32u;
unsigned row = thread_id / 32u;
unsigned rows = 1u;
for (int d = 0; d + 1 < x_ndim; ++d) rows *= unsigned(x_shape[d]);
if (row >= rows) return;
const unsigned cols = unsigned(x_shape[x_ndim - 1]);
const size_t start = size_t(row) * cols;
const size_t out = size_t(row) * K;
const unsigned steps = N > 0 ? unsigned(N) : (cols + 31u) / 32u;
unsigned orders[N > 0 ? N : 1];
#if GATE_BIAS
// The choice is among the sums of softmax and bias, so the softmax of all logits comes first.
unsigned most = 0u;
for (unsigned c = lane; c < cols; c += 32u) most = max(most, gate_order(gate_bits(x[start + c])));
const float shift = gate_value(gate_max(most));
float part = 0.0f;
for (unsigned c = lane; c < cols; c += 32u) part += gate_exp(float(x[start + c]) - shift);
const float all = gate_sum(part);
#define GATE_ORDER(c) gate_order(gate_bits(gate_exp(float(x[start + (c)]) - shift) / all + bias[c]))
#else
#define GATE_ORDER(c) gate_order(gate_bits(x[start + (c)]))
#endif
unsigned best = 0u;
unsigned place = 0xffffffffu;
#pragma unroll
for (unsigned n = 0; n < steps; ++n) {
  const unsigned c = lane + 32u * n;
  const unsigned order = c < cols ? GATE_ORDER(c) : 0u;
  if (N > 0) orders[N > 0 ? n : 0] = order;
  if (order > best) {
    best = order;
    place = c;
  }
}
#if GATE_WEIGHTS
float mine[(K + 31) / 32];
float first = 0.0f;
float sum = 0.0f;
#endif
for (int r = 0; r < K; ++r) {
  const unsigned top = gate_max(best);
  const unsigned at = gate_min(best == top ? place : 0xffffffffu);
  const bool keeper = lane == unsigned(r) % 32u;
#if GATE_WEIGHTS
  float weight = gate_value(top);
#if !GATE_BIAS
  if (r == 0) first = weight;
  weight = gate_exp(weight - first);
#endif
  sum += weight;
  if (keeper) mine[K > 32 ? r / 32 : 0] = weight;
#else
  if (keeper) values[out + r] = x[start + at];
#endif
  if (keeper) indices[out + r] = at;
  if (place == at && r + 1 < K) {
    best = 0u;
    place = 0xffffffffu;
#pragma unroll
    for (unsigned n = 0; n < steps; ++n) {
      const unsigned c = lane + 32u * n;
      const unsigned order = N > 0 ? orders[N > 0 ? n : 0] : (c < cols ? GATE_ORDER(c) : 0u);
      if (order > best && gate_after(order, c, top, at)) {
        best = order;
        place = c;
      }
    }
  }
}
#if GATE_WEIGHTS
#if GATE_BIAS
if (NORM) sum += GATE_EPS;
else sum = 1.0f;
#else
if (!NORM) {
  float own = 0.0f;
  for (unsigned c = lane; c < cols; c += 32u) own += gate_exp(float(x[start + c]) - first);
  sum = gate_sum(own);
}
#endif
for (unsigned r = lane; r < unsigned(K); r += 32u) weights[out + r] = mine[K > 32 ? r / 32u : 0u] / sum;
#endif
#undef GATE_ORDER
