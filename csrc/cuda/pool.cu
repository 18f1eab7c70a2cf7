// Pooling, backwards, on the GPU: one thread per input element gathers what its windows send it, so
// there are no atomics and the order of additions is fixed.
#include "launch.h"
#include "pooling.h"

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

struct Cuda {
  template <class T>
  static void send(const Tensor& result, const Pooling& p, bool channels_last, const T* x, const T* r) {
    const OnDeviceOf device(result);
    const int64_t numel = result.numel();
    const unsigned blocks = blocks_for("max_pool", ceil_div(numel, kThreads));
    max_kernel<<<blocks, kThreads, 0, device.stream()>>>(p, channels_last, numel, x, r,
                                                         result_of<T>(result));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class T>
  static void spread(const Tensor& result, const Pooling& p, const AverageRule& rule,
                     bool channels_last, const T* r) {
    const OnDeviceOf device(result);
    const int64_t numel = result.numel();
    const unsigned blocks = blocks_for("avg_pool", ceil_div(numel, kThreads));
    average_kernel<<<blocks, kThreads, 0, device.stream()>>>(p, rule, channels_last, numel, r,
                                                             result_of<T>(result));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CUDA, m) {
  m.impl("max_pool", TORCH_BOX(&MaxPooling<Cuda>::windows));
  m.impl("adaptive_max_pool", TORCH_BOX(&MaxPooling<Cuda>::adaptive));
  m.impl("avg_pool", TORCH_BOX(&AveragePooling<Cuda>::windows));
  m.impl("adaptive_avg_pool", TORCH_BOX(&AveragePooling<Cuda>::adaptive));
}

}  // namespace rlrp
