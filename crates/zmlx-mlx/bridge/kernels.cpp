// Custom GPU kernels from source text.
#include "api.h"

#include "mlx/fast.h"

struct Kernel {
  mx::fast::CustomKernelFunction call;
};

static std::vector<std::string> strings(const Str* p, size_t n) {
  std::vector<std::string> out;
  for (size_t i = 0; i < n; ++i) out.push_back(p[i].get());
  return out;
}

int32_t zmlx_kernel_new(const KernelSpec* k, Kernel** out) noexcept {
  return guard([&] {
    auto inputs = strings(k->inputs, k->inputs_n);
    auto outputs = strings(k->outputs, k->outputs_n);
    auto call = k->metal
        ? mx::fast::metal_kernel(k->name.get(), inputs, outputs, k->source.get(), k->header.get(), k->ensure_row_contiguous, k->atomic_outputs)
        : mx::fast::cuda_kernel(k->name.get(), inputs, outputs, k->source.get(), k->header.get(), k->ensure_row_contiguous, k->shared_memory);
    *out = new Kernel{std::move(call)};
  });
}

int32_t zmlx_kernel_call(const Kernel* k, const KernelCall* c, StreamArg stream, List** out) noexcept {
  return guard([&] {
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    const int32_t* dims = c->shapes;
    for (size_t i = 0; i < c->outputs_n; ++i) {
      shapes.push_back(checked(to_shape(dims, c->ranks[i])));
      dims += c->ranks[i];
      dtypes.push_back(to_dtype(c->dtypes[i]));
    }
    std::vector<std::pair<std::string, mx::fast::TemplateArg>> args;
    for (size_t i = 0; i < c->template_args_n; ++i) {
      const auto& t = c->template_args[i];
      if (t.kind == 0) args.emplace_back(t.name.get(), static_cast<int>(t.value));
      else if (t.kind == 1) args.emplace_back(t.name.get(), t.value != 0);
      else args.emplace_back(t.name.get(), to_dtype(t.value));
    }
    put(out, k->call(to_vec(c->inputs, c->inputs_n), shapes, dtypes,
                     {c->grid[0], c->grid[1], c->grid[2]},
                     {c->threadgroup[0], c->threadgroup[1], c->threadgroup[2]},
                     args, opt(c->init_value), c->verbose != 0, to_stream(stream)));
  });
}

int32_t zmlx_kernel_free(void* k) noexcept {
  free_later(k, [](void* p) { delete static_cast<Kernel*>(p); });
  return 0;
}
