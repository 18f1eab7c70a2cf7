// Convolutions over images in channels_last, and their input gradients, with what follows applied on the way:
// by Winograd's algorithms for filters of 3×3 (convolution_square.h), of other sizes along both axes
// (convolution_area.h) or along one of them (convolution_line.h), and as they are for 1×1 (convolution_point.h), over
// few channels, and wherever an output must not be rounded by what it does not meet (convolution_direct.h).
//
// An image is cut into patches, one for every few outputs. By Winograd's algorithms, patches and filters are
// transformed to a few terms a channel; for each term, a matrix product over the channels; and back. That is
// done for some of the filters and a block of patches at a time, few enough to stay in the caches.
#include <algorithm>
#include <numeric>
#include <tuple>

#include "convolution_area.h"
#include "convolution_direct.h"
#include "convolution_line.h"
#include "convolution_point.h"
#include "convolution_square.h"

namespace rlrp {
namespace convolution {
namespace {

constexpr int64_t kLeast = 8;          // patches that are worth a task of their own
constexpr int64_t kFilters = 1 << 20;  // elements of the filters that are transformed at a time
constexpr int64_t kDepth = 128;        // summed at a time: it rounds less, and a panel of it stays near
constexpr int64_t kCached = 5 << 19;   // of a result that caches may still hold when it is read
constexpr int64_t kMultiple = 32;      // channels come in multiples of it
constexpr int64_t kMostTaps = 64;      // along an axis
constexpr int64_t kFewChannels = 4;    // of the input, as of an RGB image

// Some rows of a matrix product over some of the depth, which is added to what was found before.
template <int kLanes, int kCount>
RLRP_INLINE inline void multiply_rows(int64_t first, int64_t last, const float* rows, int64_t depth,
                                      const float* panel, float* result, int64_t result_step) {
  Vector<kLanes> sum[kCount][kColumns] = {};
  multiply<kLanes, kCount>(
      first, last, [&](int r, int64_t k) RLRP_INLINE { return rows[r * depth + k]; }, panel, sum);
#pragma GCC unroll 12
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) {
      float* to = result + r * result_step + j * kLanes;
      store<kLanes>(to, first ? load<kLanes>(to) + sum[r][j] : sum[r][j]);
    }
  }
}

// Where the terms of so many patches and filters lie.
template <class Scheme>
Planes<Scheme::kTerms> planes_of(const Convolution& conv, const Scheme& scheme, int64_t patches, int64_t filters) {
  Planes<Scheme::kTerms> planes{};
  for (int term = 0; term < Scheme::kTerms; ++term) {
    const int64_t depth = scheme.depth(term) * conv.in.channels;
    planes.depth[term] = depth;
    planes.patches[term + 1] = planes.patches[term] + patches * (depth + Scheme::kGap) + kPad;
    planes.filters[term + 1] = planes.filters[term] + filters * depth + kPad;
  }
  planes.products = kMost * filters + kPad;
  return planes;
}

// Transforms the patches from one to another to as many rows, and adds rows of zeros to a number that is
// multiplied at a time.
template <int kLanes, class Scheme>
RLRP_INLINE inline void transform(const Work& work, const Scheme& scheme, const Planes<Scheme::kTerms>& planes,
                                  int64_t first, int64_t last, int64_t row, float* patches) {
  for (int64_t k = first; k < last; ++k, ++row) {
    scheme.template transform_patch<kLanes>(work.conv, planes, work.grid.place(k), work.zeros, row, patches);
  }
  const int64_t more = ceil_div(row, kFewRows<kLanes>) * kFewRows<kLanes> - row;
  for (int term = 0; term < Scheme::kTerms; ++term) {
    const int64_t depth = planes.depth[term];
    std::fill_n(patches + planes.patches[term] + row * depth, more * depth, 0.0f);
  }
}

// Multiplies and finishes the patches from one to another, at most kMost of them, which begin at a row.
template <int kLanes, class Scheme>
RLRP_INLINE inline void finish(const Work& work, const Scheme& scheme, const Planes<Scheme::kTerms>& planes,
                               int64_t first, int64_t last, int64_t row, const float* patches, float* products) {
  constexpr int kMany = kRows<kLanes>, kFew = kFewRows<kLanes>;
  const int64_t out = work.range.count, count = last - first, rows = ceil_div(count, kFew) * kFew;
  for (int term = 0; term < Scheme::kTerms; ++term) {
    const int64_t depth = planes.depth[term];
    const float* from = patches + planes.patches[term] + row * depth;
    float* to = products + term * planes.products;
    for (int64_t c = 0; c < out; c += kPanel<kLanes>) {
      const float* panel = work.filters + planes.filters[term] + c * depth;
      for (int64_t start = 0; start == 0 || start < depth; start += kDepth) {  // once where there are none
        const int64_t end = min64(start + kDepth, depth);
        int64_t k = 0;
        for (; k + kMany <= rows; k += kMany) {
          multiply_rows<kLanes, kMany>(start, end, from + k * depth, depth, panel, to + k * out + c, out);
        }
        for (; k < rows; k += kFew) {
          multiply_rows<kLanes, kFew>(start, end, from + k * depth, depth, panel, to + k * out + c, out);
        }
      }
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    const Place at = work.grid.place(first + k);
    const float sum = scheme.template finish_patch<kLanes>(work.conv, planes, work.range, at, products + k * out);
    if (work.conv.sums) work.sums[first + k] += sum;
  }
}

// The patches from one to another, at most kMost of them.
template <int kLanes, class Scheme>
RLRP_INLINE inline void convolve(const Work& work, const Scheme& scheme, const Planes<Scheme::kTerms>& planes,
                                 int64_t first, int64_t last, float* buffer) {
  transform<kLanes>(work, scheme, planes, first, last, 0, buffer);
  finish<kLanes>(work, scheme, planes, first, last, 0, buffer, buffer + planes.patches[Scheme::kTerms]);
}

// Calls f with the number of each task, at most so many, and with where its share of `count` begins and ends.
template <class F>
void run_tasks(int64_t most, int64_t count, const F& f) {
  const int64_t tasks = min64(most, count);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first_task, int64_t last_task) {
    simd::run_wide([&](auto lanes) RLRP_INLINE {
      for (int64_t task = first_task; task < last_task; ++task) {
        f(lanes, task, count * task / tasks, count * (task + 1) / tasks);
      }
    });
    simd::end_stream();
  });
}

