// A primitive of MLX whose CPU evaluation is a Rust function.
#include "api.h"

#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

namespace {

// Set by Rust on the thread that runs the callback, read right after it.
thread_local std::string callback_error;

struct RustKernel {
  CpuVtable v;
  std::string name;
  std::vector<int32_t> in_place;
  explicit RustKernel(const CpuVtable* p) : v(*p), name(p->name), in_place(p->in_place, p->in_place + 2 * p->in_place_n) {}
  ~RustKernel() { v.drop(v.data); }
  RustKernel(const RustKernel&) = delete;
  RustKernel& operator=(const RustKernel&) = delete;
};

// Copies a strided array to contiguous memory, element by element of any size.
void copy_strided(const array& a, char* out) {
  const size_t item = a.itemsize();
  const char* base = a.data<char>();
  const int n = static_cast<int>(a.ndim());
  std::vector<int64_t> at(n, 0);
  int64_t offset = 0;
  for (size_t i = 0; i < a.size(); ++i, out += item) {
    std::memcpy(out, base + offset * static_cast<int64_t>(item), item);
    for (int d = n - 1; d >= 0; --d) {
      offset += a.strides()[d];
      if (++at[d] < a.shape()[d]) break;
      offset -= at[d] * a.strides()[d];
      at[d] = 0;
    }
  }
}

class RustPrimitive : public mx::Primitive {
 public:
  RustPrimitive(mx::Stream s, std::shared_ptr<RustKernel> k, size_t outputs)
      : Primitive(s), k_(std::move(k)), outputs_(outputs) {}

  void eval_cpu(const std::vector<array>& inputs, std::vector<array>& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    // source[o]: the input that output o starts from; shared[o]: it is the same memory already.
    std::vector<int32_t> source(outputs.size(), -1);
    std::vector<char> shared(outputs.size(), 0);
    for (size_t i = 0; i + 1 < k_->in_place.size(); i += 2) source.at(k_->in_place[i + 1]) = k_->in_place[i];
    for (size_t o = 0; o < outputs.size(); ++o) {
      auto& out = outputs[o];
      if (source[o] >= 0) {
        const auto& in = inputs.at(source[o]);
        if (in.is_donatable() && in.flags().row_contiguous && in.nbytes() == out.nbytes() && in.data_size() == in.size()) {
          out.copy_shared_buffer(in);
          shared[o] = 1;
          continue;
        }
      }
      out.set_data(pool_malloc(out.nbytes()));
    }
    std::vector<array> in, out;
    for (const auto& a : inputs) {
      encoder.set_input_array(a);
      in.push_back(array::unsafe_weak_copy(a));
    }
    for (auto& a : outputs) {
      encoder.set_output_array(a);
      out.push_back(array::unsafe_weak_copy(a));
    }
    auto failures = Failures::current();
    failures->begin();
    encoder.dispatch([k = k_, in = std::move(in), out = std::move(out), source, shared, failures]() mutable {
      std::optional<std::string> failure;
      try {
        run(*k, in, out, source, shared);
      } catch (const std::exception& e) {
        failure = e.what();
        for (auto& a : out) spoil(a);
      }
      failures->end(std::move(failure));
    });
  }

  // Work that is already queued reads the outputs of a failed kernel: NaN for floats, zeros (no wild indices) for others.
  static void spoil(array& a) {
    if (!a.size()) return;
    bool floats = mx::issubdtype(a.dtype(), mx::inexact);
    std::memset(a.data<char>(), floats ? 0xff : 0, a.nbytes());
  }

  void eval_gpu(const std::vector<array>&, std::vector<array>&) override {
    throw std::runtime_error("[" + k_->name + "] is a CPU primitive and has no GPU evaluation");
  }

  std::vector<array> vjp(const std::vector<array>& primals, const std::vector<array>& cotangents, const std::vector<int>& argnums, const std::vector<array>& outputs) override {
    if (!k_->v.vjp) throw std::invalid_argument("[" + k_->name + "] has no gradient: give it a vjp, or wrap it in custom_vjp");
    const List* lists[] = {&primals, &cotangents, &outputs};
    List grads;
    if (k_->v.vjp(k_->v.data, lists, 3, argnums.data(), argnums.size(), &grads) != 0) throw RustError();
    if (grads.size() != argnums.size()) {
      throw std::invalid_argument("[" + k_->name + "] vjp gave " + std::to_string(grads.size()) + " gradients for " + std::to_string(argnums.size()) + " inputs");
    }
    for (size_t i = 0; i < grads.size(); ++i) {
      if (grads[i].shape() != primals[argnums[i]].shape()) throw std::invalid_argument("[" + k_->name + "] vjp gave a gradient of another shape than its input");
    }
    return grads;
  }

  std::vector<array> jvp(const std::vector<array>&, const std::vector<array>&, const std::vector<int>&) override {
    throw std::invalid_argument("[" + k_->name + "] has no forward-mode derivative (jvp)");
  }

