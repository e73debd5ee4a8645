// Threads that do the tasks of one step after the other.
//
// A member begins with its own tasks, the same in every call, whose weights its core has seen before.
// Then it takes those that others have not begun: where a thread gets no core, because others compute
// as well, the rest do not wait for it.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace dspfx {

class Team {
 public:
  explicit Team(int64_t size) : begun_(size) {}

  int64_t size() const { return static_cast<int64_t>(begun_.size()); }

 private:
  friend class Member;
  static constexpr int64_t PATIENCE = 10000;

  struct alignas(64) Begun {
    std::atomic<int64_t> tasks{0};
  };

  // The number of the next of a member's tasks, if it is below `end`.
  int64_t begin(int64_t member, int64_t end) {
    std::atomic<int64_t>& tasks = begun_[member].tasks;
    int64_t number = tasks.load(std::memory_order_relaxed);
    while (number < end &&
           !tasks.compare_exchange_weak(number, number + 1, std::memory_order_relaxed)) {
    }
    return number;
  }

  void wait_for(int64_t tasks) const {
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) < tasks; ++spins)
      if (spins > PATIENCE) std::this_thread::yield();
  }

  std::vector<Begun> begun_;  // by member, of all steps so far
  std::atomic<int64_t> done_{0};
};

class Member {
 public:
  Member(Team& team, int64_t number) : team_(team), number_(number), ends_(team.size()) {}

  // Calls `f(task)` for those of `count` tasks that it gets; all are done when it returns. Every
  // member must take the same steps. Task i belongs to member i modulo the size of the team.
  template <typename F>
  void share(int64_t count, const F& f) {
    const int64_t size = team_.size();
    for (int64_t i = 0; i < size; ++i) {
      const int64_t owner = (number_ + i) % size, first = ends_[owner];
      const int64_t end = ends_[owner] += (count + size - 1 - owner) / size;
      for (int64_t n; (n = team_.begin(owner, end)) < end;) {
        f(owner + (n - first) * size);
        team_.done_.fetch_add(1, std::memory_order_release);
      }
    }
    team_.wait_for(all_ += count);
  }

 private:
  Team& team_;
  const int64_t number_;
  std::vector<int64_t> ends_;  // by member, of the tasks of all steps so far
  int64_t all_ = 0;
};

}  // namespace dspfx
