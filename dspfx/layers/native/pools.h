// Pools: the largest or the average of neighbouring pixels of words, and the mean of all pixels.

#pragma once

#include "microkernel.h"

namespace dspfx {

// Writes the words of a tile.
template <int64_t V>
C10_ALWAYS_INLINE void put(Vec (&words)[V], const Tile& tile, const Target& target) {
  float* plane = target.y.data + target.filter[0] * target.y.plane;
  if (tile.direct) {
    if (tile.mask >= 0)
      for (int64_t v = 0; v < V; ++v)
        words[v] = words[v] & Vec::loadu(target.masks + tile.mask + v * LANES);
    for (int64_t v = 0; v < V; ++v) words[v].store(plane + tile.to + v * LANES);
    return;
  }
  alignas(64) float result[V * LANES];
  for (int64_t v = 0; v < V; ++v) words[v].store(result + v * LANES);
  for (const Segment& s : tile.segments)
    std::copy_n(result + s.from, s.count, plane + s.row * target.y.row + s.column);
}

// The largest of all taps, or their average, for the channels of a word; there is no weight.
template <typename W, bool AVERAGE, int64_t V>
void pool_tile(const float*, const int64_t* offset, int64_t count, const float* pixels,
               const Tile& tile, const Target& target, PartialSums) {
  Vec sum[V][W::CHANNELS];
  for (int64_t k = 0; k < count; ++k)
    for (int64_t v = 0; v < V; ++v) {
      const Vec words = Vec::loadu(pixels + offset[k] + v * LANES);
      for (int64_t i = 0; i < W::CHANNELS; ++i) {
        const Vec x = W::channel(words, i);
        if (k == 0) sum[v][i] = x;
        else sum[v][i] = AVERAGE ? sum[v][i] + x : at::vec::maximum(sum[v][i], x);
      }
    }
  Vec words[V];
  for (int64_t v = 0; v < V; ++v) {
    if (AVERAGE)
      for (Vec& channel : sum[v]) channel = channel / Vec(static_cast<float>(count));
    words[v] = W::joined(sum[v]);
  }
  put<V>(words, tile, target);
}

// Channel `i` of the mean of `of` pixels, which lie among `count` words; the others are zero.
template <typename W>
Vec mean(const float* pixels, int64_t count, int64_t of, int64_t i) {
  constexpr int64_t SUMS = 4;
  Vec sum[SUMS] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
  const auto add = [i](Vec& to, Vec words) { to = to + W::channel(words, i); };
  int64_t at = 0;
  for (; at + SUMS * LANES <= count; at += SUMS * LANES)
    for (int64_t s = 0; s < SUMS; ++s) add(sum[s], Vec::loadu(pixels + at + s * LANES));
  for (; at < count; at += LANES) add(sum[0], Vec::loadu(pixels + at, std::min(LANES, count - at)));
  alignas(64) float lanes[LANES];
  ((sum[0] + sum[1]) + (sum[2] + sum[3])).store(lanes);
  float whole = 0.f;
  for (const float lane : lanes) whole += lane;
  return Vec(whole / static_cast<float>(of));
}

// The average of all pixels of some planes: zeros, or nothing, lie between their rows.
template <typename W>
void average_all(int64_t height, int64_t width, const Planes<const float>& source,
                 const Planes<float>& y, int64_t from, int64_t until) {
  const int64_t count = (height - 1) * source.row + width;
  for (int64_t c = from; c < until; ++c) {
    Vec means[W::CHANNELS];
    for (int64_t i = 0; i < W::CHANNELS; ++i)
      means[i] = mean<W>(source.data + c * source.plane, count, height * width, i);
    W::joined(means).store(y.data + c * y.plane, 1);
  }
}

}  // namespace dspfx
