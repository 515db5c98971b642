// Streams, errors, memory, devices and the lock.
#include "api.h"

#include <unistd.h>

#include <algorithm>
#include <future>
#include <thread>


#include "mlx/backend/cuda/cuda.h"
#include "mlx/backend/metal/metal.h"
#include "mlx/scheduler.h"

namespace {

// Leaked on purpose: worker threads may outlive static destruction.
std::mutex& big_lock() {
  static auto* m = new std::mutex;
  return *m;
}

thread_local int lock_depth = 0;
thread_local std::string error_text;
thread_local std::string returned_text;

struct Later {
  void* p;
  void (*destroy)(void*);
};
std::mutex& later_lock() {
  static auto* m = new std::mutex;
  return *m;
}
std::vector<Later>& later() {
  static auto* v = new std::vector<Later>;
  return *v;
}
std::atomic<bool> later_pending{false};

void drain_later() {
  while (later_pending.load(std::memory_order_acquire)) {
    std::vector<Later> batch;
    {
      std::lock_guard hold(later_lock());
      batch.swap(later());
      later_pending.store(false, std::memory_order_release);
    }
    for (auto& l : batch) l.destroy(l.p);
  }
}

std::vector<mx::Stream>& streams() {
  static auto* v = new std::vector<mx::Stream>;
  return *v;
}

void put_text(const std::string& text, const char** out, size_t* out_n) {
  returned_text = text;
  *out = returned_text.data();
  *out_n = returned_text.size();
}

}  // namespace

Lock::Lock() {
  if (lock_depth == 0) big_lock().lock();
  if (++lock_depth == 1) drain_later();
}
Lock::~Lock() {
  if (--lock_depth == 0) big_lock().unlock();
}
int Lock::depth() { return lock_depth; }

void free_later(void* p, void (*destroy)(void*)) {
  if (lock_depth > 0) return destroy(p);
  if (big_lock().try_lock()) {
    ++lock_depth;
    destroy(p);
    --lock_depth;
    big_lock().unlock();
    return;
  }
  std::lock_guard hold(later_lock());
  later().push_back({p, destroy});
  later_pending.store(true, std::memory_order_release);
}

void set_error(const char* text) { error_text = text; }

void Failures::begin() {
  std::lock_guard hold(lock_);
  ++running_;
}

void Failures::end(std::optional<std::string> failure) {
  std::lock_guard hold(lock_);
  --running_;
  if (failure && !failure_) failure_ = std::move(failure);
}

std::optional<std::string> Failures::first() {
  if (earlier_) {
    if (auto failure = earlier_->first()) return failure;
  }
  std::lock_guard hold(lock_);
  return failure_;
}

bool Failures::matters() {
  {
    std::lock_guard hold(lock_);
    if (running_ > 0 || failure_) return true;
  }
  if (earlier_ && !earlier_->matters()) earlier_.reset();
  return earlier_ != nullptr;
}

static std::shared_ptr<Failures>& scoped_failures() {
  thread_local std::shared_ptr<Failures> record;
  return record;
}

std::shared_ptr<Failures>& Failures::submitted() {
  thread_local std::shared_ptr<Failures> record;
  if (record && !record->matters()) record.reset();
  return record;
}

std::shared_ptr<Failures> Failures::current() {
  // MLX evaluates in some other places too (printing, compile); those count as submitted.
  if (scoped_failures()) return scoped_failures();
  if (!submitted()) submitted() = std::make_shared<Failures>(nullptr);
  return submitted();
}

FailureScope::FailureScope() : record_(std::make_shared<Failures>(Failures::submitted())), before_(std::exchange(scoped_failures(), record_)) {}
FailureScope::~FailureScope() { scoped_failures() = std::move(before_); }

// What the machine can hold; an array beyond it is a mistake, and its allocation would not fail cleanly.
static uint64_t most_bytes() {
  static const uint64_t most = [] {
    auto pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    uint64_t bytes = pages > 0 && size > 0 ? uint64_t(pages) * uint64_t(size) : 0;
    return std::max<uint64_t>(bytes, uint64_t(16) << 30);
  }();
  return most;
}

void check_size(const mx::Shape& shape, size_t itemsize) {
  uint64_t bytes = itemsize;
  bool overflow = false, empty = false;
  for (auto d : shape) {
    if (d < 0) throw std::invalid_argument("a dimension is negative");
    empty |= d == 0;
    overflow |= __builtin_mul_overflow(bytes, static_cast<uint64_t>(d ? d : 1), &bytes);
  }
  if (overflow || (!empty && bytes > most_bytes())) throw std::invalid_argument("the array would not fit into this machine's memory");
}

const array& checked_scales(const array& w, const array& scales, const std::optional<array>& biases, std::optional<int> group_size, std::optional<int> bits, const std::string& mode) {
  // An unknown mode is MLX's to refuse.
  if (mode != "affine" && mode != "mxfp4" && mode != "mxfp8" && mode != "nvfp4") return scales;
  int group = group_size.value_or(mode == "nvfp4" ? 16 : mode == "affine" ? 64 : 32);
  int width = bits.value_or(mode == "mxfp8" ? 8 : 4);
  at_least_one(group, "group_size");
  at_least_one(width, "bits");
  auto expected = w.shape();
  if (expected.empty()) throw std::invalid_argument("the packed weight has no dimensions");
  expected.back() = static_cast<int>(int64_t(expected.back()) * 32 / width / group);
  if (scales.shape() != expected || (biases && biases->shape() != expected)) throw std::invalid_argument("scales or biases do not fit the packed weight, bits and group_size");
  return scales;
}

