// The pooling ops: checks, layouts and results, the same on every device. `Device` does the work.
#pragma once

#include "core/pooling.h"
#include "tensor.h"

namespace rlrp {

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

// Device::send<T>(result, pooling, channels_last, x, r)
template <class Device>
struct MaxPooling {
  static Tensor send(const char* op, const Pooling& p, const Tensor& x, const Tensor& r) {
    check_like(op, "r", r, "x", x, false);
    const bool last = prefers_channels_last(x);
    Tensor result = new_image(x, sizes_of(x), last);
    if (result.numel() == 0) return result;
    const Tensor in = dense(x, last), out = dense(r, last);
    dispatch(x.scalar_type(), op, [&](auto zero) {
      using T = decltype(zero);
      Device::template send<T>(result, p, last, data_of<T>(in), data_of<T>(out));
    });
    return result;
  }

  static Tensor windows(const Tensor& x, const Tensor& r, const Ints& kernel, const Ints& stride,
                        const Ints& padding, const Ints& dilation, bool ceil_mode) {
    const Pooling p = check_pooling("max_pool", sizes_of(x), r, kernel, stride, padding, dilation,
                                    ceil_mode);
    return send("max_pool", p, x, r);
  }

  static Tensor adaptive(const Tensor& x, const Tensor& r) {
    const char* op = "adaptive_max_pool";
    return send(op, check_adaptive(op, sizes_of(x), r), x, r);
  }
};

// Device::spread<T>(result, pooling, rule, channels_last, r)
template <class Device>
struct AveragePooling {
  static Tensor spread(const char* op, const Pooling& p, const AverageRule& rule, const Tensor& r,
                       const Ints& shape) {
    const bool last = prefers_channels_last(r);
    Tensor result = new_image(r, shape, last);
    if (result.numel() == 0) return result;
    const Tensor out = dense(r, last);
    dispatch(r.scalar_type(), op, [&](auto zero) {
      using T = decltype(zero);
      Device::template spread<T>(result, p, rule, last, data_of<T>(out));
    });
    return result;
  }

  static Tensor windows(const Tensor& r, const Ints& input_shape, const Ints& kernel,
                        const Ints& stride, const Ints& padding, bool ceil_mode,
                        bool count_include_pad, std::optional<int64_t> divisor_override) {
    const char* op = "avg_pool";
    const AverageRule rule = check_average(op, count_include_pad, divisor_override);
    const Pooling p = check_pooling(op, input_shape, r, kernel, stride, padding,
                                    Ints(kernel.size(), 1), ceil_mode);
    return spread(op, p, rule, r, input_shape);
  }

  static Tensor adaptive(const Tensor& r, const Ints& input_shape) {
    const char* op = "adaptive_avg_pool";
    return spread(op, check_adaptive(op, input_shape, r), {}, r, input_shape);
  }
};

}  // namespace rlrp
