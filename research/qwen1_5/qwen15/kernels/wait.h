// How a thread waits for another one: it spins, then gives its core away between looks, then sleeps.
//
// A thread that is waited for is either a microsecond away (it computes) or milliseconds (it has lost its core). Spinning
// is sized for the first. For the second the core is given away, because what has taken the other one's may run here
// instead; and then left altogether, because the system moves a waiting thread to a core only when that is idle.
#pragma once
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>

namespace qwen15 {

// Tells the core that this is a loop of waiting.
inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Sleep until `wake`, at most so long, and only while the word is `seen`.
inline void nap(std::atomic<uint32_t>* word, uint32_t seen, int64_t most_ns) {
  timespec limit = {static_cast<time_t>(most_ns / 1000000000), static_cast<long>(most_ns % 1000000000)};
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &limit, nullptr, 0);
}
inline void wake(std::atomic<uint32_t>* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

inline int64_t clock_ns(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return static_cast<int64_t>(now.tv_sec) * 1000000000 + now.tv_nsec;
}

// Time for which this thread has not been on a core, less what it has given away itself: what others took from it.
class Lost {
 public:
  Lost() : away_(away()), given_(given_ns()) {}
  int64_t ns() const { return away() - away_ - (given_ns() - given_); }

  // Counts the time off the core while it lives as given away.
  class Given {
   public:
    Given() : away_(away()) {}
    ~Given() { given_ns() += away() - away_; }

   private:
    int64_t away_;
  };

 private:
  static int64_t away() { return clock_ns(CLOCK_MONOTONIC) - clock_ns(CLOCK_THREAD_CPUTIME_ID); }
  static int64_t& given_ns() {
    static thread_local int64_t ns = 0;
    return ns;
  }
  int64_t away_, given_;
};

}  // namespace qwen15
