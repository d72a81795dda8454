// Ranks as threads of one process, for sanitizers, which see one process only: sums, columns put together, ids agreed on,
// and a rank that does not come. Exit code 0 when every number is right.
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "ranks.cpp"

namespace {

using qwen15::Ranks;

// A team of one thread.
struct Solo {
  int rank() const { return 0; }
  int size() const { return 1; }
  void barrier() {}
  void share(int64_t n, int64_t, int64_t* begin, int64_t* end) const { *begin = 0, *end = n; }
};

std::atomic<int> wrong{0};

void expect(bool right, const char* what) {
  if (!right) fprintf(stderr, "ranks_driver: %s\n", what), wrong.fetch_add(1);
}

// What rank r contributes to number i: small whole numbers, whose sums are exact.
float number(int rank, int64_t i) { return static_cast<float>((i * 7 + rank * 3) % 100); }

void work(void* memory, int rank, int ranks) {
  Ranks joined(memory, rank, ranks, 60);
  Solo solo;
  for (int64_t count : {int64_t{1}, int64_t{1000}, qwen15::kAddedByAll + 5, Ranks::kChunk + 17}) {
    std::vector<float> partial(count), x(count, 2.0f);
    for (int64_t i = 0; i < count; ++i) partial[i] = number(rank, i);
    joined.add(solo, partial.data(), count, x.data());
    bool right = true;
    for (int64_t i = 0; i < count; ++i) {
      float sum = 2;
      for (int r = 0; r < ranks; ++r) sum += number(r, i);
      right = right && x[i] == sum;
    }
    expect(right, "a sum is wrong");
  }
  for (int64_t rows : {1, 3}) {
    int64_t cols = Ranks::kChunk / 2 + 10;
    std::vector<int64_t> begins;
    for (int r = 0; r <= ranks; ++r) begins.push_back(cols * r / ranks);
    int64_t wide = begins[rank + 1] - begins[rank];
    std::vector<float> part(rows * wide), out(rows * cols, -1.0f);
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t j = 0; j < wide; ++j) part[b * wide + j] = number(static_cast<int>(b), begins[rank] + j);
    joined.join_columns(solo, part.data(), rows, begins.data(), cols, out.data());
    bool right = true;
    for (int64_t i = 0; i < rows * cols; ++i) right = right && out[i] == number(static_cast<int>(i / cols), i % cols);
    expect(right, "columns are wrong");
  }
  for (int turn = 0; turn < 50; ++turn) {
    int32_t ids[3] = {turn, turn + 1, turn + 2};
    if (rank != 0) ids[0] = ids[1] = ids[2] = -1;
    while (!joined.agree(ids, 3, 0.001)) {
    }
    expect(ids[0] == turn && ids[2] == turn + 2, "ids differ from rank 0's");
  }
  expect(joined.complaint().empty(), "there is a complaint");
}

void wait_in_vain(void* memory, int rank) {
  Ranks joined(memory, rank, 3, 0.2);
  Solo solo;
  float one = 1, x = 0;
  joined.add(solo, &one, 1, &x);
  expect(!joined.complaint().empty(), "a rank that has not come is not named");
  joined.add(solo, &one, 1, &x);  // waits no more
}

void* memory_for(int ranks) {
  void* memory = mmap(nullptr, Ranks::bytes(ranks), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory");
  return memory;
}

}  // namespace

int main() {
  for (int ranks : {2, 3, 5}) {
    void* memory = memory_for(ranks);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; ++rank) threads.emplace_back(work, memory, rank, ranks);
    for (auto& thread : threads) thread.join();
    munmap(memory, Ranks::bytes(ranks));
  }
  void* memory = memory_for(3);
  std::thread first(wait_in_vain, memory, 0), second(wait_in_vain, memory, 2);
  first.join();
  second.join();
  return wrong.load() == 0 ? 0 : 1;
}
