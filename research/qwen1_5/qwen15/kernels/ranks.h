// Sums, and parts put together, over ranks (processes) of one machine through memory that they share.
//
// The memory: a head with a seat for every rank, then for every rank two places for its numbers, and two for results.
// A rank writes into its place, says in its seat how far it is, and waits until all are as far. Collectives use the two
// places in turn: a rank that writes into one again has seen that all have said more since, which they do only when
// they have read it. Everyone adds in the order of the ranks, so all have the same bits, in every run.
//
// Nobody waits for ever: after a limit a rank gives up, which the others see; from then on nothing is written, read or
// waited for, the numbers mean nothing, and `complaint` says what happened.
#pragma once
#include <stdint.h>
#include <string.h>

#include <atomic>
#include <chrono>
#include <string>

namespace qwen15 {

class Ranks {
 public:
  // Numbers of a rank that are exchanged at once.
  static constexpr int64_t kChunk = 1 << 18;
  static constexpr int kMostRanks = 1024;

  // Bytes of the memory for so many ranks.
  static int64_t bytes(int ranks);
  // memory: zeros when the first rank comes. Throws std::runtime_error where another number of ranks, or another
  // version of this file, is at home there.
  Ranks(void* memory, int rank, int ranks, double limit_s);
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }

  // x += the ranks' `partial`, both (count,). Called by every thread of the team (Team, or what has its rank, size,
  // share and barrier); `partial` may be written up to the call, and x is whole for all threads after it.
  template <class T>
  void add(T& team, const float* partial, int64_t count, float* x);
  // Puts the ranks' parts (rows, end - begin) of one table side by side: out (rows, cols), the columns from begins[r]
  // to begins[r + 1] from rank r's part.
  template <class T>
  void join_columns(T& team, const float* part, int64_t rows, const int64_t* begins, int64_t cols, float* out);
  // Rank 0's ids (count,) in everyone's; one thread. False after `wait_s`: to be called again with the same arguments.
  bool agree(int32_t* ids, int64_t count, double wait_s);

  // What has gone wrong, "" when nothing has.
  std::string complaint() const;
  // Seconds spent waiting for the other ranks in sums and joins so far, and how often.
  double waited_seconds() const { return waited_ns_.load(std::memory_order_relaxed) * 1e-9; }
  int64_t waits() const { return waits_.load(std::memory_order_relaxed); }

 private:
  struct Seat;
  struct Head;

  float* place(int rank, int64_t turn) const { return places_ + (2 * static_cast<int64_t>(rank) + turn % 2) * kChunk; }
  // Say that what was to be written is written, and wait for all to say so.
  void step();
  bool wait_for_all(uint32_t wanted, double limit_s, int* missing);
  void give_up(int missing);
  // Changes inside `meet` only, so that all threads of a team see the same.
  bool lost() const { return missing_.load(std::memory_order_relaxed) >= 0; }

  template <class T>
  void meet(T& team, bool begins) {
    team.barrier();
    if (team.rank() == 0) {
      step();
      turn_ += begins;
    }
    team.barrier();
  }

  Head* head_;
  Seat* seats_;
  float* places_;
  int rank_, ranks_;
  double limit_s_;
  uint32_t said_ = 0;
  int64_t turn_ = 0;
  bool pending_ = false;
  std::atomic<int64_t> waited_ns_{0}, waits_{0};
  std::chrono::steady_clock::time_point pending_since_;
  std::atomic<int> missing_{-1};  // the rank that was waited for in vain; ranks_ where another rank has given up
};

// Where so few numbers are exchanged everyone adds all of them; of more, each its part, and then they meet once more.
constexpr int64_t kAddedByAll = 1 << 14;

template <class T>
void Ranks::add(T& team, const float* partial, int64_t count, float* x) {
  for (int64_t at = 0; at < count && !lost(); at += kChunk) {
    int64_t n = count - at < kChunk ? count - at : kChunk, turn = turn_, begin, end;
    team.share(n, 16, &begin, &end);
    memcpy(place(rank_, turn) + begin, partial + at + begin, (end - begin) * sizeof(float));
    meet(team, true);
    if (lost()) break;
    if (ranks_ == 2 || n <= kAddedByAll) {
      for (int64_t i = begin; i < end; ++i) {
        float sum = place(0, turn)[i];
        for (int r = 1; r < ranks_; ++r) sum += place(r, turn)[i];
        x[at + i] += sum;
      }
      continue;
    }
    int64_t each = (n + ranks_ - 1) / ranks_, first = each * rank_ < n ? each * rank_ : n;
    int64_t last = first + each < n ? first + each : n, from, to;
    team.share(last - first, 16, &from, &to);
    float* result = place(ranks_, turn);
    for (int64_t i = first + from; i < first + to; ++i) {
      float sum = place(0, turn)[i];
      for (int r = 1; r < ranks_; ++r) sum += place(r, turn)[i];
      result[i] = sum;
    }
    meet(team, false);
    if (lost()) break;
    for (int64_t i = begin; i < end; ++i) x[at + i] += result[i];
  }
  team.barrier();
}

template <class T>
void Ranks::join_columns(T& team, const float* part, int64_t rows, const int64_t* begins, int64_t cols, float* out) {
  int64_t most = 0;
  for (int r = 0; r < ranks_; ++r)
    if (begins[r + 1] - begins[r] > most) most = begins[r + 1] - begins[r];
  for (int64_t at = 0; at < rows * most && !lost(); at += kChunk) {
    int64_t turn = turn_, begin, end;
    auto size = [&](int r) {
      int64_t left = rows * (begins[r + 1] - begins[r]) - at;
      return left < 0 ? 0 : left < kChunk ? left : kChunk;
    };
    team.share(size(rank_), 16, &begin, &end);
    memcpy(place(rank_, turn) + begin, part + at + begin, (end - begin) * sizeof(float));
    meet(team, true);
    if (lost()) break;
    for (int r = 0; r < ranks_; ++r) {
      int64_t wide = begins[r + 1] - begins[r];
      team.share(size(r), 16, &begin, &end);
      const float* from = place(r, turn);
      while (begin < end) {
        int64_t row = (at + begin) / wide, column = (at + begin) % wide;
        int64_t n = wide - column < end - begin ? wide - column : end - begin;
        memcpy(out + row * cols + begins[r] + column, from + begin, n * sizeof(float));
        begin += n;
      }
    }
  }
  team.barrier();
}

// The ranks that this process has joined, null before.
Ranks* joined_ranks();
// Join them through the memory of this file, which is given its size. Throws std::runtime_error.
void join_ranks(int file, int rank, int ranks, double limit_s);

}  // namespace qwen15
