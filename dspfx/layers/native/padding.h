// Copies strips of rows into the padded frames in which a layer reads them.

#pragma once

#include <algorithm>

#include "program.h"

namespace dspfx {

// Rows are short: whole vectors, the last one stepping back, beat a call of memcpy.
inline void copy(float* to, const float* from, int64_t count) {
  if (count < LANES) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + LANES <= count; i += LANES) Vec::loadu(from + i).store(to + i);
  Vec::loadu(from + count - LANES).store(to + count - LANES);
}

// Every `step`-th pixel. There are `before` pixels of the row before the first one that is taken, and
// `after` after the last one: no others may be read.
inline void copy(float* to, const float* from, int64_t count, int64_t step, int64_t before,
                 int64_t after) {
  if (step == 1) return copy(to, from, count);
  if (step != 2 || count < LANES || (count == LANES && before + after == 0)) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
    return;
  }
  const auto pairs = [](const float* p) {
    return at::vec::deinterleave2(Vec::loadu(p), Vec::loadu(p + LANES));
  };
  int64_t i = 0;
  for (; i + LANES < count; i += LANES) std::get<0>(pairs(from + 2 * i)).store(to + i);
  // the last vector steps back; it has one pixel too many, before the first or after the last
  const int64_t last = count - LANES;
  if (after > 0) std::get<0>(pairs(from + 2 * last)).store(to + last);
  else std::get<1>(pairs(from + 2 * last - 1)).store(to + last);
}

// A word of the lowest numbers.
inline float lowest_word(int64_t per_word) {
  return c10::bit_cast<float>(per_word == 1 ? Fp32::LOWEST : Bf16::LOWEST);
}

// Copies the rows that the output rows from `first` on need, padded where the image ends.
inline void fill(const Layer& l, const Cut& cut, const Value& size, Planes<const float> from,
          int64_t first, float* to) {
  const Frame& f = cut.frame;
  const int64_t step = l.stride[1];
  const float padding = l.kind == MAX_POOL ? lowest_word(l.per_word) : 0.f;
  for (const int64_t channel : l.used) {
    const float* plane = from.data + channel * from.plane;
    for (int64_t py = 0; py < f.phases[0]; ++py) {
      for (int64_t px = 0; px < f.phases[1]; ++px) {
        // columns with 0 <= column * step + shift < width
        const int64_t shift = px - l.padding[1];
        const int64_t begin = std::clamp<int64_t>((-shift + step - 1) / step, 0, f.width);
        const int64_t end =
            std::clamp<int64_t>((size.width - shift + step - 1) / step, begin, f.width);
        const int64_t x = shift + begin * step, last = shift + (end - 1) * step;
        // all of it first: rows are short, and so are their ends
        std::fill_n(to, f.height * f.width, padding);
        for (int64_t row = 0; row < f.height; ++row, to += f.width) {
          const int64_t y = (first + row) * l.stride[0] + py - l.padding[0];
          if (y >= 0 && y < size.height && begin < end)
            copy(to + begin, plane + y * from.row + x, end - begin, step, x, size.width - 1 - last);
        }
      }
    }
  }
  std::fill_n(to, l.padding[1], padding);  // what the last row pads
}

// The same for Winograd's algorithm, of bands.
inline void fill_bands(const Layer& l, const Cut& cut, const Value& size, Planes<const float> from,
                int64_t first, const float* zeros, float* to) {
  const Frame& f = cut.frame;
  const int64_t plane = f.height * f.width, begin = l.padding[1];
  const int64_t end = begin + size.width;
  for (const int64_t channel : l.used) {
    const float* pixels = from.data + channel * from.plane;
    for (int64_t band = 0; band < f.height; ++band) {
      const float* rows[POINTS];
      for (int64_t i = 0; i < POINTS; ++i) {
        const int64_t y = first + band * BAND + i - l.padding[0];
        rows[i] = y >= 0 && y < size.height ? pixels + y * from.row : zeros;
      }
      float* row = to + band * f.width;
      for (int64_t point = 0; point < POINTS; ++point) {
        std::fill_n(row + point * plane, std::min(begin, f.width), 0.f);
        if (end < f.width) std::fill_n(row + point * plane + end, f.width - end, 0.f);
      }
      transform_rows(rows, size.width, row + begin, plane);
    }
    to += f.channel();
  }
  std::fill_n(to, begin, 0.f);
}

}  // namespace dspfx
