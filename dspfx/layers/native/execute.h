// Execution: a run takes one image after the other through all its layers, so that intermediate
// values stay in the cache. Threads compute images of their own; where there are too few images, they
// share every layer of one: a layer begins when all tasks of the one before are done.

#pragma once

#include <chrono>

#include "convert.h"
#include "kernels.h"
#include "padding.h"
#include "memory.h"
#include "build_program.h"
#include "helpers.h"

namespace dspfx {

// A program and the tensors that it works on.
struct Call {
  const Program& program;
  const float *weight, *weights_end, *bias;
  std::vector<const float*> given;           // by value
  std::vector<int64_t> strides;              // of images, by value
  std::vector<float*> returned;              // by value
  double* seconds = nullptr;                 // of the first thread's share, by layer, if wanted

  // Of image `image` of all, image `nth` of those in the arena.
  Planes<float> target(int64_t number, int64_t image, int64_t nth, float* arena) const {
    const Value& v = program.values[number];
    if (v.place == Value::INSIDE) {
      if (v.late) arena += program.early_arena + nth * program.late_arena;
      return {arena + v.at, v.plane(), v.row()};
    }
    return {returned[number] + image * strides[number], v.plane(), v.row()};
  }

  Planes<const float> source(int64_t number, int64_t image, int64_t nth, float* arena) const {
    const Value& v = program.values[number];
    if (v.place == Value::GIVEN)
      return {given[number] + image * strides[number], v.plane(), v.row()};
    const Planes<float> p = target(number, image, nth, arena);
    return {p.data, p.plane, p.row};
  }
};

// A strip of an image: its input pixels and its target.
struct Strip {
  const float* pixels;
  Target target;

  void aim_at(const Layer& l, const Block& block) {
    target.filter = l.filters.data() + block.filter;
    target.added = l.added.empty() ? nullptr : l.added.data() + block.filter;
  }
};

// Software prefetch: weights come from memory, and are used once; those of the next block are
// prefetched, some before each tile.
class Prefetch {
 public:
  Prefetch(const float* from, const float* until, int64_t tiles)
      : next_(from), last_(until), share_((until - from + tiles - 1) / tiles) {}

  void some() {
    for (const float* end = std::min(next_ + share_, last_); next_ < end; next_ += LINE)
      __builtin_prefetch(next_);
  }

