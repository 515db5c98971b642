// Logits [TOKENS, WIDTH] that are there already.
DEVICE void argmax(const float* logits, Next next) {
  zmlx_release();
  zmlx_wait();
  for (int t = 0; t < TOKENS; t++) {
    u64 best = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < WIDTH; i += gridDim.x * blockDim.x) {
      u64 key = key_of(logits[static_cast<u64>(t) * WIDTH + i], static_cast<u32>(i));
      best = key > best ? key : best;
    }
    offer(next, best, t);
  }
  if (last_block(next.arrived, gridDim.x)) advance(next);
}
