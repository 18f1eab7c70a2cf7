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
  uint32_t offset[K];
  bool repeats[K];  // one element stands for all of the pack
};

// Operands whose elements lie side by side, or are one alone.
template <int K>
struct Flat {
  static constexpr bool kWholePacks = false;  // the last one may be incomplete

  bool repeats[K];

  explicit Flat(const Axes<K>& axes) {
    for (int k = 0; k < K; ++k) repeats[k] = axes.step(k) == 0;
  }

  __device__ Where<K> at(uint32_t index) const {
    Where<K> where;
    for (int k = 0; k < K; ++k) {
      where.repeats[k] = repeats[k];
      where.offset[k] = repeats[k] ? 0 : index;
    }
    return where;
  }
};

// Operands of any strides.
template <int K>
struct Strided {
  static constexpr bool kWholePacks = true;

  int rank;
  bool repeats[K];  // along the innermost axis
  uint32_t size[kMaxAxes], stride[K][kMaxAxes];

  explicit Strided(const Axes<K>& axes) : rank(axes.rank) {
    for (int k = 0; k < K; ++k) repeats[k] = axes.step(k) == 0;
    for (int axis = 0; axis < rank; ++axis) {
      size[axis] = static_cast<uint32_t>(axes.size[axis]);
      for (int k = 0; k < K; ++k) stride[k][axis] = static_cast<uint32_t>(axes.stride[k][axis]);
    }
  }

  __device__ Where<K> at(uint32_t index) const {
    Where<K> where;
    for (int k = 0; k < K; ++k) {
      where.repeats[k] = repeats[k];
      where.offset[k] = 0;
    }
#pragma unroll 1
    for (int axis = rank - 1; axis > 0; --axis) {
      const uint32_t quotient = index / size[axis], coordinate = index - quotient * size[axis];
      for (int k = 0; k < K; ++k) where.offset[k] += coordinate * stride[k][axis];
      index = quotient;
    }
    for (int k = 0; k < K && rank > 0; ++k) where.offset[k] += index * stride[k][0];
    return where;
  }
};

template <int V, class T, int K>
__device__ Pack<T, V> load(const T* data, const Where<K>& where, int k) {
  const T* from = data + where.offset[k];
  if (V > 1 && !where.repeats[k]) return load_pack<V>(from);
  Pack<T, V> pack;
  const T value = *from;
  for (int i = 0; i < V; ++i) pack.at[i] = value;
  return pack;
}

template <class T, int V, int K>
__device__ void store(T* data, const Where<K>& where, int k, const Pack<T, V>& pack) {
  store_pack(data + where.offset[k], pack);
}

// Whether packs of V elements lie side by side in every operand, where those can be read at once. Parts begin where
// packs do.
template <int V, int K>
bool comes_in_packs(const Axes<K>& axes, const void* const (&operands)[K]) {
  for (int k = 0; k < K; ++k) {
    const int64_t step = axes.step(k);
    if (step == 0) continue;
    if (step != 1 || !is_aligned(operands[k])) return false;
    for (int axis = 0; axis < axes.rank - 1; ++axis) {
      if (axes.stride[k][axis] % V != 0) return false;
    }
  }
  return axes.rank == 1 || (axes.rank > 1 && axes.row() % V == 0);
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
template <class T, int V, class Layout, class Element>
__global__ void __launch_bounds__(kThreads)
    sweep_kernel(Layout layout, uint32_t numel, bits_t<wide_t<T>>* seen, Element element) {
  using Bits = bits_t<wide_t<T>>;
  Bits largest = 0;
  const auto note = [&](Bits bits) { largest = bits > largest ? bits : largest; };
  uint32_t at = blockIdx.x * kPiece<T> + threadIdx.x * V;
#pragma unroll 1
  for (int i = 0; i < kPiece<T> / (kThreads * V) && at < numel; ++i, at += kThreads * V) {
    if (Layout::kWholePacks || at + V <= numel) {
      note(element.template run<V>(layout.at(at)));
    } else {
#pragma unroll 1
      for (uint32_t one = at; one < numel; ++one) note(element.template run<1>(layout.at(one)));
    }
  }
  if (seen) note_largest(seen, largest);
}

// The operands' addresses are in the order of the axes.
template <class T, int K, class Element>
void sweep(const char* op, const Tensor& model, const Axes<K>& axes, const Tensor* seen,
           const void* const (&operands)[K], const Element& whole) {
  using Bits = bits_t<wide_t<T>>;
  const OnDeviceOf device(model);
  Bits* largest = nullptr;
  if (seen) {
    largest = static_cast<Bits*>(seen->mutable_data_ptr());
    const cudaError_t error = cudaMemsetAsync(largest, 0, sizeof(Bits), device.stream());
    RLRP_CHECK(error == cudaSuccess, op, "memory could not be set: ", cudaGetErrorString(error));
  }
  constexpr int V = kElementsAtOnce<T>;
  in_parts(axes, kMost, [&](const Axes<K>& part, const Offsets<K>& offset) {
    const Element element = whole.behind(offset);
    const auto numel = static_cast<uint32_t>(part.numel());
    const auto run = [&](auto kernel, const auto& layout) {
      launch(op, kernel, ceil_div(numel, kPiece<T>), device, layout, numel, largest, element);
    };
    if (!comes_in_packs<V>(part, operands)) {
      run(sweep_kernel<T, 1, Strided<K>, Element>, Strided<K>(part));
    } else if (part.rank == 1) {
      run(sweep_kernel<T, V, Flat<K>, Element>, Flat<K>(part));
    } else {
      run(sweep_kernel<T, V, Strided<K>, Element>, Strided<K>(part));
    }
  });
}

// ---- what is computed ----

template <class T, class Function>
struct Map {
  static constexpr int kTo = Function::kTo, kFrom = Function::kFrom;
  T* to[kTo];
  const T* from[kFrom];

  Map behind(const Offsets<kTo + kFrom>& offset) const {
    Map map = *this;
    for (int k = 0; k < kTo; ++k) map.to[k] += offset.of[k];
    for (int k = 0; k < kFrom; ++k) map.from[k] += offset.of[kTo + k];
    return map;
  }

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

  Finish behind(const Offsets<4>& offset) const {
    return {y + offset.of[0], other ? other + offset.of[1] : nullptr, scale ? scale + offset.of[2] : nullptr,
            shift ? shift + offset.of[3] : nullptr, relu};
  }

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
