// Program construction: parse indices and layers, plan tiling and memory for given image sizes.

#pragma once

#include "tiling.h"
#include "arena.h"
#include "parse.h"

namespace dspfx {

// given: channels, height and width of every input of the run; values are numbered from these on.
// layers: LAYER_NUMBERS each: kind, source, residual or -1, groups, filters, kernel, stride, padding,
//   dilation, activation.
// numbers (the indices): how many filters a packed block of weights has; then for each convolution
//   1. the channels of its input,
//   2. the size of each group: its filters and inputs,
//   3. the output channel of every filter, and the input channels of every group,
//   4. if there is a residual, its channels, and for every output channel that of the residual or -1.
inline Program read_program(const std::vector<std::array<int64_t, 3>>& given,
                            c10::ArrayRef<int64_t> layers, c10::ArrayRef<int64_t> outputs,
                            c10::ArrayRef<int64_t> numbers, int64_t weights_given,
                            int64_t biases_given, int64_t threads) {
  Program p;
  for (const auto& [channels, height, width] : given)
    p.values.push_back({Value::GIVEN, channels, height, width});
  TORCH_CHECK(layers.size() % LAYER_NUMBERS == 0, "group_conv2d: ", LAYER_NUMBERS,
              " numbers are needed for a layer");
  Reader indices(numbers), settings(layers);
  const int64_t rows = indices.next(1)[0];
  TORCH_CHECK(rows == MOST_ROWS, "group_conv2d: the weight is packed in blocks of ", rows,
              " filters, this build takes ", MOST_ROWS);
  int64_t weights = 0, biases = 0;
  while (!settings.done())
    read_layer(p, settings.next(LAYER_NUMBERS), indices, weights, biases);
  TORCH_CHECK(indices.done(), "group_conv2d: the indices have more than its layers use");
  TORCH_CHECK(weights == weights_given, "group_conv2d: the indices need ", weights,
              " weights, there are ", weights_given);
  if (biases_given < 0) p.no_bias.resize(biases);
  TORCH_CHECK(biases_given < 0 || biases == biases_given, "group_conv2d: the indices need ",
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
