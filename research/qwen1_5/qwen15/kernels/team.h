// Threads: a team runs one function on every thread; inside it the threads meet at barriers.
//
// Why an own pool: OpenMP keeps a pool per calling thread, and MindSpore calls operators from whichever of its own
// threads is free; one pool of ours serves all of them, and a whole network runs as one dispatch with barriers of
// well under a microsecond inside. Waiting threads spin shortly, then give the core away, then sleep (wait.h). While
// somebody else takes the cores, fewer threads work than are there: see Crew.
#pragma once
#include <stdint.h>

namespace qwen15 {

class Pool;

class Team {
 public:
  int rank() const { return rank_; }
  int size() const { return size_; }
  // Wait until every thread of the team is here. Resets `take` and `take_of`.
  void barrier();
  // The next item of a list that all threads work off together, at most once each: 0, 1, 2, ...
  int64_t take();
  // The same for the list of one thread: it works its own off in order, and helps others once it has nothing left.
  int64_t take_of(int rank);
  // Memory of this thread alone, 64-byte aligned, valid until its next call; the contents are not kept.
  void* scratch(int64_t bytes);
  // This thread's part of [0, n) when it is cut into `size` contiguous parts, in multiples of `grain`.
  void share(int64_t n, int64_t grain, int64_t* begin, int64_t* end) const { share_of(rank_, n, grain, begin, end); }
  void share_of(int rank, int64_t n, int64_t grain, int64_t* begin, int64_t* end) const;

 private:
  friend class Pool;
  Team(Pool* pool, int rank, int size) : pool_(pool), rank_(rank), size_(size) {}
  Pool* pool_;
  int rank_, size_;
};

// Number of threads: what `set_threads` said, else QWEN15_THREADS, else the CPUs this process may use.
int threads();
void set_threads(int n);
// Several memory nodes, each with its number and `counts` of the `cpus` that follow one another: the pool's threads stay
// on one node each, neighbours together, and memory that this thread and those it starts touch first comes from all nodes
// in turn. 0, or the system's error code where it does not let memory be placed.
int spread_over(int nodes, const int32_t* numbers, const int32_t* counts, const int32_t* cpus);
// Those of them that worked last: fewer while others take their cores.
int working_threads();

// Run `work(team, argument)` on at most `size` threads of the pool; returns when all are done. Calls from several
// threads take turns.
void run_team(int size, void (*work)(Team&, void*), void* argument);
// The same, and its time is not counted as the kernels', see busy_seconds.
void run_uncounted(int size, void (*work)(Team&, void*), void* argument);

template <class F>
void run_team(int size, F f) {
  run_team(size, [](Team& team, void* argument) { (*static_cast<F*>(argument))(team); }, &f);
}
template <class F>
void run_team(F f) {
  run_team(threads(), f);
}

template <class F>
void run_uncounted(F f) {
  run_uncounted(threads(), [](Team& team, void* argument) { (*static_cast<F*>(argument))(team); }, &f);
}

// Seconds spent in `run_team` since the process began.
double busy_seconds();

}  // namespace qwen15
