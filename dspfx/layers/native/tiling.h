// Tiling: a layer is split into strips of rows, tiles of pixels and shares of the filters; and the
// offsets of the pixels that a tile reads.
//
// Intermediate values lie in padded frames: zeros follow each row, and zero rows precede each plane,
// as many as the convolutions that read them pad. The zeros of a row also precede the next one, those
// of a plane follow the one before. So every tap of every channel has a constant offset from the
// output pixel, and a group of filters is one matrix product (implicit GEMM) whose rows are found by a
// list of offsets. Where a value has no such frame (the stride is not 1, or there is no padding), a
// strip of rows is copied into one first, the phases of the stride side by side.

#pragma once

#include <c10/util/bit_cast.h>

#include <algorithm>

#include "program.h"

namespace dspfx {

const float ALL_BITS = c10::bit_cast<float>(~uint32_t{0});
constexpr int64_t STRIP_FLOATS = 96 * 1024;  // of input, of the second cache
constexpr int64_t BANDS_FLOATS = 32 * 1024;  // the same, of transformed rows
constexpr int64_t FEW_WEIGHTS = 64 * 1024;   // cheap for every thread to read

inline bool is_in_place(const Layer& l, const Value& from, const Value& to, int64_t row) {
  if (l.stride[0] != 1 || l.stride[1] != 1 || from.row() != row || row < to.width) return false;
  const int64_t size[2] = {from.height, from.width}, out[2] = {to.height, to.width};
  for (int axis = 0; axis < 2; ++axis) {
    if (l.kind == MAX_POOL && l.padding[axis] != 0) return false;  // max pools pad with -infinity
    const int64_t after = out[axis] - 1 + l.reach(axis) - l.padding[axis] - (size[axis] - 1);
    if (l.padding[axis] > from.zeros[axis] || after > from.zeros[axis]) return false;
  }
  return true;
}

// The tiles of a strip whose first row of output is `first`.
inline std::vector<Tile> tiles_of(Cut& cut, const Value& to, const Value* residual, int64_t first,
                                  int64_t most) {
  const int64_t rows = std::min(cut.rows, to.height - first), row = cut.row;
  const int64_t pixels = (rows - 1) * row + to.width;
  const bool last = first + rows == to.height;
  // as far as zeros, or rows of this strip, reach
  const int64_t limit = to.zeros[1] == 0 && to.zeros[0] == 0
      ? pixels
      : rows * row + (last ? to.zeros[0] * row : 0);
  std::vector<Tile> tiles;
  for (int64_t p = 0; p < pixels; p += most * LANES) {
    const int64_t end = std::min(p + most * LANES, pixels), vectors = (end - p + LANES - 1) / LANES;
    // the last tile steps back rather than reach past the end, where that can be
    Tile tile{std::max<int64_t>(0, end - vectors * LANES), 0, vectors, false, -1, {}};
    const int64_t after = tile.at + vectors * LANES;
    tile.to = first * row + tile.at;
    tile.direct = to.row() == row && after <= limit &&
        (residual == nullptr ||
         (residual->row() == row && (residual->place == Value::INSIDE || after <= pixels)));
    for (int64_t at = tile.at; at < end;) {
      const int64_t y = at / row, until = std::min(end, y * row + to.width);
      if (at < until) tile.segments.push_back({at - tile.at, until - at, first + y, at - y * row});
      at = (y + 1) * row;
    }
    if (tile.direct && (row != to.width || after > pixels)) {
      tile.mask = static_cast<int64_t>(cut.masks.size());
      for (int64_t at = tile.at; at < after; ++at)
        cut.masks.push_back(at < pixels && at % row < to.width ? ALL_BITS : 0.f);
    }
    tiles.push_back(std::move(tile));
  }
  return tiles;
}

inline void choose_frame(const Layer& l, const Value& from, const Value& to, Cut& cut) {
  for (int axis = 0; axis < 2; ++axis)
    cut.frame.phases[axis] = std::min(l.reach(axis) + 1, l.stride[axis]);
  // at stride 1, the padding after a row is the padding before the next
  const int64_t needed = l.stride[1] == 1 && l.padding[1] <= l.reach(1)
      ? std::max(to.width, from.width + l.padding[1])
      : to.width + l.reach(1) / l.stride[1];
  cut.frame.width = to.place == Value::INSIDE ? std::max(needed, to.row()) : needed;
  cut.row = cut.frame.width;
}

// Splits the blocks of a layer into shares of about equal work; returns their boundaries.
inline std::vector<int64_t> split_blocks(const Layer& l, int64_t parts) {
  constexpr int64_t A_FILTER = 32;  // what it takes to write one, in products
  const auto work = [&](const Block& b) { return b.rows * (b.count * l.points() + A_FILTER); };
  int64_t left = 0;
  for (const Block& b : l.blocks) left += work(b);
  std::vector<int64_t> splits{0};
  int64_t at = 0;
  const int64_t blocks = static_cast<int64_t>(l.blocks.size());
  for (; parts > 1; --parts) {
    int64_t done = 0;
    // as close to a share of what is left as can be
    while (at < blocks && 2 * done + work(l.blocks[at]) <= 2 * left / parts)
      done += work(l.blocks[at++]);
    left -= done;
    splits.push_back(at);
  }
  splits.push_back(blocks);
  return splits;
}

// Strips of whole bands.
inline Cut cut_bands(const Program& p, const Layer& l, int64_t threads) {
  const Value &from = p.values[l.source], &to = p.values[l.result];
  Cut cut{};
  choose_frame(l, from, to, cut);
  // a row of less than a vector is stored as one
  if (from.width < LANES) cut.row = std::max(cut.row, l.padding[1] + LANES);
  const int64_t bands = (to.height + BAND - 1) / BAND;
  const int64_t a_band = std::max<int64_t>(1, l.used.size() * POINTS * cut.row);
  const int64_t fitting =
      std::clamp<int64_t>(BANDS_FLOATS / a_band, 1, std::max<int64_t>(1, bands));
  cut.strips = (bands + fitting - 1) / fitting;
  int64_t splits = 1;
  if (cut.strips % threads != 0) {
    const int64_t more = (cut.strips + threads - 1) / threads * threads;
    if (l.weights() <= FEW_WEIGHTS && bands >= more) cut.strips = more;
    else splits = std::min<int64_t>(threads, std::max<size_t>(1, l.blocks.size()));
  }
  cut.splits = split_blocks(l, splits);
  const int64_t in_a_strip = (bands + cut.strips - 1) / cut.strips;
  cut.strips = (bands + in_a_strip - 1) / in_a_strip;
  cut.rows = in_a_strip * BAND;
  cut.frame = {{POINTS, 1}, in_a_strip, cut.row};
  return cut;
}

inline std::vector<Spot> spots_of(const Cut& cut, const Value& to, int64_t first) {
  std::vector<Spot> spots;
  for (int64_t y = first; y < std::min(first + cut.rows, to.height); y += BAND)
    for (int64_t x = 0; x < to.width; x += LANES) {
      const int64_t column = std::max<int64_t>(0, std::min(x, to.width - LANES));
      spots.push_back({(y - first) / BAND * cut.row + column, y, column,
                       std::min(LANES, to.width)});
    }
  return spots;
}

// Whole planes, shared by threads.
inline Cut cut_planes(const Program& p, const Layer& l, int64_t threads) {
  Cut cut{};
  cut.rows = p.values[l.result].height, cut.strips = 1, cut.in_place = true;
  cut.splits = split_blocks(l, std::min<int64_t>(threads, std::max<size_t>(1, l.blocks.size())));
  return cut;
}

inline Cut cut_for(const Program& p, const Layer& l, int64_t threads) {
  if (l.converts()) return cut_planes(p, l, threads);
  if (l.kind == WINOGRAD) return cut_bands(p, l, threads);
  const Value &from = p.values[l.source], &to = p.values[l.result];
  Cut cut{};
  const int64_t row = to.place == Value::INSIDE ? to.row() : from.row();
  cut.in_place = is_in_place(l, from, to, row);
  cut.row = row;
  cut.frame = {{1, 1}, from.height + from.zeros[0], row};
  if (!cut.in_place) choose_frame(l, from, to, cut);
  const int64_t reach = l.reach(0) / l.stride[0];
  const int64_t a_row = std::max<int64_t>(1, l.used.size() * cut.frame.phases[0] *
                                                 cut.frame.phases[1] * cut.frame.width);
  const int64_t fitting =
      std::clamp<int64_t>(STRIP_FLOATS / a_row - reach, 1, std::max<int64_t>(1, to.height));
  cut.strips = (to.height + fitting - 1) / fitting;
  int64_t splits = 1;
  if (cut.strips % threads != 0) {
    const int64_t more = (cut.strips + threads - 1) / threads * threads;
    if (l.weights() <= FEW_WEIGHTS && to.height >= more * 2 * (reach + 1)) cut.strips = more;
    else splits = std::min<int64_t>(threads, std::max<size_t>(1, l.blocks.size()));
  }
  cut.splits = split_blocks(l, splits);
  cut.rows = (to.height + cut.strips - 1) / cut.strips;
  cut.strips = (to.height + cut.rows - 1) / cut.rows;
  const int64_t rest = to.height - (cut.strips - 1) * cut.rows;
  if (cut.in_place && from.place != Value::INSIDE &&
      (rest - 1) * row + to.width < MOST_VECTORS * LANES) {
    cut.in_place = false;  // a tile would reach past the image
    choose_frame(l, from, to, cut);
  }
  if (!cut.in_place) cut.frame.height = cut.rows + reach;
  return cut;
}

// The offsets of the taps of all index lists from the output pixel.
inline void find_offsets(const Layer& l, const Value& from, Cut& cut) {
  const Frame& f = cut.frame;
  cut.offsets.reserve(l.inputs.size() * l.taps());
  for (const int64_t c : l.inputs)
    for (int64_t ky = 0; ky < l.taps() / l.kernel[1]; ++ky)
      for (int64_t kx = 0; kx < l.kernel[1]; ++kx) {
        const int64_t y = ky * l.dilation[0], x = kx * l.dilation[1];
        if (cut.in_place) {
          cut.offsets.push_back(l.used[c] * from.plane() + (y - l.padding[0]) * cut.row + x -
                                l.padding[1]);
        } else {
          const int64_t phase = (y % l.stride[0]) * f.phases[1] + x % l.stride[1];
          cut.offsets.push_back(c * f.channel() + (phase * f.height + y / l.stride[0]) * f.width +
                                x / l.stride[1]);
        }
      }
}

inline void finish_cut(Program& p, const Layer& l, Cut& cut) {
  const Value &from = p.values[l.source], &to = p.values[l.result];
  if (l.converts()) return;
  find_offsets(l, from, cut);
  const Value* residual = l.residual < 0 ? nullptr : &p.values[l.residual];
  cut.tiles.resize(cut.strips);
  for (int64_t strip = 0; strip < cut.strips; ++strip) {
    if (l.kind == WINOGRAD) {
      cut.spots.push_back(spots_of(cut, to, strip * cut.rows));
      continue;
    }
    for (const Block& b : l.blocks) {
      auto& tiles = cut.tiles[strip][vectors_for(b.rows)];
      if (tiles.empty())
        tiles = tiles_of(cut, to, residual, strip * cut.rows, vectors_for(b.rows));
    }
  }
  if (!cut.in_place) {
    const int64_t floats = l.used.size() * cut.frame.channel() + l.padding[1] +
        MOST_VECTORS * LANES;
    const bool late = &l - p.layers.data() >= p.late;
    int64_t& most = late ? p.late_scratch : p.early_scratch;
    most = std::max(most, floats);
  }
}

}  // namespace dspfx
