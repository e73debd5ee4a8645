// What is computed from a plan and the sizes of the images, once: where every pixel lies.
//
// Values inside a run lie in frames: rows have zeros behind them, and planes zero rows before them,
// as many as the convolutions that read them pad. A row's zeros serve the next row as well, a
// plane's the plane before. So the pixels of a tap lie at a constant distance from those of the
// output, for every tap and channel, and a group of filters is one matrix product whose rows are
// found by a list of offsets. Where that is not so from the start (the stride is not 1, or no zeros
// are there), a strip of rows is copied into such a frame first, one phase of the stride beside the
// other.

#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <c10/util/bit_cast.h>

#include <map>
#include <numeric>
#include <optional>

#include "winograd.h"

namespace dspfx {

constexpr int64_t STRIP_FLOATS = 96 * 1024;  // of input, of the second cache
constexpr int64_t BANDS_FLOATS = 32 * 1024;  // the same, of transformed rows
constexpr int64_t FEW_WEIGHTS = 64 * 1024;   // cheap for every thread to read
const float ALL_BITS = c10::bit_cast<float>(~uint32_t{0});
constexpr int64_t TOGETHER = 4;              // images, in late layers
constexpr int64_t LAYER_NUMBERS = 14;        // that describe a layer

enum Kind : int64_t { CONVOLUTION = 0, MAX_POOL = 1, WINOGRAD = 2, AVERAGE_POOL = 3 };

// An image between layers.
struct Value {
  enum Place { GIVEN, INSIDE, RETURNED } place;
  int64_t channels, height, width;
  int64_t zeros[2] = {0, 0};  // rows before a plane, pixels behind a row
  int64_t at = 0;             // of pixel 0 of channel 0, in the arena
  bool late = false;          // read or written by late layers: one for each image of a batch
  int64_t row() const { return width + zeros[1]; }
  int64_t plane() const { return (height + zeros[0]) * row(); }
  int64_t before() const { return zeros[0] * row() + zeros[1]; }
  int64_t behind() const { return before() + MOST_VECTORS * LANES; }
};

// Some filters of one group.
struct Block {
  int64_t rows, filter;   // and the place of the first among all filters of the layer
  int64_t weight, count;  // its weights' place, and how many for each filter and sum
  int64_t list;           // place of its offsets
};

// The frame into which a strip is copied.
struct Frame {
  int64_t phases[2];      // of each axis that any tap needs
  int64_t height, width;  // of one phase of one channel
  int64_t channel() const { return phases[0] * phases[1] * height * width; }
};

// How the work is cut: strips of rows, and the blocks of filters, at `splits`, if strips are too few.
struct Cut {
  int64_t rows, strips;
  std::vector<int64_t> splits;
  bool in_place;
  int64_t row;  // distance of the rows of what is read
  Frame frame;
  std::vector<int64_t> offsets;
  // by strip and vectors in a tile
  std::vector<std::array<std::vector<Tile>, MOST_VECTORS + 1>> tiles;
  std::vector<float> masks;
  std::vector<std::vector<Spot>> spots;  // by strip, of Winograd's algorithm
};

struct Layer {
  Kind kind;
  int64_t source, residual, result;  // values; residual: -1 for none
  int64_t kernel[2], stride[2], padding[2], dilation[2], activation;
  int64_t bias;
  std::vector<int64_t> filters, added;  // channels of the result; of the residual
  std::vector<int64_t> used, inputs;    // channels that anybody reads; lists, in terms of `used`
  std::vector<Block> blocks;
  Cut alone, together;                  // for one thread, for all
  int64_t weights() const {
    int64_t sum = 0;
    for (const Block& b : blocks) sum += pools() ? 0 : weights(b);
    return sum;
  }
  bool pools() const { return kind == MAX_POOL || kind == AVERAGE_POOL; }
  int64_t weights(const Block& b) const { return b.rows * b.count * points(); }
  // sums of products, and how many products of a channel each has
  int64_t points() const { return kind == WINOGRAD ? POINTS : 1; }
  int64_t taps() const { return kind == WINOGRAD ? kernel[1] : kernel[0] * kernel[1]; }
  int64_t reach(int axis) const { return (kernel[axis] - 1) * dilation[axis]; }
};

// The last layers, those that all have more weights than pixels, are late: a thread computes each for
// several images before the next one, so that it reads the weights once for all of them.
struct Program {
  std::vector<Value> values;
  std::vector<Layer> layers;
  std::vector<int64_t> outputs;
  std::vector<float> no_bias, zeros;  // zeros: a row
  int64_t late;               // the first late layer
  int64_t early_arena = 0, late_arena = 0;  // floats for values, the late ones for one image
  int64_t early_scratch = 0, late_scratch = 0;
  int64_t floats() const {
    return early_arena + TOGETHER * late_arena + std::max(early_scratch, TOGETHER * late_scratch);
  }
};

// Reads the numbers of a plan one after the other, and no further.
class Reader {
 public:
  explicit Reader(c10::ArrayRef<int64_t> numbers) : left_(numbers) {}

