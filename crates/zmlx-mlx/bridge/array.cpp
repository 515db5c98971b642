// Creating, reading and evaluating arrays; reading and writing files.
#include "api.h"

#include <sstream>
#include <unordered_map>

#include "mlx/backend/cuda/cuda.h"
#include "mlx/scheduler.h"

namespace {

thread_local std::string text_buffer;
thread_local std::string keys_buffer;

void put_text(std::string text, const char** out, size_t* out_n) {
  text_buffer = std::move(text);
  *out = text_buffer.data();
  *out_n = text_buffer.size();
}

// Waits for a scheduled array without holding the lock, so that other threads can go on: the event is copied to a
// descriptor of our own, which nobody else looks at.
void wait_unlocked(const std::vector<array>& arrays) {
  for (const auto& a : arrays) {
    std::optional<array> probe;
    {
      Lock lock;
      if (a.status() != array::Status::evaluated) continue;
      if (a.event().valid()) {
        probe.emplace(mx::Shape{}, mx::bool_, nullptr, std::vector<array>{});
        probe->attach_event(a.event());
        probe->set_status(array::Status::evaluated);
      }
    }
    std::optional<mx::Stream> stream;
    if (probe) {
      stream = probe->event().stream();
      probe->wait();
    }
    Lock lock;
    array(a).wait();
    // Events of the CUDA library do not carry errors of a CPU stream.
    if (stream && stream->device == mx::Device::cpu) mx::scheduler::check_error(*stream);
  }
}

// What was not computed must not be read: without status and primitive it is an error from now on.
void poison(const array& a) {
  if (a.status() != array::Status::unscheduled && !a.has_primitive()) a.set_status(array::Status::unscheduled);
}

// Records of submitted evaluations by the event that their arrays carry, as long as they matter. The event is kept, so
// that its address is not used again.
struct Submission {
  mx::Event event;
  std::shared_ptr<Failures> record;
};
std::unordered_map<const void*, Submission>& submissions() {
  static auto* m = new std::unordered_map<const void*, Submission>;
  return *m;
}
const void* address(const mx::Event& e) { return &e.cast<char>(); }

// Under the lock.
void submit(const std::vector<array>& arrays) {
  FailureScope scope;
  mx::async_eval(arrays);
  if (!scope.record()->matters()) return;
  auto& known = submissions();
  std::erase_if(known, [](auto& entry) { return !entry.second.record->matters(); });
  for (const auto& a : arrays) {
    if (a.event().valid()) known.insert_or_assign(address(a.event()), Submission{a.event(), scope.record()});
  }
  Failures::submitted() = scope.record();
}

// Handles that must not be dropped outside the lock.
struct Held {
  std::vector<array> arrays;
  ~Held() {
    Lock lock;
    arrays.clear();
  }
};

// Evaluates and waits. Inside a transform the lock is held by an outer frame anyway, and only a plain eval is allowed.
void eval_and_wait(const std::vector<array>& arrays) {
  std::vector<bool> pending;
  // Records that the arrays depend on; none for one that was available before.
  std::vector<std::shared_ptr<Failures>> records;
  auto spoil = [&] {
    Lock lock;
    for (size_t i = 0; i < arrays.size(); ++i) {
      if (pending[i]) poison(arrays[i]);
    }
  };
  try {
    std::optional<Lock> lock(std::in_place);
    for (const auto& a : arrays) {
      if (a.status() == array::Status::unscheduled && !a.has_primitive()) {
        throw std::runtime_error("the array has no value: its computation failed before, or it stands for an input inside a transform");
      }
      pending.push_back(a.status() != array::Status::available);
      if (a.status() == array::Status::evaluated && a.event().valid()) {
        auto it = submissions().find(address(a.event()));
        if (it != submissions().end()) records.push_back(it->second.record);
      }
    }
    pending.resize(arrays.size());
    FailureScope scope;
    records.push_back(scope.record());
    if (Lock::depth() > 1) {
      mx::eval(arrays);
    } else {
      mx::async_eval(arrays);
      lock.reset();
      wait_unlocked(arrays);
    }
  } catch (...) {
    pending.resize(arrays.size());
    spoil();
    throw;
  }
  for (auto& record : records) {
    auto failure = record->first();
    if (!failure) continue;
    spoil();
    // Reported: later evaluations of this thread do not fail for it again, unless they read what it spoilt.
    Failures::submitted().reset();
    throw std::runtime_error(*failure);
  }
}

std::vector<std::string> lines(const char* p, size_t n) {
  std::vector<std::string> out;
  std::string text(p, n), line;
  std::istringstream in(text);
  while (std::getline(in, line, '\0')) out.push_back(line);
  return out;
}

}  // namespace

