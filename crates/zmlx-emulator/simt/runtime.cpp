// The scheduler: GPU threads as fibers, one group after another, in an order drawn from a seed.
//
// Kernel text is compiled with the compiler's thread-sanitizer instrumentation, and this file stands in for the
// sanitizer's library: every load and store of a kernel that may reach memory calls `access` first. There it is
// checked for bounds, for values never written, and for races. Bounds of C++ arrays, alignment and integer division
// come the same way from the undefined-behaviour instrumentation.
#include "memory.h"

namespace {

// One more region of the arena, between guards. Fails the launch when the arena is full.
Region* add_region(const char* name, size_t bytes, uint32_t element, size_t offset, bool cells, uint32_t memory) {
  size_t start = w.used + GUARD + offset, end = start + bytes;
  if (end + GUARD > w.arena_bytes || w.region_count == MAX_REGIONS) return nullptr;
  Region& r = w.regions[w.region_count++];
  r = Region{w.arena + start, bytes, element ? element : 1, memory, cells, nullptr, {}};
  snprintf(r.name, sizeof r.name, "%s", name);
  w.used = (end + PAGE - 1) / PAGE * PAGE;
  if (bytes) {
    uint8_t* low = w.arena + (start - offset) / PAGE * PAGE;
    if (mprotect(low, static_cast<size_t>(w.arena + w.used - low), PROT_READ | PROT_WRITE)) return nullptr;
  }
  // The first page of the guard stays closed, and what lies there is never read by the runtime itself.
  if (cells) r.cells = new Cell[bytes / r.element + 1];
  return &r;
}

void drop_regions(uint32_t from, size_t used) {
  for (uint32_t i = from; i < w.region_count; i++) delete[] w.regions[i].cells;
  w.region_count = from;
  w.used = used;
  w.last_region = 0;
}

bool set_up() {
  if (!w.arena) {
    for (size_t bytes = size_t(1) << 36; bytes >= (size_t(1) << 30) && !w.arena; bytes >>= 1) {
      void* p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
      if (p != MAP_FAILED) { w.arena = static_cast<uint8_t*>(p); w.arena_bytes = bytes; }
    }
  }
  if (!w.stacks) {
    void* p = mmap(nullptr, STACK * MAX_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    if (p != MAP_FAILED) w.stacks = static_cast<uint8_t*>(p);
  }
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&zs_run), &info)) w.image_base = reinterpret_cast<uintptr_t>(info.dli_fbase);
#if defined(__linux__)
  dl_iterate_phdr([](dl_phdr_info* i, size_t, void*) {
    uintptr_t low = ~uintptr_t(0), high = 0;
    for (int k = 0; k < i->dlpi_phnum; k++) {
      if (i->dlpi_phdr[k].p_type != PT_LOAD) continue;
      uintptr_t start = i->dlpi_addr + i->dlpi_phdr[k].p_vaddr;
      if (start < low) low = start;
      if (start + i->dlpi_phdr[k].p_memsz > high) high = start + i->dlpi_phdr[k].p_memsz;
    }
    uintptr_t own = reinterpret_cast<uintptr_t>(&w);
    if (own < low || own >= high) return 0;
    w.image_low = low;
    w.image_high = high;
    return 1;
  }, nullptr);
#endif
  return w.arena && w.stacks;
}

void fiber_main() {
  w.launch->entry(w.args, &w.self->at);
  w.self->state = DONE;
  w.live--;
  to_scheduler();
  abort();
}

// Lets the threads that wait at a barrier go on when all that must come have come.
void try_barrier() {
  uint32_t waiting = 0;
  Fiber* first = nullptr;
  for (uint32_t i = 0; i < w.threads; i++) {
    Fiber& f = w.fibers[i];
    // CUDA counts threads that have returned as arrived, Metal does not.
    if (f.state == DONE && w.launch->cuda) continue;
    if (f.state != AT_BARRIER) return;
    if (!first) first = &f;
    if (f.line != first->line) return;
    waiting++;
  }
  if (!waiting) return;
  w.epoch[0] += first->shared;
  w.epoch[1] += first->device;
  for (uint32_t i = 0; i < w.threads; i++) {
    if (w.fibers[i].state == AT_BARRIER) make_ready(w.fibers[i]);
  }
}

