// Streams, errors, memory, devices and the lock.
#include "api.h"


#include "mlx/backend/cuda/cuda.h"
#include "mlx/backend/metal/metal.h"

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

void CallbackErrors::add(std::string text) {
  std::lock_guard hold(lock_);
  if (!first_) first_ = std::move(text);
}

std::optional<std::string> CallbackErrors::take() {
  std::lock_guard hold(lock_);
  return std::exchange(first_, std::nullopt);
}

static std::shared_ptr<CallbackErrors>& scoped_errors() {
  thread_local std::shared_ptr<CallbackErrors> errors;
  return errors;
}

std::shared_ptr<CallbackErrors> thread_errors() {
  thread_local auto errors = std::make_shared<CallbackErrors>();
  return errors;
}

std::shared_ptr<CallbackErrors> current_errors() { return scoped_errors() ? scoped_errors() : thread_errors(); }

ErrorScope::ErrorScope(std::shared_ptr<CallbackErrors> errors) : before_(std::exchange(scoped_errors(), std::move(errors))) {}
ErrorScope::~ErrorScope() { scoped_errors() = std::move(before_); }

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

int32_t zmlx_last_error(const char** out, size_t* out_n) {
  *out = error_text.data();
  *out_n = error_text.size();
  return 0;
}

int32_t zmlx_backend(int32_t which, bool* available, const char** name, size_t* name_n, uint64_t* memory) {
  return guard([&] {
    *memory = 0;
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
    for (const char* key : {"total_memory", "memory_size"}) {
      auto it = info->find(key);
      if (it == info->end()) continue;
      if (auto* size = std::get_if<size_t>(&it->second)) {
        *memory = *size;
        break;
      }
    }
  });
}

int32_t zmlx_default_device_is_gpu(bool* out) {
  return guard([&] { *out = mx::default_device() == mx::Device::gpu; });
}

// Streams of the bridge may be used from every thread: the lock is what makes that right.
int32_t zmlx_stream_new(bool gpu, int32_t* out) {
  return guard([&] {
    mx::Device d(gpu ? mx::Device::gpu : mx::Device::cpu);
    if (!mx::is_available(d)) throw std::invalid_argument(gpu ? "this libmlx has no GPU backend" : "no CPU backend");
    streams().push_back(mx::new_thread_unsafe_stream(d));
    *out = static_cast<int32_t>(streams().size() - 1);
  });
}

int32_t zmlx_stream_synchronize(StreamArg index) {
  return unlocked_guard([&] {
    std::optional<mx::Stream> s;
    {
      Lock lock;
      s = to_stream(index);
      // A GPU stream's encoder is not made for several threads.
      if (s->device == mx::Device::gpu) mx::synchronize(*s);
    }
    if (s->device == mx::Device::cpu) mx::synchronize(*s);
    if (auto failure = thread_errors()->take()) throw std::runtime_error(*failure);
  });
}

int32_t zmlx_memory(int32_t which, uint64_t* out) {
  return guard([&] { *out = which == 0 ? mx::get_active_memory() : which == 1 ? mx::get_peak_memory() : which == 2 ? mx::get_cache_memory() : mx::get_memory_limit(); });
}

int32_t zmlx_memory_limit(int32_t which, uint64_t value, uint64_t* out) {
  return guard([&] { *out = which == 0 ? mx::set_memory_limit(value) : which == 1 ? mx::set_cache_limit(value) : mx::set_wired_limit(value); });
}

int32_t zmlx_clear_cache() {
  return guard([] { mx::clear_cache(); });
}
int32_t zmlx_reset_peak_memory() {
  return guard([] { mx::reset_peak_memory(); });
}
