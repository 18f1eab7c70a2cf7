// Element by element on the GPU: one pass that writes the result, and finds the largest magnitude of what is watched.
// The largest is the same in whatever order it is found.
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

// Where the elements of a pack lie in each of K operands.
template <int K>
struct Where {
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
bool comes_in_packs(const Axes<K>& axes, const void* const (&operands)[K]) {
  if (axes.rank == 0 || axes.row() % V != 0) return false;
  for (int k = 0; k < K; ++k) {
    const int64_t step = axes.step(k);
    if (step == 0) continue;
    if (step != 1 || !is_aligned(operands[k])) return false;
    for (int axis = 0; axis < axes.rank - 1; ++axis) {
      if (axes.stride[k][axis] % V != 0) return false;
    }
  }
  return true;
}

// Notes the largest of what the threads of a block have seen.
template <class Bits>
__device__ void note_largest(Bits* seen, Bits largest) {
  using Unsigned = std::conditional_t<sizeof(Bits) == 8, unsigned long long, unsigned>;
  __shared__ Unsigned of_block;
  if (threadIdx.x == 0) of_block = 0;
  __syncthreads();
  if (largest != 0) atomicMax(&of_block, static_cast<Unsigned>(largest));
  __syncthreads();
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<Unsigned*>(seen), of_block);
}

// One block per piece. `element.run<V>(where)` computes a pack and returns the largest magnitude of what it watches.
template <class T, int K, int V, class Element>
__global__ void __launch_bounds__(kThreads)
    sweep_kernel(Axes<K> axes, int64_t numel, bits_t<wide_t<T>>* seen, Element element) {
  Where<K> where;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kPiece<T>;
  const bool flat = axes.rank <= 1;
  for (int k = 0; k < K; ++k) where.repeats[k] = axes.step(k) == 0;
  bits_t<wide_t<T>> largest = 0;
#pragma unroll 4
  for (int i = 0; i < kPiece<T> / (kThreads * V); ++i) {
    const int64_t at = start + (i * kThreads + static_cast<int64_t>(threadIdx.x)) * V;
    if (at < numel) {
      if (flat) {
        for (int k = 0; k < K; ++k) where.offset[k] = at * axes.step(k);
      } else {
        axes.offsets(at, where.offset);
      }
      const bits_t<wide_t<T>> bits = element.template run<V>(where);
      largest = bits > largest ? bits : largest;
    }
  }
  if (seen) note_largest(seen, largest);
}

// The operands' addresses are in the order of the axes.
template <class T, int K, class Element>
void sweep(const char* op, const Tensor& model, const Axes<K>& axes, const Tensor* seen,
           const void* const (&operands)[K], const Element& element) {
  using Bits = bits_t<wide_t<T>>;
  const OnDeviceOf device(model);
  Bits* largest = nullptr;
  if (seen) {
    largest = static_cast<Bits*>(seen->mutable_data_ptr());
    const cudaError_t error = cudaMemsetAsync(largest, 0, sizeof(Bits), device.stream());
    RLRP_CHECK(error == cudaSuccess, op, "memory could not be set: ", cudaGetErrorString(error));
  }
  const int64_t numel = axes.numel();
  constexpr int V = kElementsAtOnce<T>;
  const auto kernel =
      comes_in_packs<V>(axes, operands) ? sweep_kernel<T, K, V, Element> : sweep_kernel<T, K, 1, Element>;
  launch(op, kernel, ceil_div(numel, kPiece<T>), device, axes, numel, largest, element);
}

// ---- what is computed ----

template <class T, class Function>
struct Map {
  static constexpr int kTo = Function::kTo, kFrom = Function::kFrom;
  T* to[kTo];
  const T* from[kFrom];

  template <int V>
  __device__ bits_t<wide_t<T>> run(const Where<kTo + kFrom>& where) const {
    Pack<T, V> sources[kFrom], results[kTo];
    for (int k = 0; k < kFrom; ++k) sources[k] = load<V>(from[k], where, kTo + k);
    bits_t<wide_t<T>> seen = 0;
    for (int i = 0; i < V; ++i) {
      wide_t<T> watched;
      if constexpr (kFrom == 3) {
        watched = Function::run(sources[0].at[i], sources[1].at[i], sources[2].at[i], results[0].at[i],
                                results[1].at[i]);
      } else {
        watched = Function::run(sources[0].at[i], sources[1].at[i], results[0].at[i]);
      }
      const bits_t<wide_t<T>> bits = magnitude(watched);
      seen = bits > seen ? bits : seen;
    }
    for (int k = 0; k < kTo; ++k) store(to[k], where, k, results[k]);
    return seen;
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
  __device__ bits_t<wide_t<T>> run(const Where<4>& where) const {
    auto ys = load<V>(y, where, 0);
    Pack<T, V> others = {};
    Pack<wide_t<T>, V> scales, shifts = {};
    for (int i = 0; i < V; ++i) scales.at[i] = 1;
    if (other) others = load<V>(other, where, 1);
    if (scale) scales = load<V>(scale, where, 2);
    if (shift) shifts = load<V>(shift, where, 3);
    bits_t<wide_t<T>> seen = 0;
    for (int i = 0; i < V; ++i) {
      const wide_t<T> more = other ? widen(others.at[i]) : wide_t<T>(0);
      const T value = narrow<T>(widen(ys.at[i]) * scales.at[i] + shifts.at[i] + more);
      const bits_t<wide_t<T>> bits = magnitude(widen(value));  // in which an overflow is to show
      seen = bits > seen ? bits : seen;
      ys.at[i] = relu ? rectified(value) : value;
    }
    store(y, where, 0, ys);
    return seen;
  }
};

struct Cuda {
  template <class T, class Function>
  static void map(const char* op, const Tensor& model, const Tensor* seen,
                  const Axes<Function::kTo + Function::kFrom>& axes, T* const (&to)[Function::kTo],
                  const T* const (&from)[Function::kFrom]) {
    constexpr int kTo = Function::kTo, kFrom = Function::kFrom;
    Map<T, Function> element;
    const void* operands[kTo + kFrom];
    for (int k = 0; k < kTo; ++k) operands[k] = element.to[k] = to[k];
    for (int k = 0; k < kFrom; ++k) operands[kTo + k] = element.from[k] = from[k];
    sweep<T>(op, model, axes, seen, operands, element);
  }

  template <class T>
  static void finish(const Axes<4>& axes, const Tensor& seen, T* y, const T* other, const wide_t<T>* scale,
                     const wide_t<T>* shift, bool relu) {
    sweep<T>("finish_", seen, axes, &seen, {y, other, scale, shift}, Finish<T>{y, other, scale, shift, relu});
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CUDA, m) {
  m.impl("divide", TORCH_BOX(&Elementwise<Cuda>::divide));
  m.impl("multiply", TORCH_BOX(&Elementwise<Cuda>::multiply));
  m.impl("split", TORCH_BOX(&Elementwise<Cuda>::split));
  m.impl("finish_", TORCH_BOX(&Elementwise<Cuda>::finish_));
}

}  // namespace rlrp
