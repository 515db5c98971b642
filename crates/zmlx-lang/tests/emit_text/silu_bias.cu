// silu_bias(x: bf16, b: bf16) -> out: bf16 = silu((x + b))
// N consecutive elements, at most 16 bytes an access.
template <typename T, int N> struct alignas(sizeof(T) * N) zk_pack {
  T v[N];
};
template <typename T, int N> struct zk_width {
  static constexpr int value = sizeof(T) * N > 16 ? int(16 / sizeof(T)) : N;
};
template <int N, typename T> __device__ inline bool zk_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * zk_width<T, N>::value) == 0;
}
template <int N, typename T> __device__ inline void zk_load(const T* p, T* r) {
  constexpr int W = zk_width<T, N>::value;
#pragma unroll
  for (int i = 0; i < N; i += W) {
    const zk_pack<T, W> w = *reinterpret_cast<const zk_pack<T, W>*>(p + i);
#pragma unroll
    for (int j = 0; j < W; ++j) r[i + j] = w.v[j];
  }
}
template <int N, typename T> __device__ inline void zk_store(T* p, const T* r) {
  constexpr int W = zk_width<T, N>::value;
#pragma unroll
  for (int i = 0; i < N; i += W) {
    zk_pack<T, W> w;
#pragma unroll
    for (int j = 0; j < W; ++j) w.v[j] = r[i + j];
    *reinterpret_cast<zk_pack<T, W>*>(p + i) = w;
  }
}
// silu_bias_7c280c6ac054a342: in_x, in_b, sizes -> out_out
{
  const int group = int(blockIdx.x + blockIdx.y * gridDim.x);
  const int thread_index = int(threadIdx.x);
  const int rows = sizes[0];
  const int cols = sizes[1];
  const int n = rows * cols;
  const int first = group * 1024;
  if (first >= n) return;
  const bool wide0 = zk_aligned<8>(in_x);
  const bool wide1 = zk_aligned<8>(in_b);
  const bool even0 = zk_aligned<8>(out_out);
  __nv_bfloat16 r0[8];
  __nv_bfloat16 r1[8];
  const int c = first + thread_index * 8;
  const int row0 = int(uint32_t(c) / uint32_t(cols));
  const int col0 = c - row0 * cols;
  if (wide0 && c + 8 <= n) {
    zk_load<8>(in_x + c, r0);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      r0[j] = c + j < n ? in_x[c + j] : __nv_bfloat16(0.0f);
    }
  }
  if (wide1 && col0 % 8 == 0 && c + 8 <= n && col0 + 8 <= cols) {
    zk_load<8>(in_b + col0, r1);
  } else {
    {
      int row = row0, col = col0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const bool inside = c + j < n;
        r1[j] = inside ? in_b[col] : __nv_bfloat16(0.0f);
        if (++col == cols) { col = 0; ++row; }
      }
    }
  }
  __nv_bfloat16 w0[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float v0 = float(r0[j]);
    const float v1 = float(r1[j]);
    const float v2 = v0 + v1;
    const float v3 = v2 / (1.0f + expf(-v2));
    w0[j] = __nv_bfloat16(v3);
  }
  if (even0 && c + 8 <= n) {
    zk_store<8>(out_out + c, w0);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (c + j < n) out_out[c + j] = w0[j];
    }
  }
}
