// What kernels, the scheduler (runtime.cpp) and the Rust side agree on.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {

struct ZsDim { uint32_t x, y, z; };

// Where the running thread stands.
struct ZsThread {
  ZsDim local;        // in its group
  ZsDim group;        // in the grid
  ZsDim group_size;   // of this group (smaller at the edge of a Metal grid)
  ZsDim nominal_size; // of a full group
  ZsDim groups;       // in the grid
  ZsDim grid;         // threads in the grid
  uint32_t index;     // in its group
  uint32_t lane, simd, simds;
};

enum ZsKind : uint32_t { ZS_INPUT = 0, ZS_OUTPUT = 1 };

struct ZsBuffer {
  const char* name;
  uint8_t* data;
  uint64_t bytes;
  uint32_t element;  // bytes of an element
  uint32_t kind;     // ZsKind
  uint32_t offset;   // bytes from a 256-byte boundary
  uint32_t filled;   // outputs: starts with defined values
};

struct ZsLaunch {
  void (*entry)(void** args, const ZsThread* thread);
  const ZsBuffer* buffers;
  uint64_t count;
  uint32_t grid[3], group[3];
  uint32_t cuda;
  uint32_t dynamic_shared;
  uint64_t seed;
  uint64_t step_limit;
};

enum ZsCode : uint32_t {
  ZS_OK = 0,
  ZS_OUT_OF_BOUNDS = 1,
  ZS_UNINITIALISED = 2,
  ZS_RACE = 3,
  ZS_DIVERGENCE = 4,
  ZS_ENDLESS = 5,
  ZS_UNWRITTEN = 6,
  ZS_MISALIGNED = 7,
  ZS_UNDEFINED = 8,
  ZS_RESOURCE = 9,
};

struct ZsReport {
  uint32_t code;
  uint32_t write, other_write;
  uint32_t thread[3], group[3], other[3], other_group[3];
  uint64_t pc;        // of the access, as an offset in the library
  int64_t index;      // element
  uint64_t length;    // elements
  uint64_t missing[8];
  uint64_t missing_count;
  char name[64];
  char text[768];
};

uint32_t zs_run(const ZsLaunch* launch, ZsReport* report);

// Called by kernel text.
const ZsThread* zs_thread();
void zs_barrier(uint32_t shared, uint32_t device, int line);
void zs_simd_barrier(uint32_t shared, uint32_t device, uint32_t mask, int line);
uint32_t zs_simd(uint32_t kind, uint32_t mask, uint64_t value, uint64_t* all, int line);
void zs_atomic(const volatile void* at, size_t bytes, uint32_t kind);  // 2 read, 3 update, 5 store
void* zs_shared(uint32_t* slot, const char* name, size_t bytes, size_t align, size_t element);
void* zs_dynamic_shared(const char* name, size_t element);
[[noreturn]] void zs_undefined(const char* what, int line);

}  // extern "C"