Tensor workspace(const Tensor& model, int64_t size) {
  return new_vector(model, size, ScalarType::Float);
}

// Adds sums of each patch, by one or several parts of the filters, to its sample's; always in the same order.
void add_up(const std::vector<float>& sums, const Grid& grid, const Convolution& conv) {
  const int64_t count = grid.count(1);
  for (auto sum = sums.begin(); sum != sums.end();) {
    for (int64_t n = 0; n < conv.batch; ++n, sum += count) {
      conv.sums[n] += std::accumulate(sum, sum + count, 0.0);
    }
  }
}

// Each task takes some patches; the filters are transformed, as many as the caches hold, for all of them.
template <class Scheme>
void run_by_patches(const Convolution& conv, const Scheme& scheme, const Grid& grid, const float* zeros,
                    const Tensor& model) {
  constexpr int kTerms = Scheme::kTerms;
  const int64_t out = conv.out.channels, count = grid.count(conv.batch);
  const int64_t threads = torch::stable::get_num_threads(), tasks = min64(threads, ceil_div(count, kLeast));
  const int64_t most = std::clamp(kFilters / planes_of(conv, scheme, 0, 1).filters[kTerms] / kMultiple * kMultiple,
                                  kMultiple, out);
  const Planes<kTerms> largest = planes_of(conv, scheme, kMost, most);
  const int64_t each = largest.patches[kTerms] + kTerms * largest.products;
  Tensor memory = workspace(model, largest.filters[kTerms] + tasks * each);
  float *filters = result_of<float>(memory), *buffers = filters + largest.filters[kTerms];
  std::vector<float> sums(conv.sums ? count : 0, 0.0f);
  for (Range range{0, 0}; range.first < out; range.first += range.count) {
    range.count = min64(most, out - range.first);
    const Planes<kTerms> planes = planes_of(conv, scheme, kMost, range.count);
    run_tasks(threads, range.count / kMultiple, [&](auto lanes, int64_t, int64_t first, int64_t last) RLRP_INLINE {
      scheme.template transform_filters<lanes>(conv, planes, range, first * kMultiple, last * kMultiple, filters);
    });
    const Work work{conv, grid, range, filters, zeros, sums.data()};
    run_tasks(tasks, count, [&](auto lanes, int64_t task, int64_t start, int64_t end) RLRP_INLINE {
      for (int64_t first = start, last = 0; first < end; first = last) {
        last = block_end(first, end);
        convolve<lanes>(work, scheme, planes, first, last, buffers + task * each);
      }
    });
  }
  add_up(sums, grid, conv);
}

