// The thread pool behind `Team`.
#include "team.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#include "wait.h"

namespace qwen15 {
namespace {

constexpr int kMaxThreads = 256;
constexpr int64_t kUs = 1000, kMs = 1000 * kUs;
// A barrier inside a network is microseconds away, and a block of rows under 100: one that takes longer has lost its core.
constexpr int64_t kSpinNs = 100 * kUs, kYieldNs = 300 * kUs;
// The next token is a millisecond away: a worker that slept would cost 50 us to wake, so it looks on for about 3 ms.
constexpr int64_t kIdleSpinNs = 3 * kMs;
constexpr int64_t kNapNs = 100 * kMs;

// CPUs this process may use: for callers of the library alone, as Python's side knows cores and quotas and says how many.
int usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  long n = sysconf(_SC_NPROCESSORS_ONLN);
  return n > 0 ? static_cast<int>(n) : 1;
}

int threads_from_environment() {
  if (const char* text = getenv("QWEN15_THREADS")) {
    char* end = nullptr;
    long n = strtol(text, &end, 10);
    if (end != text && *end == '\0' && n >= 1) return static_cast<int>(std::min<long>(n, kMaxThreads));
  }
  return std::min(usable_cpus(), kMaxThreads);
}

// How many threads work: all that are wanted, or fewer while somebody else takes their cores.
//
// The threads meet several times a layer, so one that has lost its core holds up all others for a time slice, thousands
// of blocks of rows. Its share of the work is 1 / n at most, less where the memory is what takes time; once three quarters
// of that are lost, the others do better without it. After a while one more is tried, less and less often while it fails.
class Crew {
 public:
  // For a dispatch that begins now.
  int take(int wanted, int64_t now_ns) {
    if (wanted != wanted_) {
      wanted_ = working_ = wanted;
      lost_ = 0;
    }
    if (working_ < wanted_ && now_ns >= retry_ns_) {
      ++working_;
      grown_ns_ = now_ns;
      lost_ = 0;
    }
    return working_;
  }
  // What its threads together have lost of the time it took.
  void note(int64_t lost_ns, int64_t took_ns, int64_t now_ns) {
    constexpr double kWindowNs = 30.0 * kMs;
    double weight = took_ns / (took_ns + kWindowNs);
    lost_ += weight * (std::min(1.0, static_cast<double>(lost_ns) / std::max<int64_t>(took_ns, 1)) - lost_);
    if (working_ == 1 || lost_ * working_ <= 0.75) return;
    pause_ns_ = now_ns - grown_ns_ > 500 * kMs ? kFirstPauseNs : std::min(3 * pause_ns_, kLongestPauseNs);
    retry_ns_ = now_ns + pause_ns_;
    --working_;
    lost_ = 0;
  }

 private:
  static constexpr int64_t kFirstPauseNs = 200 * kMs, kLongestPauseNs = 3000 * kMs;
  int wanted_ = 0, working_ = 0;
  double lost_ = 0;  // of the time, lately
  int64_t retry_ns_ = 0, grown_ns_ = 0, pause_ns_ = kFirstPauseNs;
};

}  // namespace

class Pool {
 public:
  static Pool& instance() {
    // Never destroyed: MindSpore's threads may still call in while the process ends.
    static Pool* pool = new Pool();
    return *pool;
  }

  int size() {
    std::lock_guard<std::mutex> lock(call_mutex_);
    return wanted();
  }

  void resize(int n) {
    std::lock_guard<std::mutex> lock(call_mutex_);
    wanted_ = std::min(std::max(n, 1), kMaxThreads);
  }

  void bind(std::vector<cpu_set_t> nodes) {
    std::lock_guard<std::mutex> lock(call_mutex_);
    nodes_ = std::move(nodes);
    stop_workers();  // those to come are bound
    size_ = 1;
  }

  int working() const { return working_.load(std::memory_order_relaxed); }

