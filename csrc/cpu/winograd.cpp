// 3×3 convolutions of stride 1 over images in channels_last, and their input gradients, by Winograd's
// F(2×2, 3×3): 16 multiplications for every 4 outputs instead of 36 (Lavin and Gray, arXiv:1509.09308).
//
// An image is cut into patches of 4×4 that overlap by 2, one for each 2×2 outputs. Patches and filters are
// transformed to 16 numbers a channel; for each of the 16, a matrix product over the channels; and back.
// That is done for some of the filters and a block of patches at a time, few enough to stay in the caches.
#include <algorithm>
#include <numeric>
#include <tuple>

#include "simd.h"
#include "tensor.h"

namespace rlrp {
namespace {

constexpr int kPatch = 4;
constexpr int kStep = 2;  // from one patch to the next: the outputs of each
constexpr int kTerms = kPatch * kPatch;
constexpr int kColumns = 2;            // vectors of outputs that the matrix product holds at a time
constexpr int64_t kBlock = 48;         // patches at a time; a multiple of the rows below
constexpr int64_t kLeast = 8;          // patches that are worth a task of their own
constexpr int64_t kFilters = 1 << 20;  // elements of the filters that are transformed at a time
constexpr int64_t kMultiple = 32;      // channels come in multiples of it
constexpr int64_t kPad = 16;           // keeps the planes of a buffer out of each other's cache lines

template <int kLanes>
struct Lanes {
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
  typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
  static constexpr int kRows = kLanes == 16 ? 12 : 6;  // what the registers hold, times kColumns
  static constexpr int kFewRows = kRows / 3;           // at the end of a block
};
template <int kLanes>
using Vector = typename Lanes<kLanes>::Vector;

template <int kLanes>
RLRP_INLINE inline Vector<kLanes> load(const float* from) {
  return *reinterpret_cast<const typename Lanes<kLanes>::Unaligned*>(from);
}

template <int kLanes>
RLRP_INLINE inline void store(float* to, Vector<kLanes> value) {
  *reinterpret_cast<typename Lanes<kLanes>::Unaligned*>(to) = value;
}

template <class V>
RLRP_INLINE inline V magnitude(const V& v) {
  return v < 0 ? -v : v;
}

struct Image {
  int64_t channels, height, width;

  int64_t offset(int64_t n, int64_t h, int64_t w) const {
    return ((n * height + h) * width + w) * channels;
  }
  bool has(int64_t h, int64_t w) const { return h >= 0 && h < height && w >= 0 && w < width; }
};

struct Filters {
  const float* taps;
  int64_t out, in, down, along;  // strides
  const float* scale;            // of a filter, so of the outputs or, on the way back, of the inputs
  int64_t scale_out, scale_in;
  float* mass;  // Σ |tap| of each output
};

struct Convolution {
  Image in, out;
  int64_t batch, padding[2];
  int64_t down, along;  // patches of an image
  Filters filters;
  const float *x, *bias, *other;
  float* y;
  bool relu;
  // y becomes the product with what it was, times a factor for each sample.
  bool multiplies;
  const float* factor;
  float* mass;  // of each patch of it

