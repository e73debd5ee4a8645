// A convolution whose groups of filters read their own lists of channels.
//
// One block of rows of one image at a time: the planes that anybody reads are copied side by side
// into a buffer that fits into the cache, padded, and split into phases where the stride is not 1.
// In it the pixels of a tap lie at a constant distance from the pixels of the output, for every tap
// and channel, so that a group is one matrix product whose rows are found by a list of offsets:
//
//     y[o, p] = sum_k w[o, k] * buffer[offset[k] + p],    k over channels of the group and taps.
//
// Kernels of one tap without padding or stride find all that in the image itself, and copy nothing.
// A tile of BLOCK filters and VECTORS vectors of pixels is kept in registers; the weights of its
// filters stay in the first cache while all pixels of the block pass by. Pixels between the rows of
// the padded buffer are computed too, and thrown away.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

// Large outputs come from a pool: fresh memory costs a page fault for every 4 KiB, each time, since
// malloc gives large blocks back to the system. What is freed is kept for the next tensor of its size.
class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: tensors may outlive everything else
    return *pool;
  }

  at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    const size_t bytes = sizeof(float) * c10::multiply_integers(sizes);
    if (bytes < SMALLEST) return at::empty(sizes, options);
    void* block = take(bytes);
    return at::from_blob(block, sizes, [bytes](void* p) { instance().give(p, bytes); }, options);
  }

 private:
  static constexpr size_t SMALLEST = 64 << 10, MOST_KEPT = 256 << 20, HUGE_PAGE = 2 << 20;

  void* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      std::vector<void*>& blocks = free_[bytes];
      if (!blocks.empty()) {
        void* block = blocks.back();
        blocks.pop_back();
        kept_ -= bytes;
        return block;
      }
    }
    void* block = nullptr;
    const size_t alignment = bytes >= HUGE_PAGE ? HUGE_PAGE : 4096;
    TORCH_CHECK(posix_memalign(&block, alignment, bytes) == 0, "group_conv2d: no memory for ",
                bytes, " bytes");
#ifdef __linux__
    if (alignment == HUGE_PAGE) madvise(block, bytes, MADV_HUGEPAGE);
#endif
    return block;
  }

  void give(void* block, size_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (kept_ + bytes > MOST_KEPT) return free(block);
    free_[bytes].push_back(block);
    kept_ += bytes;
  }

  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<void*>> free_;
  size_t kept_ = 0;
};

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
// as many accumulators as leave registers for the operands: 32 registers, or 16
constexpr int64_t BLOCK = LANES >= 16 ? 8 : 6;
constexpr int64_t VECTORS = LANES >= 16 ? 3 : 2;
constexpr int64_t TILE = LANES * VECTORS;
constexpr int64_t LINE = 16;  // floats of a line of the caches
constexpr int64_t BUFFER_FLOATS = 96 * 1024;  // of the second cache
constexpr int64_t FEW_WEIGHTS = 64 * 1024;    // cheap for every thread to read

enum Activation : int64_t { NONE = 0, RELU = 1, RELU6 = 2, HARDSWISH = 3, SILU = 4 };