// The same for an operation across a simdgroup. Lanes that have returned take no part.
void try_simd(uint32_t simd) {
  uint32_t from = simd * LANES, to = from + LANES < w.threads ? from + LANES : w.threads;
  for (uint32_t lead = from; lead < to; lead++) {
    Fiber& first = w.fibers[lead];
    if (first.state != AT_SIMD) continue;
    uint32_t active = 0;
    bool whole = true;
    for (uint32_t i = from; i < to && whole; i++) {
      Fiber& f = w.fibers[i];
      if (!(first.mask >> (i - from) & 1) || f.state == DONE) continue;
      whole = f.state == AT_SIMD && f.line == first.line && f.kind == first.kind && f.mask == first.mask;
      active |= 1u << (i - from);
    }
    if (!whole) continue;
    w.simd_epoch[0][simd] += first.shared;
    w.simd_epoch[1][simd] += first.device;
    for (uint32_t i = from; i < to; i++) {
      if (!(active >> (i - from) & 1)) continue;
      Fiber& f = w.fibers[i];
      f.active = active;
      for (uint32_t k = 0; k < LANES; k++) f.all[k] = active >> k & 1 ? w.fibers[from + k].value : 0;
    }
    for (uint32_t i = from; i < to; i++) {
      if (active >> (i - from) & 1) make_ready(w.fibers[i]);
    }
    return;
  }
}

void report_stuck() {
  ZsReport& r = *w.report;
  r.code = ZS_DIVERGENCE;
  size_t n = 0;
  uint32_t shown = 0;
  int seen_line = -1, seen_state = -1;
  for (uint32_t i = 0; i < w.threads && shown < 4; i++) {
    Fiber& f = w.fibers[i];
    int line = f.state == DONE ? 0 : f.line;
    if (f.state == seen_state && line == seen_line) continue;
    if (!shown) blame(f);
    seen_state = f.state;
    seen_line = line;
    shown++;
    const char* what = f.state == DONE ? "has returned" : f.state == AT_SIMD ? "waits at a simd operation" : "waits at a barrier";
    int k = snprintf(r.text + n, sizeof r.text - n, f.state == DONE ? "%sthread (%u, %u, %u) %s" : "%sthread (%u, %u, %u) %s in line %d",
                     n ? "; " : "", f.at.local.x, f.at.local.y, f.at.local.z, what, line);
    if (k > 0) n += static_cast<size_t>(k);
    if (n >= sizeof r.text) break;
  }
}

ZsDim position(uint32_t i, const ZsDim& size) { return {i % size.x, i / size.x % size.y, i / size.x / size.y}; }

void start_group(uint32_t number, const ZsDim& groups, const ZsDim& nominal) {
  const ZsLaunch& l = *w.launch;
  ZsDim grid{l.grid[0], l.grid[1], l.grid[2]}, g = position(number, groups), size = nominal;
  if (!l.cuda) {
    if (grid.x - g.x * size.x < size.x) size.x = grid.x - g.x * size.x;
    if (grid.y - g.y * size.y < size.y) size.y = grid.y - g.y * size.y;
    if (grid.z - g.z * size.z < size.z) size.z = grid.z - g.z * size.z;
  }
  w.group = number;
  w.serial++;
  w.threads = w.live = size.x * size.y * size.z;
  w.simds = (w.threads + LANES - 1) / LANES;
  w.epoch[0] = w.epoch[1] = 1;
  memset(w.simd_epoch, 0, sizeof w.simd_epoch);
  w.ready_count = 0;
  for (uint32_t i = 0; i < w.threads; i++) {
    Fiber& f = w.fibers[i];
    f.at = {position(i, size), g, size, nominal, groups, grid, i, i % LANES, i / LANES, w.simds};
    stack_mark(i) = MARK;
    prepare(f.context, w.stacks + i * STACK, fiber_main);
    make_ready(f);
  }
}