  int64_t patches() const { return batch * down * along; }
};

struct Place {
  int64_t n, h, w;  // of a patch's first output
};

inline Place place(const Convolution& conv, int64_t patch) {
  const int64_t row = patch / conv.along;
  return {row / conv.down, row % conv.down * kStep, patch % conv.along * kStep};
}

// Some of the outputs.
struct Range {
  int64_t first, count;
};

// Filters, transformed: for each term (outputs / panel, in, panel), where a panel is what the matrix product
// holds. From one of the range to another.
template <int kLanes>
RLRP_INLINE inline void transform_filters(const Convolution& conv, const Range& range, int64_t first,
                                          int64_t last, float* result) {
  constexpr int kPanel = kColumns * kLanes;
  constexpr int kAhead = 8;  // inputs: their filters lie too far apart for the processor to foresee
  const Filters& f = conv.filters;
  const int64_t plane = conv.in.channels * range.count + kPad;
  for (int64_t k = first; k < last; k += kLanes) {
    const int64_t out = range.first + k;
    float* to = result + k / kPanel * kPanel * conv.in.channels + k % kPanel;
    Vector<kLanes> mass{};
    for (int64_t in = 0; in < conv.in.channels; ++in, to += kPanel) {
      const float* filters = f.taps + out * f.out + in * f.in;
      float scale[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        __builtin_prefetch(filters + lane * f.out + kAhead * f.in);
        scale[lane] = f.scale ? f.scale[(out + lane) * f.scale_out + in * f.scale_in] : 1.0f;
      }
      Vector<kLanes> tap[3][3], half[kPatch][3];
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
          float gathered[kLanes];
          for (int lane = 0; lane < kLanes; ++lane) {
            gathered[lane] = filters[lane * f.out + i * f.down + j * f.along];
          }
          tap[i][j] = load<kLanes>(gathered) * load<kLanes>(scale);
          mass += magnitude(tap[i][j]);
        }
      }
      for (int j = 0; j < 3; ++j) {
        const Vector<kLanes> ends = tap[0][j] + tap[2][j];
        half[0][j] = tap[0][j];
        half[1][j] = 0.5f * (ends + tap[1][j]);
        half[2][j] = 0.5f * (ends - tap[1][j]);
        half[3][j] = tap[2][j];
      }
      for (int i = 0; i < kPatch; ++i) {
        float* term = to + i * kPatch * plane;
        const Vector<kLanes> ends = half[i][0] + half[i][2];
        store<kLanes>(term, half[i][0]);
        store<kLanes>(term + plane, 0.5f * (ends + half[i][1]));
        store<kLanes>(term + 2 * plane, 0.5f * (ends - half[i][1]));
        store<kLanes>(term + 3 * plane, half[i][2]);
      }
    }
    if (f.mass) store<kLanes>(f.mass + out, mass);
  }
}

// A patch, transformed, into a row of each of 16 planes.
template <int kLanes>
RLRP_INLINE inline void transform_patch(const Convolution& conv, const Place& at, const float* zeros,
                                        float* result, int64_t plane) {
  const float* pixel[kPatch][kPatch];
  for (int i = 0; i < kPatch; ++i) {
    for (int j = 0; j < kPatch; ++j) {
      const int64_t h = at.h + i - conv.padding[0], w = at.w + j - conv.padding[1];
      pixel[i][j] = conv.in.has(h, w) ? conv.x + conv.in.offset(at.n, h, w) : zeros;
    }
  }
  for (int64_t c = 0; c < conv.in.channels; c += kLanes) {
    Vector<kLanes> half[kPatch][kPatch];
#pragma GCC unroll 4
    for (int j = 0; j < kPatch; ++j) {
      const Vector<kLanes> a = load<kLanes>(pixel[0][j] + c), b = load<kLanes>(pixel[1][j] + c);
      const Vector<kLanes> d = load<kLanes>(pixel[2][j] + c), e = load<kLanes>(pixel[3][j] + c);
      half[0][j] = a - d;
      half[1][j] = b + d;
      half[2][j] = d - b;
      half[3][j] = b - e;
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPatch; ++i) {
      float* term = result + i * kPatch * plane + c;
      store<kLanes>(term, half[i][0] - half[i][2]);
      store<kLanes>(term + plane, half[i][1] + half[i][2]);
      store<kLanes>(term + 2 * plane, half[i][2] - half[i][1]);
      store<kLanes>(term + 3 * plane, half[i][1] - half[i][3]);
    }
  }
}

// Some rows of a matrix product: (kRows, depth) times (depth, a panel).
template <int kLanes, int kRows>
RLRP_INLINE inline void multiply_rows(int64_t depth, const float* rows, const float* panel, float* result,
                                      int64_t result_step) {
  Vector<kLanes> sum[kRows][kColumns] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<kLanes> factor[kColumns];
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) factor[j] = load<kLanes>(panel + (k * kColumns + j) * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j) sum[r][j] += rows[r * depth + k] * factor[j];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) store<kLanes>(result + r * result_step + j * kLanes, sum[r][j]);
  }
}