struct Shape {
  int64_t channels, height, width;         // of one image
  int64_t filters, out_height, out_width;  // of its output
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

struct Group {
  int64_t filters, reads;
  const int64_t* filter;  // [filters], channels of the output
  const int64_t* input;   // [reads], positions among the channels in use
  const float* weight;    // [ceil(filters / BLOCK), reads * taps, BLOCK]
};

// Where the pixels of a block of output rows lie in the buffer.
struct Frame {
  int64_t rows;               // of the output, in a block
  int64_t phases[2];          // of each axis that any tap needs
  int64_t height, width;      // of one phase of one channel
  int64_t channel() const { return phases[0] * phases[1] * height * width; }
  int64_t offset(const Shape& s, int64_t channel_number, int64_t ky, int64_t kx) const {
    const int64_t y = ky * s.dilation[0], x = kx * s.dilation[1];
    const int64_t phase = (y % s.stride[0]) * phases[1] + x % s.stride[1];
    return channel_number * channel() + (phase * height + y / s.stride[0]) * width +
        x / s.stride[1];
  }
};

// How the work is cut: strips of rows, and the filters into `splits` where images and strips are too
// few for the threads.
struct Cut {
  Frame frame;
  int64_t strips, splits;
  bool in_place;  // the image is its own buffer
};

Cut cut_for(const Shape& s, int64_t images, int64_t channels, int64_t weights) {
  Frame f;
  int64_t reach[2];
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t last = (s.kernel[axis] - 1) * s.dilation[axis];
    f.phases[axis] = std::min(last + 1, s.stride[axis]);
    reach[axis] = last / s.stride[axis];
  }
  f.width = s.out_width + reach[1];
  const int64_t a_row = std::max<int64_t>(1, channels * f.phases[0] * f.phases[1] * f.width);
  const int64_t threads = at::get_num_threads();
  const int64_t fitting = std::clamp<int64_t>(BUFFER_FLOATS / a_row - reach[0], 1, s.out_height);
  int64_t strips = (s.out_height + fitting - 1) / fitting, splits = 1;
  if (images * strips % threads != 0) {
    const int64_t more = (strips + threads - 1) / threads * threads;
    if (weights <= FEW_WEIGHTS && s.out_height >= more * 2 * (reach[0] + 1)) strips = more;
    else splits = threads;
  }
  f.rows = (s.out_height + strips - 1) / strips;
  f.height = f.rows + reach[0];
  strips = (s.out_height + f.rows - 1) / f.rows;
  const int64_t last = s.out_height - (strips - 1) * f.rows;
  bool in_place = last * s.out_width >= TILE;  // or a tile would reach past the image
  for (int axis = 0; axis < 2; ++axis)
    in_place &= s.kernel[axis] == 1 && s.stride[axis] == 1 && s.padding[axis] == 0;
  if (in_place) f.height = s.height;
  return {f, strips, splits, in_place};
}

inline void set_zero(float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0.f;
}

// Rows are short: whole vectors, the last one stepping back, beat a call of memcpy.
inline void copy(float* to, const float* from, int64_t count) {
  if (count < LANES) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + LANES <= count; i += LANES) Vec::loadu(from + i).store(to + i);
  Vec::loadu(from + count - LANES).store(to + count - LANES);
}

// Copies the rows that the output rows from `first` on need, zeros where the image ends.
void fill(const Shape& s, const Frame& f, const float* image, const std::vector<int64_t>& used,
          int64_t first, float* buffer) {
  const int64_t step = s.stride[1];
  for (const int64_t channel : used) {
    const float* plane = image + channel * s.height * s.width;
    for (int64_t py = 0; py < f.phases[0]; ++py) {
      for (int64_t px = 0; px < f.phases[1]; ++px) {
        // columns with 0 <= column * step + shift < width
        const int64_t shift = px - s.padding[1];
        const int64_t begin = std::clamp<int64_t>((-shift + step - 1) / step, 0, f.width);
        const int64_t end =
            std::clamp<int64_t>((s.width - shift + step - 1) / step, begin, f.width);
        for (int64_t row = 0; row < f.height; ++row, buffer += f.width) {
          const int64_t y = (first + row) * s.stride[0] + py - s.padding[0];
          if (y < 0 || y >= s.height) {
            set_zero(buffer, f.width);
            continue;
          }
          const float* line = plane + y * s.width + shift;
          set_zero(buffer, begin);
          if (step == 1) copy(buffer + begin, line + begin, end - begin);
          else
            for (int64_t x = begin; x < end; ++x) buffer[x] = line[x * step];
          set_zero(buffer + end, f.width - end);
        }
      }
    }
  }
}

