// Memory pool: malloc returns large blocks to the system, and new pages cost a page fault for every
// 4 KiB.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dspfx {

inline void* allocate(size_t bytes) {
  constexpr size_t HUGE_PAGE = 2 << 20;
  void* block = nullptr;
  const size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 4096;
  TORCH_CHECK(posix_memalign(&block, alignment, bytes) == 0, "dspfx: no memory for ", bytes,
              " bytes");
#ifdef __linux__
  if (alignment == HUGE_PAGE) madvise(block, bytes, MADV_HUGEPAGE);
#endif
  return block;
}

// Large outputs; what is freed is kept for the next tensor of its size.
class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: tensors may outlive everything else
    return *pool;
  }

  at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    const size_t bytes = sizeof(float) * c10::multiply_integers(sizes);
    if (bytes < SMALLEST) return at::empty(sizes, options);
    void* block = take(bytes);
    return at::from_blob(block, sizes, [bytes](void* p) { instance().give(p, bytes); }, options);
  }

 private:
  static constexpr size_t SMALLEST = 64 << 10, MOST_KEPT = 256 << 20;

  void* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      std::vector<void*>& blocks = free_[bytes];
      if (!blocks.empty()) {
        void* block = blocks.back();
        blocks.pop_back();
        kept_ -= bytes;
        return block;
      }
    }
    return allocate(bytes);
  }

  void give(void* block, size_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (kept_ + bytes > MOST_KEPT) return free(block);
    free_[bytes].push_back(block);
    kept_ += bytes;
  }

  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<void*>> free_;
  size_t kept_ = 0;
};

// Zeroed blocks of one size, each used by one call at a time.
class Arenas {
 public:
  using Block = std::unique_ptr<float, decltype(&free)>;

  Block take(int64_t floats) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      if (!free_.empty()) {
        Block block = std::move(free_.back());
        free_.pop_back();
        return block;
      }
    }
    Block block(static_cast<float*>(allocate(sizeof(float) * floats)), &free);
    std::memset(block.get(), 0, sizeof(float) * floats);
    return block;
  }

  void give(Block block) {
    const std::lock_guard<std::mutex> guard(mutex_);
    free_.push_back(std::move(block));
  }

 private:
  std::mutex mutex_;
  std::vector<Block> free_;
};

}  // namespace dspfx