  c10::ArrayRef<int64_t> next(int64_t count) {
    TORCH_CHECK(count >= 0 && count <= static_cast<int64_t>(left_.size()),
                "group_conv2d: the plan ends too early");
    const auto found = left_.slice(0, count);
    left_ = left_.slice(count);
    return found;
  }
  bool done() const { return left_.empty(); }

 private:
  c10::ArrayRef<int64_t> left_;
};

inline void read_groups(Layer& l, const Value& source, int64_t groups, int64_t filters,
                        Reader& plan, int64_t& weights) {
  const auto sizes = plan.next(2 * groups);
  l.filters = plan.next(filters).vec();
  std::vector<bool> written(filters, false);
  for (const int64_t o : l.filters) {
    TORCH_CHECK(o >= 0 && o < filters && !written[o], "group_conv2d: filter ", o,
                " is out of range or written twice");
    written[o] = true;
  }
  int64_t first = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t count = sizes[2 * g], reads = sizes[2 * g + 1];
    TORCH_CHECK(count >= 0 && count <= filters - first, "group_conv2d: group ", g,
                " is larger than the plan");
    const auto inputs = plan.next(reads);
    const int64_t start = static_cast<int64_t>(l.inputs.size());
    l.inputs.insert(l.inputs.end(), inputs.begin(), inputs.end());
    const int64_t blocks = (count + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t b = 0, at = first; b < blocks; ++b) {
      const int64_t rows = count / blocks + (b < count % blocks ? 1 : 0);
      l.blocks.push_back({rows, at, weights, reads * l.taps(), start * l.taps()});
      at += rows, weights += l.weights(l.blocks.back());
    }
    first += count;
  }
  TORCH_CHECK(first == filters, "group_conv2d: the plan has more filters than its groups");
  std::vector<int64_t> place(source.channels, -1);
  for (const int64_t c : l.inputs) {
    TORCH_CHECK(c >= 0 && c < source.channels, "group_conv2d: input channel ", c,
                " is out of range");
    place[c] = 0;
  }
  for (int64_t c = 0; c < source.channels; ++c)
    if (place[c] == 0) place[c] = static_cast<int64_t>(l.used.size()), l.used.push_back(c);
  for (int64_t& c : l.inputs) c = place[c];
}

// Every channel is a block of its own.
inline void pool_channels(Layer& l, int64_t channels) {
  l.used.resize(channels);
  std::iota(l.used.begin(), l.used.end(), 0);
  l.filters = l.inputs = l.used;
  for (int64_t c = 0; c < channels; ++c) l.blocks.push_back({1, c, 0, l.taps(), c * l.taps()});
}