  std::pair<std::vector<array>, std::vector<int>> vmap(const std::vector<array>&, const std::vector<int>&) override {
    throw std::invalid_argument("[" + k_->name + "] cannot be vectorised (vmap)");
  }

  const char* name() const override { return k_->name.c_str(); }

  std::vector<mx::Shape> output_shapes(const std::vector<array>& inputs) override {
    std::vector<mx::Shape> shapes;
    auto push = [](void* sink, const int32_t* dims, size_t rank) {
      static_cast<std::vector<mx::Shape>*>(sink)->push_back(mx::Shape(dims, dims + rank));
    };
    if (k_->v.shapes(k_->v.data, &inputs, &shapes, push) != 0) throw RustError();
    if (shapes.size() != outputs_) throw std::invalid_argument("[" + k_->name + "] gave another number of outputs for other shapes");
    for (auto& shape : shapes) checked(shape);
    for (size_t i = 0; i + 1 < k_->in_place.size(); i += 2) {
      if (inputs.at(k_->in_place[i]).shape() != shapes.at(k_->in_place[i + 1])) {
        throw std::invalid_argument("[" + k_->name + "] an in-place output must have the shape of its input");
      }
    }
    return shapes;
  }

 private:
  // On the stream's worker thread.
  static void run(const RustKernel& k, std::vector<array>& in, std::vector<array>& out, const std::vector<int32_t>& source, const std::vector<char>& shared) {
    std::vector<std::unique_ptr<char[]>> copies;
    auto view = [](const array& a, void* data) {
      return CpuView{data, a.shape().data(), a.ndim(), static_cast<int32_t>(a.dtype().val()), a.nbytes(), -1};
    };
    std::vector<CpuView> ins, outs;
    for (auto& a : in) {
      void* data = a.size() ? a.data<void>() : nullptr;
      if (data && !a.flags().row_contiguous) {
        copies.emplace_back(new char[a.nbytes() + 64]);
        data = copies.back().get();
        copy_strided(a, static_cast<char*>(data));
      }
      ins.push_back(view(a, data));
    }
    for (size_t o = 0; o < out.size(); ++o) {
      void* data = out[o].size() ? out[o].data<void>() : nullptr;
      outs.push_back(view(out[o], data));
      if (source[o] < 0) continue;
      auto& from = ins[source[o]];
      outs[o].source = source[o];
      if (data && !shared[o]) std::memcpy(data, from.data, out[o].nbytes());
    }
    // An input that an output now holds is not handed out a second time.
    for (auto s : source) if (s >= 0) ins[s].data = nullptr;
    callback_error.clear();
    if (k.v.eval(k.v.data, ins.data(), ins.size(), outs.data(), outs.size()) != 0) {
      throw std::runtime_error("[" + k.name + "] " + callback_error);
    }
  }

  std::shared_ptr<RustKernel> k_;
  size_t outputs_;
};

}  // namespace

int32_t zmlx_set_callback_error(const char* text, size_t text_n) noexcept {
  callback_error.assign(text, text_n);
  return 0;
}

int32_t zmlx_cpu_apply(const CpuVtable* v, const array* const* const* in, size_t in_n, const int32_t* dims, size_t dims_n, const int32_t* ranks, size_t ranks_n, const int32_t* dtypes, size_t dtypes_n, StreamArg stream, List** out) noexcept {
  // From here on the kernel is owned, whatever happens.
  auto kernel = std::make_shared<RustKernel>(v);
  return guard([&] {
    size_t rank_sum = 0;
    for (size_t i = 0; i < ranks_n; ++i) rank_sum += ranks[i];
    if (ranks_n != dtypes_n || rank_sum != dims_n || ranks_n == 0) throw std::invalid_argument("a CPU primitive needs at least one output");
    auto s = to_stream(stream);
    if (s.device != mx::Device::cpu) throw std::invalid_argument("a CPU primitive needs a CPU stream");
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> types;
    const int32_t* d = dims;
    for (size_t i = 0; i < ranks_n; ++i) {
      shapes.push_back(checked(to_shape(d, ranks[i])));
      d += ranks[i];
      types.push_back(to_dtype(dtypes[i]));
    }
    auto inputs = to_vec(in, in_n);
    for (size_t i = 0; i + 1 < kernel->in_place.size(); i += 2) {
      auto i0 = kernel->in_place[i], o0 = kernel->in_place[i + 1];
      if (i0 < 0 || o0 < 0 || static_cast<size_t>(i0) >= inputs.size() || static_cast<size_t>(o0) >= shapes.size()) throw std::invalid_argument("an in-place pair names an input or output that does not exist");
      if (inputs[i0].shape() != shapes[o0] || inputs[i0].dtype() != types[o0]) throw std::invalid_argument("an in-place output must have the shape and dtype of its input");
    }
    put(out, array::make_arrays(std::move(shapes), types, std::make_shared<RustPrimitive>(s, kernel, ranks_n), inputs));
  });
}
