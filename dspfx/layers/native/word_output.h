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

// A vector of sums of a filter, with the residual and the activation.
template <typename W, int64_t V>
C10_ALWAYS_INLINE Vec finished(const float* sums, int64_t r, int64_t v, const float* added,
                               int64_t added_channel, int64_t activation) {
  Vec x = Vec::loadu(sums + (r * V + v) * LANES);
  if (added != nullptr) x = x + W::channel(Vec::loadu(added + v * LANES), added_channel);
  return activated(activation, x);
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
    const float* added[W::CHANNELS] = {};
    int64_t halves[W::CHANNELS] = {};
    for (int64_t i = 0; i < W::CHANNELS; ++i) {
      const int64_t own = shared.filters[i];
      const float* from = own < 0 ? nullptr : added_plane<W>(target, own);
      if (from == nullptr) continue;
      halves[i] = target.added[own] % W::CHANNELS;
      added[i] = tile.direct ? from + tile.to : gathered[i];
      if (tile.direct) continue;
      for (const Segment& s : tile.segments)
        std::copy_n(from + s.row * target.residual.row + s.column, s.count, gathered[i] + s.from);
    }
    float* plane = target.y.data + target.filter[first] / W::CHANNELS * target.y.plane;
    const bool straight = tile.direct && shared.whole;
    float* to = straight ? plane + tile.to : result;
    for (int64_t v = 0; v < V; ++v) {
      Vec channels[W::CHANNELS];
      for (int64_t i = 0; i < W::CHANNELS; ++i)
        channels[i] = shared.filters[i] < 0 ? Vec(0.f)
                                            : finished<W, V>(sums, shared.filters[i], v, added[i],
                                                             halves[i], target.activation);
      Vec words = W::joined(channels);
      if (mask != nullptr) words = words & Vec::loadu(mask + v * LANES);
      words.store(to + v * LANES);
    }
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
