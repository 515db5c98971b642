// Stand-in for the header that MLX puts before every CUDA kernel: the names that bodies may count on.
// Used by the emulator and by the NVRTC check, each of which has declared the CUDA types before.
#pragma once

#define MAX_NDIM 10
#define WARP_SIZE 32

namespace mlx::core::cu {

using Shape = cuda::std::array<int32_t, MAX_NDIM>;
using Strides = cuda::std::array<int64_t, MAX_NDIM>;

// N values that are loaded and stored in one piece.
template <typename T, int N>
struct alignas(sizeof(T) * N) AlignedVector {
  T val[N];
  __device__ T& operator[](int i) { return val[i]; }
  __device__ const T& operator[](int i) const { return val[i]; }
};

template <int N, typename T>
inline __device__ bool is_aligned(T* p) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * N) == 0;
}

template <int N, typename T>
inline __device__ AlignedVector<T, N> unsafe_load_vector(const T* p, uint32_t at) {
  return reinterpret_cast<const AlignedVector<T, N>*>(p)[at];
}

// The vector number `at`, in one piece where the pointer allows.
template <int N, typename T>
inline __device__ AlignedVector<T, N> load_vector(const T* p, uint32_t at) {
  if (is_aligned<N>(p)) return unsafe_load_vector<N>(p, at);
  AlignedVector<T, N> v;
  for (int i = 0; i < N; ++i) v[i] = p[at * N + i];
  return v;
}

// The same, with `fallback` for elements at or past `size`.
template <int N, typename T, typename SizeT>
inline __device__ AlignedVector<T, N> load_vector(const T* p, uint32_t at, SizeT size, T fallback) {
  if (is_aligned<N>(p) && (at + 1) * N <= size) return unsafe_load_vector<N>(p, at);
  AlignedVector<T, N> v;
  for (int i = 0; i < N; ++i) v[i] = at * N + i < size ? p[at * N + i] : fallback;
  return v;
}

template <int N, typename T>
inline __device__ void unsafe_store_vector(T* p, uint32_t at, const AlignedVector<T, N>& v) {
  reinterpret_cast<AlignedVector<T, N>*>(p)[at] = v;
}

template <int N, typename T>
inline __device__ void store_vector(T* p, uint32_t at, const AlignedVector<T, N>& v) {
  if (is_aligned<N>(p)) {
    unsafe_store_vector(p, at, v);
  } else {
    for (int i = 0; i < N; ++i) p[at * N + i] = v[i];
  }
}

template <int N, typename T, typename SizeT>
inline __device__ void store_vector(T* p, uint32_t at, const AlignedVector<T, N>& v, SizeT size) {
  if (is_aligned<N>(p) && (at + 1) * N <= size) {
    unsafe_store_vector(p, at, v);
  } else {
    for (int i = 0; i < N && at * N + i < size; ++i) p[at * N + i] = v[i];
  }
}

template <typename IdxT = int64_t>
inline __device__ IdxT elem_to_loc(IdxT elem, const int* shape, const int64_t* strides, int ndim) {
  IdxT at = 0;
  for (int i = ndim; i-- > 0;) {
    at += elem % shape[i] * IdxT(strides[i]);
    elem /= shape[i];
  }
  return at;
}

}  // namespace mlx::core::cu
