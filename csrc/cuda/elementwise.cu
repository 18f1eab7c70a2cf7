// product, accumulate and split on the GPU: one pass that writes the result and sums its absolute
// values. A block sums one piece of a sample; a second kernel adds the pieces in order, so the bits do
// not depend on the schedule.
#include <cstdint>

#include "elementwise.h"
#include "launch.h"

namespace rlrp {
namespace {

constexpr int kPerThread = 16;
constexpr int kPiece = kThreads * kPerThread;

// Sum over the block, in a fixed order; the result is right in thread 0.
__device__ double block_sum(double value) {
  __shared__ double warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  __syncthreads();  // the last sum's readers are done
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x < 32) {
    value = threadIdx.x < kThreads / 32 ? warps[threadIdx.x] : 0.0;
    for (int offset = kThreads / 64; offset > 0; offset /= 2) {
      value += __shfl_down_sync(0xffffffffu, value, offset);
    }
  }
  return value;
}

// One block per piece. `element(sample, offsets, masses)` computes one element and adds to the masses.
template <class A, int S, int K, class Element>
__global__ void __launch_bounds__(kThreads)
    sweep_kernel(Layout<K> layout, int64_t numel, int64_t pieces, double* partial, Element element) {
  const int64_t sample = blockIdx.x / pieces;
  const int64_t start = blockIdx.x % pieces * kPiece;
  const bool flat = layout.axes.rank <= 1;
  A masses[S] = {};
#pragma unroll 4
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t at = start + i * kThreads + threadIdx.x;
    if (at < numel) {
      int64_t offsets[K];
      if (flat) {
        for (int k = 0; k < K; ++k) offsets[k] = at * layout.axes.step(k);
      } else {
        layout.axes.offsets(at, offsets);
      }
      for (int k = 0; k < K; ++k) offsets[k] += sample * layout.batch_stride[k];
      element(sample, offsets, masses);
    }
  }
  for (int s = 0; s < S; ++s) {
    const double sum = block_sum(static_cast<double>(masses[s]));
    if (threadIdx.x == 0) partial[s * static_cast<int64_t>(gridDim.x) + blockIdx.x] = sum;
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    total_kernel(const double* partial, int64_t pieces, A* masses) {
  const double* mine = partial + blockIdx.x * pieces;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < pieces; i += kThreads) sum += mine[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) masses[blockIdx.x] = static_cast<A>(sum);
}

template <class A, int S, int K, class Element>
void sweep(const char* op, const Layout<K>& layout, const Tensor* const (&masses)[S],
           const Element& element) {
  if (layout.batch == 0) return;
  const OnDeviceOf device(*masses[0]);
  const int64_t numel = layout.numel();
  const int64_t pieces = ceil_div(numel, kPiece);
  const int64_t blocks = layout.batch * pieces;
  const Tensor partial = new_vector(*masses[0], S * blocks, ScalarType::Double);
  double* sums = static_cast<double*>(partial.mutable_data_ptr());
  if (blocks > 0) {
    sweep_kernel<A, S, K><<<blocks_for(op, blocks), kThreads, 0, device.stream()>>>(
        layout, numel, pieces, sums, element);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  for (int s = 0; s < S; ++s) {
    total_kernel<<<blocks_for(op, layout.batch), kThreads, 0, device.stream()>>>(
        sums + s * blocks, pieces, static_cast<A*>(masses[s]->mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <class T>
struct Product {
  T* q;
  const T* x;
  const T* g;
  const wide_t<T>* factor;

  __device__ void operator()(int64_t sample, const int64_t* o, wide_t<T>* mass) const {
    const T value = multiply(x[o[1]], g[o[2]], factor ? factor[sample] : wide_t<T>(1));
    q[o[0]] = value;
    mass[0] += absolute(widen(value));
  }
};

template <class T, bool kTwo>
struct Accumulate {
  T* r;
  Given<T, kTwo> given;

  __device__ void operator()(int64_t sample, const int64_t* o, wide_t<T>* mass) const {
    const T value = narrow<T>(given.at(sample, o[1], 1, o[2], 1).at(0));
    r[o[0]] = value;
    mass[0] += absolute(widen(value));
  }
};

template <class T, bool kTwo, bool kFromSum>
struct SplitElement {
  T* r_a;
  T* r_b;
  const T* a;
  const T* b;
  Given<T, kTwo> given;

  __device__ void operator()(int64_t sample, const int64_t* o, wide_t<T>* mass) const {
    const wide_t<T> r = given.at(sample, o[4], 1, o[5], 1).at(0);
    const Parts<T> part = divide<T, kFromSum>(r, a[o[2]], b[o[3]]);
    r_a[o[0]] = part.a;
    r_b[o[1]] = part.b;
    mass[0] += absolute(widen(part.a));
    mass[1] += absolute(widen(part.b));
  }
};

struct Cuda {
  template <class T>
  static void product(const Layout<3>& layout, const Tensor& s, T* q, const T* x, const T* g,
                      const wide_t<T>* factor) {
    sweep<wide_t<T>>("product", layout, {&s}, Product<T>{q, x, g, factor});
  }

  template <class T, bool kTwo>
  static void accumulate(const Layout<3>& layout, const Tensor& s, T* r,
                         const Given<T, kTwo>& given) {
    sweep<wide_t<T>>("accumulate", layout, {&s}, Accumulate<T, kTwo>{r, given});
  }

  template <class T, bool kTwo, bool kFromSum>
  static void split(const Layout<6>& layout, const Tensor& s_a, const Tensor& s_b, T* r_a, T* r_b,
                    const T* a, const T* b, const Given<T, kTwo>& given) {
    sweep<wide_t<T>>("split", layout, {&s_a, &s_b},
                     SplitElement<T, kTwo, kFromSum>{r_a, r_b, a, b, given});
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CUDA, m) {
  m.impl("product", TORCH_BOX(&Elementwise<Cuda>::product));
  m.impl("product_", TORCH_BOX(&Elementwise<Cuda>::product_));
  m.impl("accumulate", TORCH_BOX(&Elementwise<Cuda>::accumulate));
  m.impl("accumulate_", TORCH_BOX(&Elementwise<Cuda>::accumulate_));
  m.impl("split", TORCH_BOX(&Elementwise<Cuda>::split));
  m.impl("split_", TORCH_BOX(&Elementwise<Cuda>::split_));
}

}  // namespace rlrp
