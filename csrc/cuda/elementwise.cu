// product, accumulate and split on the GPU: one pass that writes the result and sums its absolute
// values. A block sums one piece of a sample; a second kernel adds the pieces in order, so the bits do
// not depend on the schedule.
#include <cstdint>

#include "launch.h"
#include "terms.h"

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
  const int64_t size[1] = {S * blocks};
  const Tensor partial =
      torch::stable::new_empty(*masses[0], {size, 1}, ScalarType::Double);
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

Tensor multiply_into(const Tensor& x, const Tensor& g, const std::optional<Tensor>& given,
                     const Tensor& q) {
  const auto factor = packed(given);
  Tensor s = new_masses(x);
  const auto layout = layout_of(q, x, g);
  dispatch(x.scalar_type(), "product", [&](auto zero) {
    using T = decltype(zero);
    const Product<T> element{static_cast<T*>(q.mutable_data_ptr()),
                             static_cast<const T*>(x.const_data_ptr()),
                             static_cast<const T*>(g.const_data_ptr()),
                             factor ? static_cast<const wide_t<T>*>(factor->const_data_ptr())
                                    : nullptr};
    sweep<wide_t<T>>("product", layout, {&s}, element);
  });
  return s;
}

std::tuple<Tensor, Tensor> product(const Tensor& x, const Tensor& g,
                                   const std::optional<Tensor>& factor) {
  check_product("product", x, g, factor);
  Tensor q = torch::stable::empty_like(x);
  Tensor s = multiply_into(x, g, factor, q);
  return {q, s};
}

Tensor product_(const Tensor& x, const Tensor& g, const std::optional<Tensor>& factor) {
  check_product("product_", x, g, factor);
  check_writable("product_", "g", g);
  return multiply_into(x, g, factor, g);
}

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

template <bool kTwo>
std::tuple<Tensor, Tensor> accumulate_terms(const Tensor& t, const std::optional<Tensor>& t_factor,
                                            const std::optional<Tensor>& u,
                                            const std::optional<Tensor>& u_factor) {
  Tensor r = torch::stable::empty_like(t);
  Tensor s = new_masses(t);
  const auto layout = layout_of(r, t, kTwo ? *u : t);
  dispatch(t.scalar_type(), "accumulate", [&](auto zero) {
    using T = decltype(zero);
    const Accumulate<T, kTwo> element{static_cast<T*>(r.mutable_data_ptr()),
                                      Given<T, kTwo>(t, t_factor, u, u_factor)};
    sweep<wide_t<T>>("accumulate", layout, {&s}, element);
  });
  return {r, s};
}

std::tuple<Tensor, Tensor> accumulate(const Tensor& t, const std::optional<Tensor>& t_factor,
                                      const std::optional<Tensor>& u,
                                      const std::optional<Tensor>& u_factor) {
  check_terms("accumulate", t, t_factor, u, u_factor);
  const auto f = packed(t_factor), h = packed(u_factor);
  return u ? accumulate_terms<true>(t, f, u, h) : accumulate_terms<false>(t, f, u, h);
}

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

using Split = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using SplitMasses = std::tuple<Tensor, Tensor>;

template <bool kTwo, bool kFromSum>
SplitMasses split_terms(const Tensor& a, const Tensor& b, const Tensor& t,
                        const std::optional<Tensor>& t_factor, const std::optional<Tensor>& u,
                        const std::optional<Tensor>& u_factor, const Tensor& r_a,
                        const Tensor& r_b) {
  Tensor s_a = new_masses(t), s_b = new_masses(t);
  const auto layout = layout_of(r_a, r_b, a, b, t, kTwo ? *u : t);
  dispatch(t.scalar_type(), "split", [&](auto zero) {
    using T = decltype(zero);
    const SplitElement<T, kTwo, kFromSum> element{static_cast<T*>(r_a.mutable_data_ptr()),
                                                  static_cast<T*>(r_b.mutable_data_ptr()),
                                                  static_cast<const T*>(a.const_data_ptr()),
                                                  static_cast<const T*>(b.const_data_ptr()),
                                                  Given<T, kTwo>(t, t_factor, u, u_factor)};
    sweep<wide_t<T>>("split", layout, {&s_a, &s_b}, element);
  });
  return {s_a, s_b};
}

SplitMasses split_into(const char* op, const Tensor& a, const Tensor& b, const Tensor& t,
                       const std::optional<Tensor>& t_factor, const std::optional<Tensor>& u,
                       const std::optional<Tensor>& u_factor, bool from_sum, const Tensor& r_a,
                       const Tensor& r_b) {
  check_like(op, "a", a, "t", t);
  check_like(op, "b", b, "t", t);
  const auto f = packed(t_factor), h = packed(u_factor);
  if (u) {
    return from_sum ? split_terms<true, true>(a, b, t, f, u, h, r_a, r_b)
                    : split_terms<true, false>(a, b, t, f, u, h, r_a, r_b);
  }
  return from_sum ? split_terms<false, true>(a, b, t, f, u, h, r_a, r_b)
                  : split_terms<false, false>(a, b, t, f, u, h, r_a, r_b);
}

Split split(const Tensor& a, const Tensor& b, const Tensor& t, const std::optional<Tensor>& t_factor,
            const std::optional<Tensor>& u, const std::optional<Tensor>& u_factor, bool from_sum) {
  check_terms("split", t, t_factor, u, u_factor);
  Tensor r_a = torch::stable::empty_like(t), r_b = torch::stable::empty_like(t);
  auto [s_a, s_b] = split_into("split", a, b, t, t_factor, u, u_factor, from_sum, r_a, r_b);
  return {r_a, s_a, r_b, s_b};
}

SplitMasses split_(const Tensor& a, const Tensor& b, const Tensor& t,
                   const std::optional<Tensor>& t_factor, const std::optional<Tensor>& u,
                   const std::optional<Tensor>& u_factor, bool from_sum) {
  check_terms("split_", t, t_factor, u, u_factor);
  check_writable("split_", "a", a);
  check_writable("split_", "t", t);
  RLRP_CHECK(a.const_data_ptr() != t.const_data_ptr() || t.numel() == 0, "split_",
             "a and t are written to and must not be the same tensor");
  return split_into("split_", a, b, t, t_factor, u, u_factor, from_sum, a, t);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CUDA, m) {
  m.impl("product", TORCH_BOX(&product));
  m.impl("product_", TORCH_BOX(&product_));
  m.impl("accumulate", TORCH_BOX(&accumulate));
  m.impl("split", TORCH_BOX(&split));
  m.impl("split_", TORCH_BOX(&split_));
}

}  // namespace rlrp
