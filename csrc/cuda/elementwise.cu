// product, accumulate, split and finish on the GPU: one pass that writes the result and sums absolute
// values. A block sums one piece of a sample; a second kernel adds the pieces in order, so the bits do
// not depend on the schedule.
#include <cstdint>

#include "core/pack.h"
#include "elementwise.h"
#include "launch.h"

namespace rlrp {
namespace {

// A thread moves this much of every operand.
constexpr int kBytesOfThread = 64;

template <class T>
constexpr int kPiece = kThreads * kBytesOfThread / static_cast<int>(sizeof(T));

// ---- packs ----

// Where those of a pack lie in each of K operands.
template <int K>
struct Where {
  int64_t sample;
  int64_t offset[K];
  bool repeats[K];  // one element stands for all of the pack
};

template <int V, class T, int K>
__device__ Pack<T, V> load(const T* data, const Where<K>& where, int k) {
  const T* from = data + where.offset[k];
  if (V > 1 && !where.repeats[k]) return load_pack<V>(from);
  Pack<T, V> pack;
  for (int i = 0; i < V; ++i) pack.at[i] = *from;
  return pack;
}

template <class T, int V, int K>
__device__ void store(T* data, const Where<K>& where, int k, const Pack<T, V>& pack) {
  store_pack(data + where.offset[k], pack);
}

// Whether packs of V elements lie side by side in every operand, where those can be read at once.
template <int V, int K>
bool comes_in_packs(const Layout<K>& layout, const void* const (&operands)[K]) {
  if (layout.axes.rank == 0 || layout.axes.row() % V != 0) return false;
  for (int k = 0; k < K; ++k) {
    const int64_t step = layout.axes.step(k);
    if (step == 0) continue;
    if (step != 1 || !is_aligned(operands[k])) return false;
    if (layout.batch > 1 && layout.batch_stride[k] % V != 0) return false;
    for (int axis = 0; axis < layout.axes.rank - 1; ++axis) {
      if (layout.axes.stride[k][axis] % V != 0) return false;
    }
  }
  return true;
}

// ---- sweeps ----

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

// The S masses of every sample.
template <class A, int S>
struct Masses {
  A* of[S];
};

// One block per piece. `element.run<V>(where, masses)` computes a pack and adds to the masses.
template <class T, int S, int K, int V, class Element>
__global__ void __launch_bounds__(kThreads)
    sweep_kernel(Layout<K> layout, int64_t numel, int64_t pieces, double* partial,
                 Masses<wide_t<T>, S> masses, Element element) {
  Where<K> where;
  where.sample = blockIdx.x / pieces;
  const int64_t start = blockIdx.x % pieces * kPiece<T>;
  const bool flat = layout.axes.rank <= 1;
  for (int k = 0; k < K; ++k) where.repeats[k] = layout.axes.step(k) == 0;
  wide_t<T> sums[S] = {};
#pragma unroll 4
  for (int i = 0; i < kPiece<T> / (kThreads * V); ++i) {
    const int64_t at = start + (i * kThreads + static_cast<int64_t>(threadIdx.x)) * V;
    if (at < numel) {
      if (flat) {
        for (int k = 0; k < K; ++k) where.offset[k] = at * layout.axes.step(k);
      } else {
        layout.axes.offsets(at, where.offset);
      }
      for (int k = 0; k < K; ++k) where.offset[k] += where.sample * layout.batch_stride[k];
      element.template run<V>(where, sums);
    }
  }
  for (int s = 0; s < S; ++s) {
    const double sum = block_sum(static_cast<double>(sums[s]));
    if (threadIdx.x != 0) continue;
    if (pieces == 1) {
      masses.of[s][where.sample] = static_cast<wide_t<T>>(sum);
    } else {
      partial[s * static_cast<int64_t>(gridDim.x) + blockIdx.x] = sum;
    }
  }
}

// One block per mass and sample.
template <class A, int S>
__global__ void __launch_bounds__(kThreads)
    total_kernel(const double* partial, int64_t pieces, int64_t batch, Masses<A, S> masses) {
  const double* mine = partial + blockIdx.x * pieces;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < pieces; i += kThreads) sum += mine[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) masses.of[blockIdx.x / batch][blockIdx.x % batch] = static_cast<A>(sum);
}

// The operands' addresses are in the order of the layout.
template <class T, int S, int K, class Element>
void sweep(const char* op, const Layout<K>& layout, const Tensor* const (&results)[S],
           const void* const (&operands)[K], const Element& element) {
  using A = wide_t<T>;
  if (layout.batch == 0) return;
  const OnDeviceOf device(*results[0]);
  const int64_t numel = layout.numel();
  const int64_t pieces = numel == 0 ? 1 : ceil_div(numel, kPiece<T>);
  const int64_t blocks = layout.batch * pieces;
  Masses<A, S> masses;
  for (int s = 0; s < S; ++s) masses.of[s] = result_of<A>(*results[s]);
  const Tensor partial = new_vector(*results[0], pieces == 1 ? 0 : S * blocks, ScalarType::Double);
  double* sums = result_of<double>(partial);
  constexpr int V = kElementsAtOnce<T>;
  const auto kernel = comes_in_packs<V>(layout, operands) ? sweep_kernel<T, S, K, V, Element>
                                                          : sweep_kernel<T, S, K, 1, Element>;
  launch(op, kernel, blocks, device, layout, numel, pieces, sums, masses, element);
  if (pieces == 1) return;
  launch(op, total_kernel<A, S>, S * layout.batch, device, sums, pieces, layout.batch, masses);
}

// ---- what is computed ----

template <class T>
struct Product {
  T* q;
  const T* x;
  const T* g;
  const wide_t<T>* factor;