// The outputs of a patch from its row of each plane.
template <int kLanes>
RLRP_INLINE inline void finish_patch(const Convolution& conv, const Range& range, int64_t patch,
                                     const float* rows, int64_t plane) {
  const Place at = place(conv, patch);
  const int64_t channels = conv.out.channels, start = conv.out.offset(at.n, at.h, at.w) + range.first;
  const float factor = conv.factor ? conv.factor[at.n] : 1.0f;
  Vector<kLanes> mass{};
  for (int64_t c = 0; c < range.count; c += kLanes) {
    Vector<kLanes> half[kStep][kPatch], y[kStep][kStep];
#pragma GCC unroll 4
    for (int j = 0; j < kPatch; ++j) {
      const float* term = rows + j * plane + c;
      const Vector<kLanes> a = load<kLanes>(term), b = load<kLanes>(term + kPatch * plane);
      const Vector<kLanes> d = load<kLanes>(term + 2 * kPatch * plane);
      half[0][j] = a + b + d;
      half[1][j] = b - d - load<kLanes>(term + 3 * kPatch * plane);
    }
    const Vector<kLanes> bias = conv.bias ? load<kLanes>(conv.bias + range.first + c) : Vector<kLanes>{};
#pragma GCC unroll 2
    for (int i = 0; i < kStep; ++i) {
      y[i][0] = half[i][0] + half[i][1] + half[i][2] + bias;
      y[i][1] = half[i][1] - half[i][2] - half[i][3] + bias;
#pragma GCC unroll 2
      for (int j = 0; j < kStep; ++j) {
        if (!conv.out.has(at.h + i, at.w + j)) continue;
        const int64_t offset = start + (i * conv.out.width + j) * channels + c;
        if (conv.other) y[i][j] += load<kLanes>(conv.other + offset);
        if (conv.relu) y[i][j] = y[i][j] < 0 ? Vector<kLanes>{} : y[i][j];  // a NaN stays
        if (conv.multiplies) {
          y[i][j] = y[i][j] * factor * load<kLanes>(conv.y + offset);
          mass += magnitude(y[i][j]);
        }
        store<kLanes>(conv.y + offset, y[i][j]);
      }
    }
  }
  if (conv.multiplies) {
    float sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += mass[lane];
    conv.mass[patch] += sum;
  }
}

// The patches from one to another, at most kBlock of them.
template <int kLanes>
RLRP_INLINE inline void convolve(const Convolution& conv, const Range& range, const float* filters,
                                 const float* zeros, int64_t first, int64_t last, float* patches,
                                 float* products) {
  constexpr int kRows = Lanes<kLanes>::kRows, kFew = Lanes<kLanes>::kFewRows, kPanel = kColumns * kLanes;
  const int64_t in = conv.in.channels, out = range.count;
  const int64_t patch_plane = kBlock * in + kPad, product_plane = kBlock * out + kPad;
  const int64_t filter_plane = in * out + kPad;
  for (int64_t k = first; k < last; ++k) {
    transform_patch<kLanes>(conv, place(conv, k), zeros, patches + (k - first) * in, patch_plane);
  }
  const int64_t count = last - first, rows = ceil_div(count, kFew) * kFew;
  for (int term = 0; term < kTerms; ++term) {
    float *from = patches + term * patch_plane, *to = products + term * product_plane;
    std::fill_n(from + count * in, (rows - count) * in, 0.0f);
    for (int64_t c = 0; c < out; c += kPanel) {
      const float* panel = filters + term * filter_plane + c * in;
      int64_t row = 0;
      for (; row + kRows <= rows; row += kRows) {
        multiply_rows<kLanes, kRows>(in, from + row * in, panel, to + row * out + c, out);
      }
      for (; row < rows; row += kFew) {
        multiply_rows<kLanes, kFew>(in, from + row * in, panel, to + row * out + c, out);
      }
    }
  }
  for (int64_t k = first; k < last; ++k) {
    finish_patch<kLanes>(conv, range, k, products + (k - first) * out, product_plane);
  }
}

