// Between tensors and kernels: checks, dtype dispatch, layouts. Used by the CPU and the CUDA ops alike.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <optional>
#include <vector>

#include "core/axes.h"
#include "core/half.h"
#include "core/pooling.h"

#define RLRP_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, "captum_rlrp::", op, ": ", __VA_ARGS__)

namespace rlrp {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// Calls f(T{}) for the tensor's element type.
template <class F>
void dispatch(ScalarType dtype, const char* op, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(Float16{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      RLRP_CHECK(false, op, "needs float32, float64, float16 or bfloat16 tensors, not ",
                 torch::headeronly::toString(dtype));
  }
}

inline bool is_wide(ScalarType dtype) { return dtype == ScalarType::Double; }

inline ScalarType mass_type(ScalarType dtype) {
  return is_wide(dtype) ? ScalarType::Double : ScalarType::Float;
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t axis = 0; axis < a.dim(); ++axis) {
    if (a.size(axis) != b.size(axis)) return false;
  }
  return true;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// A batch-first tensor that the kernels can walk.
inline void check_first(const char* op, const char* name, const Tensor& t) {
  RLRP_CHECK(t.dim() >= 1 && t.dim() <= kMaxAxes, op, name, " must have 1 to ", kMaxAxes,
             " axes, not ", t.dim());
}

inline void check_like(const char* op, const char* name, const Tensor& t, const char* model_name,
                       const Tensor& model, bool same_shape = true) {
  RLRP_CHECK(same_device(t, model), op, name, " must be on the device of ", model_name);
  RLRP_CHECK(t.scalar_type() == model.scalar_type(), op, name, " must have the dtype of ",
             model_name, ", not ", torch::headeronly::toString(t.scalar_type()));
  RLRP_CHECK(!same_shape || same_sizes(t, model), op, name, " must have the shape of ", model_name);
}

inline void check_factor(const char* op, const char* name, const std::optional<Tensor>& factor,
                         const Tensor& t) {
  if (!factor) return;
  RLRP_CHECK(same_device(*factor, t), op, name, " must be on the device of its term");
  RLRP_CHECK(factor->scalar_type() == mass_type(t.scalar_type()), op, name, " must have dtype ",
             torch::headeronly::toString(mass_type(t.scalar_type())));
  RLRP_CHECK(factor->dim() == 1 && factor->size(0) == t.size(0), op, name,
             " must have one element per sample");
}

inline Tensor new_masses(const Tensor& t) {
  const int64_t batch = t.size(0);
  return torch::stable::new_empty(t, {&batch, 1}, mass_type(t.scalar_type()));
}


// Strides of the batch axis, and the layout of one sample, of tensors of one shape.
template <int K>
struct Layout {
  int64_t batch = 0;
  int64_t batch_stride[K] = {};
  Axes<K> axes;

  int64_t numel() const { return axes.numel(); }
};

template <class... Tensors>
Layout<sizeof...(Tensors)> layout_of(const Tensors&... tensors) {
  constexpr int K = sizeof...(Tensors);
  const Tensor* all[K] = {&tensors...};
  const int64_t* strides[K];
  Layout<K> layout;
  layout.batch = all[0]->size(0);
  for (int k = 0; k < K; ++k) {
    layout.batch_stride[k] = all[k]->stride(0);
    strides[k] = all[k]->strides().data() + 1;
  }
  layout.axes = simplify<K>(static_cast<int>(all[0]->dim() - 1), all[0]->sizes().data() + 1,
                            reinterpret_cast<const int64_t* const(&)[K]>(strides));
  return layout;
}

// ---- images: tensors (N, C, *spatial), contiguous or channels_last ----

inline bool dense_in(const Tensor& t, bool channels_last) {
  int64_t expected = 1;
  const int64_t rank = t.dim();
  if (channels_last && rank < 4) return false;
  auto axis_fits = [&](int64_t axis) {
    const bool fits = t.size(axis) == 1 || t.stride(axis) == expected;
    expected *= t.size(axis);
    return fits;
  };
  if (channels_last && !axis_fits(1)) return false;
  for (int64_t axis = rank - 1; axis >= (channels_last ? 2 : 1); --axis) {
    if (!axis_fits(axis)) return false;
  }
  return axis_fits(0);
}

// Tensors that are both (one channel, one pixel) count as contiguous.
inline bool prefers_channels_last(const Tensor& t) {
  return t.numel() > 0 && !dense_in(t, false) && dense_in(t, true);
}

inline MemoryFormat format_of(const Tensor& t, bool channels_last) {
  if (!channels_last) return MemoryFormat::Contiguous;
  return t.dim() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

inline Tensor dense(const Tensor& t, bool channels_last) {
  if (dense_in(t, channels_last)) return t;
  return torch::stable::contiguous(t, format_of(t, channels_last));
}

// An uninitialised image of the dtype and device of t.
inline Tensor new_image(const Tensor& t, const Ints& shape, bool channels_last) {
  return torch::stable::empty(shape, t.scalar_type(), std::nullopt, t.device(), std::nullopt,
                              format_of(t, channels_last));
}

inline Pooling check_images(const char* op, const Ints& shape, const Tensor& r) {
  const int64_t rank = static_cast<int64_t>(shape.size()) - 2;
  RLRP_CHECK(rank >= 1 && rank <= 3, op, "the input must be (N, C) and 1 to 3 spatial axes, not ",
             shape.size(), " axes");
  RLRP_CHECK(r.dim() == rank + 2, op, "r must have ", rank + 2, " axes, not ", r.dim());
  RLRP_CHECK(r.size(0) == shape[0] && r.size(1) == shape[1], op,
             "r must have the batch and channels of the input");
  Pooling pooling;
  pooling.batch = shape[0];
  pooling.channels = shape[1];
  for (int64_t i = 0; i < rank; ++i) {
    Window& window = pooling.axis[3 - rank + i];
    window.in = shape[i + 2];
    window.out = r.size(i + 2);
    RLRP_CHECK(window.in >= 1, op, "the input's spatial sizes must be positive");
    RLRP_CHECK(window.out >= 1, op, "r's spatial sizes must be positive");
  }
  return pooling;
}

inline Pooling check_pooling(const char* op, const Ints& shape, const Tensor& r, const Ints& kernel,
                             const Ints& stride, const Ints& padding, const Ints& dilation,
                             bool ceil_mode) {
  Pooling pooling = check_images(op, shape, r);
  const size_t rank = shape.size() - 2;
  RLRP_CHECK(kernel.size() == rank, op, "kernel must have ", rank, " elements");
  RLRP_CHECK(stride.size() == rank, op, "stride must have ", rank, " elements");
  RLRP_CHECK(padding.size() == rank, op, "padding must have ", rank, " elements");
  RLRP_CHECK(dilation.size() == rank, op, "dilation must have ", rank, " elements");
  constexpr int64_t limit = int64_t{1} << 31;  // keeps products of two of them inside int64
  for (size_t i = 0; i < rank; ++i) {
    Window& window = pooling.axis[3 - rank + i];
    RLRP_CHECK(kernel[i] >= 1 && kernel[i] < limit, op, "kernel must be positive");
    RLRP_CHECK(stride[i] >= 1 && stride[i] < limit, op, "stride must be positive");
    RLRP_CHECK(dilation[i] >= 1 && dilation[i] < limit, op, "dilation must be positive");
    RLRP_CHECK(padding[i] >= 0 && padding[i] <= kernel[i] / 2, op,
               "padding must be between 0 and half the kernel");
    window.kernel = kernel[i];
    window.stride = stride[i];
    window.padding = padding[i];
    window.dilation = dilation[i];
    RLRP_CHECK(window.expected_out(ceil_mode) == window.out, op, "r's spatial size ", i, " is ",
               window.out, ", but the window gives ", window.expected_out(ceil_mode));
    for (int64_t o = 0; o < window.out; ++o) {
      const Span span = window.inputs(o);
      RLRP_CHECK(span.begin < span.end, op, "kernel: a window lies wholly in the padding");
    }
  }
  return pooling;
}

inline Pooling check_adaptive(const char* op, const Ints& shape, const Tensor& r) {
  Pooling pooling = check_images(op, shape, r);
  for (Window& window : pooling.axis) window.adaptive = true;
  return pooling;
}

inline AverageRule check_average(const char* op, bool count_include_pad,
                                 std::optional<int64_t> divisor_override) {
  RLRP_CHECK(!divisor_override || *divisor_override != 0, op, "divisor_override must not be zero");
  return {count_include_pad, divisor_override.value_or(0)};
}

inline Ints sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Ints(sizes.begin(), sizes.end());
}

}  // namespace rlrp
