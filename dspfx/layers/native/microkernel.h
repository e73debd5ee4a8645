// Register-blocked microkernel: some filters times some vectors of pixels, sums held in registers:
//
//     y[o, p] = clamp(bias[o] + sum_k w[k, o] * pixels[offset[k] + p] + residual[o, p])
//
// Pixels and weights are words of one channel or of several, whose products are added up.

#pragma once

#include <c10/macros/Macros.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "words.h"

namespace dspfx {

constexpr int64_t LINE = 16;  // floats of a line of the caches
// as many accumulators as leave registers for the operands: of 32 registers, or of 16
constexpr bool MANY_REGISTERS = LANES >= 16;
constexpr int64_t MOST_ROWS = MANY_REGISTERS ? 8 : 6;
constexpr int64_t MOST_VECTORS = 6;

// Vectors of pixels for a number of filters.
constexpr int64_t vectors_for(int64_t rows) {
  constexpr int64_t many[] = {0, 6, 6, 6, 6, 5, 4, 3, 3}, few[] = {0, 6, 6, 4, 3, 2, 2};
  return MANY_REGISTERS ? many[rows] : few[rows];
}

enum Activation : int64_t { NONE = 0, RELU = 1, RELU6 = 2, HARDSWISH = 3, SILU = 4 };
constexpr int64_t ACTIVATIONS = 5;

// Neighbouring pixels of a row of the output that lie side by side in a tile as well.
struct Segment {
  int64_t from, count;  // in the tile
  int64_t row, column;  // of the output
};

// A tile of pixels: its offset in the strip and in the output, and which of its pixels are valid. A
// direct one is stored as it is, zeros where the mask has no bits; others are stored by segments.
struct Tile {
  int64_t at, to, vectors;
  bool direct;
  int64_t mask;  // its place among the masks, or -1
  std::vector<Segment> segments;
};

// Planes of an image that is read or written, and the distance of its rows.
template <typename T>
struct Planes {
  T* data = nullptr;  // null: there is none
  int64_t plane = 0, row = 0;
};

// Where filters are written to, and what is added to them.
struct Target {
  const int64_t* filter;
  int64_t channels;      // of the value that is written
  const int64_t* added;  // channels of the residual, -1 for none
  const float* bias;
  int64_t activation;
  Planes<float> y;
  Planes<const float> residual;
  const float* masks;
};

inline Vec smooth(int64_t activation, Vec x) {
  if (activation == SILU) return x / (Vec(1.f) + x.neg().exp());
  const Vec zero(0.f), six(6.f);
  return x * at::vec::minimum(at::vec::maximum(x + Vec(3.f), zero), six) / six;
}

inline Vec lowest(int64_t activation) {
  const bool bounded = activation == RELU || activation == RELU6;
  return Vec(bounded ? 0.f : -std::numeric_limits<float>::infinity());
}

inline Vec highest(int64_t activation) {
  return Vec(activation == RELU6 ? 6.f : std::numeric_limits<float>::infinity());
}

inline Vec activated(int64_t activation, Vec x) {
  if (activation >= HARDSWISH) return smooth(activation, x);
  return at::vec::clamp(x, lowest(activation), highest(activation));
}

// Vectors of one filter: the residual is added and the activation taken on the way out.
template <int64_t V>
C10_ALWAYS_INLINE void finish(Vec (&sum)[V], int64_t activation, const float* added, const float* mask,
                   float* to) {
  const Vec low = lowest(activation), high = highest(activation);
  if (added != nullptr)
    for (int64_t v = 0; v < V; ++v) sum[v] = sum[v] + Vec::loadu(added + v * LANES);
  for (int64_t v = 0; v < V; ++v) sum[v] = at::vec::clamp(sum[v], low, high);
  if (mask != nullptr)
    for (int64_t v = 0; v < V; ++v) sum[v] = sum[v] & Vec::loadu(mask + v * LANES);
  for (int64_t v = 0; v < V; ++v) sum[v].store(to + v * LANES);
  if (activation >= HARDSWISH)
    for (int64_t v = 0; v < V; ++v)
      smooth(activation, Vec::loadu(to + v * LANES)).store(to + v * LANES);
}

template <typename W = Fp32>
const float* added_plane(const Target& t, int64_t r) {
  if (t.residual.data == nullptr || t.added[r] < 0) return nullptr;
  return t.residual.data + t.added[r] / W::CHANNELS * t.residual.plane;
}

template <int64_t V>
C10_NOINLINE void finish_by_segments(const float* sums, const Tile& tile, const Target& target,
                                     int64_t r) {
  alignas(64) float added[V * LANES] = {}, result[V * LANES];
  Vec sum[V];
  for (int64_t v = 0; v < V; ++v) sum[v] = Vec::loadu(sums + v * LANES);
  const float* from = added_plane(target, r);
  if (from != nullptr)
    for (const Segment& s : tile.segments)
      std::copy_n(from + s.row * target.residual.row + s.column, s.count, added + s.from);
  finish<V>(sum, target.activation, from == nullptr ? nullptr : added, nullptr, result);
  float* plane = target.y.data + target.filter[r] * target.y.plane;
  for (const Segment& s : tile.segments)
    std::copy_n(result + s.from, s.count, plane + s.row * target.y.row + s.column);
}

// Adds one product of the sum; `pixels(v)` is where a vector lies. Of weights and pixels the fewer are
// held in registers, so that with the sums there are at most 16. The loops over rows must be unrolled,
// or the sums would be in memory.
template <typename W, int64_t R, int64_t V, typename Pixels>
C10_ALWAYS_INLINE void accumulate(const float* weight, const Pixels& pixels, Vec (&sum)[R][V]) {
  if constexpr (R < V) {
    Vec w[R];
    for (int64_t r = 0; r < R; ++r) w[r] = Vec(weight[r]);
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) {
      const Vec x = Vec::loadu(pixels(v));
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; ++r) sum[r][v] = W::multiply_add(w[r], x, sum[r][v]);
    }
  } else {
    Vec x[V];
    for (int64_t v = 0; v < V; ++v) x[v] = Vec::loadu(pixels(v));
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) {
      const Vec w(weight[r]);
      for (int64_t v = 0; v < V; ++v) sum[r][v] = W::multiply_add(w, x[v], sum[r][v]);
    }
  }
}