 private:
  const float *next_, *last_;
  int64_t share_;
};

constexpr int64_t BLOCKS_TOGETHER = 8, PART = 128, A_LONG_LIST = 32;

template <typename W>
const OfRows<Compute>& kernels(const Layer& l, const Block& block) {
  if (l.kind == MAX_POOL) return Kernels<W>::MAXIMUM;
  return l.kind == AVERAGE_POOL ? Kernels<W>::AVERAGE : Kernels<W>::CONVOLUTION[block.rows];
}

inline const OfRows<Compute>& kernels(const Layer& l, const Block& block) {
  return l.per_word == 1 ? kernels<Fp32>(l, block) : kernels<Bf16>(l, block);
}

// Blocks of filters that read the same pixels, tile by tile and chunk by chunk of the sum: so the
// pixels of a tile are in the L1 cache for all blocks but the first.
inline void compute_tiles(const Layer& l, const Cut& cut, const Block* blocks, int64_t number,
                   const std::vector<Tile>& tiles, const float* weights, Strip& strip,
                   Prefetch& prefetch) {
  alignas(64) float sums[BLOCKS_TOGETHER][MOST_ROWS * MOST_VECTORS * LANES];
  const int64_t count = blocks->count, part = l.pools() ? count : PART;
  for (const Tile& tile : tiles) {
    prefetch.some();
    for (int64_t k = 0; k == 0 || k < count; k += part)
      for (int64_t b = 0; b < number; ++b) {
        const Block& block = blocks[b];
        strip.aim_at(l, block);
        kernels(l, block)[tile.vectors](
            weights + block.weight + k * block.rows, cut.offsets.data() + block.list + k,
            std::min(part, count - k), strip.pixels + tile.at, tile, strip.target,
            {k == 0, k + part >= count, sums[b]});
      }
  }
}

// How many blocks from `first` on are computed together: those that read the same long list.
inline int64_t together(const Block* first, const Block* end) {
  const auto alike = [first](const Block& b) {
    return b.list == first->list && vectors_for(b.rows) == vectors_for(first->rows);
  };
  const int64_t most = first->count > A_LONG_LIST ? std::min(BLOCKS_TOGETHER, end - first) : 1;
  int64_t number = 1;
  while (number < most && alike(first[number])) ++number;
  return number;
}

// Some blocks of filters for all pixels of the strips with number `number`, of several images.
inline void compute_direct(const Call& call, const Layer& l, const Cut& cut, int64_t number,
                    Strip* strips, int64_t images, int64_t from, int64_t until) {
  for (int64_t b = from, now = 0; b < until; b += now) {
    const Block* blocks = &l.blocks[b];
    now = together(blocks, l.blocks.data() + until);
    const Block& last = blocks[now - 1];
    const float* next = call.weight + last.weight + l.weights(last);
    const std::vector<Tile>& tiles = cut.tiles[number][vectors_for(blocks->rows)];
    Prefetch prefetch(next, std::min(next + l.weights(last) * now, call.weights_end),
                      std::max<int64_t>(1, tiles.size() * images));
    for (Strip* strip = strips; strip < strips + images; ++strip)
      compute_tiles(l, cut, blocks, now, tiles, call.weight, *strip, prefetch);
  }
}

// The same with Winograd's algorithm.
inline void compute_winograd(const Call& call, const Layer& l, const Cut& cut, int64_t number,
                      Strip* strips, int64_t images, int64_t from, int64_t until) {
  std::vector<BandVector> vectors;
  for (int64_t i = 0; i < images; ++i)
    for (const Spot& spot : cut.spots[number])
      vectors.push_back({strips[i].pixels + spot.at, &spot, &strips[i].target});
  for (int64_t b = from; b < until; ++b) {
    const Block& block = l.blocks[b];
    for (int64_t i = 0; i < images; ++i) strips[i].aim_at(l, block);
    compute_bands(call.weight + block.weight, cut.offsets.data() + block.list, block.count,
                  block.rows, cut.frame.height * cut.frame.width, vectors.data(), vectors.size(),
                  call.program.values[l.result].height);
  }
}

// What works on whole planes: conversions and averages of all pixels.
inline void compute_planes(const Layer& l, const Value& size, const Planes<const float>& x,
                           const Planes<float>& y, int64_t from, int64_t until) {
  if (l.kind == PACK) return pack<Bf16>(size, x, y, from, until);
  if (l.kind == UNPACK) return unpack<Bf16>(size, x, y, from, until);
  const auto average = l.per_word == 1 ? average_all<Fp32> : average_all<Bf16>;
  average(size.height, size.width, x, y, from, until);
}

// One task of a layer, a strip or a share of its filters, for images from `image` on, at most
// TOGETHER, of which the first is the `nth` in the arena.
inline void compute_task(const Call& call, const Layer& l, const Cut& cut, int64_t image, int64_t nth,
                   int64_t images, float* arena, float* scratch, int64_t task) {
  const Program& p = call.program;
  const int64_t number = task / cut.shares(), share = task % cut.shares();
  const int64_t first = number * cut.rows, from = cut.splits[share], until = cut.splits[share + 1];
  const Value& size = p.values[l.source];
  if (l.converts() || l.averages_all_of(size)) {
    for (int64_t i = 0; i < images; ++i)
      compute_planes(l, size, call.source(l.source, image + i, nth + i, arena),
                     call.target(l.result, image + i, nth + i, arena), from, until);
    return;
  }
  Strip strips[TOGETHER];
  for (int64_t i = 0; i < images; ++i) {
    const Planes<const float> source = call.source(l.source, image + i, nth + i, arena);
    float* frame = scratch + i * p.late_scratch;
    strips[i].pixels = cut.in_place ? source.data + first * cut.row : frame;
    if (l.kind == WINOGRAD) fill_bands(l, cut, size, source, first, p.zeros.data(), frame);
    else if (!cut.in_place) fill(l, cut, size, source, first, frame);
    Target& target = strips[i].target;
    target.bias = call.bias + l.bias;
    target.channels = p.values[l.result].channels;
    target.activation = l.activation;
    target.y = call.target(l.result, image + i, nth + i, arena);
    target.residual = {};
    if (l.residual >= 0) target.residual = call.source(l.residual, image + i, nth + i, arena);
    target.masks = cut.masks.data();
  }
  const auto compute = l.kind == WINOGRAD ? compute_winograd : compute_direct;
  compute(call, l, cut, number, strips, images, from, until);
}

// All of a layer, by one thread.
inline void compute_layer(const Call& call, const Layer& l, int64_t image, int64_t nth,
                   int64_t images, float* arena, float* scratch) {
  for (int64_t task = 0; task < l.alone.tasks(); ++task)
    compute_task(call, l, l.alone, image, nth, images, arena, scratch, task);
}

// Adds the time until it is destroyed to a layer's, for what belongs to the first thread.
class Stopwatch {
 public:
  Stopwatch(const Call& call, const Layer& l, int64_t member)
      : to_(call.seconds == nullptr || member != 0
                ? nullptr
                : call.seconds + l.number) {
    if (to_ != nullptr) started_ = std::chrono::steady_clock::now();
  }
  ~Stopwatch() {
    if (to_ == nullptr) return;
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started_;
#pragma omp atomic
    *to_ += took.count();
  }

