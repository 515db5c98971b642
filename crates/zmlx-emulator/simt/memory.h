// Checks of memory accesses: bounds, values never written, races. Part of runtime.cpp.
#pragma once
#include "world.h"

namespace {

bool ordered(uint32_t memory, uint32_t group, uint32_t epoch, uint32_t simd, uint32_t simd_epoch) {
  // Shared memory of an earlier group is another memory.
  if (group != w.group) return memory == 0;
  if (epoch < w.epoch[memory]) return true;
  return simd == w.self->at.simd && simd_epoch < w.simd_epoch[memory][simd];
}

[[noreturn]] void race(const Region& r, size_t cell, bool write, uint32_t group, uint32_t thread, bool other_write,
                       void* pc) {
  // Only the group's number is kept: its position follows from the grid.
  const ZsThread& at = w.self->at;
  uint32_t* g = w.report->other_group;
  g[0] = group % at.groups.x;
  g[1] = group / at.groups.x % at.groups.y;
  g[2] = group / at.groups.x / at.groups.y;
  if (group == w.group) {
    copy_dim(w.report->other, w.fibers[thread].at.local);
  } else {
    const ZsDim& d = at.nominal_size;
    w.report->other[0] = thread % d.x;
    w.report->other[1] = thread / d.x % d.y;
    w.report->other[2] = thread / d.x / d.y;
  }
  w.report->other_write = other_write;
  fail(ZS_RACE, &r, static_cast<int64_t>(cell * r.element), write, pc);
}

void check_write_before(const Region& r, size_t i, Cell& c, bool write, bool atomic, void* pc) {
  const Stamp& s = c.write;
  if (s.group == ~0u || (atomic && s.atomic)) return;
  if (s.group == w.group && s.thread == w.self->at.index) return;
  if (!ordered(r.memory, s.group, s.epoch, s.thread / LANES, s.simd_epoch)) {
    race(r, i, write, s.group, s.thread, true, pc);
  }
}

void check_reads_before(const Region& r, size_t i, Cell& c, bool atomic, void* pc) {
  const ZsThread& me = w.self->at;
  for (const Readers& s : c.read) {
    if (s.group == ~0u || (atomic && s.atomic)) continue;
    uint32_t others = s.lanes;
    if (s.group == w.group && s.simd == me.simd) others &= ~(1u << me.lane);
    if (others && !ordered(r.memory, s.group, s.epoch, s.simd, s.simd_epoch)) {
      race(r, i, true, s.group, s.simd * LANES + __builtin_ctz(others), false, pc);
    }
  }
}

void note_read(Cell& c, uint32_t memory, bool atomic) {
  const ZsThread& me = w.self->at;
  Readers now{w.group, w.epoch[memory], w.simd_epoch[memory][me.simd], 1u << me.lane,
              static_cast<uint16_t>(me.simd), atomic};
  uint32_t slot = 0;
  for (uint32_t i = 0; i < 2; i++) {
    Readers& s = c.read[i];
    if (s.group == now.group && s.simd == now.simd) {
      if (s.epoch == now.epoch && s.simd_epoch == now.simd_epoch) {
        s.lanes |= now.lanes;
        s.atomic &= atomic;
      } else {
        s = now;
      }
      return;
    }
    // A slot of an older epoch or an older group is the one to give up.
    if (s.group != now.group || s.epoch < now.epoch) slot = i;
  }
  const Readers& old = c.read[slot];
  if (old.group != now.group || old.epoch < now.epoch) c.read[slot] = now;
}

void check_cell(Region& r, size_t i, uint32_t kind, void* pc) {
  Cell& c = r.cells[i];
  bool write = kind & 1, atomic = kind >= ATOMIC_READ;
  bool filled = c.filled && (r.memory == 1 || c.write.group == w.group);
  if (kind != WRITE && kind != ATOMIC_STORE && !filled) {
    fail(ZS_UNINITIALISED, &r, static_cast<int64_t>(i * r.element), write, pc);
  }
  check_write_before(r, i, c, write, atomic, pc);
  if (write) {
    check_reads_before(r, i, c, atomic, pc);
    const ZsThread& me = w.self->at;
    c.write = {w.group, w.epoch[r.memory], w.simd_epoch[r.memory][me.simd], static_cast<uint16_t>(me.index), atomic};
    c.filled = true;
  } else {
    note_read(c, r.memory, atomic);
  }
}

Region* nearest(uintptr_t a) {
  Region* best = nullptr;
  uintptr_t least = ~uintptr_t(0);
  for (uint32_t i = 0; i < w.region_count; i++) {
    uintptr_t low = reinterpret_cast<uintptr_t>(w.regions[i].base), high = low + w.regions[i].bytes;
    uintptr_t far = a < low ? low - a : a >= high ? a - high + 1 : 0;
    if (far < least) { least = far; best = &w.regions[i]; }
  }
  return best;
}

Region* find(uintptr_t a, size_t n) {
  Region& last = w.regions[w.last_region];
  uintptr_t base = reinterpret_cast<uintptr_t>(last.base);
  if (w.last_region < w.region_count && a >= base && a + n <= base + last.bytes) return &last;
  for (uint32_t i = 0; i < w.region_count; i++) {
    base = reinterpret_cast<uintptr_t>(w.regions[i].base);
    if (a >= base && a + n <= base + w.regions[i].bytes) {
      w.last_region = i;
      return &w.regions[i];
    }
  }
  return nullptr;
}

// A mark at the low end of a stack tells whether it has overflowed. (Closed pages would be 1,024 mappings a library,
// and systems allow some 65,000 a process.)
uint64_t& stack_mark(uint32_t fiber) { return *reinterpret_cast<uint64_t*>(w.stacks + fiber * STACK); }

// Memory that is not a buffer but may be touched: the thread's own stack, constants of the library.
bool private_memory(uintptr_t a, size_t n) {
  uintptr_t low = reinterpret_cast<uintptr_t>(w.stacks) + (w.self - w.fibers) * STACK;
  if (a >= low + sizeof MARK && a + n <= low + STACK) return true;
#if defined(__linux__)
  return a >= w.image_low && a + n <= w.image_high;
#else
  uintptr_t arena = reinterpret_cast<uintptr_t>(w.arena);
  return a < arena || a >= arena + w.arena_bytes;
#endif
}

void step() {
  if (++w.steps > w.launch->step_limit) {
    describe("no end after %llu accesses", static_cast<unsigned long long>(w.launch->step_limit));
    fail(ZS_ENDLESS, nullptr, 0, false, nullptr);
  }
}

void access(const volatile void* at, size_t n, uint32_t kind, void* pc) {
  if (!w.self) return;
  uintptr_t a = reinterpret_cast<uintptr_t>(at);
  Region* r = find(a, n);
  if (!r) {
    if (private_memory(a, n)) return;
    r = nearest(a);
    fail(ZS_OUT_OF_BOUNDS, r, r ? static_cast<int64_t>(a - reinterpret_cast<uintptr_t>(r->base)) : 0, kind & 1, pc);
  }
  step();
  size_t offset = a - reinterpret_cast<uintptr_t>(r->base);
  if (!r->cells) {
    if (kind & 1) {
      snprintf(w.report->text, sizeof w.report->text, "write to the input %s", r->name);
      fail(ZS_UNDEFINED, r, static_cast<int64_t>(offset), true, pc);
    }
    return;
  }
  if ((r->memory == 0 && draw(8) == 0) || (kind >= ATOMIC_READ && draw(2) == 0)) yield();
  for (size_t i = offset / r->element; i * r->element < offset + n; i++) check_cell(*r, i, kind, pc);
}

}  // namespace
