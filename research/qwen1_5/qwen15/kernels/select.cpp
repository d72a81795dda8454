// C functions for Python's ctypes: selection over the vocabulary, control of the threads.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "layer.h"
#include "team.h"

#define QWEN15_API extern "C" __attribute__((visibility("default")))

using namespace qwen15;

namespace {

// Bumped whenever a function's arguments or an operator's inputs change.
constexpr int kAbiVersion = 7;

struct Candidate {
  float value;
  int32_t id;
};

// Largest value first; equal values in order of their ids.
bool before(const Candidate& a, const Candidate& b) { return a.value != b.value ? a.value > b.value : a.id < b.id; }

// Maxima of consecutive chunks; empty when a logit is NaN.
std::vector<float> maxima_of(const float* logits, int64_t n) {
  std::vector<float> maxima((n + kLogitChunk - 1) / kLogitChunk);
  if (!kernels().chunk_maxima(logits, n, maxima.data())) maxima.clear();
  return maxima;
}

// Everything >= threshold, looking only into chunks whose maximum is.
void collect(const float* logits, int64_t n, const std::vector<float>& maxima, float threshold,
             std::vector<Candidate>* out) {
  for (size_t c = 0; c < maxima.size(); ++c) {
    if (maxima[c] < threshold) continue;
    int64_t end = std::min<int64_t>(n, static_cast<int64_t>(c + 1) * kLogitChunk);
    for (int64_t i = static_cast<int64_t>(c) * kLogitChunk; i < end; ++i)
      if (logits[i] >= threshold) out->push_back({logits[i], static_cast<int32_t>(i)});
  }
}

// Sorts with `before`. Many are first dealt into small buckets of values that lie near each other, which is most of the
// work in one pass.
void sort_candidates(std::vector<Candidate>* all) {
  constexpr size_t kFew = 4096, kPerBucket = 32;
  float top = -INFINITY, low = INFINITY;
  for (const Candidate& c : *all) {
    top = std::max(top, c.value);
    if (c.value > -INFINITY) low = std::min(low, c.value);
  }
  if (all->size() < kFew || !(static_cast<double>(top) - low > 0) || top == INFINITY) {
    std::sort(all->begin(), all->end(), before);
    return;
  }
  size_t last = all->size() / kPerBucket;
  double scale = last / (static_cast<double>(top) - low);
  auto bucket = [&](const Candidate& c) {
    return static_cast<size_t>(std::min((static_cast<double>(top) - c.value) * scale, static_cast<double>(last)));
  };
  std::vector<size_t> ends(last + 1, 0);
  for (const Candidate& c : *all) ++ends[bucket(c)];
  for (size_t b = 1; b <= last; ++b) ends[b] += ends[b - 1];
  std::vector<size_t> places(ends.size(), 0);
  std::copy(ends.begin(), ends.end() - 1, places.begin() + 1);
  std::vector<Candidate> dealt(all->size());
  for (const Candidate& c : *all) dealt[places[bucket(c)]++] = c;
  for (size_t b = 0, begin = 0; b <= last; begin = ends[b++])
    std::sort(dealt.begin() + begin, dealt.begin() + ends[b], before);
  all->swap(dealt);
}

}  // namespace

QWEN15_API int qwen15_abi_version() { return kAbiVersion; }
QWEN15_API const char* qwen15_kernels_name() { return kernels().name; }
QWEN15_API int qwen15_can_run(const char* name) { return can_run(name); }
QWEN15_API int qwen15_use_kernels(const char* name) { return use_kernels(name); }
QWEN15_API int qwen15_threads() { return threads(); }
QWEN15_API int qwen15_spread_over(int nodes, const int32_t* numbers, const int32_t* counts, const int32_t* cpus) {
  return spread_over(nodes, numbers, counts, cpus);
}
QWEN15_API int qwen15_working_threads() { return working_threads(); }
QWEN15_API void qwen15_set_threads(int n) { set_threads(n); }
QWEN15_API int qwen15_exact_activations() { return exact_activations(); }
QWEN15_API void qwen15_set_exact_activations(int exact) { set_exact_activations(exact != 0); }

namespace {

// The first id of the row's largest value in [begin, end), which is not empty; -1 where one of them is NaN.
int64_t first_of_largest(const float* row, int64_t begin, int64_t end) {
  std::vector<float> maxima = maxima_of(row + begin, end - begin);
  if (maxima.empty()) return -1;
  size_t chunk = std::max_element(maxima.begin(), maxima.end()) - maxima.begin();
  int64_t i = begin + static_cast<int64_t>(chunk) * kLogitChunk;
  while (row[i] != maxima[chunk]) ++i;
  return i;
}

}  // namespace