// A layer and the value that it computes, which is appended; all that a plan claims is checked.
inline void read_layer(Program& p, c10::ArrayRef<int64_t> numbers, Reader& plan, int64_t& weights,
                       int64_t& biases) {
  Layer l;
  TORCH_CHECK(numbers[0] >= CONVOLUTION && numbers[0] <= AVERAGE_POOL,
              "group_conv2d: unknown kind of layer ", numbers[0]);
  l.kind = static_cast<Kind>(numbers[0]);
  l.source = numbers[1], l.residual = numbers[2], l.result = p.values.size();
  const int64_t groups = numbers[3];
  int64_t filters = numbers[4];
  TORCH_CHECK(l.source >= 0 && l.source < l.result && l.residual >= -1 && l.residual < l.result &&
                  groups >= 0 && filters >= 0,
              "group_conv2d: a layer reads what is not there");
  const Value source = p.values[l.source];
  const int64_t size[2] = {source.height, source.width};
  int64_t out[2];
  for (int axis = 0; axis < 2; ++axis) {
    l.kernel[axis] = numbers[5 + axis], l.stride[axis] = numbers[7 + axis];
    // an average of 0 pixels is one of all
    if (l.kind == AVERAGE_POOL && l.kernel[axis] == 0) l.kernel[axis] = size[axis];
    l.padding[axis] = numbers[9 + axis], l.dilation[axis] = numbers[11 + axis];
    TORCH_CHECK(l.kernel[axis] > 0 && l.stride[axis] > 0 && l.dilation[axis] > 0 &&
                    l.padding[axis] >= 0,
                "group_conv2d: a setting is out of range");
    const int64_t room = size[axis] + 2 * l.padding[axis] - l.reach(axis) - 1;
    TORCH_CHECK(room >= 0, "group_conv2d: the kernel is larger than the padded image");
    out[axis] = room / l.stride[axis] + 1;
  }
  TORCH_CHECK(l.kind != WINOGRAD || (l.kernel[0] == 3 && l.stride[0] == 1 && l.stride[1] == 1 &&
                                     l.dilation[0] == 1),
              "group_conv2d: Winograd's algorithm is for 3 rows of taps and strides of 1");
  l.activation = numbers[13];
  TORCH_CHECK(l.activation >= 0 && l.activation < ACTIVATIONS, "group_conv2d: unknown activation ",
              l.activation);
  l.bias = biases;
  if (l.pools()) {
    TORCH_CHECK(l.residual < 0 && l.activation == NONE, "group_conv2d: a pool only pools");
    filters = source.channels;
    pool_channels(l, filters);
  } else {
    biases += filters;
    read_groups(l, source, groups, filters, plan, weights);
  }
  if (l.residual >= 0) {
    const Value& residual = p.values[l.residual];
    TORCH_CHECK(residual.height == out[0] && residual.width == out[1],
                "group_conv2d: the residual must be of the size of the output");
    const auto added = plan.next(filters);  // by channel of the result; here by filter
    for (const int64_t c : added)
      TORCH_CHECK(c >= -1 && c < residual.channels, "group_conv2d: channel ", c,
                  " of the residual is out of range");
    for (const int64_t o : l.filters) l.added.push_back(added[o]);
  }
  p.values.push_back({Value::INSIDE, filters, out[0], out[1]});
  p.layers.push_back(std::move(l));
}

// Values inside get the zeros that those need who read them as they are, and rows as long as those who
// write them by strides have; all of a size the same, so that their pixels lie side by side.
inline void choose_zeros(Program& p) {
  std::map<std::pair<int64_t, int64_t>, std::array<int64_t, 2>> zeros;
  for (const Layer& l : p.layers) {
    const Value &from = p.values[l.source], &to = p.values[l.result];
    auto& most = zeros[{to.height, to.width}];
    if (l.stride[1] > 1) most[1] = std::max(most[1], l.reach(1) / l.stride[1]);
    const bool same = from.height == to.height && from.width == to.width;
    if (!same || l.kind != CONVOLUTION || l.stride[0] != 1 || l.stride[1] != 1) continue;
    for (int axis = 0; axis < 2; ++axis) most[axis] = std::max(most[axis], l.padding[axis]);
  }
  for (Value& v : p.values)
    if (v.place == Value::INSIDE)
      for (int axis = 0; axis < 2; ++axis) v.zeros[axis] = zeros[{v.height, v.width}][axis];
}