  template <int V>
  __device__ void run(const Where<3>& where, wide_t<T>* mass) const {
    const wide_t<T> f = factor ? factor[where.sample] : wide_t<T>(1);
    const auto xs = load<V>(x, where, 1), gs = load<V>(g, where, 2);
    Pack<T, V> qs;
    for (int i = 0; i < V; ++i) {
      qs.at[i] = multiply(xs.at[i], gs.at[i], f);
      mass[0] += absolute(widen(qs.at[i]));
    }
    store(q, where, 0, qs);
  }
};

template <int V, class T, bool kTwo, int K>
__device__ Pack<wide_t<T>, V> load_terms(const Given<T, kTwo>& given, const Where<K>& where, int k) {
  const auto ts = load<V>(given.t, where, k);
  Pack<T, V> us = {};
  if constexpr (kTwo) us = load<V>(given.u, where, k + 1);
  const Terms<T, kTwo> terms = given.of(where.sample, ts.at, 1, us.at, 1);
  Pack<wide_t<T>, V> sums;
  for (int i = 0; i < V; ++i) sums.at[i] = terms.at(i);
  return sums;
}

template <class T, bool kTwo>
struct Accumulate {
  T* r;
  Given<T, kTwo> given;

  template <int V>
  __device__ void run(const Where<3>& where, wide_t<T>* mass) const {
    const auto sums = load_terms<V>(given, where, 1);
    Pack<T, V> rs;
    for (int i = 0; i < V; ++i) {
      rs.at[i] = narrow<T>(sums.at[i]);
      mass[0] += absolute(widen(rs.at[i]));
    }
    store(r, where, 0, rs);
  }
};

template <class T, bool kTwo, bool kFromSum>
struct SplitElement {
  T* r_a;
  T* r_b;
  const T* a;
  const T* b;
  Given<T, kTwo> given;

  template <int V>
  __device__ void run(const Where<6>& where, wide_t<T>* mass) const {
    const auto as = load<V>(a, where, 2), bs = load<V>(b, where, 3);
    const auto sums = load_terms<V>(given, where, 4);
    Pack<T, V> to_a, to_b;
    for (int i = 0; i < V; ++i) {
      const Parts<T> part = divide<T, kFromSum>(sums.at[i], as.at[i], bs.at[i]);
      to_a.at[i] = part.a;
      to_b.at[i] = part.b;
      mass[0] += absolute(widen(part.a));
      mass[1] += absolute(widen(part.b));
    }
    store(r_a, where, 0, to_a);
    store(r_b, where, 1, to_b);
  }
};

template <class T>
struct Finish {
  T* y;
  const T* other;
  const wide_t<T>* scale;
  const wide_t<T>* shift;
  bool relu;

  template <int V>
  __device__ void run(const Where<4>& where, wide_t<T>* mass) const {
    auto ys = load<V>(y, where, 0);
    Pack<T, V> others = {};
    Pack<wide_t<T>, V> scales, shifts = {};
    for (int i = 0; i < V; ++i) scales.at[i] = 1;
    if (other) others = load<V>(other, where, 1);
    if (scale) scales = load<V>(scale, where, 2);
    if (shift) shifts = load<V>(shift, where, 3);
    for (int i = 0; i < V; ++i) {
      const wide_t<T> more = other ? widen(others.at[i]) : wide_t<T>(0);
      const T value = narrow<T>(widen(ys.at[i]) * scales.at[i] + shifts.at[i] + more);
      mass[0] += absolute(widen(value));  // in which an overflow is to show
      ys.at[i] = relu ? rectified(value) : value;
    }
    store(y, where, 0, ys);
  }
};

struct Cuda {
  template <class T>
  static void product(const Layout<3>& layout, const Tensor& s, T* q, const T* x, const T* g,
                      const wide_t<T>* factor) {
    sweep<T>("product", layout, {&s}, {q, x, g}, Product<T>{q, x, g, factor});
  }

  template <class T, bool kTwo>
  static void accumulate(const Layout<3>& layout, const Tensor& s, T* r,
                         const Given<T, kTwo>& given) {
    sweep<T>("accumulate", layout, {&s}, {r, given.t, kTwo ? given.u : given.t},
             Accumulate<T, kTwo>{r, given});
  }

  template <class T, bool kTwo, bool kFromSum>
  static void split(const Layout<6>& layout, const Tensor& s_a, const Tensor& s_b, T* r_a, T* r_b,
                    const T* a, const T* b, const Given<T, kTwo>& given) {
    sweep<T>("split", layout, {&s_a, &s_b}, {r_a, r_b, a, b, given.t, kTwo ? given.u : given.t},
             SplitElement<T, kTwo, kFromSum>{r_a, r_b, a, b, given});
  }

  template <class T>
  static void finish(const Layout<4>& layout, const Tensor& s, T* y, const T* other,
                     const wide_t<T>* scale, const wide_t<T>* shift, bool relu) {
    sweep<T>("finish_", layout, {&s}, {y, other, scale, shift}, Finish<T>{y, other, scale, shift, relu});
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
  m.impl("finish_", TORCH_BOX(&Elementwise<Cuda>::finish_));
}

}  // namespace rlrp
