// Work stealing: a team of threads that do the tasks of one step after the other.
//
// A member begins with its own tasks, the same in every call, whose weights are in its core's cache.
// Then it steals tasks that others have not begun: a thread that loses its core delays the rest only
// by the task that it is in.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace dspfx {

class Team {
 public:
  explicit Team(int64_t size) : claimed_(size) {}

  int64_t size() const { return static_cast<int64_t>(claimed_.size()); }

 private:
  friend class Member;
  static constexpr int64_t PATIENCE = 10000;

  struct alignas(64) Count {
    std::atomic<int64_t> tasks{0};
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

  void wait_for(int64_t tasks) const {
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) < tasks; ++spins)
      if (spins > PATIENCE) std::this_thread::yield();
  }

  std::vector<Count> claimed_;  // tasks claimed so far, by owner
  std::atomic<int64_t> done_{0};
};

class Member {
 public:
  Member(Team& team, int64_t number) : team_(team), number_(number) {}

  // Calls `f(task)` for each of `count` tasks that this member gets, and waits until all are done.
  // All members must make the same sequence of calls. Task i is owned by member i modulo team size.
  template <typename F>
  void do_tasks(int64_t count, const F& f) {
    const int64_t size = team_.size();
    for (int64_t i = 0; i < size; ++i) {
      const int64_t owner = (number_ + i) % size;
      const int64_t end = first_ + (count + size - 1 - owner) / size;
      for (int64_t n; (n = team_.claim(owner, first_, end)) < end;) {
        f(owner + (n - first_) * size);
        team_.done_.fetch_add(1, std::memory_order_release);
      }
    }
    first_ += (count + size - 1) / size;
    team_.wait_for(all_ += count);
  }

 private:
  Team& team_;
  const int64_t number_;
  int64_t first_ = 0, all_ = 0;  // number of the first task of this step; tasks so far
};

}  // namespace dspfx