template <int64_t A>
inline Vec activate(Vec x) {
  const Vec zero(0.f), six(6.f);
  if constexpr (A == RELU) return at::vec::maximum(x, zero);
  if constexpr (A == RELU6) return at::vec::minimum(at::vec::maximum(x, zero), six);
  if constexpr (A == HARDSWISH)
    return x * at::vec::minimum(at::vec::maximum(x + Vec(3.f), zero), six) / six;
  if constexpr (A == SILU) return x / (Vec(1.f) + x.neg().exp());
  return x;
}

// Neighbouring pixels of the output that lie side by side in a tile as well.
struct Run {
  int64_t from, count;  // in the tile
  int64_t to;           // in a plane of the output
};

// A tile of pixels: where it begins in the buffer, and what of it is wanted.
struct Tile {
  int64_t at, vectors;
  std::vector<Run> runs;
  bool whole() const { return runs.size() == 1 && runs[0].count == vectors * LANES; }
};

// Where BLOCK filters are written to: y = activation(sum + bias + residual).
struct Target {
  const int64_t* filter;
  int64_t filters, plane;
  const float *bias, *residual;  // null where there is none; of one image, as the next
  float* y;

  template <int64_t A>
  void write(Vec value, int64_t r, int64_t to, int64_t count) const {
    const int64_t o = filter[r], at = o * plane + to;
    if (bias != nullptr) value = value + Vec(bias[o]);
    if (count == LANES) {
      if (residual != nullptr) value = value + Vec::loadu(residual + at);
      activate<A>(value).store(y + at);
    } else {
      if (residual != nullptr) value = value + Vec::loadu(residual + at, count);
      activate<A>(value).store(y + at, count);
    }
  }
};

// BLOCK filters and V vectors of pixels.
template <int64_t A, int64_t V>
void compute_tile(const float* weight, const int64_t* offset, int64_t count, const float* pixels,
                  const Tile& tile, const Target& target) {
  Vec sum[BLOCK][V];
  for (int64_t r = 0; r < BLOCK; ++r)
    for (int64_t v = 0; v < V; ++v) sum[r][v] = Vec(0.f);
  for (int64_t k = 0; k < count; ++k, weight += BLOCK) {
    const float* from = pixels + offset[k];
    Vec x[V];
    for (int64_t v = 0; v < V; ++v) x[v] = Vec::loadu(from + v * LANES);
    for (int64_t r = 0; r < BLOCK; ++r) {
      const Vec w(weight[r]);
      for (int64_t v = 0; v < V; ++v) sum[r][v] = at::vec::fmadd(w, x[v], sum[r][v]);
    }
  }
  if (tile.whole()) {
    for (int64_t r = 0; r < BLOCK; ++r)
      if (r < target.filters)
        for (int64_t v = 0; v < V; ++v)
          target.write<A>(sum[r][v], r, tile.runs[0].to + v * LANES, LANES);
    return;
  }
  alignas(64) float sums[BLOCK][V * LANES];
  for (int64_t r = 0; r < BLOCK; ++r)
    for (int64_t v = 0; v < V; ++v) sum[r][v].store(sums[r] + v * LANES);
  for (int64_t r = 0; r < target.filters; ++r)
    for (const Run& run : tile.runs)
      for (int64_t x = 0; x < run.count; x += LANES) {
        const int64_t left = std::min(LANES, run.count - x);
        target.write<A>(Vec::loadu(sums[r] + run.from + x, left), r, run.to + x, left);
      }
}

template <int64_t A>
void compute(const float* weight, const int64_t* offset, int64_t count, const float* pixels,
             const Tile& tile, const Target& target) {
  switch (tile.vectors) {
    case 1: return compute_tile<A, 1>(weight, offset, count, pixels, tile, target);
    case 2: return compute_tile<A, 2>(weight, offset, count, pixels, tile, target);
    default: return compute_tile<A, VECTORS>(weight, offset, count, pixels, tile, target);
  }
}