int32_t zmlx_array_from_data(const void* data, const int32_t* dims, size_t dims_n, int32_t dtype, array** out) noexcept {
  return guard([&] {
    auto d = to_dtype(dtype);
    auto sh = checked(to_shape(dims, dims_n));
    size_t bytes = d.size();
    for (auto dim : sh) bytes *= dim;
    array a(mx::allocator::malloc(bytes), std::move(sh), d);
    if (bytes) std::memcpy(a.data<char>(), data, bytes);
    put(out, std::move(a));
  });
}

int32_t zmlx_array_from_owned(void* data, const int32_t* dims, size_t dims_n, int32_t dtype, void* context, const void* free, array** out) noexcept {
  // The deleter runs exactly once, also when the constructor throws: the shared pointer sees to that.
  auto drop = reinterpret_cast<void (*)(void*)>(const_cast<void*>(free));
  std::shared_ptr<void> owner(context, drop);
  return guard([&] {
    put(out, array(data, checked(to_shape(dims, dims_n)), to_dtype(dtype), [owner](void*) {}));
  });
}

// Copying a handle is an atomic count: no lock, so that it works on a worker thread that others wait for.
int32_t zmlx_array_clone(const array* a, array** out) noexcept {
  return unlocked_guard([&] { put(out, *a); });
}

int32_t zmlx_array_free(void* a) noexcept {
  free_later(a, [](void* p) { delete static_cast<array*>(p); });
  return 0;
}

// Shape and dtype never change after construction, so these two take no lock.
int32_t zmlx_array_shape(const array* a, const int32_t** out, size_t* out_n) noexcept {
  *out = a->shape().data();
  *out_n = a->ndim();
  return 0;
}
int32_t zmlx_array_dtype(const array* a, int32_t* out) noexcept {
  *out = static_cast<int32_t>(a->dtype().val());
  return 0;
}

int32_t zmlx_array_eval_data(const array* a, bool* contiguous, const void** out) noexcept {
  return unlocked_guard([&] {
    Held held{{*a}};
    eval_and_wait(held.arrays);
    Lock lock;
    *contiguous = a->flags().row_contiguous;
    *out = a->size() ? array(*a).data<void>() : nullptr;
  });
}

// What the CUDA library keeps behind a buffer's pointer, as its allocator.h of the pinned version has it. That header needs
// those of CUDA, and asking the buffer for its data would move it to memory that host and GPU share.
struct CudaBuffer {
  void* data;
  size_t size;
  int device;
};

int32_t zmlx_array_device_data(const array* a, bool* contiguous, uint64_t* address) noexcept {
  return unlocked_guard([&] {
    if (!mx::cu::is_available()) throw std::runtime_error("the loaded libmlx does not run on CUDA");
    Held held{{*a}};
    eval_and_wait(held.arrays);
    Lock lock;
    *contiguous = a->flags().row_contiguous;
    *address = 0;
    if (!a->size()) return;
    auto buffer = a->buffer();
    auto* cuda = static_cast<const CudaBuffer*>(buffer.ptr());
    if (!cuda || !cuda->data) throw std::runtime_error("the array has no memory");
    size_t end = static_cast<size_t>(a->offset()) + a->nbytes();
    if (cuda->size < end) throw std::runtime_error("the array is not where the CUDA library of this version keeps arrays");
    *address = reinterpret_cast<uint64_t>(cuda->data) + static_cast<uint64_t>(a->offset());
  });
}

