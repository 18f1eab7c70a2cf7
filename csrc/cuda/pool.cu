// Pooling, backwards, on the GPU: one thread per input element gathers what its windows send it, so
// there are no atomics and the order of additions is fixed.
#include "core/pooling.h"
#include "launch.h"

namespace rlrp {
namespace {

// The element that a thread works on: its plane in x and r, and its place in the plane.
struct Place {
  int64_t in, out;  // offsets of the plane
  int64_t d, h, w;
};

__device__ Place place_of(const Pooling& p, int64_t index, bool channels_last) {
  int64_t plane, pixel;
  Place place;
  if (channels_last) {
    const int64_t channel = index % p.channels, position = index / p.channels;
    plane = position / p.in_plane();
    pixel = position % p.in_plane();
    place.in = plane * p.in_plane() * p.channels + channel;
    place.out = plane * p.out_plane() * p.channels + channel;
  } else {
    plane = index / p.in_plane();
    pixel = index % p.in_plane();
    place.in = plane * p.in_plane();
    place.out = plane * p.out_plane();
  }
  place.w = pixel % p.axis[2].in;
  place.h = pixel / p.axis[2].in % p.axis[1].in;
  place.d = pixel / (p.axis[2].in * p.axis[1].in);
  return place;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    max_kernel(Pooling p, bool channels_last, int64_t numel, const T* x, const T* r, T* result) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= numel) return;
  const Place at = place_of(p, index, channels_last);
  const int64_t step = channels_last ? p.channels : 1;
  result[index] = narrow<T>(won(p, x + at.in, r + at.out, step, at.d, at.h, at.w));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    average_kernel(Pooling p, AverageRule rule, bool channels_last, int64_t numel, const T* r,
                   T* result) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= numel) return;
  const Place at = place_of(p, index, channels_last);
  const int64_t step = channels_last ? p.channels : 1;
  result[index] = narrow<T>(averaged(p, rule, r + at.out, step, at.d, at.h, at.w));
}

Tensor send_to_winners(const char* op, const Pooling& p, const Tensor& x, const Tensor& r) {
  check_like(op, "r", r, "x", x, false);
  const bool last = prefers_channels_last(x);
  const OnDeviceOf device(x);
  Tensor result = new_image(x, sizes_of(x), last);
  const int64_t numel = result.numel();
  if (numel == 0) return result;
  const Tensor in = dense(x, last), out = dense(r, last);
  dispatch(x.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    max_kernel<<<blocks_for(op, ceil_div(numel, kThreads)), kThreads, 0, device.stream()>>>(
        p, last, numel, static_cast<const T*>(in.const_data_ptr()),
        static_cast<const T*>(out.const_data_ptr()), static_cast<T*>(result.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

Tensor max_pool(const Tensor& x, const Tensor& r, const Ints& kernel, const Ints& stride,
                const Ints& padding, const Ints& dilation, bool ceil_mode) {
  const Pooling p = check_pooling("max_pool", sizes_of(x), r, kernel, stride, padding, dilation,
                                  ceil_mode);
  return send_to_winners("max_pool", p, x, r);
}

Tensor adaptive_max_pool(const Tensor& x, const Tensor& r) {
  return send_to_winners("adaptive_max_pool", check_adaptive("adaptive_max_pool", sizes_of(x), r), x,
                         r);
}

Tensor spread(const char* op, const Pooling& p, const AverageRule& rule, const Tensor& r,
              const Ints& shape) {
  const bool last = prefers_channels_last(r);
  const OnDeviceOf device(r);
  Tensor result = new_image(r, shape, last);
  const int64_t numel = result.numel();
  if (numel == 0) return result;
  const Tensor out = dense(r, last);
  dispatch(r.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    average_kernel<<<blocks_for(op, ceil_div(numel, kThreads)), kThreads, 0, device.stream()>>>(
        p, rule, last, numel, static_cast<const T*>(out.const_data_ptr()),
        static_cast<T*>(result.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

Tensor avg_pool(const Tensor& r, const Ints& input_shape, const Ints& kernel, const Ints& stride,
                const Ints& padding, bool ceil_mode, bool count_include_pad,
                std::optional<int64_t> divisor_override) {
  const AverageRule rule = check_average("avg_pool", count_include_pad, divisor_override);
  const Pooling p = check_pooling("avg_pool", input_shape, r, kernel, stride, padding,
                                  Ints(kernel.size(), 1), ceil_mode);
  return spread("avg_pool", p, rule, r, input_shape);
}

Tensor adaptive_avg_pool(const Tensor& r, const Ints& input_shape) {
  const Pooling p = check_adaptive("adaptive_avg_pool", input_shape, r);
  return spread("adaptive_avg_pool", p, {}, r, input_shape);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CUDA, m) {
  m.impl("max_pool", TORCH_BOX(&max_pool));
  m.impl("adaptive_max_pool", TORCH_BOX(&adaptive_max_pool));
  m.impl("avg_pool", TORCH_BOX(&avg_pool));
  m.impl("adaptive_avg_pool", TORCH_BOX(&adaptive_avg_pool));
}

}  // namespace rlrp
