// Convolutions whose groups of filters read their own lists of channels, one or a run of them.
//
// A run takes one image after the other through all its layers, so that what is between them stays
// in the cache. Threads take images of their own; where there are too few, they share every layer
// of one, and wait for each other before the next.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <sstream>
#include <string>
#include <thread>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "memory.h"
#include "program.h"

namespace dspfx {
namespace {

// Rows are short: whole vectors, the last one stepping back, beat a call of memcpy.
inline void copy(float* to, const float* from, int64_t count) {
  if (count < LANES) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + LANES <= count; i += LANES) Vec::loadu(from + i).store(to + i);
  Vec::loadu(from + count - LANES).store(to + count - LANES);
}

// Every `step`-th pixel.
inline void copy(float* to, const float* from, int64_t count, int64_t step) {
  if (step == 1) return copy(to, from, count);
  if (step == 2 && count > LANES) {
    const auto pairs = [](const float* p) {
      return at::vec::deinterleave2(Vec::loadu(p), Vec::loadu(p + LANES));
    };
    for (int64_t i = 0; i + LANES < count; i += LANES)
      std::get<0>(pairs(from + 2 * i)).store(to + i);
    // the last vector steps back, and by one more: it may not read past the last pixel
    const int64_t last = count - LANES;
    return std::get<1>(pairs(from + 2 * last - 1)).store(to + last);
  }
  for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
}

// Copies the rows that the output rows from `first` on need, padded where the image ends.
void fill(const Layer& l, const Cut& cut, const Value& size, Planes<const float> from,
          int64_t first, float* to) {
  const Frame& f = cut.frame;
  const int64_t step = l.stride[1];
  const float padding =
      l.kind == MAX_POOL ? -std::numeric_limits<float>::infinity() : 0.f;
  for (const int64_t channel : l.used) {
    const float* plane = from.data + channel * from.plane;
    for (int64_t py = 0; py < f.phases[0]; ++py) {
      for (int64_t px = 0; px < f.phases[1]; ++px) {
        // columns with 0 <= column * step + shift < width
        const int64_t shift = px - l.padding[1];
        const int64_t begin = std::clamp<int64_t>((-shift + step - 1) / step, 0, f.width);
        const int64_t end =
            std::clamp<int64_t>((size.width - shift + step - 1) / step, begin, f.width);
        // all of it first: rows are short, and so are their ends
        std::fill_n(to, f.height * f.width, padding);
        for (int64_t row = 0; row < f.height; ++row, to += f.width) {
          const int64_t y = (first + row) * l.stride[0] + py - l.padding[0];
          if (y >= 0 && y < size.height)
            copy(to + begin, plane + y * from.row + shift + begin * step, end - begin, step);
        }
      }
    }
  }
  std::fill_n(to, l.padding[1], padding);  // what the last row pads
}

// The same for Winograd's algorithm, of bands.
void fill_bands(const Layer& l, const Cut& cut, const Value& size, Planes<const float> from,
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

// Threads that take the same steps and wait for each other.
class Team {
 public:
  explicit Team(int64_t size) : size_(size) {}

  int64_t size() const { return size_; }

  void wait() {
    if (size_ == 1) return;
    const int64_t turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins)
      if (spins > PATIENCE) std::this_thread::yield();
  }

 private:
  static constexpr int64_t PATIENCE = 10000;
  const int64_t size_;
  std::atomic<int64_t> arrived_{0}, turn_{0};
};

// Calls `f(member, team)` in every thread of a team, which may be smaller than asked for.
template <typename F>
void in_parallel(int64_t threads, const F& f) {
#ifdef _OPENMP
  if (threads > 1) {
    std::optional<Team> team;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      team.emplace(omp_get_num_threads());
      f(omp_get_thread_num(), *team);
    }
    return;
  }
#endif
  Team alone(1);
  f(0, alone);
}