inline void find_late_layers(Program& p) {
  const auto pixels = [&](int64_t number) {
    const Value& v = p.values[number];
    return v.channels * v.height * v.width;
  };
  p.late = static_cast<int64_t>(p.layers.size());
  while (p.late > 0) {
    const Layer& l = p.layers[p.late - 1];
    if (l.weights() <= pixels(l.source) + pixels(l.result)) break;
    --p.late;
  }
  for (size_t i = p.late; i < p.layers.size(); ++i) {
    const Layer& l = p.layers[i];
    p.values[l.source].late = p.values[l.result].late = true;
    if (l.residual >= 0) p.values[l.residual].late = true;
  }
}

// Gives every value inside a place in the arena for as long as it is read. A place is used for
// values of one size only: its zeros stay what they are.
inline void choose_places(Program& p) {
  struct Slot {
    int64_t height, width, free_from, channels;
    bool late;
    std::vector<int64_t> values;
  };
  std::vector<int64_t> last(p.values.size(), -1);
  for (int64_t i = 0; i < static_cast<int64_t>(p.layers.size()); ++i) {
    const Layer& l = p.layers[i];
    last[l.source] = last[l.result] = i;
    if (l.residual >= 0) last[l.residual] = i;
  }
  std::vector<Slot> slots;
  for (int64_t i = 0; i < static_cast<int64_t>(p.layers.size()); ++i) {
    const int64_t number = p.layers[i].result;
    const Value& v = p.values[number];
    if (v.place != Value::INSIDE) continue;
    auto slot = std::find_if(slots.begin(), slots.end(), [&](const Slot& s) {
      return s.height == v.height && s.width == v.width && s.late == v.late && s.free_from < i;
    });
    if (slot == slots.end()) slot = slots.insert(slot, {v.height, v.width, 0, 0, v.late, {}});
    slot->free_from = last[number];
    slot->channels = std::max(slot->channels, v.channels);
    slot->values.push_back(number);
  }
  for (const Slot& slot : slots) {
    const Value& like = p.values[slot.values[0]];
    int64_t& end = slot.late ? p.late_arena : p.early_arena;
    for (const int64_t number : slot.values) p.values[number].at = end + like.before();
    const int64_t floats = like.before() + slot.channels * like.plane() + like.behind();
    end += (floats + LINE - 1) / LINE * LINE;
  }
}

inline bool is_in_place(const Layer& l, const Value& from, const Value& to, int64_t row) {
  if (l.stride[0] != 1 || l.stride[1] != 1 || from.row() != row || row < to.width) return false;
  const int64_t size[2] = {from.height, from.width}, out[2] = {to.height, to.width};
  for (int axis = 0; axis < 2; ++axis) {
    if (l.kind == MAX_POOL && l.padding[axis] != 0) return false;  // zeros are not what it pads
    const int64_t behind = out[axis] - 1 + l.reach(axis) - l.padding[axis] - (size[axis] - 1);
    if (l.padding[axis] > from.zeros[axis] || behind > from.zeros[axis]) return false;
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
    const int64_t behind = tile.at + vectors * LANES;
    tile.to = first * row + tile.at;
    tile.direct = to.row() == row && behind <= limit &&
        (residual == nullptr ||
         (residual->row() == row && (residual->place == Value::INSIDE || behind <= pixels)));
    for (int64_t at = tile.at; at < end;) {
      const int64_t y = at / row, until = std::min(end, y * row + to.width);
      if (at < until) tile.segments.push_back({at - tile.at, until - at, first + y, at - y * row});
      at = (y + 1) * row;
    }
    if (tile.direct && (row != to.width || behind > pixels)) {
      tile.mask = static_cast<int64_t>(cut.masks.size());
      for (int64_t at = tile.at; at < behind; ++at)
        cut.masks.push_back(at < pixels && at % row < to.width ? ALL_BITS : 0.f);
    }
    tiles.push_back(std::move(tile));
  }
  return tiles;
}