int32_t zmlx_array_text(const array* a, const char** out, size_t* out_n) noexcept {
  return unlocked_guard([&] {
    Held held{{*a}};
    eval_and_wait(held.arrays);
    Lock lock;
    std::ostringstream os;
    os << array(*a);
    put_text(os.str(), out, out_n);
  });
}

int32_t zmlx_array_id(const array* a, uint64_t* out) noexcept {
  *out = a->id();
  return 0;
}

int32_t zmlx_eval(const array* const* const* p, size_t n) noexcept {
  return unlocked_guard([&] {
    Held held{to_vec(p, n)};
    eval_and_wait(held.arrays);
  });
}

int32_t zmlx_async_eval(const array* const* const* p, size_t n) noexcept {
  return guard([&] { submit(to_vec(p, n)); });
}

int32_t zmlx_list_len(const List* list, size_t* out) noexcept {
  *out = list->size();
  return 0;
}
int32_t zmlx_list_get(const List* list, size_t index, array** out) noexcept {
  return guard([&] { put(out, list->at(index)); });
}
int32_t zmlx_list_push(List* list, const array* a) noexcept {
  return guard([&] { list->push_back(*a); });
}
int32_t zmlx_list_free(List* list) noexcept {
  free_later(list, [](void* p) { delete static_cast<List*>(p); });
  return 0;
}

// Names come and go as one string with NUL between them.
int32_t zmlx_save_safetensors(const char* path, size_t path_n, const char* names, size_t names_n, const array* const* const* p, size_t n, const char* keys, size_t keys_n) noexcept {
  return guard([&] {
    auto name_list = lines(names, names_n);
    auto key_list = lines(keys, keys_n);
    std::unordered_map<std::string, array> arrays;
    for (size_t i = 0; i < n; ++i) arrays.insert_or_assign(name_list.at(i), **p[i]);
    std::unordered_map<std::string, std::string> metadata;
    for (size_t i = 0; i + 1 < key_list.size(); i += 2) metadata[key_list[i]] = key_list[i + 1];
    mx::save_safetensors(std::string(path, path_n), std::move(arrays), std::move(metadata));
  });
}

static void put_named(std::unordered_map<std::string, array>& loaded, List** arrays, const char** names, size_t* names_n) {
  List list;
  std::string joined;
  for (auto& [name, a] : loaded) {
    joined += name;
    joined += '\0';
    list.push_back(a);
  }
  put(arrays, std::move(list));
  put_text(std::move(joined), names, names_n);
}

int32_t zmlx_load_safetensors(const char* path, size_t path_n, StreamArg s, List** arrays, const char** names, size_t* names_n) noexcept {
  return guard([&] {
    auto loaded = mx::load_safetensors(std::string(path, path_n), to_stream(s));
    put_named(loaded.first, arrays, names, names_n);
  });
}

int32_t zmlx_load_gguf(const char* path, size_t path_n, StreamArg s, List** arrays, const char** names, size_t* names_n, const char** keys, size_t* keys_n) noexcept {
  return guard([&] {
    auto loaded = mx::load_gguf(std::string(path, path_n), to_stream(s));
    keys_buffer.clear();
    for (auto& [key, value] : loaded.second) {
      std::string text;
      if (auto* str = std::get_if<std::string>(&value)) {
        text = *str;
      } else if (auto* a = std::get_if<array>(&value); a && a->size() <= 64) {
        std::ostringstream os;
        os << *a;
        text = os.str();
      } else if (auto* many = std::get_if<std::vector<std::string>>(&value)) {
        for (auto& item : *many) text += item + "\n";
      } else {
        continue;
      }
      keys_buffer += key;
      keys_buffer += '\0';
      keys_buffer += text;
      keys_buffer += '\0';
    }
    *keys = keys_buffer.data();
    *keys_n = keys_buffer.size();
    put_named(loaded.first, arrays, names, names_n);
  });
}
