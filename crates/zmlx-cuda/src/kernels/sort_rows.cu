// Rows in the order of their experts, those of one expert in the order in which they were. A block finds one expert's.

DEVICE void sort_rows(const u32* chosen, u32* tokens, u32* experts, u32* places, int rows) {
  __shared__ int less[WARPS], same[WARPS];
  const u32 expert = blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int part = (rows + THREADS - 1) / THREADS * 32, begin = warp * part, end = min(begin + part, rows);
  int before = 0, own = 0;
  for (int i = begin; i < end; i += 32) {
    u32 v = i + lane < end ? chosen[i + lane] : 0xffffffffu;
    before += __popc(__ballot_sync(ALL_LANES, v < expert));
    own += __popc(__ballot_sync(ALL_LANES, v == expert));
  }
  if (lane == 0) less[warp] = before, same[warp] = own;
  __syncthreads();
  int at = 0;
  for (int w = 0; w < WARPS; w++) at += less[w] + (w < warp ? same[w] : 0);
  for (int i = begin; i < end; i += 32) {
    u32 v = i + lane < end ? chosen[i + lane] : 0xffffffffu;
    u32 votes = __ballot_sync(ALL_LANES, v == expert);
    if (v == expert) {
      int to = at + __popc(votes & ((1u << lane) - 1u));
      tokens[to] = static_cast<u32>(i + lane) / CHOICES;
      experts[to] = expert;
      places[i + lane] = static_cast<u32>(to);
    }
    at += __popc(votes);
  }
}
