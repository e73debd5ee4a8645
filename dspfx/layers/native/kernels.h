// The kernels by kind of words, filters and vectors.

#pragma once

#include "pools.h"
#include "word_output.h"

namespace dspfx {

template <typename W>
struct Direct {
  template <int64_t R, int64_t V>
  struct Of {
    static void compute(const float* weight, const int64_t* offset, int64_t count,
                        const float* pixels, const Tile& tile, const Target& target,
                        PartialSums part) {
      Vec sum[R][V];
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; ++r)
        for (int64_t v = 0; v < V; ++v)
          sum[r][v] = part.first ? Vec(target.bias[target.filter[r]])
                                 : Vec::loadu(part.sums + (r * V + v) * LANES);
      if (part.last && tile.direct) ask_for<W, R, V>(tile, target);
      for (int64_t k = 0; k < count; ++k, weight += R) {
        const float* from = pixels + offset[k];
        accumulate<W, R, V>(weight, [from](int64_t v) { return from + v * LANES; }, sum);
      }
      if (W::CHANNELS == 1 && part.last) return finish_rows<R, V>(sum, tile, target);
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; ++r)
        for (int64_t v = 0; v < V; ++v) sum[r][v].store(part.sums + (r * V + v) * LANES);
      if constexpr (W::CHANNELS > 1)
        if (part.last) finish_words<W, V>(part.sums, R, tile, target);
    }
  };
};

using Compute = decltype(&Direct<Fp32>::Of<1, 1>::compute);

template <typename W, bool AVERAGE, int64_t... V>
constexpr OfRows<Compute> pools(std::integer_sequence<int64_t, V...>) {
  return {nullptr, pool_tile<W, AVERAGE, V + 1>...};
}

template <typename W>
struct Kernels {
  static constexpr auto CONVOLUTION = all_rows<Compute, Direct<W>::template Of>();
  static constexpr auto MAXIMUM =
      pools<W, false>(std::make_integer_sequence<int64_t, vectors_for(1)>());
  static constexpr auto AVERAGE =
      pools<W, true>(std::make_integer_sequence<int64_t, vectors_for(1)>());
};

}  // namespace dspfx
