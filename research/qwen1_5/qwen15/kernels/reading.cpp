// The way of reading weights that is in use, and what one is worth on this machine.
#include "reading.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "layer.h"
#include "team.h"
#include "wait.h"

#define QWEN15_API extern "C" __attribute__((visibility("default")))

namespace qwen15 {
namespace {

std::atomic<Reading> way{Reading()};

// Takes memory out of the caches, so that the next one who reads it waits for the memory.
void flush(const char* data, int64_t bytes) {
#if defined(__x86_64__)
  for (int64_t at = 0; at < bytes; at += 64) __builtin_ia32_clflush(data + at);
  __builtin_ia32_mfence();
#elif defined(__aarch64__)
  for (int64_t at = 0; at < bytes; at += 64) asm volatile("dc civac, %0" : : "r"(data + at) : "memory");
  asm volatile("dsb ish" : : : "memory");
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace

Reading reading() { return way.load(std::memory_order_relaxed); }
void set_reading(Reading chosen) { way.store(chosen, std::memory_order_relaxed); }

}  // namespace qwen15

using namespace qwen15;

QWEN15_API void qwen15_set_reading(int hint, int ahead, int places) {
  Reading chosen;
  chosen.hint = static_cast<int8_t>(hint);
  chosen.places = static_cast<int8_t>(places);
  chosen.ahead = ahead;
  set_reading(chosen);
}

// Seconds in which all threads read weights (rows, cols) of 16 bits at `data`, which no cache holds, against so many
// tokens, as the way in use does it. They are taken as fp16, which few tokens meet row by row with every instruction set.
QWEN15_API double qwen15_probe_reading(const void* data, int64_t rows, int64_t cols, int64_t tokens) {
  Matrix w;
  w.data = data;
  w.dtype = DType::f16;
  w.rows = rows;
  w.cols = cols;
  std::vector<float> x(tokens * cols, 1.0f), out(tokens * rows);
  run_uncounted([&](Team& team) {
    int64_t begin, end;
    team.share(rows * w.row_bytes(), 4096, &begin, &end);
    flush(static_cast<const char*>(data) + begin, end - begin);
  });
  int64_t begin = clock_ns(CLOCK_MONOTONIC);
  project(w, x.data(), tokens, nullptr, out.data());
  return (clock_ns(CLOCK_MONOTONIC) - begin) * 1e-9;
}