// Each task takes some filters, and transforms them a few at a time; the patches are transformed for all of them.
template <class Scheme>
void run_by_filters(const Convolution& conv, const Scheme& scheme, const Grid& grid, const float* zeros,
                    const Tensor& model) {
  constexpr int kTerms = Scheme::kTerms;
  constexpr int64_t kGroup = kFewRows<16>;  // patches; of fewer lanes a multiple of their kFewRows
  const int64_t count = grid.count(conv.batch), groups = ceil_div(count, kGroup);
  const int64_t threads = torch::stable::get_num_threads(), parts = conv.out.channels / kMultiple;
  const int64_t shares = min64(ceil_div(threads, parts), groups);  // of the patches, by each part
  const Planes<kTerms> planes = planes_of(conv, scheme, groups * kGroup, kMultiple);
  const int64_t each = planes.filters[kTerms] + kTerms * planes.products;
  Tensor memory = workspace(model, planes.patches[kTerms] + min64(threads, parts * shares) * each);
  float *patches = result_of<float>(memory), *buffers = patches + planes.patches[kTerms];
  std::vector<float> sums(conv.sums ? parts * count : 0, 0.0f);
  const Work all{conv, grid, {}, nullptr, zeros, nullptr};
  run_tasks(threads, groups, [&](auto lanes, int64_t, int64_t start, int64_t end) RLRP_INLINE {
    const int64_t first = start * kGroup;
    transform<lanes>(all, scheme, planes, first, min64(end * kGroup, count), first, patches);
  });
  run_tasks(threads, parts * shares, [&](auto lanes, int64_t task, int64_t start, int64_t end) RLRP_INLINE {
    float *filters = buffers + task * each, *products = filters + planes.filters[kTerms];
    for (int64_t k = start; k < end; ++k) {
      const int64_t part = k / shares, share = k % shares;
      const Range range{part * kMultiple, kMultiple};
      if (k == start || share == 0) {
        scheme.template transform_filters<lanes>(conv, planes, range, 0, kMultiple, filters);
      }
      const Work work{conv, grid, range, filters, zeros, sums.data() + (conv.sums ? part * count : 0)};
      const int64_t stop = min64(groups * (share + 1) / shares * kGroup, count);
      for (int64_t first = groups * share / shares * kGroup, last = 0; first < stop; first = last) {
        last = block_end(first, stop);
        finish<lanes>(work, scheme, planes, first, last, first, patches, products);
      }
    }
  });
  add_up(sums, grid, conv);
}

template <class Scheme>
void run_by(const Convolution& conv, const Scheme& scheme, const Tensor& model) {
  const Grid grid(conv, scheme.outputs);
  const std::vector<float> zeros(conv.in.channels, 0.0f);
  if constexpr (Scheme::kTerms > 1) {  // whatever takes less memory transformed stays as a whole
    if (grid.count(conv.batch) <= conv.out.channels) {
      return run_by_filters(conv, scheme, grid, zeros.data(), model);
    }
  }
  run_by_patches(conv, scheme, grid, zeros.data(), model);
}

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
  if (conv.dividend) conv.dividend += start * out.step[axis];
  out.size[axis] = start < out.size[axis] ? ceil_div(out.size[axis] - start, stride) : 0;
  out.step[axis] *= stride;
  conv.filters.taps += (phase + stride * (taps - 1)) * conv.filters.step[axis];
  conv.filters.step[axis] *= -stride;
  conv.kernel[axis] = taps;
  conv.padding[axis] = taps - 1 - skipped;
  conv.stride[axis] = 1;
}

// By the scheme for filters of that size, of which conv may have a phase.
void run_one(const Convolution& conv, const int64_t (&kernel)[2], const Tensor& model) {
  if (kernel[0] == 1 && kernel[1] == 1) return run_by(conv, Point{}, model);
  if (conv.direct || conv.in.channels <= kFewChannels) return run_by(conv, Direct(conv.kernel), model);
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
      run_one(turned, conv.kernel, model);
    }
  }
}

// What the ops share: checks, and all that follows from the image, the filters, the stride and the padding.
struct Arguments {
  const char* op;
  bool transpose;
  Convolution conv{};
  std::vector<Tensor> kept;  // what the pointers point into