  void run(int size, void (*work)(Team&, void*), void* argument, bool counted) {
    std::lock_guard<std::mutex> lock(call_mutex_);
    if (owner_ != getpid()) forget_workers();  // threads do not survive fork()
    int64_t begin = clock_ns(CLOCK_MONOTONIC);
    adjust(size);
    team_ = crew_.take(size, begin);
    working_.store(team_, std::memory_order_relaxed);
    work_ = work;
    argument_ = argument;
    arrived_.store(0, std::memory_order_relaxed);
    reset_takes();
    finished_.store(0, std::memory_order_relaxed);
    for (int rank = 1; rank < team_; ++rank) {
      Seat& seat = seats_[rank];
      seat.ticket.fetch_add(1, std::memory_order_seq_cst);
      if (seat.sleeping.load(std::memory_order_seq_cst)) wake(&seat.ticket);
    }
    Team team(this, 0, team_);
    Lost lost;
    work(team, argument);
    int64_t lost_ns = lost.ns();
    for (uint32_t done; (done = finished_.load(std::memory_order_acquire)) != static_cast<uint32_t>(team_ - 1);)
      wait_while(finished_, done);
    for (int rank = 1; rank < team_; ++rank) lost_ns += seats_[rank].lost_ns;
    int64_t end = clock_ns(CLOCK_MONOTONIC);
    if (!counted) return;
    busy_ns_.fetch_add(end - begin, std::memory_order_relaxed);
    crew_.note(lost_ns, end - begin, end);
  }

  double busy_seconds() const { return busy_ns_.load(std::memory_order_relaxed) * 1e-9; }

  void barrier() {
    if (team_ == 1) {
      reset_takes();
      return;
    }
    uint32_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == team_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      reset_takes();
      generation_.store(generation + 1, std::memory_order_seq_cst);
      if (sleepers_.load(std::memory_order_seq_cst) > 0) wake(&generation_);
    } else {
      wait_while(generation_, generation);
    }
  }

  void* scratch(int rank, int64_t bytes) {
    Seat& memory = seats_[rank];
    if (memory.bytes < bytes) {
      free(memory.data);
      memory.bytes = (bytes + 4095) / 4096 * 4096;
      memory.data = aligned_alloc(4096, memory.bytes);
      if (memory.data == nullptr) {
        fprintf(stderr, "qwen15 kernels: no memory for %lld bytes of scratch\n", static_cast<long long>(memory.bytes));
        abort();
      }
    }
    return memory.data;
  }

  int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }
  int64_t take_of(int rank) { return seats_[rank].next.fetch_add(1, std::memory_order_relaxed); }

 private:
  // What belongs to one thread.
  struct alignas(128) Seat {
    std::atomic<uint32_t> ticket{0};  // dispatches it has been called to
    std::atomic<bool> sleeping{false};
    alignas(64) std::atomic<int64_t> next{0};
    int64_t lost_ns = 0;
    void* data = nullptr;
    int64_t bytes = 0;
  };

  int wanted() {
    if (wanted_ == 0) wanted_ = threads_from_environment();
    return wanted_;
  }

  void reset_takes() {
    next_.store(0, std::memory_order_relaxed);
    for (int rank = 0; rank < team_; ++rank) seats_[rank].next.store(0, std::memory_order_relaxed);
  }

  // Waits while the word is `seen`.
  void wait_while(std::atomic<uint32_t>& word, uint32_t seen) {
    for (int spins = 0; spins < 64; ++spins) {
      if (word.load(std::memory_order_acquire) != seen) return;
      relax();
    }
    int64_t begin = clock_ns(CLOCK_MONOTONIC);
    for (int spins = 1; spins % 64 != 0 || clock_ns(CLOCK_MONOTONIC) - begin < kSpinNs; ++spins) {
      if (word.load(std::memory_order_acquire) != seen) return;
      relax();
    }
    Lost::Given given;
    while (clock_ns(CLOCK_MONOTONIC) - begin < kYieldNs) {
      if (word.load(std::memory_order_acquire) != seen) return;
      sched_yield();
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    while (word.load(std::memory_order_seq_cst) == seen) nap(&word, seen, kNapNs);
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }

  void forget_workers() {
    new std::vector<std::thread>(std::move(workers_));  // kept for ever: a thread object of the parent cannot be joined
    workers_.clear();
    size_ = 1;
    sleepers_.store(0);
    for (Seat& seat : seats_) seat.sleeping.store(false);
    owner_ = getpid();
  }

  void adjust(int n) {
    if (size_ == n) return;
    stop_workers();
    size_ = n;
    for (int rank = 1; rank < n; ++rank) {
      uint32_t seen = seats_[rank].ticket.load();
      workers_.emplace_back([this, rank, seen] { loop(rank, seen); });
    }
  }

  void stop_workers() {
    stopping_.store(true);
    for (int rank = 1; rank < size_; ++rank) {
      seats_[rank].ticket.fetch_add(1);
      wake(&seats_[rank].ticket);
    }
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stopping_.store(false);
  }

  void loop(int rank, uint32_t seen) {
    Seat& seat = seats_[rank];
    if (!nodes_.empty()) {  // where it may not, the system goes on to choose
      const cpu_set_t& own = nodes_[static_cast<size_t>(rank) * nodes_.size() / size_];
      sched_setaffinity(0, sizeof own, &own);
    }
    while (wait_for_work(seat, seen)) {
      ++seen;
      Team team(this, rank, team_);
      Lost lost;
      work_(team, argument_);
      seat.lost_ns = lost.ns();
      finished_.fetch_add(1, std::memory_order_seq_cst);
      if (sleepers_.load(std::memory_order_seq_cst) > 0) wake(&finished_);
    }
  }

  bool wait_for_work(Seat& seat, uint32_t seen) {
    int64_t deadline = clock_ns(CLOCK_MONOTONIC) + kIdleSpinNs;
    for (int spins = 1;; ++spins) {
      if (seat.ticket.load(std::memory_order_acquire) != seen) return !stopping_.load();
      relax();
      if (spins % 256 != 0) continue;
      if (clock_ns(CLOCK_MONOTONIC) > deadline) break;
      sched_yield();
    }
    seat.sleeping.store(true, std::memory_order_seq_cst);
    while (seat.ticket.load(std::memory_order_seq_cst) == seen) nap(&seat.ticket, seen, kNapNs);
    seat.sleeping.store(false, std::memory_order_relaxed);
    return !stopping_.load();
  }

  std::mutex call_mutex_;
  Seat seats_[kMaxThreads];
  Crew crew_;
  int wanted_ = 0;
  int size_ = 1;  // threads there are, the caller included
  int team_ = 1;  // of them work on this dispatch
  pid_t owner_ = getpid();
  std::vector<std::thread> workers_;
  std::vector<cpu_set_t> nodes_;  // CPUs of each, where there are several
  void (*work_)(Team&, void*) = nullptr;
  void* argument_ = nullptr;

  std::atomic<int64_t> busy_ns_{0};
  std::atomic<int> working_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<int> sleepers_{0};  // in barriers, or waiting for the others to finish
  alignas(64) std::atomic<uint32_t> finished_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int64_t> next_{0};
};

