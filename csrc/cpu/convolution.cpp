// Convolutions over images in channels_last, and their input gradients, with what follows applied on the way:
// by Winograd's algorithms for filters of 3×3 (convolution_square.h), of other sizes along both axes
// (convolution_area.h) or along one of them (convolution_line.h), and as they are for 1×1 (convolution_point.h), over
// few channels (convolution_direct.h), and depthwise (convolution_depthwise.h).
//
// The law is direct, or by Winograd's algorithm where that rounds no output by what it does not meet
// (convolution_guarded.h).
#include <algorithm>
#include <tuple>

#include "convolution_area.h"
#include "convolution_depthwise.h"
#include "convolution_guarded.h"
#include "convolution_line.h"
#include "convolution_point.h"

namespace rlrp {
namespace convolution {
namespace {

constexpr int64_t kMostTaps = 64;      // along an axis
constexpr int64_t kFewChannels = 4;    // of the input, as of an RGB image

// The input gradient as a convolution over the outputs' gradient, turned by half a turn: with a stride, one
// for every phase of the inputs, which meet other taps. Nothing is left where a phase has no inputs.
void turn(Convolution& conv, int axis, int64_t phase) {
  const int64_t stride = conv.stride[axis], padding = conv.padding[axis];
  const int64_t taps = ceil_div(conv.kernel[axis] - phase, stride);
  const int64_t skipped = padding > phase ? ceil_div(padding - phase, stride) : 0;
  const int64_t start = skipped * stride + phase - padding;  // the first input
  Image& out = conv.out;
  conv.y += start * out.step[axis];
  if (conv.times) conv.times += start * out.step[axis];
  if (conv.other) conv.other += start * out.step[axis];
  if (conv.dividend) conv.dividend += start * out.step[axis];
  out.size[axis] = start < out.size[axis] ? ceil_div(out.size[axis] - start, stride) : 0;
  out.step[axis] *= stride;
  conv.filters.taps += (phase + stride * (taps - 1)) * conv.filters.step[axis];
  conv.filters.step[axis] *= -stride;
  conv.kernel[axis] = taps;
  conv.padding[axis] = taps - 1 - skipped;
  conv.stride[axis] = 1;
}

// Of a phase that meets no taps.
void run_empty(const Convolution& conv) {
  const Image& out = conv.out;
  torch::stable::parallel_for(0, conv.batch * out.size[0], 1, [&](int64_t first, int64_t last) {
    for (int64_t line = first; line < last; ++line) {
      for (int64_t w = 0; w < out.size[1]; ++w) {
        const int64_t offset = out.offset(line / out.size[0], line % out.size[0], w);
        if (conv.other) {
          std::copy_n(conv.other + offset, out.channels, conv.y + offset);
        } else {
          std::fill_n(conv.y + offset, out.channels, 0.0f);
        }
      }
    }
  });
}

// By the scheme for filters of that size, of which conv may have a phase.
void run_one(const Convolution& conv, const int64_t (&kernel)[2], const Tensor& model) {
  if (conv.depthwise) return Depthwise(conv).run();
  const bool few = conv.in.channels <= kFewChannels;
  if (kernel[0] == 1 && kernel[1] == 1 && !few) return run_by(conv, Point{}, model);
  if (conv.exact && !few && Square::suits(conv)) return run_guarded(conv, model);
  if (conv.exact || few) return run_by(conv, Direct(conv.kernel), model);
  if (Square::suits(conv)) return run_by(conv, Square{}, model);
  if (kernel[0] > 1 && kernel[1] > 1) return run_by(conv, Area(conv.kernel, conv.stride), model);
  const int axis = kernel[0] == 1;
  run_by(conv, Line(axis, conv.kernel[axis], conv.stride[axis]), model);
}

void run(const Convolution& conv, bool transpose, const Tensor& model) {
  if (!transpose) return run_one(conv, conv.kernel, model);
  for (int64_t down = 0; down < conv.stride[0]; ++down) {
    for (int64_t along = 0; along < conv.stride[1]; ++along) {
      Convolution turned = conv;
      turn(turned, 0, down);
      turn(turned, 1, along);
      if (turned.kernel[0] > 0 && turned.kernel[1] > 0) {
        run_one(turned, conv.kernel, model);
      } else {
        run_empty(turned);
      }
    }
  }
}

// One group of a convolution's channels, whose filters lie so far from the first.
Convolution group_of(Convolution conv, int64_t groups, int64_t group, int64_t filters) {
  conv.in.channels /= groups;
  conv.out.channels /= groups;
  const int64_t out = group * conv.out.channels;
  conv.x += group * conv.in.channels;
  conv.y += out;
  conv.filters.taps += filters;
  for (const float** each : {&conv.filters.scale, &conv.bias, &conv.other, &conv.times, &conv.dividend}) {
    if (*each) *each += out;
  }
  conv.streams &= conv.out.channels % kLine == 0;
  return conv;
}

// What the ops share: checks, and all that follows from the image, the filters, the stride and the padding.
struct Arguments {
  const char* op;
  bool transpose;
  int64_t groups, filters;  // how far a group's lie from the next one's
  Convolution conv{};
  std::vector<Tensor> kept;  // what the pointers point into

