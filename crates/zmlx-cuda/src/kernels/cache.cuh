// Reading caches of keys and values: 16 bytes at a time, once.

constexpr int ELEMENTS = 16 / sizeof(CACHE);

#ifdef __CUDA_ARCH__
DEVICE uint4 load_cache(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
#else
DEVICE uint4 load_cache(const void* p) { return *reinterpret_cast<const uint4*>(p); }
#endif

DEVICE void unpack(const uint4& v, float (&to)[ELEMENTS]) {
  const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (CACHE_KIND == KIND_F32) {
      to[i] = __uint_as_float(w[i]);
    } else {
      to[2 * i] = widen<CACHE_KIND>(static_cast<u16>(w[i]));
      to[2 * i + 1] = widen<CACHE_KIND>(static_cast<u16>(w[i] >> 16));
    }
  }
}