// A program and the tensors that it works on.
struct Call {
  const Program& program;
  const float *weight, *weights_end, *bias;
  std::vector<const float*> given;           // by value
  std::vector<int64_t> strides;              // of images, by value
  std::vector<float*> returned;              // by value
  double* seconds = nullptr;                 // of the first thread, by layer, if wanted

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

// A strip of an image: what it is computed from and written to.
struct Strip {
  const float* pixels;
  Target target;

  void aim_at(const Layer& l, const Block& block) {
    target.filter = l.filters.data() + block.filter;
    target.added = l.added.empty() ? nullptr : l.added.data() + block.filter;
  }
};

// Weights come from far away, and once only: those of the next block are asked for early, some before
// each tile.
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

constexpr int64_t BLOCKS_TOGETHER = 8, PART = 128;

const OfRows<Compute>& kernels(const Layer& l, const Block& block) {
  if (l.kind == MAX_POOL) return POOL<false>;
  return l.kind == AVERAGE_POOL ? POOL<true> : COMPUTE[block.rows];
}

// Blocks of filters that read the same pixels, tile by tile and part by part of the products: so the
// pixels of a tile come from the first cache for all blocks but one.
void compute_tiles(const Layer& l, const Cut& cut, const Block* blocks, int64_t number,
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
int64_t together(const Block* first, const Block* end) {
  const auto alike = [first](const Block& b) {
    return b.list == first->list && vectors_for(b.rows) == vectors_for(first->rows);
  };
  const int64_t most = first->count > PART ? std::min(BLOCKS_TOGETHER, end - first) : 1;
  int64_t number = 1;
  while (number < most && alike(first[number])) ++number;
  return number;
}

// Some blocks of filters for all pixels of the strips with number `number`, of several images.
void compute_direct(const Call& call, const Layer& l, const Cut& cut, int64_t number,
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

// The same by Winograd's algorithm.
void compute_winograd(const Call& call, const Layer& l, const Cut& cut, int64_t number,
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

// A member's share of a layer, for images from `image` on, at most TOGETHER, of which the first is
// the `nth` in the arena.
void compute_layer(const Call& call, const Layer& l, const Cut& cut, int64_t image, int64_t nth,
                   int64_t images, float* arena, float* scratch, int64_t member,
                   int64_t members) {
  const Program& p = call.program;
  const int64_t splits = static_cast<int64_t>(cut.splits.size()) - 1;
  for (int64_t task = member; task < cut.strips * splits; task += members) {
    const int64_t number = task / splits, split = task % splits;
    const int64_t first = number * cut.rows;
    Strip strips[TOGETHER];
    for (int64_t i = 0; i < images; ++i) {
      const Planes<const float> source = call.source(l.source, image + i, nth + i, arena);
      float* frame = scratch + i * p.late_scratch;
      strips[i].pixels = cut.in_place ? source.data + first * cut.row : frame;
      const Value& size = p.values[l.source];
      if (l.kind == WINOGRAD) fill_bands(l, cut, size, source, first, p.zeros.data(), frame);
      else if (!cut.in_place) fill(l, cut, size, source, first, frame);
      Target& target = strips[i].target;
      target.bias = call.bias + l.bias;
      target.activation = l.activation;
      target.y = call.target(l.result, image + i, nth + i, arena);
      target.residual = {};
      if (l.residual >= 0) target.residual = call.source(l.residual, image + i, nth + i, arena);
      target.masks = cut.masks.data();
    }
    const auto compute = l.kind == WINOGRAD ? compute_winograd : compute_direct;
    compute(call, l, cut, number, strips, images, cut.splits[split], cut.splits[split + 1]);
  }
}

// Adds the time until it is destroyed to a layer's, in the first thread.
class Stopwatch {
 public:
  Stopwatch(const Call& call, const Layer& l, int64_t member)
      : to_(call.seconds == nullptr || member != 0
                ? nullptr
                : call.seconds + (&l - call.program.layers.data())) {
    if (to_ != nullptr) started_ = std::chrono::steady_clock::now();
  }
  ~Stopwatch() {
    if (to_ == nullptr) return;
    *to_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count();
  }

 private:
  double* to_;
  std::chrono::steady_clock::time_point started_;
};

// All layers for images from `image` on, at most TOGETHER.
void run_alone(const Call& call, int64_t image, int64_t images, float* arena, float* scratch,
               int64_t member) {
  const Program& p = call.program;
  for (int64_t i = 0; i < images; ++i)
    for (auto l = p.layers.begin(); l < p.layers.begin() + p.late; ++l) {
      const Stopwatch watch(call, *l, member);
      compute_layer(call, *l, l->alone, image + i, i, 1, arena, scratch, 0, 1);
    }
  for (auto l = p.layers.begin() + p.late; l < p.layers.end(); ++l) {
    const Stopwatch watch(call, *l, member);
    compute_layer(call, *l, l->alone, image, 0, images, arena, scratch, 0, 1);
  }
}

void run(const Call& call, Arenas& arenas, int64_t images, int64_t threads) {
  const Program& p = call.program;
  std::vector<Arenas::Block> own;
  for (int64_t i = 0; i < threads; ++i) own.push_back(arenas.take(p.floats()));
  in_parallel(threads, [&](int64_t me, Team& team) {
    const int64_t values = p.early_arena + TOGETHER * p.late_arena;
    float *arena = own[me].get(), *scratch = arena + values;
    const int64_t share = images / team.size();
    for (int64_t n = me * share; n < (me + 1) * share; n += TOGETHER)
      run_alone(call, n, std::min(TOGETHER, (me + 1) * share - n), arena, scratch, me);
    team.wait();
    for (int64_t n = share * team.size(); n < images; ++n)
      for (const Layer& l : p.layers) {
        const Stopwatch watch(call, l, me);
        compute_layer(call, l, l.together, n, 0, 1, own[0].get(), scratch, me, team.size());
        team.wait();
      }
  });
  for (auto& block : own) arenas.give(std::move(block));
}

// `x` if its planes lie one behind the other in every image, as in a slice of channels, else a copy.
at::Tensor with_whole_planes(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat && x.is_cpu(),
              "group_conv2d: images must be float32 tensors of 4 dimensions on the CPU");
  const bool rows = x.stride(3) == 1 && x.stride(2) == x.size(3);
  return rows && x.stride(1) == x.size(2) * x.size(3) ? x : x.contiguous();
}

// Programs of plans that are alive: what was checked and laid out once need not be again. Of a plan
// those for the last few sizes are kept, for each holds memory.
class Programs {
 public:
  struct Key {
    std::string layers;
    std::vector<int64_t> numbers;
    bool operator==(const Key& other) const {
      return numbers == other.numbers && layers == other.layers;
    }
  };

  struct Entry {
    Key key;
    c10::weak_intrusive_ptr<c10::StorageImpl> plan;
    Program program;
    Arenas arenas;
    Entry(Key k, const at::Tensor& tensor, Program p)
        : key(std::move(k)),
          plan(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(
              tensor.storage().unsafeGetStorageImpl())),
          program(std::move(p)) {}
  };

  static Programs& instance() {
    static Programs* programs = new Programs;  // like the pool
    return *programs;
  }

  template <typename F>
  std::shared_ptr<Entry> get(const at::Tensor& plan, Key key, const F& read) {
    key.numbers.push_back(plan.numel());
    key.numbers.push_back(plan.is_inference() ? 0 : plan._version());
    const std::lock_guard<std::mutex> guard(mutex_);
    Entries& known = known_[plan.const_data_ptr()];
    for (const auto& entry : known)
      if (entry->key == key && !entry->plan.expired()) return entry;
    const auto made = std::make_shared<Entry>(std::move(key), plan, read());
    if (known.size() >= MOST_SIZES) known.erase(known.begin());
    known.push_back(made);
    forget_plans_that_are_gone();
    return made;
  }

 private:
  using Entries = std::vector<std::shared_ptr<Entry>>;
  static constexpr size_t MOST_SIZES = 4;

  void forget_plans_that_are_gone() {
    for (auto it = known_.begin(); it != known_.end();) {
      auto& entries = it->second;
      const auto gone = [](const auto& entry) { return entry->plan.expired(); };
      entries.erase(std::remove_if(entries.begin(), entries.end(), gone), entries.end());
      it = entries.empty() ? known_.erase(it) : std::next(it);
    }
  }

  std::mutex mutex_;
  std::unordered_map<const void*, Entries> known_;
};

// The numbers that describe layers, from text.
std::vector<int64_t> as_numbers(const std::string& text) {
  std::vector<int64_t> numbers;
  std::istringstream stream(text);
  for (int64_t number = 0; stream >> number;) numbers.push_back(number);
  TORCH_CHECK(stream.eof(), "group_conv2d: layers are described by numbers");
  return numbers;
}

std::vector<at::Tensor> compute(at::TensorList inputs, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, const at::Tensor& plan,
                                const std::string& layers, at::IntArrayRef outputs,
                                double* seconds) {
  TORCH_CHECK(plan.scalar_type() == at::kLong && plan.is_contiguous() && plan.is_cpu(),
              "group_conv2d: the plan must be a contiguous int64 tensor");
  TORCH_CHECK(weight.scalar_type() == at::kFloat && weight.is_contiguous() && weight.is_cpu(),
              "group_conv2d: the packed weight must be contiguous float32");
  TORCH_CHECK(!inputs.empty(), "group_conv2d: an image is needed");
  TORCH_CHECK(!bias || (bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->is_cpu()),
              "group_conv2d: the bias must be contiguous float32");
  const int64_t threads = at::get_num_threads(), images = inputs[0].size(0);
  std::vector<at::Tensor> given;
  std::vector<std::array<int64_t, 3>> sizes;
  Programs::Key key{layers, outputs.vec()};
  for (const at::Tensor& x : inputs) {
    given.push_back(with_whole_planes(x));
    TORCH_CHECK(x.size(0) == images, "group_conv2d: the inputs are of different numbers of images");
    sizes.push_back({x.size(1), x.size(2), x.size(3)});
    key.numbers.insert(key.numbers.end(), sizes.back().begin(), sizes.back().end());
  }
  const int64_t biases = bias ? bias->numel() : -1;
  key.numbers.insert(key.numbers.end(), {static_cast<int64_t>(outputs.size()), weight.numel(), biases, threads});
  const auto entry = Programs::instance().get(plan, std::move(key), [&] {
    const c10::ArrayRef<int64_t> numbers(plan.const_data_ptr<int64_t>(), plan.numel());
    return read_program(sizes, as_numbers(layers), outputs, numbers, weight.numel(), biases, threads);
  });
  const Program& p = entry->program;
  const float* weights = weight.const_data_ptr<float>();
  Call call{p, weights, weights + weight.numel(),
            bias ? bias->const_data_ptr<float>() : p.no_bias.data(), {}, {}, {}, seconds};
  call.given.resize(p.values.size()), call.returned.resize(p.values.size());
  call.strides.resize(p.values.size());
  for (size_t i = 0; i < given.size(); ++i) {
    call.given[i] = given[i].const_data_ptr<float>();
    call.strides[i] = given[i].stride(0);
  }
  std::vector<at::Tensor> results;
  for (const int64_t number : outputs) {
    const Value& v = p.values[number];
    results.push_back(Pool::instance().empty({images, v.channels, v.height, v.width},
                                             given[0].options()));
    call.returned[number] = results.back().mutable_data_ptr<float>();
    call.strides[number] = v.channels * v.height * v.width;
  }
  run(call, entry->arenas, images, threads);
  return results;
}

std::vector<at::Tensor> group_conv_run(at::TensorList inputs, const at::Tensor& weight,
                                       const std::optional<at::Tensor>& bias,
                                       const at::Tensor& plan, const std::string& layers,
                                       at::IntArrayRef outputs) {
  return compute(inputs, weight, bias, plan, layers, outputs, nullptr);
}

at::Tensor group_conv_run_seconds(at::TensorList inputs, const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias, const at::Tensor& plan,
                                  const std::string& layers, at::IntArrayRef outputs) {
  const int64_t count = static_cast<int64_t>(as_numbers(layers).size()) / LAYER_NUMBERS;
  const at::Tensor seconds = at::zeros({count}, at::kDouble);
  compute(inputs, weight, bias, plan, layers, outputs, seconds.mutable_data_ptr<double>());
  return seconds;
}

at::Tensor group_conv2d(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, const at::Tensor& plan,
                        const std::optional<at::Tensor>& residual, int64_t groups, int64_t filters,
                        at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                        at::IntArrayRef dilation, int64_t activation) {
  std::vector<int64_t> layer{CONVOLUTION, 0, residual ? 1 : -1, groups, filters};
  for (const at::IntArrayRef setting : {kernel, stride, padding, dilation}) {
    TORCH_CHECK(setting.size() == 2, "group_conv2d: two numbers are needed of each setting");
    layer.insert(layer.end(), setting.begin(), setting.end());
  }
  layer.push_back(activation);
  std::vector<at::Tensor> inputs{x};
  if (residual) inputs.push_back(*residual);
  std::string text;
  for (const int64_t number : layer) text += std::to_string(number) + ' ';
  return group_conv_run(inputs, weight, bias, plan, text,
                        {static_cast<int64_t>(inputs.size())})[0];
}

int64_t filters_in_a_block() { return MOST_ROWS; }

void refuse_gradient(const at::Tensor& x) {
  TORCH_CHECK(!at::GradMode::is_enabled() || !x.requires_grad(),
              "dspfx's own convolutions are for inference; train the prepared model instead");
}

at::Tensor group_conv2d_without_gradient(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& plan, const std::optional<at::Tensor>& residual, int64_t groups,
    int64_t filters, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dspfx::group_conv2d", "")
                             .typed<decltype(group_conv2d)>();
  refuse_gradient(x), refuse_gradient(weight);
  if (residual) refuse_gradient(*residual);
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, bias, plan, residual, groups, filters, kernel, stride, padding,
                 dilation, activation);
}

std::vector<at::Tensor> group_conv_run_without_gradient(
    at::TensorList inputs, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& plan, const std::string& layers, at::IntArrayRef outputs) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dspfx::group_conv_run", "")
                             .typed<decltype(group_conv_run)>();
  refuse_gradient(weight);
  for (const at::Tensor& x : inputs) refuse_gradient(x);
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(inputs, weight, bias, plan, layers, outputs);
}

}  // namespace

TORCH_LIBRARY_IMPL(dspfx, CPU, m) {
  m.impl("group_conv2d", &group_conv2d);
  m.impl("group_conv_run", &group_conv_run);
}

TORCH_LIBRARY_IMPL(dspfx, Autograd, m) {
  m.impl("group_conv2d", &group_conv2d_without_gradient);
  m.impl("group_conv_run", &group_conv_run_without_gradient);
}

TORCH_LIBRARY_FRAGMENT(dspfx, m) {
  m.def("filters_in_a_block() -> int", &filters_in_a_block);
  m.def("group_conv_run_seconds(Tensor[] inputs, Tensor weight, Tensor? bias, Tensor plan, "
        "str layers, int[] outputs) -> Tensor", &group_conv_run_seconds);
}

}  // namespace dspfx
