// Threads that help callers: made by the first call that wants them, asleep when there is nothing to
// do, and never waited for.

#pragma once

#ifndef _WIN32
#include <pthread.h>
#endif

#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#include "thread_team.h"

namespace dspfx {

class Helpers {
 public:
  // Never destroyed: its threads are detached, and may outlive everything else. A child process has
  // none of its parent's threads, and makes its own.
  static Helpers& instance() {
    Helpers* now = current().load(std::memory_order_acquire);
    if (now != nullptr) return *now;
#ifndef _WIN32
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
      current().store(nullptr, std::memory_order_release);
    });
    (void)registered;
#endif
    auto made = std::make_unique<Helpers>();
    if (current().compare_exchange_strong(now, made.get(), std::memory_order_acq_rel))
      return *made.release();
    return *now;
  }

  // Asks all but member 0 for help. Helpers take the newest team when they are free. Where another
  // thread is just here, perhaps without a core, nobody is asked: the caller can do all.
  void ask(const std::shared_ptr<Team>& team) {
    {
      const std::unique_lock<std::mutex> guard(mutex_, std::try_to_lock);
      if (!guard.owns_lock()) return;
      team_ = team;
      asked_.fetch_add(1, std::memory_order_release);
      while (count_ + 1 < team->size() && add()) {
      }
    }
    asked_.notify_all();
  }

 private:
  static constexpr std::chrono::microseconds PATIENCE{50};  // from call to call in a loop

  static std::atomic<Helpers*>& current() {
    static std::atomic<Helpers*> helpers{nullptr};
    return helpers;
  }

  bool add() {
    try {
      std::thread([this, member = count_ + 1] { work(member); }).detach();
    } catch (const std::system_error&) {
      return false;  // no more threads for this process: fewer do it
    }
    ++count_;
    return true;
  }

  [[noreturn]] void work(int64_t member) {
#ifdef __linux__
    pthread_setname_np(pthread_self(), ("dspfx-" + std::to_string(member)).c_str());
#elif defined(__APPLE__)
    pthread_setname_np(("dspfx-" + std::to_string(member)).c_str());
#endif
    for (int seen = 0;;) {
      const auto ready = [&] { return asked_.load(std::memory_order_acquire) != seen; };
      if (!spin_until(ready, PATIENCE)) asked_.wait(seen, std::memory_order_acquire);
      std::shared_ptr<Team> team;
      {
        const std::lock_guard<std::mutex> guard(mutex_);
        seen = asked_.load(std::memory_order_relaxed);
        team = team_;
      }
      if (team != nullptr && member < team->size()) team->help(member);
    }
  }

  std::mutex mutex_;
  std::shared_ptr<Team> team_;  // the newest
  int64_t count_ = 0;
  alignas(64) std::atomic<int> asked_{0};
};

}  // namespace dspfx
