// Pooling on the GPU. Backwards, one thread per input element gathers what its windows send it, so there
// are no atomics and the order of additions is fixed.
#include "launch.h"
#include "pooling.h"

namespace rlrp {
namespace {

// The element that a thread works on: its plane at the input and the output, and its place in the plane.
struct Place {
  int64_t in, out;  // offsets of the plane
  int64_t d, h, w;
};

// kOutput: the element is one of the output.
template <bool kOutput>
__device__ Place place_of(const Pooling& p, int64_t index, bool channels_last) {
  const int64_t size = kOutput ? p.out_plane() : p.in_plane();
  const int64_t height = kOutput ? p.axis[1].out : p.axis[1].in;
  const int64_t width = kOutput ? p.axis[2].out : p.axis[2].in;
  const int64_t lanes = channels_last ? p.channels : 1;
  const int64_t lane = index % lanes, plane = index / lanes / size, pixel = index / lanes % size;
  return {plane * p.in_plane() * lanes + lane, plane * p.out_plane() * lanes + lane,
          pixel / (width * height), pixel / width % height, pixel % width};
}

template <class T, class N>
__global__ void __launch_bounds__(kThreads)
    race_kernel(Pooling p, bool channels_last, int64_t numel, const T* x, T* y, N* winners) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= numel) return;
  const Place at = place_of<true>(p, index, channels_last);
  const auto won = winner(p, x + at.in, channels_last ? p.channels : 1, at.d, at.h, at.w);
  y[index] = won.value;
  winners[index] = static_cast<N>(won.number);
}

template <class T, class N>
__global__ void __launch_bounds__(kThreads)
    collect_kernel(Pooling p, bool channels_last, int64_t numel, const N* winners, const T* r,
                   T* result) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= numel) return;
  const Place at = place_of<false>(p, index, channels_last);
  const int64_t step = channels_last ? p.channels : 1;
  result[index] = narrow<T>(won(p, winners + at.out, r + at.out, step, at.d, at.h, at.w));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    average_kernel(Pooling p, AverageRule rule, bool channels_last, int64_t numel, const T* r,
                   T* result) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= numel) return;
  const Place at = place_of<false>(p, index, channels_last);
  const int64_t step = channels_last ? p.channels : 1;
  result[index] = narrow<T>(averaged(p, rule, r + at.out, step, at.d, at.h, at.w));
}

struct Cuda {
  template <class T, class N>
  static void race(const Tensor& y, const Tensor& winners, const Pooling& p, bool channels_last,
                   const T* x) {
    const OnDeviceOf device(y);
    const int64_t numel = y.numel();
    const unsigned blocks = blocks_for("max_pool", ceil_div(numel, kThreads));
    race_kernel<<<blocks, kThreads, 0, device.stream()>>>(p, channels_last, numel, x, result_of<T>(y),
                                                          result_of<N>(winners));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class T, class N>
  static void collect(const Tensor& result, const Pooling& p, bool channels_last, const N* winners,
                      const T* r) {
    const OnDeviceOf device(result);
    const int64_t numel = result.numel();
    const unsigned blocks = blocks_for("max_unpool", ceil_div(numel, kThreads));
    collect_kernel<<<blocks, kThreads, 0, device.stream()>>>(p, channels_last, numel, winners, r,
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
  m.impl("max_unpool", TORCH_BOX(&MaxPooling<Cuda>::unpool));
  m.impl("adaptive_max_pool", TORCH_BOX(&MaxPooling<Cuda>::adaptive));
  m.impl("adaptive_max_unpool", TORCH_BOX(&MaxPooling<Cuda>::adaptive_unpool));
  m.impl("avg_pool", TORCH_BOX(&AveragePooling<Cuda>::windows));
  m.impl("adaptive_avg_pool", TORCH_BOX(&AveragePooling<Cuda>::adaptive));
}

}  // namespace rlrp
