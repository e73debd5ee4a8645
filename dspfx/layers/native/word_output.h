// The epilogue of filters whose results share words with those of others.

#pragma once

#include "microkernel.h"

namespace dspfx {

// Vectors of words that filters have in common: of which filters, -1 for none.
template <typename W>
struct Shared {
  int64_t filters[W::CHANNELS];
  bool whole;  // what has no filter is no channel of the value
};

// The filters from `first` on that share a word, and how many they are.
template <typename W>
inline int64_t sharing(const Target& target, int64_t first, int64_t rows, Shared<W>& shared) {
  const int64_t word = target.filter[first] / W::CHANNELS;
  std::fill_n(shared.filters, W::CHANNELS, -1);
  int64_t r = first;
  for (; r < rows && target.filter[r] / W::CHANNELS == word; ++r)
    shared.filters[target.filter[r] % W::CHANNELS] = r;
  shared.whole = true;
  for (int64_t i = 0; i < W::CHANNELS; ++i)
    shared.whole &= shared.filters[i] >= 0 || word * W::CHANNELS + i >= target.channels;
  return r - first;
}

// The sums of a filter, and words of which one channel is the residual, null for none.
struct Addends {
  const float *sums, *words;
  int64_t channel;
};

// All activations keep it.
alignas(64) constexpr float NO_SUMS[MOST_VECTORS * LANES] = {};

// The residual is added, the activation taken and the channels joined.
template <typename W, int64_t V>
C10_ALWAYS_INLINE void join(const Addends (&of)[W::CHANNELS], int64_t activation,
                            const float* mask, float* to) {
  const Vec low = lowest(activation), high = highest(activation);
  for (int64_t v = 0; v < V; ++v) {
    Vec channels[W::CHANNELS];
    for (int64_t i = 0; i < W::CHANNELS; ++i) {
      Vec x = Vec::loadu(of[i].sums + v * LANES);
      if (of[i].words != nullptr)
        x = x + W::channel(Vec::loadu(of[i].words + v * LANES), of[i].channel);
      channels[i] = activation >= HARDSWISH ? smooth(activation, x) : at::vec::clamp(x, low, high);
    }
    Vec words = W::joined(channels);
    if (mask != nullptr) words = words & Vec::loadu(mask + v * LANES);
    words.store(to + v * LANES);
  }
}

// The sums of `rows` filters, [filter][vector], to the words of a tile.
template <typename W, int64_t V>
C10_NOINLINE void finish_words(const float* sums, int64_t rows, const Tile& tile,
                               const Target& target) {
  const float* mask = tile.mask < 0 ? nullptr : target.masks + tile.mask;
  alignas(64) float gathered[W::CHANNELS][V * LANES], result[V * LANES];
  if (!tile.direct) std::fill_n(gathered[0], W::CHANNELS * V * LANES, 0.f);
  Shared<W> shared;
  for (int64_t r = 0; r < rows;) {
    const int64_t first = r;
    r += sharing<W>(target, first, rows, shared);
    Addends addends[W::CHANNELS];
    for (int64_t i = 0; i < W::CHANNELS; ++i) {
      const int64_t own = shared.filters[i];
      addends[i] = {own < 0 ? NO_SUMS : sums + own * V * LANES, nullptr, 0};
      const float* from = own < 0 ? nullptr : added_plane<W>(target, own);
      if (from == nullptr) continue;
      addends[i].channel = target.added[own] % W::CHANNELS;
      addends[i].words = tile.direct ? from + tile.to : gathered[i];
      if (tile.direct) continue;
      for (const Segment& s : tile.segments)
        std::copy_n(from + s.row * target.residual.row + s.column, s.count, gathered[i] + s.from);
    }
    float* plane = target.y.data + target.filter[first] / W::CHANNELS * target.y.plane;
    const bool straight = tile.direct && shared.whole;
    join<W, V>(addends, target.activation, mask, straight ? plane + tile.to : result);
    if (straight) continue;
    const auto put = [&](const float* from, int64_t count, float* at) {
      if (shared.whole) return static_cast<void>(std::copy_n(from, count, at));
      for (int64_t i = 0; i < W::CHANNELS; ++i)
        if (shared.filters[i] >= 0) store_channel<W>(from, i, count, at);
    };
    if (tile.direct) put(result, V * LANES, plane + tile.to);
    else
      for (const Segment& s : tile.segments)
        put(result + s.from, s.count, plane + s.row * target.y.row + s.column);
  }
}

}  // namespace dspfx
