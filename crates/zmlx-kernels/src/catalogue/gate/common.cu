template <typename T>
__device__ __forceinline__ unsigned gate_bits(T v) { return __float_as_uint(float(v)); }
__device__ __forceinline__ float gate_float(unsigned bits) { return __uint_as_float(bits); }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ __forceinline__ unsigned gate_max(unsigned v) { return __reduce_max_sync(0xffffffffu, v); }
__device__ __forceinline__ unsigned gate_min(unsigned v) { return __reduce_min_sync(0xffffffffu, v); }
#else
__device__ __forceinline__ unsigned gate_max(unsigned v) {
  for (int n = 16; n > 0; n /= 2) v = max(v, __shfl_xor_sync(0xffffffffu, v, n));
  return v;
}
__device__ __forceinline__ unsigned gate_min(unsigned v) {
  for (int n = 16; n > 0; n /= 2) v = min(v, __shfl_xor_sync(0xffffffffu, v, n));
  return v;
}
#endif
__device__ __forceinline__ float gate_sum(float v) {
  for (int n = 16; n > 0; n /= 2) v += __shfl_xor_sync(0xffffffffu, v, n);
  return v;
}
__device__ __forceinline__ float gate_exp(float v) { return expf(v); }
#define GATE_FN __device__ __forceinline__
