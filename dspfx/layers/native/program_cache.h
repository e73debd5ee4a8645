// Programs of plans that are alive: what was checked and laid out once need not be again.

#pragma once

#include <ATen/core/Tensor.h>

#include <mutex>
#include <string>
#include <unordered_map>

#include "memory.h"
#include "build_program.h"

namespace dspfx {

// Of a plan the programs for the last few sizes are kept, for each holds memory.
class Programs {
 public:
  struct Key {
    std::string layers;
    std::vector<int64_t> numbers;
    bool operator==(const Key& other) const {
      return numbers == other.numbers && layers == other.layers;
    }
  };

  struct Entry {
    Key key;
    c10::weak_intrusive_ptr<c10::StorageImpl> plan;
    Program program;
    Arenas arenas;
    Entry(Key k, const at::Tensor& tensor, Program p)
        : key(std::move(k)),
          plan(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(
              tensor.storage().unsafeGetStorageImpl())),
          program(std::move(p)) {}
  };

  static Programs& instance() {
    static Programs* programs = new Programs;  // like the pool
    return *programs;
  }

  template <typename F>
  std::shared_ptr<Entry> get(const at::Tensor& plan, Key key, const F& read) {
    key.numbers.push_back(plan.numel());
    key.numbers.push_back(plan.is_inference() ? 0 : plan._version());
    const std::lock_guard<std::mutex> guard(mutex_);
    Entries& known = known_[plan.const_data_ptr()];
    for (const auto& entry : known)
      if (entry->key == key && !entry->plan.expired()) return entry;
    const auto made = std::make_shared<Entry>(std::move(key), plan, read());
    if (known.size() >= MOST_SIZES) known.erase(known.begin());
    known.push_back(made);
    forget_plans_that_are_gone();
    return made;
  }

 private:
  using Entries = std::vector<std::shared_ptr<Entry>>;
  static constexpr size_t MOST_SIZES = 4;

  void forget_plans_that_are_gone() {
    for (auto it = known_.begin(); it != known_.end();) {
      auto& entries = it->second;
      const auto gone = [](const auto& entry) { return entry->plan.expired(); };
      entries.erase(std::remove_if(entries.begin(), entries.end(), gone), entries.end());
      it = entries.empty() ? known_.erase(it) : std::next(it);
    }
  }

  std::mutex mutex_;
  std::unordered_map<const void*, Entries> known_;
};

}  // namespace dspfx
