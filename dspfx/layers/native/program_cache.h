// Program cache: what was validated and planned once is kept while its indices are alive.

#pragma once

#include <ATen/core/Tensor.h>

#include <mutex>
#include <string>
#include <unordered_map>

#include "memory.h"
#include "build_program.h"

namespace dspfx {

// For each tensor of indices the programs of the last few sizes are kept; each holds memory.
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
    c10::weak_intrusive_ptr<c10::StorageImpl> indices;
    Program program;
    Arenas arenas;
    Entry(Key k, const at::Tensor& tensor, Program p)
        : key(std::move(k)),
          indices(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(
              tensor.storage().unsafeGetStorageImpl())),
          program(std::move(p)) {}
  };

  static Programs& instance() {
    static Programs* programs = new Programs;  // like the pool
    return *programs;
  }

  template <typename F>
  std::shared_ptr<Entry> get(const at::Tensor& indices, Key key, const F& read) {
    key.numbers.push_back(indices.numel());
    key.numbers.push_back(indices.is_inference() ? 0 : indices._version());
    const std::lock_guard<std::mutex> guard(mutex_);
    Entries& known = known_[indices.const_data_ptr()];
    for (const auto& entry : known)
      if (entry->key == key && !entry->indices.expired()) return entry;
    const auto made = std::make_shared<Entry>(std::move(key), indices, read());
    if (known.size() >= MOST_SIZES) known.erase(known.begin());
    known.push_back(made);
    remove_expired();
    return made;
  }

 private:
  using Entries = std::vector<std::shared_ptr<Entry>>;
  static constexpr size_t MOST_SIZES = 4;

  void remove_expired() {
    for (auto it = known_.begin(); it != known_.end();) {
      auto& entries = it->second;
      const auto gone = [](const auto& entry) { return entry->indices.expired(); };
      entries.erase(std::remove_if(entries.begin(), entries.end(), gone), entries.end());
      it = entries.empty() ? known_.erase(it) : std::next(it);
    }
  }

  std::mutex mutex_;
  std::unordered_map<const void*, Entries> known_;
};

}  // namespace dspfx
