// The pooling ops: checks, layouts and results, the same on every device. `Device` does the work.
#pragma once

#include "core/pooling.h"
#include "tensor.h"

namespace rlrp {

constexpr int64_t kLargest = int64_t{1} << 31;  // keeps products of two sizes inside int64

inline Pooling check_images(const char* op, const Ints& shape) {
  const size_t rank = shape.size() < 2 ? 0 : shape.size() - 2;
  RLRP_CHECK(rank >= 1 && rank <= 3, op, "the input must be (N, C) and 1 to 3 spatial axes, not ",
             shape.size(), " axes");
  Pooling pooling;
  pooling.batch = shape[0];
  pooling.channels = shape[1];
  for (size_t i = 0; i < rank; ++i) {
    pooling.axis[3 - rank + i].in = shape[i + 2];
    RLRP_CHECK(shape[i + 2] >= 1 && shape[i + 2] < kLargest, op,
               "the input's spatial sizes must be positive");
  }
  return pooling;
}

inline Pooling check_windows(const char* op, const Ints& shape, const Ints& kernel, const Ints& stride,
                             const Ints& padding, const Ints& dilation, bool ceil_mode) {
  Pooling pooling = check_images(op, shape);
  const size_t rank = shape.size() - 2;
  RLRP_CHECK(kernel.size() == rank, op, "kernel must have ", rank, " elements");
  RLRP_CHECK(stride.size() == rank, op, "stride must have ", rank, " elements");
  RLRP_CHECK(padding.size() == rank, op, "padding must have ", rank, " elements");
  RLRP_CHECK(dilation.size() == rank, op, "dilation must have ", rank, " elements");
  for (size_t i = 0; i < rank; ++i) {
    Window& window = pooling.axis[3 - rank + i];
    RLRP_CHECK(kernel[i] >= 1 && kernel[i] < kLargest, op, "kernel must be positive");
    RLRP_CHECK(stride[i] >= 1 && stride[i] < kLargest, op, "stride must be positive");
    RLRP_CHECK(dilation[i] >= 1 && dilation[i] < kLargest, op, "dilation must be positive");
    RLRP_CHECK(padding[i] >= 0 && padding[i] <= kernel[i] / 2, op,
               "padding must be between 0 and half the kernel");
    window.kernel = kernel[i];
    window.stride = stride[i];
    window.padding = padding[i];
    window.dilation = dilation[i];
    window.out = window.expected_out(ceil_mode);
    RLRP_CHECK(window.out >= 1, op, "kernel: the window is larger than the input along spatial axis ", i);
  }
  return pooling;
}

// Once the output is known to be a tensor's size, and no arbitrary number.
inline void check_reach(const char* op, const Pooling& pooling) {
  for (const Window& window : pooling.axis) {
    for (int64_t o = 0; o < window.out; ++o) {
      const Span span = window.inputs(o);
      RLRP_CHECK(span.begin < span.end, op, "kernel: a window lies wholly in the padding");
    }
  }
}

inline Pooling check_adaptive(const char* op, const Ints& shape, const Ints& output_size) {
  Pooling pooling = check_images(op, shape);
  const size_t rank = shape.size() - 2;
  RLRP_CHECK(output_size.size() == rank, op, "the output must have ", rank, " spatial axes");
  for (size_t i = 0; i < rank; ++i) {
    Window& window = pooling.axis[3 - rank + i];
    RLRP_CHECK(output_size[i] >= 1 && output_size[i] < kLargest, op,
               "the output's spatial sizes must be positive");
    window.out = output_size[i];
    window.adaptive = true;
  }
  return pooling;
}

inline Ints spatial_sizes_of(const Tensor& t) {
  const Ints sizes = sizes_of(t);
  return sizes.size() < 2 ? Ints() : Ints(sizes.begin() + 2, sizes.end());
}

// That a tensor has the pooling's output shape.
inline void check_output(const char* op, const char* name, const Tensor& t, const Ints& shape,
                         const Pooling& pooling) {
  const int64_t rank = static_cast<int64_t>(shape.size()) - 2;
  RLRP_CHECK(t.dim() == rank + 2, op, name, " must have ", rank + 2, " axes, not ", t.dim());
  RLRP_CHECK(t.size(0) == shape[0] && t.size(1) == shape[1], op, name,
             " must have the batch and channels of the input");
  for (int64_t i = 0; i < rank; ++i) {
    const int64_t expected = pooling.axis[3 - rank + i].out;
    RLRP_CHECK(t.size(i + 2) == expected, op, name, "'s spatial size ", i, " is ", t.size(i + 2),
               ", but the window gives ", expected);
  }
  check_reach(op, pooling);
}

inline Ints output_shape(const Ints& shape, const Pooling& pooling) {
  Ints result = shape;
  for (size_t i = 2; i < shape.size(); ++i) result[i] = pooling.axis[i + 3 - shape.size()].out;
  return result;
}

inline AverageRule check_average(const char* op, bool count_include_pad,
                                 std::optional<int64_t> divisor_override) {
  RLRP_CHECK(!divisor_override || *divisor_override != 0, op, "divisor_override must not be zero");
  return {count_include_pad, divisor_override.value_or(0)};
}

// Device::race<T, N>(y, winners, pooling, channels_last, x)
// Device::collect<T, N>(result, pooling, channels_last, winners, r)
template <class Device>
struct MaxPooling {
  // A winner's number is stored in a byte where the windows are small. Adaptive ones may be any size.
  static ScalarType number_type(const char* op, const Pooling& p) {
    bool small = true;
    int64_t count = 1;
    for (const Window& window : p.axis) {
      small = small && !window.adaptive && window.kernel <= 256;
      count *= small ? window.kernel : 1;
    }
    RLRP_CHECK(p.most_inputs() < kLargest, op, "the windows are too large");
    return small && count <= 256 ? ScalarType::Byte : ScalarType::Int;
  }