bool run_group() {
  while (w.live) {
    if (!w.ready_count) {
      report_stuck();
      return false;
    }
    uint32_t pick = draw(w.ready_count), i = w.ready[pick];
    w.ready[pick] = w.ready[--w.ready_count];
    w.self = &w.fibers[i];
    change(w.scheduler, w.self->context);
    State state = w.self->state;
    uint32_t simd = w.self->at.simd;
    w.self = nullptr;
    if (w.report->code) return false;
    if (stack_mark(i) != MARK) {
      w.report->code = ZS_RESOURCE;
      describe("private memory of a thread exceeds %zu bytes", STACK);
      return false;
    }
    if (state == AT_BARRIER || (state == DONE && w.launch->cuda)) try_barrier();
    if (state == AT_SIMD || state == DONE) try_simd(simd);
  }
  return true;
}

bool place_buffers() {
  const ZsLaunch& l = *w.launch;
  for (uint64_t i = 0; i < l.count; i++) {
    const ZsBuffer& b = l.buffers[i];
    Region* r = add_region(b.name, b.bytes, b.element, b.offset, b.kind == ZS_OUTPUT, 1);
    if (!r) {
      w.report->code = ZS_RESOURCE;
      describe("no room for buffer %s of %llu bytes", b.name, static_cast<unsigned long long>(b.bytes));
      return false;
    }
    if (b.bytes) memcpy(r->base, b.data, b.bytes);
    for (size_t k = 0; r->cells && b.filled && k < b.bytes / r->element; k++) r->cells[k].filled = true;
    w.args[i] = r->base;
  }
  w.device_regions = w.region_count;
  w.device_used = w.used;
  return true;
}

void collect() {
  const ZsLaunch& l = *w.launch;
  for (uint64_t i = 0; i < l.count; i++) {
    const ZsBuffer& b = l.buffers[i];
    Region& r = w.regions[i];
    if (b.kind != ZS_OUTPUT) continue;
    if (b.bytes) memcpy(b.data, r.base, b.bytes);
    ZsReport& out = *w.report;
    if (out.code) continue;
    uint64_t missing = 0;
    for (size_t k = 0; k < b.bytes / r.element; k++) {
      if (r.cells[k].filled) continue;
      if (missing < 8) out.missing[missing] = k;
      missing++;
    }
    if (!missing) continue;
    out.code = ZS_UNWRITTEN;
    out.missing_count = missing;
    out.length = b.bytes / r.element;
    snprintf(out.name, sizeof out.name, "%s", r.name);
  }
}

void run_groups() {
  const ZsLaunch& l = *w.launch;
  ZsDim size{l.group[0] < l.grid[0] ? l.group[0] : l.grid[0], l.group[1] < l.grid[1] ? l.group[1] : l.grid[1],
             l.group[2] < l.grid[2] ? l.group[2] : l.grid[2]};
  // CUDA's grid is counted with the group as asked, though the group may have been cut to the grid.
  ZsDim groups{(l.grid[0] + l.group[0] - 1) / l.group[0], (l.grid[1] + l.group[1] - 1) / l.group[1],
               (l.grid[2] + l.group[2] - 1) / l.group[2]};
  uint64_t count = uint64_t(groups.x) * groups.y * groups.z;
  // A walk with a step prime to the count visits every group once, in an order of the seed's.
  uint64_t stride = count > 2 ? 1 + draw(static_cast<uint32_t>(count > 0xffffffffu ? 0xffffffffu : count - 1)) : 1;
  auto gcd = [](uint64_t a, uint64_t b) { while (b) { uint64_t t = a % b; a = b; b = t; } return a; };
  while (gcd(stride, count) != 1) stride++;
  uint64_t at = count > 1 ? draw(static_cast<uint32_t>(count > 0xffffffffu ? 0xffffffffu : count)) : 0;
  for (uint64_t k = 0; k < count; k++, at = (at + stride) % count) {
    drop_regions(w.device_regions, w.device_used);
    w.shared_bytes = 0;
    w.dynamic = nullptr;
    start_group(static_cast<uint32_t>(at), groups, size);
    if (!run_group()) return;
  }
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) uint32_t zs_run(const ZsLaunch* launch, ZsReport* report) {
  pthread_mutex_lock(&lock);
  memset(report, 0, sizeof *report);
  w.launch = launch;
  w.report = report;
  w.steps = 0;
  w.random = launch->seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;
  if (!w.random) w.random = 1;
  for (int i = 0; i < 8; i++) draw(2);
  w.used = 0;
  if (!set_up()) {
    report->code = ZS_RESOURCE;
    describe("no address space for the memory of the emulated device");
  } else if (place_buffers()) {
    run_groups();
    w.self = nullptr;
    collect();
  }
  drop_regions(0, 0);
  uint32_t code = report->code;
  pthread_mutex_unlock(&lock);
  return code;
}

