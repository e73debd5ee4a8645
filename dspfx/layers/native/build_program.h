// Program construction: parse indices and layers, plan tiling and memory for given image sizes.

#pragma once

#include "tiling.h"
#include "arena.h"
#include "parse.h"

namespace dspfx {

// Inserts a layer that converts a value between words and fp32; its result is the next value.
inline void convert(Program& p, Kind kind, int64_t source, int64_t number,
                    std::vector<Layer>::iterator before) {
  const Value from = p.values[source];
  Layer l{kind, number, p.per_word, source, -1, static_cast<int64_t>(p.values.size()),
          {1, 1}, {1, 1}, {0, 0}, {1, 1}, NONE, 0};
  const Value inside = p.inside(from.channels, from.height, from.width);
  pool_planes(l, inside.planes);
  p.layers.insert(before, std::move(l));
  if (kind == PACK) p.values.push_back(inside);
  else p.values.push_back({Value::RETURNED, from.channels, from.height, from.width, from.channels});
}

// The number of the value that is returned for an inner one.
inline int64_t return_value(Program& p, int64_t number) {
  if (p.per_word == 1) {
    p.values[number].place = Value::RETURNED;
    return number;
  }
  const auto writer = std::find_if(p.layers.begin(), p.layers.end(),
                                   [number](const Layer& l) { return l.result == number; });
  convert(p, UNPACK, number, writer->number, writer + 1);
  return static_cast<int64_t>(p.values.size()) - 1;
}

// given: channels, height and width of every input of the run; values are numbered from these on.
// layers: LAYER_NUMBERS each: kind, source, residual or -1, groups, filters, kernel, stride, padding,
//   dilation, activation.
// numbers (the indices): how many filters a packed block of weights has; then for each convolution
//   1. the channels of its input,
//   2. the size of each group: its filters and inputs,
//   3. the output channel of every filter, and the input channels of every group, or words of them
//      where a word has several,
//   4. if there is a residual, its channels, and for every output channel that of the residual or -1.
inline Program read_program(const std::vector<std::array<int64_t, 3>>& given,
                            c10::ArrayRef<int64_t> layers, c10::ArrayRef<int64_t> outputs,
                            c10::ArrayRef<int64_t> numbers, int64_t weights_given,
                            int64_t biases_given, int64_t per_word, int64_t threads) {
  Program p{per_word};
  for (const auto& [channels, height, width] : given) {
    p.described.push_back(p.values.size());
    p.values.push_back({Value::GIVEN, channels, height, width, channels});
  }
  if (per_word > 1)
    for (int64_t& number : p.described) {
      number = p.values.size();
      convert(p, PACK, number - given.size(), 0, p.layers.end());
    }
  TORCH_CHECK(layers.size() % LAYER_NUMBERS == 0, "group_conv2d: ", LAYER_NUMBERS,
              " numbers are needed for a layer");
  Reader indices(numbers), settings(layers);
  const int64_t rows = indices.next(1)[0];
  TORCH_CHECK(rows == MOST_ROWS, "group_conv2d: the weight is packed in blocks of ", rows,
              " filters, this build takes ", MOST_ROWS);
  int64_t weights = 0, biases = 0;
  for (int64_t number = 0; !settings.done(); ++number)
    read_layer(p, settings.next(LAYER_NUMBERS), number, indices, weights, biases);
  TORCH_CHECK(indices.done(), "group_conv2d: the indices have more than its layers use");
  TORCH_CHECK(weights == weights_given, "group_conv2d: the indices need ", weights,
              " weights, there are ", weights_given);
  if (biases_given < 0) p.no_bias.resize(biases);
  TORCH_CHECK(biases_given < 0 || biases == biases_given, "group_conv2d: the indices need ",
              biases, " biases, there are ", biases_given);
  std::vector<bool> returned(p.described.size(), false);
  for (const int64_t number : outputs) {
    TORCH_CHECK(number >= static_cast<int64_t>(given.size()) &&
                    number < static_cast<int64_t>(p.described.size()) && !returned[number],
                "group_conv2d: output ", number, " is no layer's, or returned twice");
    returned[number] = true;
    p.outputs.push_back(return_value(p, p.described[number]));
  }
  for (const Value& v : p.values)
    p.zeros.resize(std::max<size_t>(p.zeros.size(), v.width));
  choose_zeros(p);
  find_late_layers(p);
  assign_slots(p);
  for (Layer& l : p.layers) {
    l.alone = cut_for(p, l, 1);
    l.together = cut_for(p, l, threads);
    finish_cut(p, l, l.alone);
    finish_cut(p, l, l.together);
  }
  return p;
}

}  // namespace dspfx
