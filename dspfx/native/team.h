// Threads that take the same steps and wait for each other.

#pragma once

#include <atomic>
#include <optional>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dspfx {

class Team {
 public:
  explicit Team(int64_t size) : size_(size) {}

  int64_t size() const { return size_; }

  void wait() {
    if (size_ == 1) return;
    const int64_t turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins)
      if (spins > PATIENCE) std::this_thread::yield();
  }

 private:
  static constexpr int64_t PATIENCE = 10000;
  const int64_t size_;
  std::atomic<int64_t> arrived_{0}, turn_{0};
};

// Calls `f(member, team)` in every thread of a team, which may be smaller than asked for.
template <typename F>
void in_parallel(int64_t threads, const F& f) {
#ifdef _OPENMP
  if (threads > 1) {
    std::optional<Team> team;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      team.emplace(omp_get_num_threads());
      f(omp_get_thread_num(), *team);
    }
    return;
  }
#endif
  Team alone(1);
  f(0, alone);
}

}  // namespace dspfx
