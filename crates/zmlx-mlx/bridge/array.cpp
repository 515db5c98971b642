// Creating, reading and evaluating arrays; reading and writing files.
#include "api.h"

#include <sstream>

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

// Evaluates and waits. Inside a transform the lock is held by an outer frame anyway, and only a plain eval is allowed.
void eval_and_wait(const std::vector<array>& arrays) {
  std::vector<array::Status> before;
  {
    Lock lock;
    for (const auto& a : arrays) {
      before.push_back(a.status());
      if (a.status() == array::Status::unscheduled && !a.has_primitive()) {
        throw std::runtime_error("the array has no value: its computation failed before, or it stands for an input inside a transform");
      }
    }
  }
  auto errors = std::make_shared<CallbackErrors>();
  // An array that this call scheduled is spoilt by a failure here; one submitted earlier, by a failure of then.
  auto poison_if = [&](auto spoilt) {
    Lock lock;
    for (size_t i = 0; i < arrays.size(); ++i) {
      if (spoilt(before[i])) poison(arrays[i]);
    }
  };
  try {
    if (Lock::depth() > 0) {
      ErrorScope scope(errors);
      mx::eval(arrays);
    } else {
      {
        Lock lock;
        ErrorScope scope(errors);
        mx::async_eval(arrays);
      }
      wait_unlocked(arrays);
    }
  } catch (...) {
    poison_if([](auto status) { return status != array::Status::available; });
    throw;
  }
  if (auto failure = errors->take()) {
    poison_if([](auto status) { return status != array::Status::available; });
    throw std::runtime_error(*failure);
  }
  if (auto failure = thread_errors()->take()) {
    poison_if([](auto status) { return status == array::Status::evaluated; });
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

int32_t zmlx_array_from_data(const void* data, const int32_t* dims, size_t dims_n, int32_t dtype, array** out) {
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

int32_t zmlx_array_from_owned(void* data, const int32_t* dims, size_t dims_n, int32_t dtype, void* context, const void* free, array** out) {
  // The deleter runs exactly once, also when the constructor throws: the shared pointer sees to that.
  auto drop = reinterpret_cast<void (*)(void*)>(const_cast<void*>(free));
  std::shared_ptr<void> owner(context, drop);
  return guard([&] {
    put(out, array(data, checked(to_shape(dims, dims_n)), to_dtype(dtype), [owner](void*) {}));
  });
}

// Copying a handle is an atomic count: no lock, so that it works on a worker thread that others wait for.
int32_t zmlx_array_clone(const array* a, array** out) {
  return unlocked_guard([&] { put(out, *a); });
}

int32_t zmlx_array_free(void* a) {
  free_later(a, [](void* p) { delete static_cast<array*>(p); });
  return 0;
}

// Shape and dtype never change after construction, so these two take no lock.
int32_t zmlx_array_shape(const array* a, const int32_t** out, size_t* out_n) {
  *out = a->shape().data();
  *out_n = a->ndim();
  return 0;
}
int32_t zmlx_array_dtype(const array* a, int32_t* out) {
  *out = static_cast<int32_t>(a->dtype().val());
  return 0;
}

int32_t zmlx_array_eval_data(const array* a, bool* contiguous, const void** out) {
  return unlocked_guard([&] {
    eval_and_wait({*a});
    Lock lock;
    *contiguous = a->flags().row_contiguous;
    *out = a->size() ? array(*a).data<void>() : nullptr;
  });
}

int32_t zmlx_array_text(const array* a, const char** out, size_t* out_n) {
  return unlocked_guard([&] {
    eval_and_wait({*a});
    Lock lock;
    std::ostringstream os;
    os << array(*a);
    put_text(os.str(), out, out_n);
  });
}

int32_t zmlx_array_id(const array* a, uint64_t* out) {
  *out = a->id();
  return 0;
}

int32_t zmlx_eval(const array* const* const* p, size_t n) {
  return unlocked_guard([&] { eval_and_wait([&] { Lock lock; return to_vec(p, n); }()); });
}

int32_t zmlx_async_eval(const array* const* const* p, size_t n) {
  return guard([&] { mx::async_eval(to_vec(p, n)); });
}

int32_t zmlx_list_len(const List* list, size_t* out) {
  *out = list->size();
  return 0;
}
int32_t zmlx_list_get(const List* list, size_t index, array** out) {
  return guard([&] { put(out, list->at(index)); });
}
int32_t zmlx_list_push(List* list, const array* a) {
  return guard([&] { list->push_back(*a); });
}
int32_t zmlx_list_free(List* list) {
  free_later(list, [](void* p) { delete static_cast<List*>(p); });
  return 0;
}

// Names come and go as one string with NUL between them.
int32_t zmlx_save_safetensors(const char* path, size_t path_n, const char* names, size_t names_n, const array* const* const* p, size_t n, const char* keys, size_t keys_n) {
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

int32_t zmlx_load_safetensors(const char* path, size_t path_n, StreamArg s, List** arrays, const char** names, size_t* names_n) {
  return guard([&] {
    auto loaded = mx::load_safetensors(std::string(path, path_n), to_stream(s));
    put_named(loaded.first, arrays, names, names_n);
  });
}

int32_t zmlx_load_gguf(const char* path, size_t path_n, StreamArg s, List** arrays, const char** names, size_t* names_n, const char** keys, size_t* keys_n) {
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