void Team::barrier() { pool_->barrier(); }
void* Team::scratch(int64_t bytes) { return pool_->scratch(rank_, bytes); }
int64_t Team::take() { return pool_->take(); }

int64_t Team::take_of(int rank) { return pool_->take_of(rank); }

void Team::share_of(int rank, int64_t n, int64_t grain, int64_t* begin, int64_t* end) const {
  int64_t grains = (n + grain - 1) / grain;
  *begin = grains * rank / size_ * grain;
  *end = grains * (rank + 1) / size_ * grain;
  if (*end > n) *end = n;
  if (*begin > n) *begin = n;
}

void run_team(int size, void (*work)(Team&, void*), void* argument) {
  Pool::instance().run(size, work, argument, true);
}
void run_uncounted(int size, void (*work)(Team&, void*), void* argument) {
  Pool::instance().run(size, work, argument, false);
}
int threads() { return Pool::instance().size(); }
void set_threads(int n) { Pool::instance().resize(n); }
int spread_over(int nodes, const int32_t* numbers, const int32_t* counts, const int32_t* cpus) {
  std::vector<cpu_set_t> sets(nodes);
  unsigned long mask[16] = {0};  // as the kernel has it, 1024 nodes
  constexpr int kBits = 8 * sizeof(mask[0]), kMost = kBits * 16, kInterleave = 3;
  for (int i = 0; i < nodes; ++i) {
    CPU_ZERO(&sets[i]);
    for (int c = 0; c < counts[i]; ++c, ++cpus)
      if (*cpus < CPU_SETSIZE) CPU_SET(*cpus, &sets[i]);
    if (numbers[i] < kMost) mask[numbers[i] / kBits] |= 1ul << numbers[i] % kBits;
  }
  Pool::instance().bind(std::move(sets));
  return syscall(SYS_set_mempolicy, kInterleave, mask, kMost) == 0 ? 0 : errno;
}
int working_threads() { return Pool::instance().working(); }
double busy_seconds() { return Pool::instance().busy_seconds(); }

}  // namespace qwen15
