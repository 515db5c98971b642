// What all kernels share. No header is included: NVRTC has vectors, shuffles and mathematics built in. Where an
// instruction has no C++ name it stands behind a function with a plain twin, which the emulator compiles.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define DEVICE __device__ __forceinline__
constexpr u32 ALL_LANES = 0xffffffffu;
#define CUDA_INFINITY __uint_as_float(0x7f800000u)

// 16-bit floats are told apart by these; storage is u16.
enum Kind { KIND_F32 = 0, KIND_F16 = 1, KIND_BF16 = 2 };

// Moments of a block that a timeline has.
enum Moment { MOMENT_BEGUN = 0, MOMENT_WAITED = 1, MOMENT_PLACED = 2, MOMENT_SUMMED = 3, MOMENT_DONE = 4 };
constexpr int MOMENTS = 5;

#ifdef TIMELINE
DEVICE u64*& timeline_of_block() {
  __shared__ u64* at;
  return at;
}
// Notes when the first thread of the block comes here, in nanoseconds of the GPU's clock.
DEVICE void moment(Moment which) {
  if (threadIdx.x != 0) return;
  u64 now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now) :: "memory");
  timeline_of_block()[which] = now;
}
DEVICE void timeline_begins(u64* timeline) {
  u64 block = (static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) timeline_of_block() = timeline + block * MOMENTS;
  moment(MOMENT_BEGUN);
}
#else
DEVICE void moment(Moment) {}
#endif

