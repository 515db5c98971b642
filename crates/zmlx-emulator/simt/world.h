// State of a launch, and how it fails. Part of runtime.cpp.
#pragma once
#include "abi.h"
#include "context.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#if defined(__linux__)
#include <link.h>
#endif

namespace {

constexpr uint32_t MAX_THREADS = 1024, LANES = 32, MAX_REGIONS = 192;
constexpr uint64_t MARK = 0x5ca1ab1e0ddba115ull;
constexpr size_t PAGE = 16384, GUARD = 1 << 20;

// The low bit says that memory changes; from 2 on the access is atomic.
enum Access : uint32_t { READ = 0, WRITE = 1, ATOMIC_READ = 2, ATOMIC_UPDATE = 3, ATOMIC_STORE = 5 };
enum State : uint8_t { READY, AT_BARRIER, AT_SIMD, DONE };

// A write, or the last one of a kind, to a cell.
struct Stamp {
  uint32_t group = ~0u, epoch = 0, simd_epoch = 0;
  uint16_t thread = 0;
  bool atomic = false;
};
// Lanes of one simdgroup that have read a cell since its last simd-level barrier.
struct Readers {
  uint32_t group = ~0u, epoch = 0, simd_epoch = 0, lanes = 0;
  uint16_t simd = 0;
  bool atomic = false;
};
// Readers of two simdgroups are enough: a writer is unordered with one of them whenever it is unordered with any.
struct Cell {
  Stamp write;
  Readers read[2];
  bool filled = false;
};

struct Region {
  uint8_t* base;
  size_t bytes;
  uint32_t element;
  uint32_t memory;  // 0 shared, 1 device
  bool writable;
  Cell* cells;      // one an element; none for inputs
  char name[48];
};

struct Fiber {
  Context context;
  ZsThread at;
  State state;
  uint32_t kind, mask;     // of the simd op it waits for
  uint32_t shared, device; // what its barrier orders
  int line;
  uint64_t value;
  uint64_t all[LANES];
  uint32_t active;
};

struct World {
  const ZsLaunch* launch;
  ZsReport* report;
  uint8_t* arena = nullptr;
  size_t arena_bytes = 0, used = 0, device_used = 0;
  Region regions[MAX_REGIONS];
  uint32_t region_count = 0, device_regions = 0, last_region = 0;
  void* args[MAX_REGIONS];
  uint8_t* stacks = nullptr;
  Fiber fibers[MAX_THREADS];
  Context scheduler;
  Fiber* self = nullptr;
  uint32_t threads = 0, live = 0, simds = 0;
  uint32_t ready[MAX_THREADS], ready_count = 0;
  uint32_t group = 0, serial = 0, epoch[2] = {0, 0}, simd_epoch[2][LANES];
  size_t shared_bytes = 0;
  Region* dynamic = nullptr;
  uint64_t random = 1, steps = 0;
  uintptr_t image_low = 0, image_high = 0, image_base = 0;
};

World w;
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

uint32_t draw(uint32_t below) {
  w.random ^= w.random << 13;
  w.random ^= w.random >> 7;
  w.random ^= w.random << 17;
  return static_cast<uint32_t>((w.random >> 32) * below >> 32);
}

void copy_dim(uint32_t* to, const ZsDim& d) { to[0] = d.x; to[1] = d.y; to[2] = d.z; }

void describe(const char* format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(w.report->text, sizeof w.report->text, format, list);
  va_end(list);
}

void blame(const Fiber& f) {
  copy_dim(w.report->thread, f.at.local);
  copy_dim(w.report->group, f.at.group);
}

// Leaves the fiber for good: the launch has failed.
[[noreturn]] void stop() {
  Context dead;
  change(dead, w.scheduler);
  abort();
}

void to_scheduler() { change(w.self->context, w.scheduler); }

void make_ready(Fiber& f) {
  f.state = READY;
  w.ready[w.ready_count++] = static_cast<uint32_t>(&f - w.fibers);
}

void yield() {
  make_ready(*w.self);
  to_scheduler();
}

[[noreturn]] void fail(uint32_t code, const Region* region, int64_t offset, bool write, void* pc) {
  ZsReport& r = *w.report;
  r.code = code;
  r.write = write;
  blame(*w.self);
  r.pc = reinterpret_cast<uintptr_t>(pc) - w.image_base;
  if (region) {
    snprintf(r.name, sizeof r.name, "%s", region->name);
    int64_t e = region->element;
    r.index = offset >= 0 ? offset / e : (offset - e + 1) / e;
    r.length = region->bytes / e;
  }
  stop();
}

}  // namespace