mx::Stream to_stream(StreamArg s) {
  if (s < 0 || static_cast<size_t>(s) >= streams().size()) throw std::invalid_argument("unknown stream");
  return streams()[s];
}

mx::Dtype to_dtype(int32_t code) {
  static const mx::Dtype all[] = {mx::bool_,  mx::uint8, mx::uint16,  mx::uint32,  mx::uint64,  mx::int8,     mx::int16,
                                  mx::int32, mx::int64, mx::float16, mx::float32, mx::float64, mx::bfloat16, mx::complex64};
  if (code < 0 || code >= 14) throw std::invalid_argument("unknown dtype");
  return all[code];
}

int32_t zmlx_last_error(const char** out, size_t* out_n) noexcept {
  *out = error_text.data();
  *out_n = error_text.size();
  return 0;
}

int32_t zmlx_backend(int32_t which, bool* available, const char** name, size_t* name_n, uint64_t* memory, uint64_t* working_set) noexcept {
  return guard([&] {
    *memory = *working_set = 0;
    put_text("", name, name_n);
    *available = which == 0 ? mx::is_available(mx::Device(mx::Device::cpu))
        : which == 1        ? mx::cu::is_available()
                            : mx::metal::is_available();
    if (!*available) return;
    const auto* info = &mx::device_info(mx::Device(which == 0 ? mx::Device::cpu : mx::Device::gpu));
    for (const char* key : {"device_name", "architecture"}) {
      auto it = info->find(key);
      if (it == info->end()) continue;
      if (auto* text = std::get_if<std::string>(&it->second)) {
        put_text(*text, name, name_n);
        break;
      }
    }
    auto size = [&](const char* key) -> uint64_t {
      auto it = info->find(key);
      auto* value = it == info->end() ? nullptr : std::get_if<size_t>(&it->second);
      return value ? *value : 0;
    };
    *memory = size("total_memory");
    if (*memory == 0) *memory = size("memory_size");
    *working_set = size("max_recommended_working_set_size");
  });
}

int32_t zmlx_default_device_is_gpu(bool* out) noexcept {
  return guard([&] { *out = mx::default_device() == mx::Device::gpu; });
}

// Streams of the bridge may be used from every thread: the lock is what makes that right.
int32_t zmlx_stream_new(bool gpu, int32_t* out) noexcept {
  return guard([&] {
    mx::Device d(gpu ? mx::Device::gpu : mx::Device::cpu);
    if (!mx::is_available(d)) throw std::invalid_argument(gpu ? "this libmlx has no GPU backend" : "no CPU backend");
    // MLX throws a stored error of a stream at whatever its "main" thread (the first it sees) enqueues next. This one
    // never enqueues anything.
    static bool parked = [] {
      std::promise<void> ready;
      std::thread([&ready] {
        mx::scheduler::scheduler();
        ready.set_value();
        std::promise<void>().get_future().wait();
      }).detach();
      ready.get_future().wait();
      return true;
    }();
    (void)parked;
    streams().push_back(mx::new_thread_unsafe_stream(d));
    *out = static_cast<int32_t>(streams().size() - 1);
    // The CUDA library waits on the GPU, with a spinning kernel, for what a CPU stream signals with another kernel. If
    // that one were loaded while the first spins, each would wait for the other: so it is loaded now.
    static bool signalled = false;
    if (!gpu && !signalled && mx::cu::is_available()) {
      signalled = true;
      auto a = mx::add(mx::zeros({1}, mx::float32, streams().back()), mx::ones({1}, mx::float32, streams().back()), streams().back());
      mx::async_eval({a});
      a.wait();
    }
  });
}

int32_t zmlx_stream_synchronize(StreamArg index) noexcept {
  return unlocked_guard([&] {
    std::optional<mx::Stream> s;
    {
      Lock lock;
      s = to_stream(index);
      // A GPU stream's encoder is not made for several threads.
      if (s->device == mx::Device::gpu) mx::synchronize(*s);
    }
    if (s->device == mx::Device::cpu) mx::synchronize(*s);
    if (auto& submitted = Failures::submitted()) {
      auto failure = submitted->first();
      submitted.reset();
      if (failure) throw std::runtime_error(*failure);
    }
  });
}

int32_t zmlx_memory(int32_t which, uint64_t* out) noexcept {
  return guard([&] {
    size_t active = mx::get_active_memory(), kept = std::min(pool_bytes(), active);
    *out = which == 0 ? active - kept : which == 1 ? mx::get_peak_memory() : which == 2 ? mx::get_cache_memory() + kept : mx::get_memory_limit();
  });
}
int32_t zmlx_memory_limit(int32_t which, uint64_t value, uint64_t* out) noexcept {
  return guard([&] {
    if (which == 1) pool_set_limit(value);
    *out = which == 0 ? mx::set_memory_limit(value) : which == 1 ? mx::set_cache_limit(value) : mx::set_wired_limit(value);
  });
}
int32_t zmlx_clear_cache() noexcept {
  return guard([] {
    pool_clear();
    mx::clear_cache();
  });
}
int32_t zmlx_reset_peak_memory() noexcept {
  return guard([] { mx::reset_peak_memory(); });
}
