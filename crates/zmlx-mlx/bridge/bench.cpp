// The chain of small ops that the host-overhead bench compares Rust with, in plain C++ without the bridge's lock.
#include "api.h"

#include <chrono>

int32_t zmlx_bench_chain(StreamArg stream, uint64_t length, uint64_t repeats, bool pipelined, uint64_t* nanoseconds) noexcept {
  return guard([&] {
    auto s = to_stream(stream);
    auto z = mx::zeros({16}, mx::float32, s);
    auto one = mx::ones({16}, mx::float32, s);
    mx::eval(z, one);
    auto start = std::chrono::steady_clock::now();
    for (uint64_t r = 0; r < repeats; ++r) {
      for (uint64_t i = 0; i < length; ++i) z = mx::add(z, one, s);
      if (pipelined) mx::async_eval(z);
      else mx::eval(z);
    }
    mx::synchronize(s);
    *nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start).count();
  });
}