void run(Convolution& conv, const Tensor& model) {
  conv.down = ceil_div(conv.out.height, kStep);
  conv.along = ceil_div(conv.out.width, kStep);
  const int64_t in = conv.in.channels, out = conv.out.channels;
  const int64_t most = std::clamp(kFilters / (kTerms * in) / kMultiple * kMultiple, kMultiple, out);
  // Each task works through blocks of patches with buffers of its own.
  const int64_t tasks = min64(torch::stable::get_num_threads(), ceil_div(conv.patches(), kLeast));
  const int64_t patches = kTerms * (kBlock * in + kPad), products = kTerms * (kBlock * most + kPad);
  const auto workspace = [&](int64_t size) {
    return torch::stable::empty({size}, ScalarType::Float, std::nullopt, model.device(), std::nullopt,
                                MemoryFormat::Contiguous);
  };
  Tensor filters = workspace(kTerms * (in * most + kPad)), buffers = workspace(tasks * (patches + products));
  float *filters_data = result_of<float>(filters), *buffers_data = result_of<float>(buffers);
  const std::vector<float> zeros(in, 0.0f);
  for (Range range{0, 0}; range.first < out; range.first += range.count) {
    range.count = min64(most, out - range.first);
    torch::stable::parallel_for(0, range.count / kMultiple, 1, [&](int64_t first, int64_t last) {
      simd::run_wide([&](auto lanes) RLRP_INLINE {
        transform_filters<lanes>(conv, range, first * kMultiple, last * kMultiple, filters_data);
      });
    });
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t first_task, int64_t last_task) {
      simd::run_wide([&](auto lanes) RLRP_INLINE {
        for (int64_t task = first_task; task < last_task; ++task) {
          float* buffer = buffers_data + task * (patches + products);
          const int64_t end = conv.patches() * (task + 1) / tasks;
          for (int64_t first = conv.patches() * task / tasks; first < end; first += kBlock) {
            convolve<lanes>(conv, range, filters_data, zeros.data(), first, min64(first + kBlock, end), buffer,
                            buffer + patches);
          }
        }
      });
    });
  }
}

// What the ops share: checks, and all that follows from the input, the filters and the padding.
struct Arguments {
  const char* op;
  Convolution conv{};
  std::vector<Tensor> kept;  // what the pointers point into

  Arguments(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
            const Ints& padding, bool transpose)
      : op(op) {
    RLRP_CHECK(x.scalar_type() == ScalarType::Float, op, "the image must have dtype float32");
    RLRP_CHECK(x.dim() == 4 && weight.dim() == 4, op, "the image and weight must have 4 axes");
    check_like(op, "weight", weight, "the image", x, false);
    RLRP_CHECK(weight.size(2) == 3 && weight.size(3) == 3, op, "weight must be of 3×3");
    RLRP_CHECK(weight.size(0) % kMultiple == 0 && weight.size(1) % kMultiple == 0 && weight.numel() > 0, op,
               "weight's channels must come in multiples of ", kMultiple);
    const int in_axis = transpose ? 0 : 1, out_axis = 1 - in_axis;
    RLRP_CHECK(x.size(1) == weight.size(in_axis), op, "the image must have the channels that weight reads");
    RLRP_CHECK(padding.size() == 2, op, "padding must have 2 elements");
    for (int i = 0; i < 2; ++i) {
      RLRP_CHECK(padding[i] >= 0 && padding[i] <= 2, op, "padding must be 0, 1 or 2");
      conv.padding[i] = transpose ? 2 - padding[i] : padding[i];
    }
    conv.batch = x.size(0);
    conv.in = {x.size(1), x.size(2), x.size(3)};
    conv.out = {weight.size(out_axis), conv.in.height + 2 * conv.padding[0] - 2,
                conv.in.width + 2 * conv.padding[1] - 2};
    RLRP_CHECK(conv.out.height >= 1 && conv.out.width >= 1, op,
               "the image, padded, must be as large as the filters");
    conv.x = data(x, true);
    conv.filters = {data_of<float>(weight), weight.stride(out_axis), weight.stride(in_axis),
                    weight.stride(2), weight.stride(3), vector("scale", scale, weight.size(0)),
                    transpose ? 0 : 1, transpose ? 1 : 0, nullptr};
    if (transpose) {  // the filters turned by half a turn
      conv.filters.taps += 2 * (weight.stride(2) + weight.stride(3));
      conv.filters.down = -weight.stride(2);
      conv.filters.along = -weight.stride(3);
    }
  }

