// Function transforms over Rust closures.
#include "api.h"

#include "mlx/compile.h"
#include "mlx/compile_impl.h"
#include "mlx/transforms.h"

namespace {

Function borrowed(const Callback* f) {
  return [f](const List& in) { return call_rust(*f, {&in}); };
}

// A closure that outlives the call; the last function object that holds it frees it.
std::shared_ptr<Callback> owned(const Callback* f) {
  return std::shared_ptr<Callback>(new Callback(*f), [](Callback* c) {
    if (c->drop) c->drop(c->data);
    delete c;
  });
}

Function owned_function(const Callback* f) {
  auto c = owned(f);
  return [c](const List& in) { return call_rust(*c, {&in}); };
}

}  // namespace

int32_t zmlx_vjp(const Callback* f, const array* const* const* p, size_t p_n, const array* const* const* c, size_t c_n, List** outputs, List** grads, StreamArg stream) noexcept {
  return guard([&] {
    // MLX makes copies of its own here; they must not go to a stream of this thread alone.
    mx::StreamContext context(to_stream(stream));
    auto r = mx::vjp(borrowed(f), to_vec(p, p_n), to_vec(c, c_n));
    put(outputs, std::move(r.first));
    put(grads, std::move(r.second));
  });
}

int32_t zmlx_jvp(const Callback* f, const array* const* const* p, size_t p_n, const array* const* const* t, size_t t_n, List** outputs, List** tangents, StreamArg stream) noexcept {
  return guard([&] {
    mx::StreamContext context(to_stream(stream));
    auto r = mx::jvp(borrowed(f), to_vec(p, p_n), to_vec(t, t_n));
    put(outputs, std::move(r.first));
    put(tangents, std::move(r.second));
  });
}

int32_t zmlx_value_and_grad(const Callback* f, const int32_t* argnums, size_t argnums_n, const array* const* const* in, size_t in_n, List** values, List** grads, StreamArg stream) noexcept {
  return guard([&] {
    mx::StreamContext context(to_stream(stream));
    auto r = mx::value_and_grad(borrowed(f), to_ints(argnums, argnums_n))(to_vec(in, in_n));
    put(values, std::move(r.first));
    put(grads, std::move(r.second));
  });
}

int32_t zmlx_vmap(const Callback* f, const array* const* const* in, size_t in_n, const int32_t* in_axes, size_t in_axes_n, const int32_t* out_axes, size_t out_axes_n, List** out, StreamArg stream) noexcept {
  return guard([&] {
    mx::StreamContext context(to_stream(stream));
    put(out, mx::vmap(borrowed(f), to_ints(in_axes, in_axes_n), to_ints(out_axes, out_axes_n))(to_vec(in, in_n)));
  });
}

// MLX keys its traces by an address and erases them from the cache of the compiling thread only. Here a key is never
// used twice, and the traces go from every thread that called.
struct Traces {
  uintptr_t id;
  std::vector<mx::detail::CompileCacheWeakPtr> caches;
  explicit Traces(uintptr_t id) : id(id) {}
  void used_here() {
    mx::detail::CompileCacheWeakPtr here = mx::detail::compile_cache();
    for (auto& c : caches) {
      if (!c.owner_before(here) && !here.owner_before(c)) return;
    }
    caches.push_back(std::move(here));
  }
  ~Traces() {
    for (auto& c : caches) mx::detail::compile_erase(c, id);
  }
};

int32_t zmlx_compile(const Callback* f, bool shapeless, Function** out) noexcept {
  return guard([&] {
    static uintptr_t next = 1;  // odd: never the address of a function that MLX itself compiled
    auto traces = std::make_shared<Traces>(next += 2);
    auto call = mx::detail::compile(owned_function(f), traces->id, shapeless, {});
    *out = new Function([traces, call = std::move(call)](const List& in) {
      traces->used_here();
      return call(in);
    });
  });
}

// MLX takes the first input or output of these without looking whether there is one.
static Function with_outputs(Function f, const char* what) {
  return [f = std::move(f), what](const List& in) {
    auto out = f(in);
    if (out.empty()) throw std::invalid_argument(std::string(what) + " needs a function with at least one output");
    return out;
  };
}
static Function with_inputs(Function f, const char* what) {
  return [f = std::move(f), what](const List& in) {
    if (in.empty()) throw std::invalid_argument(std::string(what) + " needs at least one input");
    return f(in);
  };
}

int32_t zmlx_checkpoint(const Callback* f, Function** out) noexcept {
  return guard([&] { *out = new Function(with_inputs(mx::checkpoint(with_outputs(owned_function(f), "checkpoint")), "checkpoint")); });
}

int32_t zmlx_custom_vjp(const Callback* f, const Callback* vjp, Function** out) noexcept {
  return guard([&] {
    auto fun = with_outputs(owned_function(f), "custom_vjp");
    auto back = owned(vjp);
    auto call = mx::custom_vjp(fun, [back](const List& primals, const List& cotangents, const List& outputs) {
      return call_rust(*back, {&primals, &cotangents, &outputs});
    });
    *out = new Function(with_inputs(std::move(call), "custom_vjp"));
  });
}

int32_t zmlx_function_call(const Function* f, const array* const* const* in, size_t in_n, List** out, StreamArg stream) noexcept {
  return guard([&] {
    mx::StreamContext context(to_stream(stream));
    put(out, (*f)(to_vec(in, in_n)));
  });
}

int32_t zmlx_function_free(void* f) noexcept {
  free_later(f, [](void* p) { delete static_cast<Function*>(p); });
  return 0;
}

int32_t zmlx_set_compile_enabled(bool enabled) noexcept {
  return guard([&] { enabled ? mx::enable_compile() : mx::disable_compile(); });
}