 private:
  double* to_;
  std::chrono::steady_clock::time_point started_;
};

// All layers for images from `image` on, at most TOGETHER, which are `member`'s.
inline void run_alone(const Call& call, int64_t image, int64_t images, float* arena, float* scratch,
               int64_t member) {
  const Program& p = call.program;
  for (int64_t i = 0; i < images; ++i)
    for (auto l = p.layers.begin(); l < p.layers.begin() + p.late; ++l) {
      const Stopwatch watch(call, *l, member);
      compute_layer(call, *l, image + i, i, 1, arena, scratch);
    }
  for (auto l = p.layers.begin() + p.late; l < p.layers.end(); ++l) {
    const Stopwatch watch(call, *l, member);
    compute_layer(call, *l, image, 0, images, arena, scratch);
  }
}

// Step 0 is of images of one's own, a few in a task; then each layer of each image left is a step.
inline void run(const Call& call, Arenas& arenas, int64_t images, int64_t threads) {
  const Program& p = call.program;
  const int64_t values = p.early_arena + TOGETHER * p.late_arena;
  const int64_t own = images / threads, parts = (own + TOGETHER - 1) / TOGETHER;
  const int64_t layers = static_cast<int64_t>(p.layers.size());
  std::vector<Arenas::Block> arena;
  for (int64_t i = 0; i < threads; ++i) arena.push_back(arenas.take(p.floats()));
  std::vector<int64_t> counts{threads * parts};
  for (int64_t n = own * threads; n < images; ++n)
    for (const Layer& l : p.layers) counts.push_back(l.together.tasks());
  const auto compute = [&](int64_t step, int64_t task, int64_t me) {
    float* scratch = arena[me].get() + values;
    if (step > 0) {
      const Layer& l = p.layers[(step - 1) % layers];
      compute_task(call, l, l.together, own * threads + (step - 1) / layers, 0, 1, arena[0].get(),
                   scratch, task);
      return;
    }
    const int64_t first = task % threads * own, part = task / threads * TOGETHER;
    run_alone(call, first + part, std::min(TOGETHER, own - part), arena[me].get(), scratch,
              task % threads);
  };
  const auto team = std::make_shared<Team>(threads, counts, std::cref(compute));
  if (threads > 1) Helpers::instance().ask(team);
  team->do_step(0, 0);
  for (int64_t step = 1; step < team->steps(); ++step) {
    const Stopwatch watch(call, p.layers[(step - 1) % layers], 0);
    team->do_step(step, 0);
  }
  for (auto& block : arena) arenas.give(std::move(block));
}

}  // namespace dspfx