#ifdef __CUDA_ARCH__
// Waits until the launches before this one are complete and what they wrote can be seen (programmatic dependent launch).
DEVICE void zmlx_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  moment(MOMENT_WAITED);
}
// Lets the launch after this one begin with what does not depend on it.
DEVICE void zmlx_release() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Weights are read once: they need no room in the first-level cache. Volatile, so that they are asked for where the text
// says so, before waiting for the launch before.
DEVICE uint4 load_weights(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEVICE u8 load_weights(const u8* p) {
  u32 v;
  asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p));
  return static_cast<u8>(v);
}
DEVICE u16 load_weights(const u16* p) {
  u16 v;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
DEVICE u32 load_weights(const u32* p) {
  u32 v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
DEVICE float load_weights(const float* p) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}
DEVICE float4 load_weights(const float4* p) {
  float4 v;
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
  return v;
}
// What launches before this one wrote, asked for where the text says so.
DEVICE float4 load_now(const float4* p) {
  float4 v;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
// The same past the first-level cache.
DEVICE float4 load_anew(const float4* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE float load_anew(const float* p) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
DEVICE float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
DEVICE u16 float_to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
// Copies to shared memory that go on by themselves, in groups; zeros where there is nothing to copy.
DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
DEVICE void copy_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
DEVICE void copy_4(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
DEVICE void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all groups of the thread but the last N have come.
template <int N> DEVICE void wait_groups() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }
// Values that blocks of one launch hand to each other.
DEVICE void publish(float* p, float v) { asm volatile("st.relaxed.gpu.f32 [%0], %1;" :: "l"(p), "f"(v) : "memory"); }
DEVICE float published(float* p) {
  float v;
  asm volatile("ld.relaxed.gpu.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
}
DEVICE float4 published4(float* p) {
  float4 v;
  asm volatile("ld.relaxed.gpu.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
#else
DEVICE void zmlx_wait() {}
DEVICE void zmlx_release() {}
template <class T> DEVICE T load_weights(const T* p) { return *p; }
DEVICE float4 load_now(const float4* p) { return *p; }
DEVICE float4 load_anew(const float4* p) { return *p; }
DEVICE float load_anew(const float* p) { return *p; }
DEVICE void copy_16(void* to, const void* from, bool valid) {
  *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : make_uint4(0u, 0u, 0u, 0u);
}
DEVICE void copy_4(void* to, const void* from, bool valid) {
  *static_cast<u32*>(to) = valid ? *static_cast<const u32*>(from) : 0u;
}
DEVICE void end_group() {}
template <int N> DEVICE void wait_groups() {}
DEVICE float half_to_float(u16 h) { return __half2float(__ushort_as_half(h)); }
DEVICE u16 float_to_half(float f) { return __half_as_ushort(__float2half_rn(f)); }
DEVICE void publish(float* p, float v) { zs::atomic_write(p, v); }
DEVICE float published(float* p) { return zs::atomic_read(p); }
DEVICE float4 published4(float* p) {
  return make_float4(published(p), published(p + 1), published(p + 2), published(p + 3));
}
#endif

DEVICE float bfloat_to_float(u16 b) { return __uint_as_float(static_cast<u32>(b) << 16); }
// Rounds to nearest even; NaN stays NaN.
DEVICE u16 float_to_bfloat(float f) {
  u32 b = __float_as_uint(f);
  if ((b & 0x7fffffffu) > 0x7f800000u) return static_cast<u16>(b >> 16 | 0x40u);
  return static_cast<u16>((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
}

template <int KIND> DEVICE float widen(u16 v) { return KIND == KIND_F16 ? half_to_float(v) : bfloat_to_float(v); }
template <int KIND> DEVICE float widen(float v) { return v; }
template <int KIND> DEVICE void narrow(float v, u16* to) {
  *to = KIND == KIND_F16 ? float_to_half(v) : float_to_bfloat(v);
}
template <int KIND> DEVICE void narrow(float v, float* to) { *to = v; }

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }

DEVICE float warp_sum(float v) {
#pragma unroll
  for (int n = 16; n > 0; n /= 2) v += __shfl_xor_sync(ALL_LANES, v, n);
  return v;
}
// The largest, NaN if any is.
DEVICE float larger(float a, float b) { return a > b || isnan(a) ? a : b; }
DEVICE float warp_largest(float v) {
#pragma unroll
  for (int n = 16; n > 0; n /= 2) v = larger(__shfl_xor_sync(ALL_LANES, v, n), v);
  return v;
}

// Integers in the order of floats; NaN above all.
DEVICE u32 ordered(float f) {
  u32 b = __float_as_uint(f + 0.0f);
  if (isnan(f)) return 0xffffffffu;
  return b & 0x80000000u ? ~b : b | 0x80000000u;
}

// Whether this block is the last of `blocks` to come here; what the others published before it is seen after it. All
// threads call it. The counter is zero again afterwards.
DEVICE bool last_block(u32* arrived, u32 blocks) {
  __shared__ u32 ticket;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    ticket = atomicAdd(arrived, 1u);
    if (ticket == blocks - 1) atomicExch(arrived, 0u);
  }
  __syncthreads();
  bool last = ticket == blocks - 1;
  __threadfence();
  return last;
}

// Sum over the block, in one order whatever the threads do; all threads call it and all get it. `room`: a float a warp.
template <int WARPS_OF_BLOCK> DEVICE float block_sum(float v, float* room) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < WARPS_OF_BLOCK; i++) total += room[i];
  return total;
}

enum Act { ACT_NONE = 0, ACT_SILU = 1, ACT_GELU_TANH = 2, ACT_GELU_ERF = 3, ACT_CLAMPED = 4 };
// act(gate) * up.
template <int ACT> DEVICE float gated(float gate, float up, float alpha, float limit) {
  if (ACT == ACT_SILU) return silu(gate) * up;
  if (ACT == ACT_GELU_TANH) {
    float inner = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
    return 0.5f * gate * (1.0f + tanhf(inner)) * up;
  }
  if (ACT == ACT_GELU_ERF) return 0.5f * gate * (1.0f + erff(gate * 0.7071067811865476f)) * up;
  // Comparisons that NaN passes through.
  if (gate > limit) gate = limit;
  if (up > limit) up = limit;
  if (up < -limit) up = -limit;
  return gate * sigmoid(alpha * gate) * (1.0f + up);
}
