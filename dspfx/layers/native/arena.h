// Static memory planning: the place of every value in the arena, by liveness, and its zero padding.

#pragma once

#include <algorithm>
#include <map>

#include "program.h"

namespace dspfx {

// Intermediate values get the zero padding that layers need which read them in place, and the row
// length that strided writers have; all values of one size get the same, so that their pixels align.
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
    return v.planes * v.height * v.width;
  };
  p.late = static_cast<int64_t>(p.layers.size());
  while (p.late > 0) {
    const Layer& l = p.layers[p.late - 1];
    if (l.convolves() && l.weights() <= pixels(l.source) + pixels(l.result)) break;
    --p.late;
  }
  for (size_t i = p.late; i < p.layers.size(); ++i) {
    const Layer& l = p.layers[i];
    p.values[l.source].late = p.values[l.result].late = true;
    if (l.residual >= 0) p.values[l.residual].late = true;
  }
}

// Gives every intermediate value a slot in the arena until its last read. A slot is reused for values
// of the same size only: so its padding stays zero.
inline void assign_slots(Program& p) {
  struct Slot {
    int64_t height, width, free_from, planes;
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
    slot->planes = std::max(slot->planes, v.planes);
    slot->values.push_back(number);
  }
  for (const Slot& slot : slots) {
    const Value& like = p.values[slot.values[0]];
    int64_t& end = slot.late ? p.late_arena : p.early_arena;
    for (const int64_t number : slot.values) p.values[number].at = end + like.before();
    const int64_t floats = like.before() + slot.planes * like.plane() + like.after();
    end += (floats + LINE - 1) / LINE * LINE;
  }
}

}  // namespace dspfx
