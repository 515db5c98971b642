// What instrumented code calls, in place of the sanitizers' libraries. Part of runtime.cpp, inside extern "C".

// The calls that the thread-sanitizer instrumentation makes.
#define ZS_HOOK(N)                                                                                            \
  void __tsan_read##N(void* a) { access(a, N, READ, __builtin_return_address(0)); }                           \
  void __tsan_write##N(void* a) { access(a, N, WRITE, __builtin_return_address(0)); }                         \
  void __tsan_unaligned_read##N(void* a) { access(a, N, READ, __builtin_return_address(0)); }                 \
  void __tsan_unaligned_write##N(void* a) { access(a, N, WRITE, __builtin_return_address(0)); }               \
  void __tsan_volatile_read##N(void* a) { access(a, N, READ, __builtin_return_address(0)); }                  \
  void __tsan_volatile_write##N(void* a) { access(a, N, WRITE, __builtin_return_address(0)); }
ZS_HOOK(1)
ZS_HOOK(2)
ZS_HOOK(4)
ZS_HOOK(8)
ZS_HOOK(16)
void __tsan_read_range(void* a, size_t n) { access(a, n, READ, __builtin_return_address(0)); }
void __tsan_write_range(void* a, size_t n) { access(a, n, WRITE, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  access(from, n, READ, __builtin_return_address(0));
  access(to, n, WRITE, __builtin_return_address(0));
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  access(from, n, READ, __builtin_return_address(0));
  access(to, n, WRITE, __builtin_return_address(0));
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int v, size_t n) {
  access(to, n, WRITE, __builtin_return_address(0));
  return memset(to, v, n);
}

// The calls that the undefined-behaviour instrumentation makes; data starts with file, line, column.
struct Place { const char* file; uint32_t line, column; };
[[noreturn]] static void undefined_at(const Place* p, const char* what, void* pc) {
  if (p && p->file) describe("%s at %s:%u", what, p->file, p->line); else describe("%s", what);
  fail(ZS_UNDEFINED, nullptr, 0, false, pc);
}
void __ubsan_handle_out_of_bounds(Place* p, uintptr_t index) {
  describe("index %lld outside of an array at %s:%u", static_cast<long long>(index), p->file ? p->file : "?", p->line);
  w.report->pc = 0;
  snprintf(w.report->name, sizeof w.report->name, "array");
  w.report->index = static_cast<int64_t>(index);
  fail(ZS_OUT_OF_BOUNDS, nullptr, 0, false, __builtin_return_address(0));
}
void __ubsan_handle_divrem_overflow(Place* p, uintptr_t, uintptr_t) {
  undefined_at(p, "integer division by zero or overflow", __builtin_return_address(0));
}
struct Mismatch { Place place; const void* type; unsigned char log_alignment, kind; };
void __ubsan_handle_type_mismatch_v1(Mismatch* m, uintptr_t a) {
  describe("address not a multiple of %u at %s:%u", 1u << m->log_alignment, m->place.file ? m->place.file : "?", m->place.line);
  Region* r = find(a, 1);
  if (!r) r = nearest(a);
  fail(ZS_MISALIGNED, r, r ? static_cast<int64_t>(a - reinterpret_cast<uintptr_t>(r->base)) : 0, false,
       __builtin_return_address(0));
}
