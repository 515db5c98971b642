// Function transforms over Rust closures.
#include "api.h"

#include "mlx/compile.h"
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

int32_t zmlx_vjp(const Callback* f, const array* const* const* p, size_t p_n, const array* const* const* c, size_t c_n, List** outputs, List** grads) {
  return guard([&] {
    auto r = mx::vjp(borrowed(f), to_vec(p, p_n), to_vec(c, c_n));
    put(outputs, std::move(r.first));
    put(grads, std::move(r.second));
  });
}

int32_t zmlx_jvp(const Callback* f, const array* const* const* p, size_t p_n, const array* const* const* t, size_t t_n, List** outputs, List** tangents) {
  return guard([&] {
    auto r = mx::jvp(borrowed(f), to_vec(p, p_n), to_vec(t, t_n));
    put(outputs, std::move(r.first));
    put(tangents, std::move(r.second));
  });
}

int32_t zmlx_value_and_grad(const Callback* f, const int32_t* argnums, size_t argnums_n, const array* const* const* in, size_t in_n, List** values, List** grads) {
  return guard([&] {
    auto r = mx::value_and_grad(borrowed(f), to_ints(argnums, argnums_n))(to_vec(in, in_n));
    put(values, std::move(r.first));
    put(grads, std::move(r.second));
  });
}

int32_t zmlx_vmap(const Callback* f, const array* const* const* in, size_t in_n, const int32_t* in_axes, size_t in_axes_n, const int32_t* out_axes, size_t out_axes_n, List** out) {
  return guard([&] {
    put(out, mx::vmap(borrowed(f), to_ints(in_axes, in_axes_n), to_ints(out_axes, out_axes_n))(to_vec(in, in_n)));
  });
}

int32_t zmlx_compile(const Callback* f, bool shapeless, Function** out) {
  return guard([&] { *out = new Function(mx::compile(owned_function(f), shapeless)); });
}

int32_t zmlx_checkpoint(const Callback* f, Function** out) {
  return guard([&] { *out = new Function(mx::checkpoint(owned_function(f))); });
}

int32_t zmlx_custom_vjp(const Callback* f, const Callback* vjp, Function** out) {
  return guard([&] {
    auto fun = owned_function(f);
    auto back = owned(vjp);
    *out = new Function(mx::custom_vjp(fun, [back](const List& primals, const List& cotangents, const List& outputs) {
      return call_rust(*back, {&primals, &cotangents, &outputs});
    }));
  });
}

int32_t zmlx_function_call(const Function* f, const array* const* const* in, size_t in_n, List** out) {
  return guard([&] { put(out, (*f)(to_vec(in, in_n))); });
}

int32_t zmlx_function_free(void* f) {
  free_later(f, [](void* p) { delete static_cast<Function*>(p); });
  return 0;
}

int32_t zmlx_set_compile_enabled(bool enabled) {
  return guard([&] { enabled ? mx::enable_compile() : mx::disable_compile(); });
}