using Compute = void (*)(const float*, const int64_t*, int64_t, const float*, const Tile&,
                         const Target&);

Compute compute_for(int64_t activation) {
  switch (activation) {
    case NONE: return compute<NONE>;
    case RELU: return compute<RELU>;
    case RELU6: return compute<RELU6>;
    case HARDSWISH: return compute<HARDSWISH>;
    case SILU: return compute<SILU>;
  }
  TORCH_CHECK(false, "group_conv2d: unknown activation ", activation);
}

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// `x` if its planes lie one behind the other in every image, as in a slice of channels, else a copy.
at::Tensor with_whole_planes(const at::Tensor& x) {
  const bool rows = x.stride(3) == 1 && x.stride(2) == x.size(3);
  return rows && x.stride(1) == x.size(2) * x.size(3) ? x : x.contiguous();
}

// Everything that a plan may claim is checked before a pointer is made of it.
std::vector<Group> checked(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& sizes,
                           const at::Tensor& filters, const at::Tensor& inputs, int64_t block,
                           int64_t taps) {
  for (const auto* t : {&sizes, &filters, &inputs}) {
    TORCH_CHECK(t->scalar_type() == at::kLong && t->is_contiguous() && t->is_cpu(),
                "group_conv2d: the plan must be of contiguous int64 tensors");
  }
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat && x.is_cpu(),
              "group_conv2d: x must be a float32 tensor of 4 dimensions on the CPU");
  TORCH_CHECK(weight.scalar_type() == at::kFloat && weight.is_contiguous() && weight.is_cpu(),
              "group_conv2d: the packed weight must be contiguous float32");
  TORCH_CHECK(block == BLOCK, "group_conv2d: the weight is packed in blocks of ", block,
              " filters, this build takes ", BLOCK);
  TORCH_CHECK(sizes.dim() == 2 && sizes.size(1) == 2, "group_conv2d: sizes must be [G, 2]");
  std::vector<Group> groups;
  const int64_t* size = sizes.const_data_ptr<int64_t>();
  const int64_t *filter = filters.const_data_ptr<int64_t>(),
                *input = inputs.const_data_ptr<int64_t>();
  const float* packed = weight.const_data_ptr<float>();
  int64_t filters_left = filters.numel(), inputs_left = inputs.numel(),
          weights_left = weight.numel();
  for (int64_t g = 0; g < sizes.size(0); ++g, size += 2) {
    TORCH_CHECK(size[0] >= 0 && size[1] >= 0 && size[0] <= filters_left && size[1] <= inputs_left,
                "group_conv2d: group ", g, " is larger than the plan");
    const int64_t weights = rounded_up(size[0], BLOCK) * size[1] * taps;
    TORCH_CHECK(weights <= weights_left, "group_conv2d: the weight is too small for group ", g);
    groups.push_back({size[0], size[1], filter, input, packed});
    filter += size[0], input += size[1], packed += weights;
    filters_left -= size[0], inputs_left -= size[1], weights_left -= weights;
  }
  TORCH_CHECK(filters_left == 0 && inputs_left == 0 && weights_left == 0,
              "group_conv2d: the plan has more than its groups use");
  std::vector<bool> written(filters.numel(), false);
  for (int64_t i = 0; i < filters.numel(); ++i) {
    const int64_t o = filters.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(o >= 0 && o < filters.numel() && !written[o],
                "group_conv2d: filter ", o, " is out of range or written twice");
    written[o] = true;
  }
  for (int64_t i = 0; i < inputs.numel(); ++i) {
    const int64_t c = inputs.const_data_ptr<int64_t>()[i];
    TORCH_CHECK(c >= 0 && c < x.size(1), "group_conv2d: input channel ", c, " is out of range");
  }
  return groups;
}

