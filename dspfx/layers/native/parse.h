// Parses and validates indices: damaged ones raise, and nothing is read out of bounds.

#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <numeric>

#include "program.h"

namespace dspfx {

// Reads numbers one after the other, never past the end.
class Reader {
 public:
  explicit Reader(c10::ArrayRef<int64_t> numbers) : left_(numbers) {}

  c10::ArrayRef<int64_t> next(int64_t count) {
    TORCH_CHECK(count >= 0 && count <= static_cast<int64_t>(left_.size()),
                "group_conv2d: the indices end too early");
    const auto found = left_.slice(0, count);
    left_ = left_.slice(count);
    return found;
  }
  bool done() const { return left_.empty(); }

 private:
  c10::ArrayRef<int64_t> left_;
};

inline void read_groups(Layer& l, const Value& source, int64_t groups, int64_t filters,
                        Reader& indices, int64_t& weights) {
  const int64_t channels = indices.next(1)[0];
  TORCH_CHECK(source.channels == channels, "group_conv2d: expected an input of ", channels,
              " channels, got ", source.channels);
  const auto sizes = indices.next(2 * groups);
  l.filters = indices.next(filters).vec();
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
                " is larger than the indices");
    const auto inputs = indices.next(reads);
    const int64_t start = static_cast<int64_t>(l.inputs.size());
    l.inputs.insert(l.inputs.end(), inputs.begin(), inputs.end());
    const int64_t blocks = (count + MOST_ROWS - 1) / MOST_ROWS;
    const int64_t words = (count + l.per_word - 1) / l.per_word;
    for (int64_t b = 0, at = first; b < blocks; ++b) {
      const int64_t own = words / blocks + (b < words % blocks ? 1 : 0);
      const int64_t rows = std::min(own * l.per_word, first + count - at);
      l.blocks.push_back({rows, at, weights, reads * l.taps(), start * l.taps()});
      at += rows, weights += l.weights(l.blocks.back());
    }
    first += count;
  }
  TORCH_CHECK(first == filters, "group_conv2d: the indices have more filters than its groups");
  std::vector<int64_t> place(source.planes, -1);
  for (const int64_t c : l.inputs) {
    TORCH_CHECK(c >= 0 && c < source.planes, "group_conv2d: input channel ", c,
                " is out of range");
    place[c] = 0;
  }
  for (int64_t c = 0; c < source.planes; ++c)
    if (place[c] == 0) place[c] = static_cast<int64_t>(l.used.size()), l.used.push_back(c);
  for (int64_t& c : l.inputs) c = place[c];
}

// Every plane is a block of its own.
inline void pool_planes(Layer& l, int64_t planes) {
  l.used.resize(planes);
  std::iota(l.used.begin(), l.used.end(), 0);
  l.filters = l.inputs = l.used;
  for (int64_t c = 0; c < planes; ++c) l.blocks.push_back({1, c, 0, l.taps(), c * l.taps()});
}

// Parses a layer, and appends it and its result; every number is validated.
inline void read_layer(Program& p, c10::ArrayRef<int64_t> numbers, int64_t number, Reader& indices,
                       int64_t& weights, int64_t& biases) {
  Layer l;
  TORCH_CHECK(numbers[0] >= CONVOLUTION && numbers[0] <= AVERAGE_POOL,
              "group_conv2d: unknown kind of layer ", numbers[0]);
  l.kind = static_cast<Kind>(numbers[0]);
  l.per_word = p.per_word, l.number = number;
  const int64_t groups = numbers[3];
  int64_t filters = numbers[4];
  const int64_t known = p.described.size();
  TORCH_CHECK(numbers[1] >= 0 && numbers[1] < known && numbers[2] >= -1 && numbers[2] < known &&
                  groups >= 0 && filters >= 0,
              "group_conv2d: a layer reads what is not there");
  l.source = p.described[numbers[1]], l.residual = numbers[2] < 0 ? -1 : p.described[numbers[2]];
  l.result = p.values.size();
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
  TORCH_CHECK(l.kind != WINOGRAD || (p.per_word == 1 && l.kernel[0] == 3 && l.stride[0] == 1 && l.stride[1] == 1 &&
                                     l.dilation[0] == 1),
              "group_conv2d: Winograd's algorithm is for 3 rows of taps and strides of 1, in fp32");
  l.activation = numbers[13];
  TORCH_CHECK(l.activation >= 0 && l.activation < ACTIVATIONS, "group_conv2d: unknown activation ",
              l.activation);
  l.bias = biases;
  if (l.pools()) {
    TORCH_CHECK(l.residual < 0 && l.activation == NONE, "group_conv2d: a pool only pools");
    filters = source.channels;
    pool_planes(l, source.planes);
  } else {
    biases += filters;
    read_groups(l, source, groups, filters, indices, weights);
  }
  if (l.residual >= 0) {
    const Value& residual = p.values[l.residual];
    TORCH_CHECK(residual.height == out[0] && residual.width == out[1],
                "group_conv2d: the residual must be of the size of the output");
    const int64_t channels = indices.next(1)[0];
    TORCH_CHECK(residual.channels == channels, "group_conv2d: expected a residual of ", channels,
                " channels, got ", residual.channels);
    const auto added = indices.next(filters);  // by channel of the result; here by filter
    for (const int64_t c : added)
      TORCH_CHECK(c >= -1 && c < residual.channels, "group_conv2d: channel ", c,
                  " of the residual is out of range");
    for (const int64_t o : l.filters) l.added.push_back(added[o]);
  }
  p.described.push_back(l.result);
  p.values.push_back(p.inside(filters, out[0], out[1]));
  p.layers.push_back(std::move(l));
}

}  // namespace dspfx
