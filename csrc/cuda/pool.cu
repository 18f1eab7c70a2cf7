// Pooling on the GPU. Backwards, a thread gathers what its elements' windows send them, so there are no
// atomics and the order of additions is fixed.
#include "core/pack.h"
#include "launch.h"
#include "pooling.h"

namespace rlrp {
namespace {

// How an image lies in memory, and how many channels a thread takes at once.
template <bool kLast, int V>
struct Lie {
  static constexpr bool channels_last = kLast;
  static constexpr int channels = V;
};

// Where a thread's elements are: their planes at the input and the output, their own offset there where
// they are walked, and their place in the plane.
struct Place {
  int64_t in, out, own;
  int64_t d, h, w;
};

// Calls body(place) for all elements of the output, or the input.
template <class L, bool kOutput, class Body>
__device__ void walk(const Pooling& p, int64_t numel, const Body& body) {
  const int64_t height = kOutput ? p.axis[1].out : p.axis[1].in;
  const int64_t width = kOutput ? p.axis[2].out : p.axis[2].in;
  if constexpr (L::channels_last) {
    // A block takes a row of pixels: most of the index arithmetic is then the same for all its threads.
    const int64_t row = blockIdx.x, depth = kOutput ? p.axis[0].out : p.axis[0].in;
    const int64_t h = row % height, d = row / height % depth, n = row / height / depth;
    const int64_t in = n * p.in_plane() * p.channels, out = n * p.out_plane() * p.channels;
    const int64_t packs = p.channels / L::channels;
    for (int64_t at = threadIdx.x; at < width * packs; at += kThreads) {
      const int64_t w = at / packs, lane = (at - w * packs) * L::channels;
      body(Place{in + lane, out + lane, (row * width + w) * p.channels + lane, d, h, w});
    }
  } else {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= numel) return;
    const int64_t size = kOutput ? p.out_plane() : p.in_plane();
    const int64_t plane = at / size, pixel = at - plane * size;
    body(Place{plane * p.in_plane(), plane * p.out_plane(), at, pixel / (width * height),
               pixel / width % height, pixel % width});
  }
}

// Between elements of a plane.
template <class L>
__device__ int64_t step_of(const Pooling& p) {
  return L::channels_last ? p.channels : 1;
}

template <class T, int V>
__device__ Pack<T, V> narrowed(const Pack<wide_t<T>, V>& sums) {
  Pack<T, V> pack;
  for (int v = 0; v < V; ++v) pack.at[v] = narrow<T>(sums.at[v]);
  return pack;
}

template <class L, class T, class N>
__global__ void __launch_bounds__(kThreads)
    race_kernel(Pooling p, int64_t numel, const T* x, T* y, N* winners) {
  walk<L, true>(p, numel, [&](const Place& at) {
    const auto found = winner<L::channels>(p, x + at.in, step_of<L>(p), at.d, at.h, at.w);
    Pack<N, L::channels> numbers;
    for (int v = 0; v < L::channels; ++v) numbers.at[v] = static_cast<N>(found.number[v]);
    store_pack(y + at.own, found.value);
    store_pack(winners + at.own, numbers);
  });
}

template <class L, class T, class N>
__global__ void __launch_bounds__(kThreads)
    collect_kernel(Pooling p, int64_t numel, const N* winners, const T* r, T* result) {
  walk<L, false>(p, numel, [&](const Place& at) {
    const auto sums =
        won<L::channels>(p, winners + at.out, r + at.out, step_of<L>(p), at.d, at.h, at.w);
    store_pack(result + at.own, narrowed<T>(sums));
  });
}

template <class L, class T>
__global__ void __launch_bounds__(kThreads)
    average_kernel(Pooling p, AverageRule rule, int64_t numel, const T* r, T* result) {
  walk<L, false>(p, numel, [&](const Place& at) {
    const auto sums =
        averaged<L::channels>(p, rule, r + at.out, step_of<L>(p), at.d, at.h, at.w);
    store_pack(result + at.own, narrowed<T>(sums));
  });
}

// Calls run(Lie, blocks) with what suits an image of that layout whose operands are at the addresses.
template <class T, class F>
void with_lie(const Tensor& image, bool channels_last, std::initializer_list<const void*> operands,
              const F& run) {
  constexpr int V = kElementsAtOnce<T>;
  const int64_t channels = image.size(1), last = image.size(image.dim() - 1);
  bool packs = channels % V == 0;
  for (const void* operand : operands) packs = packs && is_aligned(operand);
  const int64_t rows = image.numel() / (channels * last);
  if (!channels_last) {
    run(Lie<false, 1>{}, ceil_div(image.numel(), kThreads));
  } else if (packs) {
    run(Lie<true, V>{}, rows);
  } else {
    run(Lie<true, 1>{}, rows);
  }
}

struct Cuda {
  template <class T, class N>
  static void race(const Tensor& y, const Tensor& winners, const Pooling& p, bool channels_last,
                   const T* x) {
    const OnDeviceOf device(y);
    T* to = result_of<T>(y);
    N* numbers = result_of<N>(winners);
    with_lie<T>(y, channels_last, {x, to, numbers}, [&](auto lie, int64_t blocks) {
      launch("max_pool", race_kernel<decltype(lie), T, N>, blocks, device, p, y.numel(), x, to, numbers);
    });
  }

  template <class T, class N>
  static void collect(const Tensor& result, const Pooling& p, bool channels_last, const N* winners,
                      const T* r) {
    const OnDeviceOf device(result);
    T* to = result_of<T>(result);
    with_lie<T>(result, channels_last, {winners, r, to}, [&](auto lie, int64_t blocks) {
      launch("max_unpool", collect_kernel<decltype(lie), T, N>, blocks, device, p, result.numel(), winners,
             r, to);
    });
  }

  template <class T>
  static void spread(const Tensor& result, const Pooling& p, const AverageRule& rule,
                     bool channels_last, const T* r) {
    const OnDeviceOf device(result);
    T* to = result_of<T>(result);
    with_lie<T>(result, channels_last, {r, to}, [&](auto lie, int64_t blocks) {
      launch("avg_pool", average_kernel<decltype(lie), T>, blocks, device, p, rule, result.numel(), r, to);
    });
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