// Prefetches the residual and the output of a tile, both in memory, while its products are summed.
template <typename W, int64_t R, int64_t V>
C10_ALWAYS_INLINE void ask_for(const Tile& tile, const Target& target) {
  constexpr int64_t last = V * LANES - 1;
  for (int64_t r = 0; r < R; ++r) {
    if (r > 0 && target.filter[r] / W::CHANNELS == target.filter[r - 1] / W::CHANNELS) continue;
    const float* to =
        target.y.data + target.filter[r] / W::CHANNELS * target.y.plane + tile.to;
    for (int64_t i = 0; i < last; i += LINE) __builtin_prefetch(to + i, 1);
    __builtin_prefetch(to + last, 1);
    const float* added = added_plane<W>(target, r);
    if (added == nullptr) continue;
    for (int64_t i = 0; i < last; i += LINE) __builtin_prefetch(added + tile.to + i);
    __builtin_prefetch(added + tile.to + last);
  }
}

// Partial sums of a tile over a chunk of the products: the sums so far are in `sums`, except for the
// first chunk; after the last one the epilogue is applied.
struct PartialSums {
  bool first, last;
  float* sums;  // [filter][vector]
};

// The epilogue of all filters of a block, where each has words of its own.
template <int64_t R, int64_t V>
C10_ALWAYS_INLINE void finish_rows(Vec (&sum)[R][V], const Tile& tile, const Target& target) {
  const float* mask = tile.mask < 0 ? nullptr : target.masks + tile.mask;
#pragma GCC unroll 8
  for (int64_t r = 0; r < R; ++r) {
    if (tile.direct) {
      const float* added = added_plane(target, r);
      finish<V>(sum[r], target.activation, added == nullptr ? nullptr : added + tile.to, mask,
                target.y.data + target.filter[r] * target.y.plane + tile.to);
    } else {
      alignas(64) float sums[V * LANES];
      for (int64_t v = 0; v < V; ++v) sum[r][v].store(sums + v * LANES);
      finish_by_segments<V>(sums, tile, target, r);
    }
  }
}

template <typename Function>
using OfRows = std::array<Function, MOST_VECTORS + 1>;

template <typename Function, template <int64_t, int64_t> class Kernel, int64_t R, int64_t... V>
constexpr OfRows<Function> of_rows(std::integer_sequence<int64_t, V...>) {
  return {nullptr, Kernel<R, V + 1>::compute...};
}

template <typename Function, template <int64_t, int64_t> class Kernel, int64_t... R>
constexpr std::array<OfRows<Function>, MOST_ROWS + 1> all_rows(
    std::integer_sequence<int64_t, R...>) {
  return {OfRows<Function>{}, of_rows<Function, Kernel, R + 1>(
                                  std::make_integer_sequence<int64_t, vectors_for(R + 1)>())...};
}

// A kernel by filters, 1 to MOST_ROWS, and vectors, 1 to vectors_for(filters).
template <typename Function, template <int64_t, int64_t> class Kernel>
constexpr std::array<OfRows<Function>, MOST_ROWS + 1> all_rows() {
  return all_rows<Function, Kernel>(std::make_integer_sequence<int64_t, MOST_ROWS>());
}

}  // namespace dspfx
