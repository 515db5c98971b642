// What the parts of the bridge share: the lock, error reporting and argument conversion.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "mlx/mlx.h"

namespace mx = mlx::core;
using mx::array;

using List = std::vector<array>;
using Function = std::function<std::vector<array>(const std::vector<array>&)>;
// Index of a stream in the bridge's own table (runtime.cpp).
using StreamArg = int32_t;

// A Rust closure: `call` gets lists of arrays and fills `out`; it returns 0, or 2 when it left an error on the Rust
// side. `drop` (null for a closure that is only borrowed) frees `data`.
struct Callback {
  void* data;
  int32_t (*call)(void* data, const List* const* in, size_t in_n, List* out);
  void (*drop)(void* data);
};

struct Str {
  const char* data;
  size_t len;
  std::string get() const { return std::string(data, len); }
};

struct KernelSpec {
  int32_t metal;
  Str name;
  const Str* inputs;
  size_t inputs_n;
  const Str* outputs;
  size_t outputs_n;
  Str source;
  Str header;
  int32_t ensure_row_contiguous;
  int32_t atomic_outputs;
  int32_t shared_memory;
};

struct TemplateArg {
  Str name;
  int32_t kind;  // 0 int, 1 bool, 2 dtype
  int32_t value;
};

struct KernelCall {
  const array* const* const* inputs;
  size_t inputs_n;
  const int32_t* shapes;  // all output shapes, one after another
  const int32_t* ranks;
  const int32_t* dtypes;
  size_t outputs_n;
  int32_t grid[3];
  int32_t threadgroup[3];
  const TemplateArg* template_args;
  size_t template_args_n;
  const float* init_value;
  int32_t verbose;
};

// One operand of a CPU primitive as Rust sees it, in row-contiguous memory. `source` is the input that an in-place
// output already holds, or -1; an input that was handed over to an output has null data.
struct CpuView {
  void* data;
  const int32_t* shape;
  size_t rank;
  int32_t dtype;
  size_t bytes;
  int32_t source;
};

struct CpuVtable {
  void* data;
  void (*drop)(void* data);
  const char* name;
  const int32_t* in_place;  // pairs (input, output)
  size_t in_place_n;        // number of pairs
  int32_t (*eval)(void* data, const CpuView* in, size_t in_n, const CpuView* out, size_t out_n);
  // Null when the primitive has no gradient.
  int32_t (*vjp)(void* data, const List* const* lists, size_t lists_n, const int32_t* argnums, size_t argnums_n, List* out);
  // Shapes of all outputs one after another, with their ranks, for shapeless compilation.
  int32_t (*shapes)(void* data, const List* in, void* sink, void (*push)(void* sink, const int32_t* dims, size_t rank));
};

// Derivatives and vectorisation of arrays that some primitive gives. `rule` 0 is vjp (primals, cotangents, outputs;
// numbers: argnums), 1 is jvp (primals, tangents; argnums), 2 is vmap (inputs; axes, -1 for none), which also writes the
// axis of each output.
struct TransformsVtable {
  void* data;
  void (*drop)(void* data);
  int32_t (*call)(void* data, int32_t rule, const List* const* lists, size_t lists_n, const int32_t* numbers, size_t numbers_n, List* out, int32_t* axes);
};

struct Kernel;
struct Api;

// Thrown through MLX when a Rust callback failed; the error itself waits on the Rust side.
struct RustError : std::runtime_error {
  RustError() : std::runtime_error("a Rust callback failed") {}
};

// MLX lets descriptors of arrays change under evaluation, so every entry of the bridge holds one process-wide lock.
// It is recursive: a transform calls back into Rust, which calls ops.
class Lock {
 public:
  Lock();
  ~Lock();
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;
  // How often this thread holds the lock.
  static int depth();
};

// Frees now if the lock is free or ours, else when it is next taken: a drop on a worker thread must never wait for
// a thread that waits for that worker.
void free_later(void* p, void (*destroy)(void*));

void set_error(const char* text);

// Failures of the CPU primitives that one evaluation scheduled, and of those submitted before it by the same thread,
// which it may depend on. (An exception thrown in MLX's worker would poison the stream instead: with several threads on
// one stream another thread might get the error, and under CUDA events do not carry it.)
class Failures {
 public:
  explicit Failures(std::shared_ptr<Failures> earlier) : earlier_(std::move(earlier)) {}

  // A kernel is scheduled; it has ended, maybe with a failure. The first failure stays.
  void begin();
  void end(std::optional<std::string> failure);

  // The first failure here or earlier.
  std::optional<std::string> first();
  // Whether a kernel here or earlier may still fail or has failed.
  bool matters();

  // The record that kernels scheduled by this thread write to.
  static std::shared_ptr<Failures> current();
  // The thread's last submission that matters, which a new evaluation follows; null when there is none.
  static std::shared_ptr<Failures>& submitted();

