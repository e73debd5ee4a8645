// Work stealing: one caller and the threads that help it do the tasks of one step after the other.
//
// A member begins with its own tasks, the same in every call, whose weights are in its core's cache.
// Then it steals tasks that others have not begun. No member is needed: the caller does all that no
// helper has begun, and waits only for tasks that a helper has begun and not finished. (To do such a
// task again would be a data race, and the helper would write to memory after the call.)
//
// What makes this safe:
// - A task is claimed once. No task of a step is claimed before all of the steps before are done,
//   so that `done_`, a count over all steps, tells which steps are done.
// - Finishing a task releases what it wrote, seeing that its step is done acquires it.
// - Outside of a task that it has claimed, a helper touches nothing but the team, which it shares
//   ownership of. So the caller may return, and free what tasks work on, while helpers still come.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace dspfx {

inline void pause_briefly() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `ready()`, for a short time; whether it is.
template <typename F>
bool spin_until(const F& ready, std::chrono::microseconds most) {
  if (ready()) return true;
  const auto end = std::chrono::steady_clock::now() + most;
  do {
    for (int i = 0; i < 8; ++i) pause_briefly();
    if (ready()) return true;
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

class Team {
 public:
  // Computes task `task` of step `step` as member `member`.
  using Compute = std::function<void(int64_t step, int64_t task, int64_t member)>;

  // Step s is of counts[s] tasks, of which task i is owned by member i modulo `size`.
  Team(int64_t size, const std::vector<int64_t>& counts, Compute compute)
      : compute_(std::move(compute)), claimed_(size) {
    int64_t first = 0, before = 0;
    for (const int64_t count : counts) {
      steps_.push_back({count, first, static_cast<int>(before)});
      first += (count + size - 1) / size, before += count;
    }
  }

  int64_t size() const { return static_cast<int64_t>(claimed_.size()); }
  int64_t steps() const { return static_cast<int64_t>(steps_.size()); }

  // Does the tasks of a step that nobody else begins, and waits until all are done; all of the steps
  // before must be. Who is not the caller need not wait for the end of the last step.
  void do_step(int64_t number, int64_t member) noexcept {
    const Step& step = steps_[number];
    const int end = step.before + static_cast<int>(step.count);
    if (done_.load(std::memory_order_acquire) >= end) return;
    for (int64_t i = 0; i < size(); ++i) {
      const int64_t owner = (member + i) % size();
      const int64_t last = step.first + (step.count + size() - 1 - owner) / size();
      for (int64_t n; (n = claim(owner, step.first, last)) < last;) {
        compute_(number, owner + (n - step.first) * size(), member);
        if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == end) done_.notify_all();
      }
    }
    if (member == 0 || number + 1 < steps()) wait_for(end);
  }

  void help(int64_t member) noexcept {
    for (int64_t step = 0; step < steps(); ++step) do_step(step, member);
  }

 private:
  static constexpr std::chrono::microseconds PATIENCE{20};

  struct alignas(64) Count {
    std::atomic<int64_t> tasks{0};
  };
  struct Step {
    int64_t count, first;  // first: an owner's number of its first task
    int before;            // tasks of the steps before
  };

  // Claims a task of `owner`, from number `first` on; `end` or more if none is left.
  int64_t claim(int64_t owner, int64_t first, int64_t end) {
    std::atomic<int64_t>& claimed = claimed_[owner].tasks;
    int64_t before = claimed.load(std::memory_order_relaxed);
    while (std::max(before, first) < end &&
           !claimed.compare_exchange_weak(before, std::max(before, first) + 1,
                                          std::memory_order_relaxed)) {
    }
    return std::max(before, first);
  }

  // A core that sleeps is one that the scheduler can give to the thread that is waited for.
  void wait_for(int tasks) const {
    const auto ready = [&] { return done_.load(std::memory_order_acquire) >= tasks; };
    if (spin_until(ready, PATIENCE)) return;
    for (int now; (now = done_.load(std::memory_order_acquire)) < tasks;)
      done_.wait(now, std::memory_order_acquire);
  }

  const Compute compute_;
  std::vector<Step> steps_;
  std::vector<Count> claimed_;  // tasks claimed so far, by owner
  alignas(64) std::atomic<int> done_{0};
};

}  // namespace dspfx
