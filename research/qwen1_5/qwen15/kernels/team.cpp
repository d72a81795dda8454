// The thread pool behind `Team`.
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace qwen15 {
namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kMaxThreads = 256;
// A barrier inside a network is a microsecond away: spin about 20 us, then let others run.
constexpr int kBarrierSpins = 2000;
// The next token is a millisecond away: a worker that slept would cost 50 us to wake, so it looks on for about 3 ms.
constexpr auto kIdleSpin = std::chrono::microseconds(3000);

std::string first_line(const std::string& path) {
  std::string line;
  if (FILE* file = fopen(path.c_str(), "r")) {
    char buffer[256];
    if (fgets(buffer, sizeof buffer, file)) line = buffer;
    fclose(file);
  }
  return line;
}

// Physical cores among the CPUs this process may run on (hyper-threads of one core count once).
int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) {
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? static_cast<int>(n) : 1;
  }
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &set)) continue;
    std::string siblings =
        first_line("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    cores.insert(siblings.empty() ? "cpu" + std::to_string(cpu) : siblings);
  }
  return cores.empty() ? 1 : static_cast<int>(cores.size());
}

int threads_from_environment() {
  if (const char* text = getenv("QWEN15_THREADS")) {
    char* end = nullptr;
    long n = strtol(text, &end, 10);
    if (end != text && *end == '\0' && n >= 1) return n > kMaxThreads ? kMaxThreads : static_cast<int>(n);
  }
  int n = usable_cores();
  return n > kMaxThreads ? kMaxThreads : n;
}

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
    wanted_ = n < 1 ? 1 : (n > kMaxThreads ? kMaxThreads : n);
  }

  void run(int size, void (*work)(Team&, void*), void* argument, bool counted) {
    std::lock_guard<std::mutex> lock(call_mutex_);
    if (owner_ != getpid()) forget_workers();  // threads do not survive fork()
    auto begin = std::chrono::steady_clock::now();
    adjust(size);
    work_ = work;
    argument_ = argument;
    arrived_.store(0, std::memory_order_relaxed);
    reset_takes();
    finished_.store(0, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> sleep_lock(sleep_mutex_);
      ticket_.fetch_add(1, std::memory_order_release);
      if (sleeping_ > 0) wake_.notify_all();
    }
    Team team(this, 0, size_);
    work(team, argument);
    wait_until([this] { return finished_.load(std::memory_order_acquire) == size_ - 1; });
    std::chrono::nanoseconds spent = std::chrono::steady_clock::now() - begin;
    if (counted) busy_ns_.fetch_add(spent.count(), std::memory_order_relaxed);
  }

  double busy_seconds() const { return busy_ns_.load(std::memory_order_relaxed) * 1e-9; }

  void barrier() {
    if (size_ == 1) {
      reset_takes();
      return;
    }
    uint32_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      reset_takes();
      generation_.store(generation + 1, std::memory_order_release);
    } else {
      wait_until([this, generation] { return generation_.load(std::memory_order_acquire) != generation; });
    }
  }

  void* scratch(int rank, int64_t bytes) {
    Memory& memory = memory_[rank];
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
  int64_t take_of(int rank) { return own_[rank].next.fetch_add(1, std::memory_order_relaxed); }

 private:
  int wanted() {
    if (wanted_ == 0) wanted_ = threads_from_environment();
    return wanted_;
  }

  void reset_takes() {
    next_.store(0, std::memory_order_relaxed);
    for (int rank = 0; rank < size_; ++rank) own_[rank].next.store(0, std::memory_order_relaxed);
  }

  template <class Done>
  static void wait_until(Done done) {
    for (int spins = 0; !done(); ++spins) {
      if (spins < kBarrierSpins) relax();
      else sched_yield();
    }
  }

  void forget_workers() {
    new std::vector<std::thread>(std::move(workers_));  // kept for ever: a thread object of the parent cannot be joined
    workers_.clear();
    size_ = 1;
    sleeping_ = 0;
    owner_ = getpid();
  }

  void adjust(int n) {
    if (size_ == n) return;
    stop_workers();
    size_ = n;
    uint32_t seen = ticket_.load();
    for (int rank = 1; rank < n; ++rank) workers_.emplace_back([this, rank, n, seen] { loop(rank, n, seen); });
  }

  void stop_workers() {
    {
      std::lock_guard<std::mutex> sleep_lock(sleep_mutex_);
      stopping_.store(true);
      wake_.notify_all();
    }
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stopping_.store(false);
  }

  void loop(int rank, int size, uint32_t seen) {
    Team team(this, rank, size);
    while (wait_for_work(seen)) {
      ++seen;
      work_(team, argument_);
      finished_.fetch_add(1, std::memory_order_release);
    }
  }

  bool wait_for_work(uint32_t seen) {
    auto deadline = std::chrono::steady_clock::now() + kIdleSpin;
    for (int spins = 0;; ++spins) {
      if (stopping_.load(std::memory_order_relaxed)) return false;
      if (ticket_.load(std::memory_order_acquire) != seen) return true;
      relax();
      if (spins % 256 == 255) {
        if (std::chrono::steady_clock::now() > deadline) break;
        sched_yield();
      }
    }
    std::unique_lock<std::mutex> lock(sleep_mutex_);
    ++sleeping_;
    wake_.wait(lock, [this, seen] { return stopping_.load() || ticket_.load(std::memory_order_acquire) != seen; });
    --sleeping_;
    return !stopping_.load();
  }

  struct alignas(64) Memory {
    void* data = nullptr;
    int64_t bytes = 0;
  };

  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
  };

  std::mutex call_mutex_;
  Counter own_[kMaxThreads];
  Memory memory_[kMaxThreads];
  int wanted_ = 0;
  int size_ = 1;
  pid_t owner_ = getpid();
  std::vector<std::thread> workers_;
  void (*work_)(Team&, void*) = nullptr;
  void* argument_ = nullptr;

  std::atomic<int64_t> busy_ns_{0};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
  int sleeping_ = 0;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> ticket_{0};
  alignas(64) std::atomic<int> finished_{0};
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
double busy_seconds() { return Pool::instance().busy_seconds(); }

}  // namespace qwen15