  // Of a transpose, the image is the gradient of the outputs, and `input` tells the shape of the inputs.
  Arguments(const char* op, const Tensor& image, const Tensor& weight, const std::optional<Tensor>& scale,
            const Ints& stride, const Ints& padding, const Tensor* input = nullptr)
      : op(op), transpose(input != nullptr) {
    RLRP_CHECK(image.scalar_type() == ScalarType::Float, op, "the image must have dtype float32");
    RLRP_CHECK(image.dim() == 4 && weight.dim() == 4, op, "the image and weight must have 4 axes");
    check_like(op, "weight", weight, "the image", image, false);
    RLRP_CHECK(weight.numel() > 0, op, "weight must not be empty");
    const bool point = weight.size(2) == 1 && weight.size(3) == 1;
    const int64_t outputs = weight.size(0), channels = (input ? *input : image).size(1);
    groups = channels / weight.size(1);
    RLRP_CHECK(groups > 0 && channels % weight.size(1) == 0 && outputs % groups == 0, op,
               "the image must have the channels that weight reads, or groups of them");
    RLRP_CHECK(!transpose || image.size(1) == outputs, op, "the image must have a channel for each filter");
    conv.depthwise = groups > 1 && groups == channels && groups == outputs;
    RLRP_CHECK(stride.size() == 2 && padding.size() == 2, op, "stride and padding must have 2 elements");
    std::copy_n(weight.sizes().begin() + 2, 2, conv.kernel);
    const auto [height, width] = conv.kernel;
    RLRP_CHECK(height <= kMostTaps && width <= kMostTaps, op, "weight must have at most ", kMostTaps,
               " taps along an axis");
    int64_t size[2];
    for (int i = 0; i < 2; ++i) {
      RLRP_CHECK(stride[i] >= 1 && (point || stride[i] <= conv.kernel[i]), op,
                 "stride must be from 1 to the number of taps along its axis, but for 1×1");
      RLRP_CHECK(padding[i] >= 0 && padding[i] < conv.kernel[i], op, "padding must be less than the filters");
      const int64_t inputs = (input ? *input : image).size(2 + i);
      conv.stride[i] = min64(stride[i], std::max<int64_t>(inputs, conv.kernel[i]));  // no farther than the image
      conv.padding[i] = padding[i];
      const int64_t room = inputs + 2 * padding[i] - conv.kernel[i];
      RLRP_CHECK(inputs >= 0 && room >= 0, op, "the image, padded, must be as large as the filters");
      size[i] = room / stride[i] + 1;
      RLRP_CHECK(!transpose || size[i] == image.size(2 + i), op,
                 "the image's size does not follow from the input's");
    }
    conv.batch = image.size(0);
    conv.in = Image::dense(image.size(1), image.size(2), image.size(3));
    conv.out = input ? Image::dense(channels, input->size(2), input->size(3)) : Image::dense(outputs, size[0], size[1]);
    conv.x = data(image, true);
    const bool strewn = height * width == 1 && weight.stride(0) != 1 && weight.stride(1) != 1;
    const Tensor w = strewn ? kept.emplace_back(torch::stable::contiguous(weight)) : weight;
    const bool turned = transpose && !conv.depthwise;
    conv.filters = {data_of<float>(w), w.stride(turned), w.stride(!turned), {w.stride(2), w.stride(3)},
                    vector("scale", scale, outputs), false};
    filters = outputs / groups * w.stride(0);
  }