 private:
  std::mutex lock_;
  int running_ = 0;
  std::optional<std::string> failure_;
  std::shared_ptr<Failures> earlier_;
};

// A new record, current in this scope.
class FailureScope {
 public:
  FailureScope();
  ~FailureScope();
  FailureScope(const FailureScope&) = delete;
  FailureScope& operator=(const FailureScope&) = delete;
  const std::shared_ptr<Failures>& record() const { return record_; }

 private:
  std::shared_ptr<Failures> record_, before_;
};

// Runs `f` and turns exceptions into a status.
template <class F>
int32_t unlocked_guard(F&& f) {
  try {
    f();
    return 0;
  } catch (const RustError&) {
    return 2;
  } catch (const std::exception& e) {
    set_error(e.what());
  } catch (...) {
    set_error("an exception of unknown type");
  }
  return 1;
}

// The same under the lock.
template <class F>
int32_t guard(F&& f) {
  return unlocked_guard([&] {
    Lock lock;
    f();
  });
}

// The stream with this number in the bridge's table; throws if there is none.
mx::Stream to_stream(StreamArg s);

inline std::optional<array> opt(const array* a) { return a ? std::optional<array>(*a) : std::nullopt; }
inline std::optional<int> opt(const int32_t* p) { return p ? std::optional<int>(*p) : std::nullopt; }
inline std::optional<float> opt(const float* p) { return p ? std::optional<float>(*p) : std::nullopt; }

inline std::vector<array> to_vec(const array* const* const* p, size_t n) {
  std::vector<array> v;
  v.reserve(n);
  for (size_t i = 0; i < n; ++i) v.push_back(**p[i]);
  return v;
}
inline std::vector<int> to_ints(const int32_t* p, size_t n) { return std::vector<int>(p, p + n); }
inline mx::Shape to_shape(const int32_t* p, size_t n) { return mx::Shape(p, p + n); }

// MLX multiplies dimensions without a check, and a failed allocation is not noticed: no negative dimension, a product
// that fits, and no more bytes than the machine has.
void check_size(const mx::Shape& shape, size_t itemsize);
inline mx::Shape checked(mx::Shape shape, size_t itemsize = 1) {
  check_size(shape, itemsize);
  return shape;
}

// Values that MLX divides by.
inline int at_least_one(int value, const char* name) {
  if (value < 1) throw std::invalid_argument(std::string(name) + " must be at least 1");
  return value;
}
inline std::optional<int> at_least_one(std::optional<int> value, const char* name) {
  if (value) at_least_one(*value, name);
  return value;
}
inline mx::Shape no_zeros(mx::Shape strides) {
  for (auto s : strides) {
    // The smallest integer has no absolute value, and large ones overflow in MLX's rounding.
    if (s == 0 || s < -(1 << 30) || s > (1 << 30)) throw std::invalid_argument("a stride is 0 or too large");
  }
  return strides;
}
inline mx::Shape no_open_zero(mx::Shape shape) {
  bool open = false, zero = false;
  for (auto d : shape) {
    open |= d == -1;
    zero |= d == 0;
  }
  if (open && zero) throw std::invalid_argument("-1 beside a dimension of 0 can be anything");
  return shape;
}
inline const List& not_empty(const List& list) {
  if (list.empty()) throw std::invalid_argument("needs at least one array");
  return list;
}
// Attention and delta rule divide by the number of heads on `axis` of a 4-d array.
inline const array& with_heads(const array& a, int axis) {
  if (a.ndim() == 4 && a.shape(axis) == 0) throw std::invalid_argument("an array has no heads");
  return a;
}
// MLX trusts that scales and biases fit the packed weight.
const array& checked_scales(const array& w, const array& scales, const std::optional<array>& biases, std::optional<int> group_size, std::optional<int> bits, const std::string& mode);

// Memory for an output of a CPU primitive (pool.cpp). Kept buffers count as active in MLX: subtract `pool_bytes`.
mx::allocator::Data pool_malloc(size_t bytes);
size_t pool_bytes();
void pool_clear();
void pool_set_limit(size_t bytes);

mx::Dtype to_dtype(int32_t code);
inline std::optional<mx::Dtype> opt_dtype(int32_t code) {
  return code < 0 ? std::nullopt : std::optional<mx::Dtype>(to_dtype(code));
}

inline void put(array** out, array a) {
  check_size(a.shape(), a.itemsize());
  *out = new array(std::move(a));
}
inline void put(List** out, List v) {
  for (auto& a : v) check_size(a.shape(), a.itemsize());
  *out = new List(std::move(v));
}
inline void put2(array** out, array** out1, std::pair<array, array> r) {
  put(out, std::move(r.first));
  put(out1, std::move(r.second));
}

// Calls a Rust closure with lists of arrays.
inline List call_rust(const Callback& c, std::initializer_list<const List*> lists) {
  List out;
  if (c.call(c.data, lists.begin(), lists.size(), &out) != 0) throw RustError();
  return out;
}