  template <class F>
  static void dispatch_both(const char* op, ScalarType dtype, ScalarType number, F f) {
    dispatch(dtype, op, [&](auto zero) {
      number == ScalarType::Byte ? f(zero, uint8_t{}) : f(zero, int32_t{});
    });
  }

  static std::tuple<Tensor, Tensor> race(const char* op, const Pooling& p, const Tensor& x) {
    check_reach(op, p);
    const bool last = prefers_channels_last(x);
    const Ints shape = output_shape(sizes_of(x), p);
    const ScalarType number = number_type(op, p);
    Tensor y = new_image(x, shape, last), winners = new_image(x, shape, last, number);
    if (y.numel() == 0) return {y, winners};
    const Tensor in = dense(x, last);
    dispatch_both(op, x.scalar_type(), number, [&](auto zero, auto none) {
      using T = decltype(zero);
      using N = decltype(none);
      Device::template race<T, N>(y, winners, p, last, data_of<T>(in));
    });
    return {y, winners};
  }

  static Tensor collect(const char* op, const Pooling& p, const Tensor& r, const Tensor& winners,
                        const Ints& shape) {
    const ScalarType number = number_type(op, p);
    check_output(op, "r", r, shape, p);
    check_output(op, "winners", winners, shape, p);
    RLRP_CHECK(same_device(winners, r), op, "winners must be on the device of r");
    RLRP_CHECK(winners.scalar_type() == number, op, "winners must be what max_pool returned");
    const bool last = prefers_channels_last(r);
    Tensor result = new_image(r, shape, last);
    if (result.numel() == 0) return result;
    const Tensor out = dense(r, last), won = dense(winners, last);
    dispatch_both(op, r.scalar_type(), number, [&](auto zero, auto none) {
      using T = decltype(zero);
      using N = decltype(none);
      Device::template collect<T, N>(result, p, last, data_of<N>(won), data_of<T>(out));
    });
    return result;
  }

  static std::tuple<Tensor, Tensor> windows(const Tensor& x, const Ints& kernel, const Ints& stride,
                                            const Ints& padding, const Ints& dilation,
                                            bool ceil_mode) {
    const char* op = "max_pool";
    return race(op, check_windows(op, sizes_of(x), kernel, stride, padding, dilation, ceil_mode), x);
  }

  static Tensor unpool(const Tensor& r, const Tensor& winners, const Ints& input_shape,
                       const Ints& kernel, const Ints& stride, const Ints& padding,
                       const Ints& dilation, bool ceil_mode) {
    const char* op = "max_unpool";
    const Pooling p = check_windows(op, input_shape, kernel, stride, padding, dilation, ceil_mode);
    return collect(op, p, r, winners, input_shape);
  }

  static std::tuple<Tensor, Tensor> adaptive(const Tensor& x, const Ints& output_size) {
    const char* op = "adaptive_max_pool";
    return race(op, check_adaptive(op, sizes_of(x), output_size), x);
  }

  static Tensor adaptive_unpool(const Tensor& r, const Tensor& winners, const Ints& input_shape) {
    const char* op = "adaptive_max_unpool";
    return collect(op, check_adaptive(op, input_shape, spatial_sizes_of(r)), r, winners, input_shape);
  }
};

// Device::spread<T>(result, pooling, rule, channels_last, r)
template <class Device>
struct AveragePooling {
  static Tensor spread(const char* op, const Pooling& p, const AverageRule& rule, const Tensor& r,
                       const Ints& shape) {
    check_output(op, "r", r, shape, p);
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
    const Pooling p = check_windows(op, input_shape, kernel, stride, padding, Ints(kernel.size(), 1),
                                    ceil_mode);
    return spread(op, p, rule, r, input_shape);
  }

  static Tensor adaptive(const Tensor& r, const Ints& input_shape) {
    const char* op = "adaptive_avg_pool";
    return spread(op, check_adaptive(op, input_shape, spatial_sizes_of(r)), {}, r, input_shape);
  }
};

}  // namespace rlrp