  Ints shape() const { return {conv.batch, conv.out.channels, conv.out.size[0], conv.out.size[1]}; }

  const float* data(const Tensor& t, bool channels_last) {
    return data_of<float>(kept.emplace_back(dense(t, channels_last)));
  }

  const float* vector(const char* name, const std::optional<Tensor>& v, int64_t count) {
    if (!v) return nullptr;
    check_like(op, name, *v, "the image", kept.front(), false);
    RLRP_CHECK(v->dim() == 1 && v->size(0) == count, op, name, " must have ", count, " elements");
    return data(*v, false);
  }

  // What is added to a result like the model.
  void add(const std::optional<Tensor>& other, const Tensor& model) {
    if (!other) return;
    check_like(op, "other", *other, "the result", model);
    conv.other = data(*other, true);
  }

  void run_into(Tensor& y) {
    if (y.numel() == 0) return;
    conv.write_to(y);
    if (conv.depthwise || groups == 1) return run(conv, transpose, y);
    for (int64_t g = 0; g < groups; ++g) run(group_of(conv, groups, g, g * filters), transpose, y);
  }

  // Returns what is summed on the way, for each sample.
  Tensor run_and_sum_into(Tensor& y) {
    std::vector<double> sums(conv.batch, 0.0);
    conv.sums = sums.data();
    run_into(y);
    Tensor result = new_sums(y);
    std::copy(sums.begin(), sums.end(), result_of<float>(result));
    return result;
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                                   const std::optional<Tensor>& bias, const std::optional<Tensor>& other,
                                   const Ints& stride, const Ints& padding, bool relu) {
  Arguments a("convolution", x, weight, scale, stride, padding);
  a.conv.bias = a.vector("bias", bias, weight.size(0));
  a.conv.relu = relu;
  Tensor y = new_image(x, a.shape(), true);
  a.add(other, y);
  Tensor before = a.run_and_sum_into(y);
  return {y, before};
}

// The two halves of the law, by |weight| and direct: s = r / convolution(|x|), with the sums of |s| over
// each sample;
std::tuple<Tensor, Tensor> divide(const Tensor& r, const Tensor& x, const Tensor& weight, const Ints& stride,
                                  const Ints& padding, bool nonnegative) {
  Arguments a("convolution_divide", x, weight, std::nullopt, stride, padding);
  a.conv.filters.absolute = a.conv.exact = true;
  a.conv.absolute = !nonnegative;
  Tensor s = new_image(x, a.shape(), true);
  check_like(a.op, "r", r, "the result", s);
  a.conv.dividend = a.data(r, true);
  Tensor seen = a.run_and_sum_into(s);
  return {s, seen};
}

// and |x| ⊙ convolution_transpose(s) + other.
Tensor product(const Tensor& x, const Tensor& s, const Tensor& weight, const std::optional<Tensor>& other,
               const Ints& stride, const Ints& padding) {
  const char* op = "convolution_product";
  RLRP_CHECK(x.dim() == 4, op, "x must have 4 axes");
  check_like(op, "x", x, "s", s, false);
  Arguments a(op, s, weight, std::nullopt, stride, padding, &x);
  const Ints shape = a.shape();
  RLRP_CHECK(sizes_of(x) == shape, op, "x must have the shape of the convolution's input");
  a.conv.filters.absolute = a.conv.exact = a.conv.times_absolute = true;
  a.conv.times = a.data(x, true);
  a.add(other, x);
  Tensor result = new_image(x, shape, true);
  a.run_into(result);
  return result;
}

}  // namespace

void run_point(const Convolution& conv, const Tensor& model) { run_by(conv, Point{}, model); }

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) {
  m.impl("convolution", TORCH_BOX(&forward));
  m.impl("convolution_divide", TORCH_BOX(&divide));
  m.impl("convolution_product", TORCH_BOX(&product));
}

}  // namespace convolution
}  // namespace rlrp
