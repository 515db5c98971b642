// The rows that experts gave for a token, weighted and added. A block makes a token's.

DEVICE void store_eight(const float (&v)[8], float* to) {
  reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
DEVICE void store_eight(const float (&v)[8], u16* to) {
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u16 low, high;
    narrow<ROW_FLOAT>(v[2 * i], &low);
    narrow<ROW_FLOAT>(v[2 * i + 1], &high);
    words[i] = static_cast<u32>(high) << 16 | low;
  }
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// out[t] = sum over c of scores[t, c] * rows[order[t, c]]
template <class SCORE, class OUT>
DEVICE void combine_rows(const u16* rows, const u32* order, const SCORE* scores, OUT* out) {
  const u64 token = blockIdx.x;
  u64 from[CHOICES];
  float weights[CHOICES];
#pragma unroll
  for (int c = 0; c < CHOICES; c++) {
    from[c] = static_cast<u64>(order[token * CHOICES + c]) * COLUMNS;
    weights[c] = widen<ROW_FLOAT>(scores[token * CHOICES + c]);
  }
  for (int column = threadIdx.x * 8; column < COLUMNS; column += THREADS * 8) {
    uint4 v[CHOICES];
#pragma unroll
    for (int c = 0; c < CHOICES; c++) v[c] = *reinterpret_cast<const uint4*>(rows + from[c] + column);
    float sums[8] = {};
#pragma unroll
    for (int c = 0; c < CHOICES; c++) {
      const u32 words[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sums[2 * i] = fmaf(weights[c], widen<ROW_FLOAT>(static_cast<u16>(words[i])), sums[2 * i]);
        sums[2 * i + 1] = fmaf(weights[c], widen<ROW_FLOAT>(static_cast<u16>(words[i] >> 16)), sums[2 * i + 1]);
      }
    }
    store_eight(sums, out + token * COLUMNS + column);
  }
}
