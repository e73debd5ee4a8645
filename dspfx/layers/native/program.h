// The program of a run: values, layers, and the tiling of each layer.

#pragma once

#include <array>
#include <vector>

#include "winograd.h"

namespace dspfx {

constexpr int64_t TOGETHER = 4;        // images, in late layers
constexpr int64_t LAYER_NUMBERS = 14;  // that describe a layer

// The last two convert values of fp32 that are given or returned: they are in no description.
enum Kind : int64_t {
  CONVOLUTION = 0, MAX_POOL = 1, WINOGRAD = 2, AVERAGE_POOL = 3, PACK = 4, UNPACK = 5
};

// A value: an input, an output, or an image between layers.
struct Value {
  enum Place { GIVEN, INSIDE, RETURNED } place;
  int64_t channels, height, width;
  int64_t planes;             // of words
  int64_t zeros[2] = {0, 0};  // rows before a plane, pixels after a row
  int64_t at = 0;             // of pixel 0 of channel 0, in the arena
  bool late = false;          // read or written by late layers: one for each image of a batch
  int64_t row() const { return width + zeros[1]; }
  int64_t plane() const { return (height + zeros[0]) * row(); }
  int64_t before() const { return zeros[0] * row() + zeros[1]; }
  int64_t after() const { return before() + MOST_VECTORS * LANES; }
};

// Some filters of one group.
struct Block {
  int64_t rows, filter;   // and the place of the first among all filters of the layer
  int64_t weight, count;  // its weights' place, and how many for each filter and sum
  int64_t list;           // place of its offsets
};

// The padded frame into which a strip is copied.
struct Frame {
  int64_t phases[2];      // of each axis that any tap needs
  int64_t height, width;  // of one phase of one channel
  int64_t channel() const { return phases[0] * phases[1] * height * width; }
};

// Tiling: strips of rows, and shares of the blocks of filters, at `splits`, if strips are too few.
struct Cut {
  int64_t rows, strips;
  std::vector<int64_t> splits;
  bool in_place;
  int64_t row;  // stride of the rows that are read
  Frame frame;
  std::vector<int64_t> offsets;
  // by strip and vectors in a tile
  std::vector<std::array<std::vector<Tile>, MOST_VECTORS + 1>> tiles;
  std::vector<float> masks;
  std::vector<std::vector<Spot>> spots;  // by strip, of Winograd's algorithm

  int64_t shares() const { return static_cast<int64_t>(splits.size()) - 1; }
  int64_t tasks() const { return strips * shares(); }
};

struct Layer {
  Kind kind;
  int64_t number;    // in the description; that of the layer for which this one converts
  int64_t per_word;  // channels in a word
  int64_t source, residual, result;  // values; residual: -1 for none
  int64_t kernel[2], stride[2], padding[2], dilation[2], activation;
  int64_t bias;
  std::vector<int64_t> filters, added;  // channels of the result; of the residual
  std::vector<int64_t> used, inputs;    // planes that are read; lists, as positions in `used`
  std::vector<Block> blocks;
  Cut alone, together;                  // for one thread, for all
  int64_t weights() const {
    int64_t sum = 0;
    for (const Block& b : blocks) sum += convolves() ? weights(b) : 0;
    return sum;
  }
  bool pools() const { return kind == MAX_POOL || kind == AVERAGE_POOL; }
  bool convolves() const { return kind == CONVOLUTION || kind == WINOGRAD; }
  bool converts() const { return kind == PACK || kind == UNPACK; }
  bool averages_all_of(const Value& v) const {
    return kind == AVERAGE_POOL && kernel[0] == v.height && kernel[1] == v.width &&
           padding[0] == 0 && padding[1] == 0 && dilation[0] == 1 && dilation[1] == 1;
  }
  // in words
  int64_t weights(const Block& b) const { return b.rows * b.count * points(); }
  // sums of products, and how many products of a channel each has
  int64_t points() const { return kind == WINOGRAD ? POINTS : 1; }
  int64_t taps() const { return kind == WINOGRAD ? kernel[1] : kernel[0] * kernel[1]; }
  int64_t reach(int axis) const { return (kernel[axis] - 1) * dilation[axis]; }
};

// The last layers, those that all have more weights than pixels, or no weights, are late: a thread
// computes each for several images before the next one, so that it reads the weights once for all.
struct Program {
  int64_t per_word;                // channels in a word of values that lie inside
  std::vector<Value> values;
  std::vector<int64_t> described;  // the values that descriptions of layers number
  std::vector<Layer> layers;
  std::vector<int64_t> outputs;
  std::vector<float> no_bias, zeros;  // zeros: a row
  int64_t late;               // the first late layer
  int64_t early_arena = 0, late_arena = 0;  // floats for values, the late ones for one image
  int64_t early_scratch = 0, late_scratch = 0;
  Value inside(int64_t channels, int64_t height, int64_t width) const {
    return {Value::INSIDE, channels, height, width, (channels + per_word - 1) / per_word};
  }
  int64_t floats() const {
    return early_arena + TOGETHER * late_arena + std::max(early_scratch, TOGETHER * late_scratch);
  }
};

}  // namespace dspfx