  Ints shape() const { return {conv.batch, conv.out.channels, conv.out.height, conv.out.width}; }

  const float* data(const Tensor& t, bool channels_last) {
    return data_of<float>(kept.emplace_back(dense(t, channels_last)));
  }

  const float* vector(const char* name, const std::optional<Tensor>& v, int64_t count) {
    if (!v) return nullptr;
    check_like(op, name, *v, "the image", kept.front(), false);
    RLRP_CHECK(v->dim() == 1 && v->size(0) == count, op, name, " must have ", count, " elements");
    return data(*v, false);
  }
};

std::tuple<Tensor, Tensor> conv_3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
                                    const std::optional<Tensor>& bias, const std::optional<Tensor>& other,
                                    const Ints& padding, bool relu) {
  Arguments a("conv_3x3", x, weight, scale, padding, false);
  a.conv.bias = a.vector("bias", bias, weight.size(0));
  a.conv.relu = relu;
  Tensor y = new_image(x, a.shape(), true), mass = new_image(x, {weight.size(0)}, false);
  if (other) {
    check_like(a.op, "other", *other, "the result", y);
    a.conv.other = a.data(*other, true);
  }
  a.conv.y = result_of<float>(y);
  a.conv.filters.mass = result_of<float>(mass);
  run(a.conv, x);
  return {y, mass};
}

Tensor conv_3x3_transpose(const Tensor& g, const Tensor& weight, const std::optional<Tensor>& scale,
                          const Ints& padding) {
  Arguments a("conv_3x3_transpose", g, weight, scale, padding, true);
  Tensor result = new_image(g, a.shape(), true);
  a.conv.y = result_of<float>(result);
  run(a.conv, g);
  return result;
}

// x becomes factor · x ⊙ conv_3x3_transpose(g); returns the mass of it.
Tensor conv_3x3_product_(Tensor x, const Tensor& g, const Tensor& weight, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& factor, const Ints& padding) {
  Arguments a("conv_3x3_product_", g, weight, scale, padding, true);
  check_like(a.op, "x", x, "g", g, false);
  const Ints shape = a.shape();
  RLRP_CHECK(sizes_of(x) == shape, a.op, "x must have the shape of the convolution's input");
  RLRP_CHECK(dense_in(x, true), a.op, "x must be channels_last");
  a.conv.factor = a.vector("factor", factor, shape[0]);
  a.conv.multiplies = true;
  a.conv.y = result_of<float>(x);
  Tensor mass = new_masses(x);
  std::fill_n(result_of<float>(mass), shape[0], 0.0f);
  if (x.numel() == 0) return mass;
  RLRP_CHECK(x.const_data_ptr() != g.const_data_ptr(), a.op, "x and g must not be the same tensor");
  std::vector<float> masses(shape[0] * ceil_div(shape[2], kStep) * ceil_div(shape[3], kStep), 0.0f);
  a.conv.mass = masses.data();
  run(a.conv, g);
  const size_t patches = masses.size() / shape[0];
  for (int64_t n = 0; n < shape[0]; ++n) {  // in a fixed order, whatever the number of threads
    const auto first = masses.begin() + n * patches;
    result_of<float>(mass)[n] = static_cast<float>(std::accumulate(first, first + patches, 0.0));
  }
  return mass;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) {
  m.impl("conv_3x3", TORCH_BOX(&conv_3x3));
  m.impl("conv_3x3_transpose", TORCH_BOX(&conv_3x3_transpose));
  m.impl("conv_3x3_product_", TORCH_BOX(&conv_3x3_product_));
}

}  // namespace rlrp
