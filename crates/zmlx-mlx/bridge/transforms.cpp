// Function transforms over Rust closures.
#include "api.h"

#include "mlx/compile.h"
#include "mlx/compile_impl.h"
#include "mlx/primitives.h"
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

// Another primitive with the derivatives and the vectorisation that Rust gives. Unlike MLX's own CustomTransforms it
// adds no node, and transforms do not see the primitive inside, which has none of these rules.
class Transformed : public mx::Primitive {
 public:
  Transformed(std::shared_ptr<mx::Primitive> inner, std::shared_ptr<TransformsVtable> rules, size_t outputs)
      : Primitive(inner->stream()), inner_(std::move(inner)), rules_(std::move(rules)), outputs_(outputs) {}

  void eval_cpu(const List& inputs, List& outputs) override { inner_->eval_cpu(inputs, outputs); }
  void eval_gpu(const List& inputs, List& outputs) override { inner_->eval_gpu(inputs, outputs); }
  const char* name() const override { return inner_->name(); }
  std::vector<mx::Shape> output_shapes(const List& inputs) override { return inner_->output_shapes(inputs); }

  List vjp(const List& primals, const List& cotangents, const std::vector<int>& argnums, const List& outputs) override {
    auto grads = call(0, {&primals, &cotangents, &outputs}, argnums, argnums.size(), nullptr);
    for (size_t i = 0; i < grads.size(); ++i) {
      if (grads[i].shape() != primals[argnums[i]].shape()) throw std::invalid_argument("[" + std::string(name()) + "] vjp gave a gradient of another shape than its input");
    }
    return grads;
  }

  List jvp(const List& primals, const List& tangents, const std::vector<int>& argnums) override {
    return call(1, {&primals, &tangents}, argnums, outputs_, nullptr);
  }

  std::pair<List, std::vector<int>> vmap(const List& inputs, const std::vector<int>& axes) override {
    std::vector<int32_t> out_axes(outputs_, 0);
    auto out = call(2, {&inputs}, axes, outputs_, out_axes.data());
    return {std::move(out), std::vector<int>(out_axes.begin(), out_axes.end())};
  }

 private:
  List call(int32_t rule, std::initializer_list<const List*> lists, const std::vector<int>& numbers, size_t expected, int32_t* axes) {
    List out;
    if (rules_->call(rules_->data, rule, lists.begin(), lists.size(), numbers.data(), numbers.size(), &out, axes) != 0) throw RustError();
    if (out.size() != expected) throw std::invalid_argument("[" + std::string(name()) + "] a transform gave " + std::to_string(out.size()) + " arrays, not " + std::to_string(expected));
    return out;
  }

  std::shared_ptr<mx::Primitive> inner_;
  std::shared_ptr<TransformsVtable> rules_;
  size_t outputs_;
};

}  // namespace

int32_t zmlx_with_transforms(const TransformsVtable* v, const array* const* const* in, size_t in_n, List** out) noexcept {
  // From here on the rules are owned, whatever happens.
  auto rules = std::shared_ptr<TransformsVtable>(new TransformsVtable(*v), [](TransformsVtable* p) {
    p->drop(p->data);
    delete p;
  });
  return guard([&] {
    auto arrays = to_vec(in, in_n);
    if (arrays.empty() || !arrays[0].has_primitive()) throw std::invalid_argument("with_transforms needs the outputs of a primitive that has not run");
    auto inner = arrays[0].primitive_ptr();
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    for (auto& a : arrays) {
      if (!a.has_primitive() || a.primitive_ptr() != inner) throw std::invalid_argument("with_transforms needs all outputs of one primitive");
      shapes.push_back(a.shape());
      dtypes.push_back(a.dtype());
    }
    put(out, array::make_arrays(std::move(shapes), dtypes, std::make_shared<Transformed>(inner, rules, arrays.size()), arrays[0].inputs()));
  });
}

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