// ids[b] = the first id of logits[b]'s largest value, logits (B, V); -1 where a logit is NaN. Each thread begins with the
// columns that it has just written as rows of the head: from another core's cache they come at a tenth of the speed.
QWEN15_API void qwen15_argmax(const float* logits, int64_t rows, int64_t vocab, int32_t* ids) {
  constexpr int64_t kPart = 16 * kLogitChunk;
  int64_t parts = (vocab + kPart - 1) / kPart;
  std::vector<int64_t> found(rows * parts);
  auto search = [&](int64_t part) {
    int64_t begin = part * kPart, end = std::min(begin + kPart, vocab);
    for (int64_t b = 0; b < rows; ++b) found[b * parts + part] = first_of_largest(logits + b * vocab, begin, end);
  };
  if (parts < 4) {
    for (int64_t part = 0; part < parts; ++part) search(part);
  } else {
    run_uncounted([&](Team& team) {
      for (int i = 0; i < team.size(); ++i) {
        int owner = (team.rank() + i) % team.size();
        int64_t begin, end;
        team.share_of(owner, parts, 1, &begin, &end);
        for (int64_t part = begin + team.take_of(owner); part < end; part = begin + team.take_of(owner)) search(part);
      }
    });
  }
  for (int64_t b = 0; b < rows; ++b) {
    const float* row = logits + b * vocab;
    int64_t best = found[b * parts];
    for (int64_t part = 1; part < parts && best >= 0; ++part) {
      int64_t other = found[b * parts + part];
      if (other < 0 || row[other] > row[best]) best = other;
    }
    ids[b] = static_cast<int32_t>(best);
  }
}

// The k largest of logits (V,), largest first, equal ones in order of their ids. Exact: the k-th largest chunk maximum
// has k values at or above it, so nothing below it can be among the k. Returns their number (k, or V when it is less),
// -1 when a logit is NaN.
QWEN15_API int64_t qwen15_top_candidates(const float* logits, int64_t vocab, int64_t k, float* values, int32_t* ids) {
  if (k > vocab) k = vocab;
  if (k <= 0) return 0;
  std::vector<float> maxima = maxima_of(logits, vocab);
  if (maxima.empty()) return -1;
  float threshold = -INFINITY;
  if (k <= static_cast<int64_t>(maxima.size())) {
    std::vector<float> sorted = maxima;
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
    threshold = sorted[k - 1];
  }
  std::vector<Candidate> found;
  collect(logits, vocab, maxima, threshold, &found);
  std::partial_sort(found.begin(), found.begin() + k, found.end(), before);
  for (int64_t i = 0; i < k; ++i) {
    values[i] = found[i].value;
    ids[i] = found[i].id;
  }
  return k;
}

// The nucleus of softmax(logits / temperature), logits (V,): the fewest most likely ids whose probabilities sum to at
// least top_p, the one that crosses included; most likely first, equal ones in order of their ids. `capacity` is the
// room in values (logits, not divided) and ids. `normaliser` becomes (largest logit, sum over the whole vocabulary of
// exp((logit - largest) / temperature)). Returns the number of ids, -1 when a logit is NaN, -2 when they do not fit.
QWEN15_API int64_t qwen15_nucleus(const float* logits, int64_t vocab, float temperature, double top_p, float* values,
                                  int32_t* ids, int64_t capacity, double* normaliser) {
  std::vector<float> maxima = maxima_of(logits, vocab);
  if (maxima.empty()) return -1;
  float top = *std::max_element(maxima.begin(), maxima.end());
  double total = kernels().sum_exp(logits, vocab, 1.0f / temperature, top);
  normaliser[0] = top;
  normaliser[1] = total;
  // Widen the net until what it holds is the nucleus: values above top - 4 T, then - 8 T, ... All values of the net are
  // larger than all outside, so once its mass reaches top_p the nucleus lies inside.
  std::vector<Candidate> found;
  for (double depth = 4.0 * temperature;; depth *= 2.0) {
    found.clear();
    bool everything = depth > 1e9 || static_cast<double>(top) - depth < -3e38;
    collect(logits, vocab, maxima, everything ? -INFINITY : static_cast<float>(top - depth), &found);
    everything = everything || static_cast<int64_t>(found.size()) == vocab;
    double mass = 0.0;
    for (const Candidate& c : found) mass += exp((static_cast<double>(c.value) - top) / temperature);
    if (mass >= top_p * total || everything) break;
  }
  sort_candidates(&found);
  double mass = 0.0;
  int64_t count = 0;
  for (const Candidate& c : found) {
    if (count == capacity) return -2;
    values[count] = c.value;
    ids[count] = c.id;
    ++count;
    mass += exp((static_cast<double>(c.value) - top) / temperature);
    if (mass >= top_p * total) break;
  }
  return count;
}
