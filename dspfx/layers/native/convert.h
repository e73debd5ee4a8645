// Converts images of fp32 that are given or returned to words and back.

#pragma once

#include "program.h"

namespace dspfx {

// Calls `f(at, count)` for the vectors of a row.
template <typename F>
C10_ALWAYS_INLINE void vectors_of_row(int64_t width, const F& f) {
  for (int64_t x = 0; x < width; x += LANES) f(x, std::min(LANES, width - x));
}

// Channels that there are not are zero.
template <typename W>
void pack(const Value& size, const Planes<const float>& x, const Planes<float>& y, int64_t from,
          int64_t until) {
  for (int64_t plane = from; plane < until; ++plane)
    for (int64_t row = 0; row < size.height; ++row)
      vectors_of_row(size.width, [&](int64_t at, int64_t count) {
        Vec channels[W::CHANNELS];
        for (int64_t i = 0; i < W::CHANNELS; ++i) {
          const int64_t channel = plane * W::CHANNELS + i;
          const float* read = x.data + channel * x.plane + row * x.row + at;
          channels[i] = channel < size.channels ? load(read, count) : Vec(0.f);
        }
        store(W::joined(channels), y.data + plane * y.plane + row * y.row + at, count);
      });
}

template <typename W>
void unpack(const Value& size, const Planes<const float>& x, const Planes<float>& y, int64_t from,
            int64_t until) {
  for (int64_t plane = from; plane < until; ++plane)
    for (int64_t row = 0; row < size.height; ++row)
      vectors_of_row(size.width, [&](int64_t at, int64_t count) {
        const Vec words = load(x.data + plane * x.plane + row * x.row + at, count);
        for (int64_t i = 0; i < W::CHANNELS; ++i) {
          const int64_t channel = plane * W::CHANNELS + i;
          if (channel < size.channels)
            store(W::channel(words, i), y.data + channel * y.plane + row * y.row + at, count);
        }
      });
}

}  // namespace dspfx
