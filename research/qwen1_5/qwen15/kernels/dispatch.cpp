// Choice of the instruction set.
#include "dispatch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <vector>

namespace qwen15 {
namespace {

struct Choice {
  const Kernels* kernels;
  bool runs;
};

#ifdef QWEN15_EMULATED
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

// `own` with the functions of `base` where it has none.
[[maybe_unused]] Kernels filled(Kernels own, const Kernels& base) {
  auto fill = [](auto& function, auto inherited) { function = function == nullptr ? inherited : function; };
  fill(own.rmsnorm, base.rmsnorm);
  fill(own.prepare, base.prepare);
  fill(own.matmul, base.matmul);
  fill(own.ask, base.ask);
  fill(own.rope_and_cache, base.rope_and_cache);
  fill(own.attention, base.attention);
  fill(own.gather, base.gather);
  fill(own.combine, base.combine);
  fill(own.embed, base.embed);
  fill(own.chunk_maxima, base.chunk_maxima);
  fill(own.sum_exp, base.sum_exp);
  fill(own.read_bytes, base.read_bytes);
  fill(own.peak_flops, base.peak_flops);
  return own;
}

#if defined(__x86_64__)
// Whether the CPU has tiles and bf16 products of them, and the system keeps both of the tiles' states.
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kOsxsave = 1u << 27, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kTileStates = 3u << 17;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kOsxsave) == 0) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileStates) == kTileStates;
}

// Linux gives the tiles' 8 KiB of state to processes that ask, for all of their threads.
bool may_use_amx() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first; those that this library was compiled with.
std::vector<Choice> choices() {
  std::vector<Choice> all;
  auto add = [&](const Kernels& kernels, bool runs) { all.push_back({&kernels, runs}); };
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = kEmulated || (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"));
  [[maybe_unused]] bool avx512_bf16 =
      kEmulated || (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"));
#if defined(QWEN15_HAS_AMX) && defined(QWEN15_HAS_AVX512_BF16)
  static const Kernels amx = filled(kernels_amx, kernels_avx512_bf16);
  add(amx, kEmulated || (avx512_bf16 && has_amx() && may_use_amx()));
#endif
#ifdef QWEN15_HAS_AVX512_BF16
  add(kernels_avx512_bf16, avx512_bf16);
#endif
#ifdef QWEN15_HAS_AVX512
  add(kernels_avx512, avx512);
#endif
#ifdef QWEN15_HAS_AVX2
  add(kernels_avx2, avx2);
#endif
#elif defined(__aarch64__)
#ifdef __linux__
  // HWCAP_ASIMDDP, HWCAP_ASIMDHP, HWCAP2_BF16
  constexpr unsigned long kDotProduct = 1ul << 20, kHalf = 1ul << 10, kBf16 = 1ul << 14;
  unsigned long has = getauxval(AT_HWCAP);
  bool dot = (has & kDotProduct) != 0, bf16 = dot && (has & kHalf) != 0 && (getauxval(AT_HWCAP2) & kBf16) != 0;
#else
  bool dot = false, bf16 = false;
#endif
#ifdef QWEN15_HAS_NEON_BF16
  add(kernels_neon_bf16, bf16);
#endif
#if defined(QWEN15_HAS_NEON_DOT) && defined(QWEN15_HAS_NEON)
  static const Kernels neon_dot = filled(kernels_neon_dot, kernels_neon);
  add(neon_dot, dot);
#endif
#ifdef QWEN15_HAS_NEON
  add(kernels_neon, true);
#endif
#endif
  add(kernels_portable, true);
  return all;
}

std::atomic<const Kernels*> chosen{nullptr};

const std::vector<Choice>& known() {
  static const std::vector<Choice>* all = new std::vector<Choice>(choices());  // the system is asked once
  return *all;
}

const Kernels* find(const char* name) {
  for (const Choice& choice : known())
    if (choice.runs && strcmp(choice.kernels->name, name) == 0) return choice.kernels;
  return nullptr;
}

const Kernels* best() {
  for (const Choice& choice : known())
    if (choice.runs) return choice.kernels;
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
