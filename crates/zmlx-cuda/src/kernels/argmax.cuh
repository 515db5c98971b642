// The largest logit of each row and what follows a decoded token. Keys are 64 bits: the logit in the order of integers, then
// the index from above, so that the largest key is the lowest index of the largest logit. NaN ranks below all.

struct Next {
  u64* best;         // [TOKENS], zero between launches
  u32* arrived;      // zero between launches
  u32* tokens;       // [TOKENS]: what the next step embeds
  int* position;     // of the next step's first token
  u32* ring;         // [RING, TOKENS] in memory that the host reads
  u32* count;        // steps so far, in device memory
  u32* published;    // the same, in memory that the host reads, stored after the ring's entry
};

DEVICE u64 key_of(float logit, u32 index) {
  u32 rank = isnan(logit) ? 0u : ordered(logit);
  return static_cast<u64>(rank) << 32 | static_cast<u32>(~index);
}

#ifdef __CUDA_ARCH__
DEVICE void fence_host() { __threadfence_system(); }
DEVICE void store_host(u32* p, u32 v) { asm volatile("st.relaxed.sys.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory"); }
#else
DEVICE void fence_host() {}
DEVICE void store_host(u32* p, u32 v) { *p = v; }
#endif

// The block's best keys (a thread's own for row t in `mine`) into device memory. All threads call it.
DEVICE void offer(const Next& next, u64 mine, int t) {
  __shared__ u64 of_block;
  __syncthreads();
  if (threadIdx.x == 0) of_block = 0;
  __syncthreads();
#pragma unroll
  for (int n = 16; n > 0; n /= 2) {
    u64 other = __shfl_xor_sync(ALL_LANES, mine, n);
    mine = other > mine ? other : mine;
  }
  if (threadIdx.x % 32 == 0) atomicMax(&of_block, mine);
  __syncthreads();
  if (threadIdx.x == 0) atomicMax(next.best + t, of_block);
}

// By the last block: stores the tokens, appends them to the ring and advances the position.
DEVICE void advance(const Next& next) {
  if (threadIdx.x == 0) {
    u32 step = *next.count;
    for (int t = 0; t < TOKENS; t++) {
      u32 token = ~static_cast<u32>(atomicExch(next.best + t, u64(0)));
      next.tokens[t] = token;
      store_host(next.ring + static_cast<u64>(step % RING) * TOKENS + t, token);
    }
    *next.position += 1;
    *next.count = step + 1;
    fence_host();
    store_host(next.published, step + 1);
  }
}