  // Of a transpose, the image is the gradient of the outputs, and `size` the inputs'.
  Arguments(const char* op, const Tensor& image, const Tensor& weight, const std::optional<Tensor>& scale,
            const Ints& stride, const Ints& padding, const Ints* size = nullptr)
      : op(op), transpose(size != nullptr) {
    RLRP_CHECK(image.scalar_type() == ScalarType::Float, op, "the image must have dtype float32");
    RLRP_CHECK(image.dim() == 4 && weight.dim() == 4, op, "the image and weight must have 4 axes");
    check_like(op, "weight", weight, "the image", image, false);
    const bool few = !transpose && weight.size(1) <= kFewChannels;
    RLRP_CHECK(weight.size(0) % kMultiple == 0 && (few || weight.size(1) % kMultiple == 0), op,
               "weight's channels must come in multiples of ", kMultiple, ", or be ", kFewChannels,
               " at most on the way in");
    RLRP_CHECK(weight.numel() > 0, op, "weight must not be empty");
    RLRP_CHECK(image.size(1) == weight.size(transpose ? 0 : 1), op,
               "the image must have the channels that weight reads");
    RLRP_CHECK(stride.size() == 2 && padding.size() == 2, op, "stride and padding must have 2 elements");
    std::copy_n(weight.sizes().begin() + 2, 2, conv.kernel);
    const auto [height, width] = conv.kernel;
    RLRP_CHECK(height <= kMostTaps && width <= kMostTaps, op, "weight must have at most ", kMostTaps,
               " taps along an axis");
    int64_t outputs[2];
    for (int i = 0; i < 2; ++i) {
      RLRP_CHECK(stride[i] >= 1 && stride[i] <= conv.kernel[i], op,
                 "stride must be from 1 to the number of taps along its axis");
      RLRP_CHECK(padding[i] >= 0 && padding[i] < conv.kernel[i], op, "padding must be less than the filters");
      conv.stride[i] = stride[i];
      conv.padding[i] = padding[i];
      const int64_t inputs = transpose ? (*size)[i] : image.size(2 + i);
      const int64_t room = inputs + 2 * padding[i] - conv.kernel[i];
      RLRP_CHECK(inputs >= 0 && room >= 0, op, "the image, padded, must be as large as the filters");
      outputs[i] = room / stride[i] + 1;
      RLRP_CHECK(!transpose || outputs[i] == image.size(2 + i), op,
                 "the image's size does not follow from the input's");
    }
    conv.batch = image.size(0);
    conv.in = Image::dense(image.size(1), image.size(2), image.size(3));
    conv.out = transpose ? Image::dense(weight.size(1), (*size)[0], (*size)[1])
                         : Image::dense(weight.size(0), outputs[0], outputs[1]);
    conv.x = data(image, true);
    const bool strewn = height * width == 1 && weight.stride(0) != 1 && weight.stride(1) != 1;
    const Tensor w = strewn ? kept.emplace_back(torch::stable::contiguous(weight)) : weight;
    conv.filters = {data_of<float>(w), w.stride(transpose), w.stride(!transpose), {w.stride(2), w.stride(3)},
                    vector("scale", scale, w.size(0)), false};
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

  void run_into(Tensor& y) {
    if (y.numel() == 0) return;
    conv.y = result_of<float>(y);
    conv.streams = y.numel() > kCached && simd::streams(conv.y);
    run(conv, transpose, y);
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
  if (other) {
    check_like(a.op, "other", *other, "the result", y);
    a.conv.other = a.data(*other, true);
  }
  Tensor before = a.run_and_sum_into(y);
  return {y, before};
}

// The two halves of the law, by |weight| and direct: s = r / convolution(x), for an x that is not negative, with the
// sums of |s| over each sample;
std::tuple<Tensor, Tensor> divide(const Tensor& r, const Tensor& x, const Tensor& weight, const Ints& stride,
                                  const Ints& padding) {
  Arguments a("convolution_divide", x, weight, std::nullopt, stride, padding);
  a.conv.filters.absolute = a.conv.direct = true;
  Tensor s = new_image(x, a.shape(), true);
  check_like(a.op, "r", r, "the result", s);
  a.conv.dividend = a.data(r, true);
  Tensor seen = a.run_and_sum_into(s);
  return {s, seen};
}

// and x ⊙ convolution_transpose(s).
Tensor product(const Tensor& x, const Tensor& s, const Tensor& weight, const Ints& stride, const Ints& padding) {
  const char* op = "convolution_product";
  RLRP_CHECK(x.dim() == 4, op, "x must have 4 axes");
  const Ints size = {x.size(2), x.size(3)};
  Arguments a(op, s, weight, std::nullopt, stride, padding, &size);
  check_like(op, "x", x, "s", s, false);
  const Ints shape = a.shape();
  RLRP_CHECK(sizes_of(x) == shape, op, "x must have the shape of the convolution's input");
  a.conv.filters.absolute = a.conv.direct = true;
  a.conv.times = a.data(x, true);
  Tensor result = new_image(x, shape, true);
  a.run_into(result);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) {
  m.impl("convolution", TORCH_BOX(&forward));
  m.impl("convolution_divide", TORCH_BOX(&divide));
  m.impl("convolution_product", TORCH_BOX(&product));
}

}  // namespace convolution
}  // namespace rlrp
