// softmax(x: f32) -> out: f32 = exp((x - row_max(x))) * (1 / row_sum(exp((x - row_max(x)))))
inline bool zk_isnan(float a) {
  return (as_type<uint32_t>(a) & 0x7fffffffu) > 0x7f800000u;
}
// NaN if either is.
inline float zk_max(float a, float b) {
  return a > b || zk_isnan(a) ? a : b;
}
// softmax_160cd7cc5ae75a01: in_x, sizes -> out_out
{
  const int group = int(threadgroup_position_in_grid.x + threadgroup_position_in_grid.y * threadgroups_per_grid.x);
  const int thread_index = int(thread_index_in_threadgroup);
  const int rows = sizes[0];
  const int cols = sizes[1];
  const int lane = thread_index;
  const int place = group;
  const bool live = place < rows;
  const int row = live ? place : rows - 1;
  const int base = row * cols;
  const int end = live ? cols : 0;
  float r0[8];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int c = (k * 64 + lane) * 4;
    if (c + 4 <= cols) {
#pragma unroll
      for (int j = 0; j < 4; ++j) r0[k * 4 + j] = in_x[base + c + j];
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        r0[k * 4 + j] = c + j < cols ? in_x[base + c + j] : 0.0f;
      }
    }
  }
  float k3[8];
  float a1 = as_type<float>(0xff800000u);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int c = (k * 64 + lane) * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float v0 = r0[k * 4 + j];
      if (c + j < cols) {
        a1 = zk_max(a1, v0);
      }
    }
  }
#pragma unroll
  for (int m = 16; m > 0; m >>= 1) {
    const float b = simd_shuffle_xor(a1, ushort(m));
    a1 = zk_max(a1, b);
  }
  threadgroup float z1[2];
  if (thread_index % 32 == 0) {
    z1[thread_index / 32] = a1;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  a1 = z1[thread_index % 2];
#pragma unroll
  for (int m = 1; m > 0; m >>= 1) {
    const float b = simd_shuffle_xor(a1, ushort(m));
    a1 = zk_max(a1, b);
  }
  const float u1 = a1;
  float a4 = 0.0f;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int c = (k * 64 + lane) * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float v0 = r0[k * 4 + j];
      const float v2 = v0 - u1;
      const float v3 = metal::precise::exp(v2);
      k3[k * 4 + j] = v3;
      if (c + j < cols) {
        a4 = a4 + v3;
      }
    }
  }
  a4 = simd_sum(a4);
  threadgroup float z4[2];
  if (thread_index % 32 == 0) {
    z4[thread_index / 32] = a4;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  a4 = z4[thread_index % 2];
#pragma unroll
  for (int m = 1; m > 0; m >>= 1) {
    const float b = simd_shuffle_xor(a4, ushort(m));
    a4 = a4 + b;
  }
  const float u4 = a4;
  const float u6 = 1.0f / u4;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int c = (k * 64 + lane) * 4;
    float w0[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float v3 = k3[k * 4 + j];
      const float v7 = v3 * u6;
      w0[j] = v7;
    }
    if (c + 4 <= end) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out_out[base + c + j] = w0[j];
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (c + j < end) out_out[base + c + j] = w0[j];
      }
    }
  }
}
