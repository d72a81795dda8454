// C functions for the bench: bandwidth, peak of the arithmetic, and the time the kernels have worked.
#include <stdint.h>

#include <atomic>
#include <chrono>

#include "dispatch.h"
#include "team.h"

#define QWEN15_API extern "C" __attribute__((visibility("default")))

using namespace qwen15;

namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

// Bytes per second all threads together read from `bytes` of memory, each its own half, third, ...; one pass.
// split: each thread reads several places side by side instead of one after another.
QWEN15_API double qwen15_probe_bandwidth(const void* data, int64_t bytes, int split) {
  std::atomic<uint64_t> sink{0};
  run_team([](Team&) {});  // whoever slept is awake now
  auto begin = std::chrono::steady_clock::now();
  run_team([&](Team& team) {
    int64_t from, to;
    team.share(bytes, 4096, &from, &to);
    sink += kernels().read_bytes(static_cast<const char*>(data) + from, to - from, split != 0);
  });
  return bytes / seconds_since(begin);
}

// Floating point operations per second all threads reach together in multiply-adds on registers, as prefill does them.
// dtype: 0 float32, 1 float16 (computed in float32), 2 bfloat16 (dot products where the CPU has them).
QWEN15_API double qwen15_probe_flops(int64_t repeats, int dtype) {
  std::atomic<int64_t> done{0};
  run_team([](Team&) {});
  auto begin = std::chrono::steady_clock::now();
  run_team([&](Team&) { done += static_cast<int64_t>(kernels().peak_flops(repeats, static_cast<DType>(dtype))); });
  return static_cast<double>(done) / seconds_since(begin);
}

// Seconds for which the kernels have worked since the process began; what a token took beyond them is the caller's own.
QWEN15_API double qwen15_busy_seconds() { return busy_seconds(); }