const ZsThread* zs_thread() { return &w.self->at; }

void zs_barrier(uint32_t shared, uint32_t device, int line) {
  step();
  Fiber& f = *w.self;
  f.state = AT_BARRIER;
  f.shared = shared;
  f.device = device;
  f.line = line;
  to_scheduler();
}

uint32_t wait_simd(uint32_t kind, uint32_t mask, uint64_t value, uint32_t shared, uint32_t device, int line) {
  step();
  Fiber& f = *w.self;
  f.state = AT_SIMD;
  f.kind = kind;
  f.mask = mask;
  f.value = value;
  f.shared = shared;
  f.device = device;
  f.line = line;
  if (!(mask >> f.at.lane & 1)) zs_undefined("the calling lane is not in the mask of a warp operation", line);
  to_scheduler();
  return f.active;
}

void zs_simd_barrier(uint32_t shared, uint32_t device, uint32_t mask, int line) {
  wait_simd(~0u, mask, 0, shared, device, line);
}

uint32_t zs_simd(uint32_t kind, uint32_t mask, uint64_t value, uint64_t* all, int line) {
  uint32_t active = wait_simd(kind, mask, value, 0, 0, line);
  memcpy(all, w.self->all, sizeof w.self->all);
  return active;
}

void zs_atomic(const volatile void* at, size_t bytes, uint32_t kind) {
  access(at, bytes, kind, __builtin_return_address(0));
}

[[noreturn]] static void resource(const char* name, size_t bytes, size_t limit) {
  describe("%s brings the shared memory of a group to %zu bytes, the limit is %zu", name, bytes, limit);
  fail(ZS_RESOURCE, nullptr, 0, false, nullptr);
}

// `slot` holds for which group (counted over all launches) the array was placed, and as which region.
void* zs_shared(uint32_t* slot, const char* name, size_t bytes, size_t align, size_t element) {
  if (slot[0] == w.serial) return w.regions[slot[1]].base;
  size_t limit = w.launch->cuda ? 48 * 1024 : 32 * 1024;
  w.shared_bytes = (w.shared_bytes + align - 1) / align * align + bytes;
  if (w.shared_bytes > limit) resource(name, w.shared_bytes, limit);
  Region* r = add_region(name, bytes, static_cast<uint32_t>(element), 0, true, 0);
  if (!r) resource(name, bytes, 0);
  slot[0] = w.serial;
  slot[1] = w.region_count - 1;
  return r->base;
}

void* zs_dynamic_shared(const char* name, size_t element) {
  if (!w.dynamic) {
    size_t limit = 227 * 1024;
    if (w.launch->dynamic_shared > limit) resource(name, w.launch->dynamic_shared, limit);
    w.dynamic = add_region(name, w.launch->dynamic_shared, static_cast<uint32_t>(element), 0, true, 0);
    if (!w.dynamic) resource(name, w.launch->dynamic_shared, 0);
  }
  return w.dynamic->base;
}

void zs_undefined(const char* what, int line) {
  if (line > 0) describe("%s (line %d)", what, line); else describe("%s", what);
  fail(ZS_UNDEFINED, nullptr, 0, false, __builtin_return_address(0));
}

#include "hooks.h"

}  // extern "C"
