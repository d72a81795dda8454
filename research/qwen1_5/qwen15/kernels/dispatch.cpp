// Choice of the instruction set.
#include "dispatch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

namespace qwen15 {
namespace {

struct Choice {
  const Kernels* kernels;
  bool runs;
};

// Best first.
int choices(Choice* out) {
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  out[n++] = {&kernels_avx512_bf16, avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")};
  out[n++] = {&kernels_avx512, avx512};
  out[n++] = {&kernels_avx2, avx2};
#endif
  out[n++] = {&kernels_portable, true};
  return n;
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels* find(const char* name) {
  Choice all[4];
  int n = choices(all);
  for (int i = 0; i < n; ++i)
    if (all[i].runs && strcmp(all[i].kernels->name, name) == 0) return all[i].kernels;
  return nullptr;
}

const Kernels* best() {
  Choice all[4];
  int n = choices(all);
  for (int i = 0; i < n; ++i)
    if (all[i].runs) return all[i].kernels;
  return &kernels_portable;
}

}  // namespace

bool can_run(const char* name) { return find(name) != nullptr; }

bool use_kernels(const char* name) {
  const Kernels* found = find(name);
  if (found != nullptr) chosen.store(found);
  return found != nullptr;
}

const Kernels& kernels() {
  const Kernels* current = chosen.load(std::memory_order_acquire);
  if (current != nullptr) return *current;
  const char* name = getenv("QWEN15_KERNELS");
  const Kernels* found = name != nullptr && *name != '\0' ? find(name) : best();
  if (found == nullptr) {
    // The Python side has refused this before; a caller of the library alone gets the best and is told.
    found = best();
    fprintf(stderr, "qwen15 kernels: QWEN15_KERNELS=%s cannot run here, using %s\n", name, found->name);
  }
  chosen.store(found, std::memory_order_release);
  return *found;
}

}  // namespace qwen15
