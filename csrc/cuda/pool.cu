// Pooling on the GPU. Backwards, a thread gathers what its elements' windows send them, so there are no
// atomics and the order of additions is fixed.
#include "core/pack.h"
#include "launch.h"
#include "pooling.h"

namespace rlrp {
namespace {

using Windows = PoolingOf<int32_t>;

// How an image lies in memory, and how many channels a thread takes at once.
template <bool kLast, int V>
struct Layout {
  static constexpr bool channels_last = kLast;
  static constexpr int channels = V;
};

// Where a thread's elements are: their planes at the input and the output, their own offset there where
// they are walked, and their pixel in the plane.
struct Place {
  int64_t in, out, own;
  int32_t d, h, w;
};

// Calls body(place) for elements of the output, or the input, from a contiguous image's plane `first` on.
template <class L, bool kOutput, class Body>
__device__ void walk(const Windows& p, int64_t first, int32_t numel, const Body& body) {
  const int32_t height = kOutput ? p.axis[1].out : p.axis[1].in;
  const int32_t width = kOutput ? p.axis[2].out : p.axis[2].in;
  if constexpr (L::channels_last) {
    // A block takes a row of pixels: most of the index arithmetic is then the same for all its threads.
    const int32_t row = blockIdx.x, depth = kOutput ? p.axis[0].out : p.axis[0].in;
    const int32_t h = row % height, d = row / height % depth, n = row / height / depth;
    const int64_t in = n * (p.in_plane() * p.channels), out = n * (p.out_plane() * p.channels);
    const int64_t own = row * (width * p.channels);
    const int32_t packs = static_cast<int32_t>(p.channels) / L::channels;
    for (int32_t at = threadIdx.x; at < width * packs; at += kThreads) {
      const int32_t w = at / packs, lane = (at - w * packs) * L::channels;
      body(Place{in + lane, out + lane, own + int64_t{at} * L::channels, d, h, w});
    }
  } else {
    const int32_t at = blockIdx.x * kThreads + threadIdx.x;
    if (at >= numel) return;
    const int32_t size = kOutput ? p.out_plane() : p.in_plane();
    const int32_t plane = at / size, pixel = at - plane * size;
    const int32_t line = pixel / width;
    body(Place{(first + plane) * p.in_plane(), (first + plane) * p.out_plane(), first * size + at,
               line / height, line % height, pixel - line * width});
  }
}

// Between elements of a plane.
template <class L>
__device__ int64_t step_of(const Windows& p) {
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
    max_kernel(Windows p, int64_t first, int32_t numel, const T* x, T* y, N* winners) {
  walk<L, true>(p, first, numel, [&](const Place& at) {
    const auto found = winner<L::channels>(p, x + at.in, step_of<L>(p), at.d, at.h, at.w);
    Pack<N, L::channels> numbers;
    for (int v = 0; v < L::channels; ++v) numbers.at[v] = static_cast<N>(found.number[v]);
    store_pack(y + at.own, found.value);
    store_pack(winners + at.own, numbers);
  });
}

template <class L, class T, class N>
__global__ void __launch_bounds__(kThreads)
    unpool_kernel(Windows p, int64_t first, int32_t numel, const N* winners, const T* r, T* result) {
  walk<L, false>(p, first, numel, [&](const Place& at) {
    const auto sums =
        won<L::channels>(p, winners + at.out, r + at.out, step_of<L>(p), at.d, at.h, at.w);
    store_pack(result + at.own, narrowed<T>(sums));
  });
}

template <class L, class T>
__global__ void __launch_bounds__(kThreads)
    average_kernel(Windows p, AverageRule rule, int64_t first, int32_t numel, const T* r, T* result) {
  walk<L, false>(p, first, numel, [&](const Place& at) {
    const auto sums =
        averaged<L::channels>(p, rule, r + at.out, step_of<L>(p), at.d, at.h, at.w);
    store_pack(result + at.own, narrowed<T>(sums));
  });
}

// Calls run(Layout, windows, first plane, elements, blocks) with what suits an image of that layout whose operands are
// at the addresses; in parts, each small enough for 32 bits.
template <class T, class F>
void each_part(const char* op, const Tensor& image, const Pooling& pooling, bool channels_last,
               std::initializer_list<const void*> operands, const F& run) {
  constexpr int64_t kLargestImage = int64_t{1} << 30;
  constexpr int V = kElementsAtOnce<T>;
  Windows p{pooling.batch, pooling.channels, {}};
  for (int i = 0; i < 3; ++i) {
    RLRP_CHECK(pooling.axis[i].is_moderate(), op, "the windows or the image are too large");
    p.axis[i] = pooling.axis[i].as<int32_t>();
  }
  const int64_t pixels = max64(pooling.in_plane(), pooling.out_plane());
  RLRP_CHECK(pixels < kLargestImage, op, "the image is too large");
  const int64_t channels = pooling.channels, last = image.size(image.dim() - 1);
  if (channels_last) {
    RLRP_CHECK(last * channels < kLargestImage, op, "the image is too large");
    bool packs = channels % V == 0;
    for (const void* operand : operands) packs = packs && is_aligned(operand);
    const int64_t rows = image.numel() / (channels * last);
    packs ? run(Layout<true, V>{}, p, 0, 0, rows) : run(Layout<true, 1>{}, p, 0, 0, rows);
    return;
  }
  const int64_t planes = pooling.batch * channels, size = image.numel() / planes, most = max64(kMost / pixels, 1);
  for (int64_t first = 0; first < planes; first += most) {
    const int64_t numel = min64(most, planes - first) * size;
    run(Layout<false, 1>{}, p, first, static_cast<int32_t>(numel), ceil_div(numel, kThreads));
  }
}

struct Cuda {
  template <class T, class N>
  static void race(const Tensor& y, const Tensor& winners, const Pooling& p, bool channels_last,
                   const T* x) {
    const OnDeviceOf device(y);
    T* to = result_of<T>(y);
    N* numbers = result_of<N>(winners);
    each_part<T>("max_pool", y, p, channels_last, {x, to, numbers},
                 [&](auto layout, const Windows& windows, int64_t first, int32_t numel, int64_t blocks) {
                   launch("max_pool", max_kernel<decltype(layout), T, N>, blocks, device, windows, first,
                          numel, x, to, numbers);
                 });
  }

  template <class T, class N>
  static void collect(const Tensor& result, const Pooling& p, bool channels_last, const N* winners,
                      const T* r) {
    const OnDeviceOf device(result);
    T* to = result_of<T>(result);
    each_part<T>("max_unpool", result, p, channels_last, {winners, r, to},
                 [&](auto layout, const Windows& windows, int64_t first, int32_t numel, int64_t blocks) {
                   launch("max_unpool", unpool_kernel<decltype(layout), T, N>, blocks, device, windows,
                          first, numel, winners, r, to);
                 });
  }

  template <class T>
  static void spread(const Tensor& result, const Pooling& p, const AverageRule& rule,
                     bool channels_last, const T* r) {
    const OnDeviceOf device(result);
    T* to = result_of<T>(result);
    each_part<T>("avg_pool", result, p, channels_last, {r, to},
                 [&](auto layout, const Windows& windows, int64_t first, int32_t numel, int64_t blocks) {
                   launch("avg_pool", average_kernel<decltype(layout), T>, blocks, device, windows, rule,
                          first, numel, r, to);
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