inline void choose_frame(const Layer& l, const Value& from, const Value& to, Cut& cut) {
  for (int axis = 0; axis < 2; ++axis)
    cut.frame.phases[axis] = std::min(l.reach(axis) + 1, l.stride[axis]);
  // where nothing is skipped, what is padded behind a row is what is padded before the next
  const int64_t needed = l.stride[1] == 1 && l.padding[1] <= l.reach(1)
      ? std::max(to.width, from.width + l.padding[1])
      : to.width + l.reach(1) / l.stride[1];
  cut.frame.width = to.place == Value::INSIDE ? std::max(needed, to.row()) : needed;
  cut.row = cut.frame.width;
}

// Cuts the blocks of a layer into parts of about as much work each; where they begin and end.
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

inline Cut cut_for(const Program& p, const Layer& l, int64_t threads) {
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

// Where the taps of all lists lie, from the pixel of the output.
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

// Args: given: channels, height and width of every value that is given; layers: LAYER_NUMBERS
// each: kind, source, residual or -1, groups, filters, kernel, stride, padding, dilation, activation.
// Values are counted from the given ones on. Plan: the rows of a block for which the weights are
// packed; then for each convolution the sizes of its groups, filters and inputs, its filters' channels,
// its groups' inputs, and for every channel of the result that of the residual or -1.
inline Program read_program(const std::vector<std::array<int64_t, 3>>& given,
                            c10::ArrayRef<int64_t> layers, c10::ArrayRef<int64_t> outputs,
                            c10::ArrayRef<int64_t> numbers, int64_t weights_given,
                            int64_t biases_given, int64_t threads) {
  Program p;
  for (const auto& [channels, height, width] : given)
    p.values.push_back({Value::GIVEN, channels, height, width});
  TORCH_CHECK(layers.size() % LAYER_NUMBERS == 0, "group_conv2d: ", LAYER_NUMBERS,
              " numbers are needed for a layer");
  Reader plan(numbers), settings(layers);
  const int64_t rows = plan.next(1)[0];
  TORCH_CHECK(rows == MOST_ROWS, "group_conv2d: the weight is packed in blocks of ", rows,
              " filters, this build takes ", MOST_ROWS);
  int64_t weights = 0, biases = 0;
  while (!settings.done())
    read_layer(p, settings.next(LAYER_NUMBERS), plan, weights, biases);
  TORCH_CHECK(plan.done(), "group_conv2d: the plan has more than its layers use");
  TORCH_CHECK(weights == weights_given, "group_conv2d: the plan needs ", weights,
              " weights, there are ", weights_given);
  if (biases_given < 0) p.no_bias.resize(biases);
  TORCH_CHECK(biases_given < 0 || biases == biases_given, "group_conv2d: the plan needs ",
              biases, " biases, there are ", biases_given);
  for (const int64_t number : outputs) {
    TORCH_CHECK(number >= static_cast<int64_t>(given.size()) &&
                    number < static_cast<int64_t>(p.values.size()) &&
                    p.values[number].place == Value::INSIDE,
                "group_conv2d: output ", number, " is no layer's, or returned twice");
    p.values[number].place = Value::RETURNED;
    p.outputs.push_back(number);
  }
  for (const Value& v : p.values)
    p.zeros.resize(std::max<size_t>(p.zeros.size(), v.width));
  choose_zeros(p);
  find_late_layers(p);
  choose_places(p);
  for (Layer& l : p.layers) {
    l.alone = cut_for(p, l, 1);
    l.together = cut_for(p, l, threads);
    finish_cut(p, l, l.alone);
    finish_cut(p, l, l.together);
  }
  return p;
}

}  // namespace dspfx
