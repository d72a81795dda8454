// The shared memory behind `Ranks`: how ranks say how far they are, and how they wait.
#include "ranks.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <optional>
#include <stdexcept>

#include "wait.h"

namespace qwen15 {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kVersion = 1;
// Another rank is a few microseconds away when all compute, so at first the wait costs the core.
constexpr int kSpins = 4000;
// After a token is chosen, or a thread has lost its core, it is up to a few milliseconds.
constexpr auto kYield = std::chrono::milliseconds(2);
constexpr int64_t kNapNs = 50 * 1000 * 1000;  // a rank that gives up is noticed so soon

int64_t rounded(int64_t bytes) { return (bytes + 4095) / 4096 * 4096; }

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

}  // namespace

struct alignas(128) Ranks::Seat {
  std::atomic<uint32_t> said{0};      // how many steps this rank has made
  std::atomic<uint32_t> sleepers{0};  // that wait for this rank
};

struct Ranks::Head {
  std::atomic<uint32_t> version{0}, ranks{0};
  std::atomic<uint32_t> given_up{0};  // 1 + the rank that was waited for in vain
};

int64_t Ranks::bytes(int ranks) {
  return 4096 + rounded(ranks * static_cast<int64_t>(sizeof(Seat))) +
         2 * (ranks + 1) * kChunk * static_cast<int64_t>(sizeof(float));
}

Ranks::Ranks(void* memory, int rank, int ranks, double limit_s)
    : head_(static_cast<Head*>(memory)), rank_(rank), ranks_(ranks), limit_s_(limit_s) {
  if (ranks < 2 || ranks > kMostRanks || rank < 0 || rank >= ranks)
    throw std::runtime_error("rank " + std::to_string(rank) + " of " + std::to_string(ranks) + " cannot be");
  char* base = static_cast<char*>(memory);
  seats_ = reinterpret_cast<Seat*>(base + 4096);
  places_ = reinterpret_cast<float*>(base + 4096 + rounded(ranks * static_cast<int64_t>(sizeof(Seat))));
  uint32_t version = 0, count = 0;
  bool fits = head_->version.compare_exchange_strong(version, kVersion) || version == kVersion;
  fits = fits && (head_->ranks.compare_exchange_strong(count, ranks) || count == static_cast<uint32_t>(ranks));
  if (!fits)
    throw std::runtime_error("the ranks' memory is of version " + std::to_string(version) + " for " +
                             std::to_string(count) + " ranks, not of version " + std::to_string(kVersion) + " for " +
                             std::to_string(ranks));
}

void Ranks::step() {
  int missing = 0;
  Seat& own = seats_[rank_];
  own.said.store(++said_, std::memory_order_seq_cst);
  if (own.sleepers.load(std::memory_order_seq_cst) > 0) wake(&own.said);
  if (missing_.load(std::memory_order_relaxed) >= 0) return;
  Clock::time_point begin = Clock::now();
  if (!wait_for_all(said_, limit_s_, &missing)) give_up(missing);
  waited_ns_.fetch_add(std::chrono::nanoseconds(Clock::now() - begin).count(), std::memory_order_relaxed);
  waits_.fetch_add(1, std::memory_order_relaxed);
}

// Whether all have made so many steps; otherwise who has not, or `ranks_` where somebody has given up.
bool Ranks::wait_for_all(uint32_t wanted, double limit_s, int* missing) {
  Clock::time_point begin = Clock::now();
  int spins = 0;
  std::optional<Lost::Given> given;
  for (int r = 0; r < ranks_; ++r) {
    Seat& seat = seats_[r];
    for (;;) {
      uint32_t said = seat.said.load(std::memory_order_acquire);
      if (static_cast<int32_t>(said - wanted) >= 0) break;
      if (++spins < kSpins) {
        relax();
        continue;
      }
      if (!given) given.emplace();
      *missing = r;
      if (head_->given_up.load(std::memory_order_relaxed) != 0) {
        *missing = ranks_;
        return false;
      }
      double waited_s = seconds_since(begin);
      if (waited_s > limit_s) return false;
      if (waited_s < std::chrono::duration<double>(kYield).count()) {
        sched_yield();
        continue;
      }
      seat.sleepers.fetch_add(1, std::memory_order_seq_cst);
      if (seat.said.load(std::memory_order_seq_cst) == said) nap(&seat.said, said, kNapNs);
      seat.sleepers.fetch_sub(1, std::memory_order_seq_cst);
    }
  }
  return true;
}

void Ranks::give_up(int missing) {
  missing_.store(missing, std::memory_order_relaxed);
  uint32_t nobody = 0;
  if (missing < ranks_) head_->given_up.compare_exchange_strong(nobody, 1 + static_cast<uint32_t>(missing));
}

bool Ranks::agree(int32_t* ids, int64_t count, double wait_s) {
  if (count > kChunk) throw std::runtime_error("more numbers than can be agreed on at once");
  if (missing_.load(std::memory_order_relaxed) >= 0) throw std::runtime_error(complaint());
  if (!pending_) {
    if (rank_ == 0) memcpy(place(0, turn_), ids, count * sizeof(int32_t));
    Seat& own = seats_[rank_];
    own.said.store(++said_, std::memory_order_seq_cst);
    if (own.sleepers.load(std::memory_order_seq_cst) > 0) wake(&own.said);
    pending_ = true;
    pending_since_ = Clock::now();
  }
  int missing = 0;
  if (!wait_for_all(said_, std::min(wait_s, limit_s_), &missing)) {
    if (missing < ranks_ && seconds_since(pending_since_) < limit_s_) return false;
    give_up(missing);
    throw std::runtime_error(complaint());
  }
  pending_ = false;
  memcpy(ids, place(0, turn_++), count * sizeof(int32_t));
  return true;
}

std::string Ranks::complaint() const {
  int missing = missing_.load(std::memory_order_relaxed);
  if (missing < 0) return "";
  if (missing < ranks_)
    return "rank " + std::to_string(missing) + " has kept rank " + std::to_string(rank_) + " waiting for " +
           std::to_string(static_cast<int64_t>(limit_s_)) + " s";
  return "another rank has given up waiting for rank " +
         std::to_string(head_->given_up.load(std::memory_order_relaxed) - 1);
}

namespace {
Ranks* joined = nullptr;
}

Ranks* joined_ranks() { return joined; }

void join_ranks(int file, int rank, int ranks, double limit_s) {
  if (joined != nullptr) {
    if (joined->rank() != rank || joined->ranks() != ranks)
      throw std::runtime_error("this process is rank " + std::to_string(joined->rank()) + " of " +
                               std::to_string(joined->ranks()) + " already");
    return;
  }
  if (ranks < 2 || ranks > Ranks::kMostRanks) throw std::runtime_error("2 to 1024 ranks can share memory");
  int64_t bytes = Ranks::bytes(ranks);
  struct stat found;
  if (fstat(file, &found) != 0 || (found.st_size < bytes && ftruncate(file, bytes) != 0))
    throw std::runtime_error(std::string("the ranks' memory cannot be given its size: ") + strerror(errno));
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED)
    throw std::runtime_error(std::string("the ranks' memory cannot be mapped: ") + strerror(errno));
  // Never unmapped: MindSpore's threads may still call in while the process ends.
  joined = new Ranks(memory, rank, ranks, limit_s);
}

}  // namespace qwen15
