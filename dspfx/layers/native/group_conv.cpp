// The operators: convolutions whose groups of filters read their own lists of channels, one or a run.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <sstream>

#include "program_cache.h"
#include "execute.h"

namespace dspfx {
namespace {

// `x` if its planes are contiguous in every image, as in a slice of channels, else a copy.
at::Tensor with_whole_planes(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat && x.is_cpu(),
              "group_conv2d: images must be float32 tensors of 4 dimensions on the CPU");
  const bool rows = x.stride(3) == 1 && x.stride(2) == x.size(3);
  return rows && x.stride(1) == x.size(2) * x.size(3) ? x : x.contiguous();
}

// The numbers that describe layers, from text.
std::vector<int64_t> as_numbers(const std::string& text) {
  std::vector<int64_t> numbers;
  std::istringstream stream(text);
  for (int64_t number = 0; stream >> number;) numbers.push_back(number);
  TORCH_CHECK(stream.eof(), "group_conv2d: layers are described by numbers");
  return numbers;
}

std::vector<at::Tensor> compute(at::TensorList inputs, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, const at::Tensor& indices,
                                const std::string& layers, at::IntArrayRef outputs,
                                double* seconds) {
  TORCH_CHECK(indices.scalar_type() == at::kLong && indices.is_contiguous() && indices.is_cpu(),
              "group_conv2d: the indices must be a contiguous int64 tensor");
  const int64_t per_word = weight.scalar_type() == at::kBFloat16 ? Bf16::CHANNELS : 1;
  TORCH_CHECK((per_word > 1 || weight.scalar_type() == at::kFloat) && weight.is_contiguous() &&
                  weight.is_cpu() && weight.numel() % per_word == 0,
              "group_conv2d: the packed weight must be contiguous float32 or bfloat16");
  const int64_t words = weight.numel() / per_word;
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
  key.numbers.insert(key.numbers.end(), {static_cast<int64_t>(outputs.size()), words, biases, per_word, threads});
  const auto entry = Programs::instance().get(indices, std::move(key), [&] {
    const c10::ArrayRef<int64_t> numbers(indices.const_data_ptr<int64_t>(), indices.numel());
    return read_program(sizes, as_numbers(layers), outputs, numbers, words, biases, per_word, threads);
  });
  const Program& p = entry->program;
  const float* weights = static_cast<const float*>(weight.const_data_ptr());
  Call call{p, weights, weights + words,
            bias ? bias->const_data_ptr<float>() : p.no_bias.data(), {}, {}, {}, seconds};
  call.given.resize(p.values.size()), call.returned.resize(p.values.size());
  call.strides.resize(p.values.size());
  for (size_t i = 0; i < given.size(); ++i) {
    call.given[i] = given[i].const_data_ptr<float>();
    call.strides[i] = given[i].stride(0);
  }
  std::vector<at::Tensor> results;
  for (const int64_t number : p.outputs) {
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
                                       const at::Tensor& indices, const std::string& layers,
                                       at::IntArrayRef outputs) {
  return compute(inputs, weight, bias, indices, layers, outputs, nullptr);
}

at::Tensor group_conv_run_seconds(at::TensorList inputs, const at::Tensor& weight,
                                  const std::optional<at::Tensor>& bias, const at::Tensor& indices,
                                  const std::string& layers, at::IntArrayRef outputs) {
  const int64_t count = static_cast<int64_t>(as_numbers(layers).size()) / LAYER_NUMBERS;
  const at::Tensor seconds = at::zeros({count}, at::kDouble);
  compute(inputs, weight, bias, indices, layers, outputs, seconds.mutable_data_ptr<double>());
  return seconds;
}

at::Tensor group_conv2d(const at::Tensor& x, const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias, const at::Tensor& indices,
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
  return group_conv_run(inputs, weight, bias, indices, text,
                        {static_cast<int64_t>(inputs.size())})[0];
}

int64_t filters_in_a_block() { return MOST_ROWS; }

bool multiplies_bf16() { return Bf16::INSTRUCTIONS; }

void refuse_gradient(const at::Tensor& x) {
  TORCH_CHECK(!at::GradMode::is_enabled() || !x.requires_grad(),
              "dspfx's own convolutions are for inference; train the prepared model instead");
}

at::Tensor group_conv2d_without_gradient(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& indices, const std::optional<at::Tensor>& residual, int64_t groups,
    int64_t filters, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dspfx::group_conv2d", "")
                             .typed<decltype(group_conv2d)>();
  refuse_gradient(x), refuse_gradient(weight);
  if (residual) refuse_gradient(*residual);
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, weight, bias, indices, residual, groups, filters, kernel, stride, padding,
                 dilation, activation);
}

std::vector<at::Tensor> group_conv_run_without_gradient(
    at::TensorList inputs, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const at::Tensor& indices, const std::string& layers, at::IntArrayRef outputs) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dspfx::group_conv_run", "")
                             .typed<decltype(group_conv_run)>();
  refuse_gradient(weight);
  for (const at::Tensor& x : inputs) refuse_gradient(x);
  const at::AutoDispatchBelowADInplaceOrView below;
  return op.call(inputs, weight, bias, indices, layers, outputs);
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
  m.def("multiplies_bf16() -> bool", &multiplies_bf16);
  m.def("group_conv_run_seconds(Tensor[] inputs, Tensor weight, Tensor? bias, Tensor indices, "
        "str layers, int[] outputs) -> Tensor", &group_conv_run_seconds);
}

}  // namespace dspfx
