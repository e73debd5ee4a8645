// Winograd's algorithm along the columns of an image, F(4, 3): four rows of output, a band, cost
// six products for every filter, channel and tap of a row, instead of twelve.
//
//     Y = A^T [(G g) * (B^T d)]
//
// S. Winograd, Arithmetic Complexity of Computations, 1980; the matrices for the points 0, 1, -1, 2,
// -2 and infinity are those of A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural
// Networks, CVPR 2016. Along rows taps are added as usual: vectors lie along rows, so that both transforms
// consist of sums of vectors.

#pragma once

#include "microkernel.h"

namespace dspfx {

constexpr int64_t BAND = 4;    // rows of output
constexpr int64_t POINTS = 6;  // planes of transformed rows

// A vector of pixels of a band: where it lies in a plane of transformed rows, and in the output. In
// narrow images only `count` pixels are wanted.
struct Spot {
  int64_t at, row, column, count;
};

inline Vec load(const float* from, int64_t count) {
  return count == LANES ? Vec::loadu(from) : Vec::loadu(from, count);
}

inline void store(Vec x, float* to, int64_t count) {
  if (count == LANES) x.store(to);
  else x.store(to, static_cast<int>(count));
}

// B^T d for `count` pixels of six rows, from `to` on, one plane after the other.
inline void transform_pixels(const float* const (&rows)[POINTS], int64_t x, int64_t count, float* to,
                             int64_t plane) {
  Vec d[POINTS];
  for (int64_t i = 0; i < POINTS; ++i) d[i] = load(rows[i] + x, count);
  const Vec two(2.f), four(4.f), five(5.f);
  const Vec even = d[4] - four * d[2], odd = d[3] - four * d[1];
  const Vec even2 = d[4] - d[2], odd2 = two * (d[3] - d[1]);
  (four * d[0] - five * d[2] + d[4]).store(to);
  (even + odd).store(to + plane);
  (even - odd).store(to + 2 * plane);
  (even2 + odd2).store(to + 3 * plane);
  (even2 - odd2).store(to + 4 * plane);
  (four * d[1] - five * d[3] + d[5]).store(to + 5 * plane);
}

// Whole rows; the last vector steps back. Rows of less than a vector are stored as one, followed by zeros.
inline void transform_rows(const float* const (&rows)[POINTS], int64_t width, float* to,
                           int64_t plane) {
  if (width < LANES) return transform_pixels(rows, 0, width, to, plane);
  for (int64_t x = 0; x + LANES <= width; x += LANES)
    transform_pixels(rows, x, LANES, to + x, plane);
  const int64_t last = width - LANES;
  if (width % LANES != 0) transform_pixels(rows, last, LANES, to + last, plane);
}

// One of the vectors that are computed one after the other, in a strip or in those of several images.
struct BandVector {
  const float* pixels;
  const Spot* spot;
  const Target* target;
};

// The products of one point, for some filters; V vectors at a time are held in registers, and
// `number` is a multiple of V.
template <int64_t R, int64_t V>
struct Products {
  static void compute(const float* weights, const int64_t* offset, int64_t count, int64_t plane,
                      const BandVector* vectors, int64_t number, float* to) {
    const BandVector* end = vectors + number;
    for (; vectors < end; vectors += V, to += V * R * LANES) {
      Vec sum[R][V];
      const float *from[V], *weight = weights;
      for (int64_t v = 0; v < V; ++v) from[v] = vectors[v].pixels + plane;
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; ++r)
        for (int64_t v = 0; v < V; ++v) sum[r][v] = Vec(0.f);
      for (int64_t k = 0; k < count; ++k, weight += R)
        accumulate<Fp32, R, V>(weight, [&](int64_t v) { return from[v] + offset[k]; }, sum);
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; ++r)
        for (int64_t v = 0; v < V; ++v) sum[r][v].store(to + (v * R + r) * LANES);
    }
  }
};

using ComputeProducts = decltype(&Products<1, 1>::compute);
constexpr auto PRODUCTS = all_rows<ComputeProducts, Products>();

// A^T of six products, `step` floats apart, and what `finish` does.
inline void finish_band(const float* products, int64_t step, const BandVector& vector,
                        int64_t height, int64_t r) {
  const Target& target = *vector.target;
  const Spot& spot = *vector.spot;
  Vec m[POINTS];
  for (int64_t i = 0; i < POINTS; ++i) m[i] = Vec::loadu(products + i * step);
  const Vec bias(target.bias[target.filter[r]]);
  const Vec sum = m[1] + m[2], difference = m[1] - m[2];
  const Vec sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  const Vec y[BAND] = {m[0] + sum + sum2 + bias, difference + Vec(2.f) * difference2 + bias,
                       sum + Vec(4.f) * sum2 + bias,
                       difference + Vec(8.f) * difference2 + m[5] + bias};
  const float* added = added_plane(target, r);
  float* plane = target.y.data + target.filter[r] * target.y.plane;
  for (int64_t i = 0; i < std::min(BAND, height - spot.row); ++i) {
    Vec x = y[i];
    if (added != nullptr)
      x = x + load(added + (spot.row + i) * target.residual.row + spot.column, spot.count);
    store(activated(target.activation, x), plane + (spot.row + i) * target.y.row + spot.column,
          spot.count);
  }
}

constexpr int64_t MOST_PRODUCTS = 4096;  // floats, of the first cache

// All vectors of one block of filters.
inline void compute_bands(const float* weight, const int64_t* offset, int64_t count, int64_t rows,
                          int64_t plane, const BandVector* vectors, int64_t number, int64_t height) {
  alignas(64) float products[MOST_PRODUCTS];
  const int64_t most = vectors_for(rows);
  static_assert(MOST_PRODUCTS >= POINTS * 32 * LANES);  // no more sums than registers
  const int64_t together = MOST_PRODUCTS / (POINTS * rows * LANES) / most * most;
  for (; number > 0; vectors += together, number -= together) {
    const int64_t now = std::min(together, number), step = now * rows * LANES;
    const int64_t whole = now / most * most;
    for (int64_t point = 0; point < POINTS; ++point) {
      const float* own = weight + point * count * rows;
      float* to = products + point * step;
      PRODUCTS[rows][most](own, offset, count, point * plane, vectors, whole, to);
      if (now > whole)
        PRODUCTS[rows][now - whole](own, offset, count, point * plane, vectors + whole,
                                    now - whole, to + whole * rows * LANES);
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t v = 0; v < now; ++v)
        finish_band(products + (v * rows + r) * LANES, step, vectors[v], height, r);
  }
}

}  // namespace dspfx