// The tiles of a strip that begins at output row `first`.
std::vector<Tile> tiles_of(const Shape& s, const Frame& f, int64_t first) {
  const int64_t rows = std::min(f.rows, s.out_height - first);
  const int64_t pixels = (rows - 1) * f.width + s.out_width;
  const int64_t line = f.width == s.out_width ? pixels : f.width;  // without gaps: one long row
  const int64_t wanted = f.width == s.out_width ? pixels : s.out_width;
  std::vector<Tile> tiles;
  for (int64_t p = 0; p < pixels; p += TILE) {
    const int64_t end = std::min(p + TILE, pixels), vectors = (end - p + LANES - 1) / LANES;
    // the last tile steps back rather than read past the end, where that can be
    Tile tile{std::max<int64_t>(0, end - vectors * LANES), vectors, {}};
    for (int64_t at = tile.at; at < end;) {
      const int64_t row = at / line, until = std::min(end, row * line + wanted);
      if (at < until)
        tile.runs.push_back(
            {at - tile.at, until - at, (first + row) * s.out_width + at - row * line});
      at = (row + 1) * line;
    }
    tiles.push_back(std::move(tile));
  }
  return tiles;
}

at::Tensor group_conv2d(const at::Tensor& given, const at::Tensor& weight,
                        const std::optional<at::Tensor>& given_bias, const at::Tensor& sizes,
                        const at::Tensor& filters, const at::Tensor& inputs,
                        const std::optional<at::Tensor>& given_residual, at::IntArrayRef kernel,
                        at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                        int64_t block, int64_t activation) {
  TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 &&
                  dilation.size() == 2,
              "group_conv2d: two numbers are needed of each setting");
  Shape s;
  for (int axis = 0; axis < 2; ++axis) {
    TORCH_CHECK(kernel[axis] > 0 && stride[axis] > 0 && dilation[axis] > 0 && padding[axis] >= 0,
                "group_conv2d: a setting is out of range");
    s.kernel[axis] = kernel[axis], s.stride[axis] = stride[axis];
    s.padding[axis] = padding[axis], s.dilation[axis] = dilation[axis];
  }
  std::vector<Group> groups =
      checked(given, weight, sizes, filters, inputs, block, kernel[0] * kernel[1]);
  const at::Tensor x = with_whole_planes(given);
  s.channels = x.size(1), s.height = x.size(2), s.width = x.size(3), s.filters = filters.numel();
  int64_t out[2];
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t covered = s.dilation[axis] * (s.kernel[axis] - 1) + 1;
    const int64_t room = x.size(2 + axis) + 2 * s.padding[axis] - covered;
    TORCH_CHECK(room >= 0, "group_conv2d: the kernel is larger than the padded image");
    out[axis] = room / s.stride[axis] + 1;
  }
  s.out_height = out[0], s.out_width = out[1];
  at::Tensor y = Pool::instance().empty({x.size(0), s.filters, out[0], out[1]}, x.options());
  at::Tensor bias, residual;
  if (given_bias) {
    bias = given_bias->contiguous();
    TORCH_CHECK(bias.scalar_type() == at::kFloat && bias.numel() == s.filters,
                "group_conv2d: the bias must be float32, one for each filter");
  }
  if (given_residual) {
    residual = with_whole_planes(*given_residual);
    TORCH_CHECK(residual.scalar_type() == at::kFloat && residual.sizes() == y.sizes(),
                "group_conv2d: the residual must be like the output");
  }
  const Compute compute = compute_for(activation);
  if (y.numel() == 0) return y;

  // the channels that anybody reads, and each group's lists in terms of them
  std::vector<int64_t> place(s.channels, -1), used, lists;
  for (const Group& group : groups)
    for (int64_t i = 0; i < group.reads; ++i)
      if (place[group.input[i]] < 0) place[group.input[i]] = 0;
  for (int64_t c = 0; c < s.channels; ++c)
    if (place[c] == 0) place[c] = static_cast<int64_t>(used.size()), used.push_back(c);
  const Cut cut = cut_for(s, x.size(0), static_cast<int64_t>(used.size()), weight.numel());
  const Frame& f = cut.frame;
  std::vector<int64_t> starts, blocks{0};
  for (const Group& group : groups) {
    starts.push_back(static_cast<int64_t>(lists.size()));
    blocks.push_back(blocks.back() + (group.filters + BLOCK - 1) / BLOCK);
    for (int64_t i = 0; i < group.reads; ++i)
      for (int64_t ky = 0; ky < s.kernel[0]; ++ky)
        for (int64_t kx = 0; kx < s.kernel[1]; ++kx)
          lists.push_back(f.offset(s, cut.in_place ? group.input[i] : place[group.input[i]], ky, kx));
  }

  const int64_t splits = std::min(cut.splits, blocks.back());
  const int64_t buffer_size =
      cut.in_place ? 0 : static_cast<int64_t>(used.size()) * f.channel() + TILE;
  std::vector<std::vector<Tile>> tiles;
  for (int64_t strip = 0; strip < cut.strips; ++strip)
    tiles.push_back(tiles_of(s, f, strip * f.rows));
  const int64_t taps = s.kernel[0] * s.kernel[1];
  const float* x_data = x.const_data_ptr<float>();
  const float* weights_end = weight.const_data_ptr<float>() + weight.numel();
  float* y_data = y.mutable_data_ptr<float>();
  const float* bias_data = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  const float* residual_data = residual.defined() ? residual.const_data_ptr<float>() : nullptr;
  const int64_t image = x.stride(0), added_image = residual.defined() ? residual.stride(0) : 0;
  const int64_t result = s.filters * s.out_height * s.out_width;

  at::parallel_for(0, x.size(0) * cut.strips * splits, 1, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> scratch;  // grows to what the largest layer needs, and stays
    if (static_cast<int64_t>(scratch.size()) < buffer_size) scratch.resize(buffer_size);
    float* buffer = scratch.data();
    int64_t filled = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t where = task / splits, split = task % splits;
      const int64_t n = where / cut.strips, strip = where % cut.strips, first = strip * f.rows;
      if (where != filled && !cut.in_place) fill(s, f, x_data + n * image, used, first, buffer);
      filled = where;
      const float* pixels = cut.in_place ? x_data + n * image + first * s.width : buffer;
      const float* added = residual_data == nullptr ? nullptr : residual_data + n * added_image;
      const int64_t from = blocks.back() * split / splits;
      const int64_t until = blocks.back() * (split + 1) / splits;
      size_t g = 0;
      for (int64_t b = from; b < until; ++b) {
        while (b >= blocks[g + 1]) ++g;
        const Group& group = groups[g];
        const int64_t number = b - blocks[g], count = group.reads * taps;
        const Target target{group.filter + number * BLOCK,
                            std::min(BLOCK, group.filters - number * BLOCK),
                            s.out_height * s.out_width,
                            bias_data,
                            added,
                            y_data + n * result};
        const float* own = group.weight + number * count * BLOCK;
        // weights come from far away, and once only: those of the next block are asked for early
        const float* next = own + count * BLOCK;
        const float* last = std::min(next + count * BLOCK, weights_end);
        const int64_t parts = static_cast<int64_t>(tiles[strip].size());
        const int64_t share = (last - next + parts - 1) / parts;
        for (const Tile& tile : tiles[strip]) {
          for (const float* end = std::min(next + share, last); next < end; next += LINE)
            __builtin_prefetch(next);
          compute(own, lists.data() + starts[g], count, pixels + tile.at, tile, target);
        }
      }
    }
  });
  return y;
}

int64_t filters_in_a_block() { return BLOCK; }

}  // namespace

TORCH_LIBRARY_IMPL(dspfx, CPU, m) { m.impl("group_conv2d", &group_conv2d); }

TORCH_LIBRARY_FRAGMENT(dspfx, m) { m.def("filters_in_a_block() -> int", &filters_in_a_block); }
