// Large outputs of CPU primitives, recycled. MLX's CPU allocator gives every buffer back to the system, and touching
// fresh pages costs several times what a memory-bound kernel does. The GPU libraries keep a cache of their own.
#include "api.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <list>

#include "mlx/allocator.h"
#include "mlx/backend/cuda/cuda.h"
#include "mlx/backend/metal/metal.h"

namespace {

constexpr size_t kSmallest = size_t(1) << 20;

struct Pool {
  std::mutex lock;
  std::list<mx::allocator::Buffer> kept;  // the newest first
  size_t bytes = 0;
  size_t limit = size_t(1) << 30;
};

// Never destroyed: buffers come back while the process ends.
Pool& pool() {
  static auto* p = new Pool;
  return *p;
}

size_t size_of_buffer(const mx::allocator::Buffer& b) { return mx::allocator::allocator().size(b); }

void shrink(Pool& p, size_t limit) {
  while (p.bytes > limit) {
    auto oldest = p.kept.back();
    p.kept.pop_back();
    p.bytes -= size_of_buffer(oldest);
    mx::allocator::allocator().free(oldest);
  }
}

void give_back(mx::allocator::Buffer b) {
  auto& p = pool();
  std::lock_guard hold(p.lock);
  p.bytes += size_of_buffer(b);
  p.kept.push_front(b);
  shrink(p, p.limit);
}

}  // namespace

mx::allocator::Data pool_malloc(size_t bytes) {
  static const bool recycles = !mx::cu::is_available() && !mx::metal::is_available();
  if (!recycles || bytes < kSmallest) return mx::allocator::malloc(bytes);
  auto& p = pool();
  {
    std::lock_guard hold(p.lock);
    for (auto it = p.kept.begin(); it != p.kept.end(); ++it) {
      size_t size = size_of_buffer(*it);
      if (size < bytes || size - bytes > bytes / 4) continue;
      auto b = *it;
      p.kept.erase(it);
      p.bytes -= size;
      return {b, give_back};
    }
  }
  auto b = mx::allocator::allocator().malloc(bytes);
  if (!b.ptr()) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Large pages where the system has them: fewer faults now and fewer misses of the address cache later. Only a hint.
  constexpr uintptr_t large = uintptr_t(2) << 20;
  auto start = (reinterpret_cast<uintptr_t>(b.raw_ptr()) + large - 1) / large * large;
  auto end = (reinterpret_cast<uintptr_t>(b.raw_ptr()) + bytes) / large * large;
  if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
  return {b, give_back};
}

size_t pool_bytes() {
  std::lock_guard hold(pool().lock);
  return pool().bytes;
}

void pool_clear() {
  std::lock_guard hold(pool().lock);
  shrink(pool(), 0);
}

void pool_set_limit(size_t bytes) {
  std::lock_guard hold(pool().lock);
  pool().limit = bytes;
  shrink(pool(), bytes);
}
