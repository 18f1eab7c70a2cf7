// The law of a small dense layer in one call: where there is little to multiply, calls are what takes the time.
#include "core/elementwise.h"
#include "simd.h"
#include "tensor.h"

namespace rlrp {
namespace {

// One row: q = x ⊙ (Wᵀ s), s = r / (|W| |x|); returns the largest magnitude of what is watched.
template <class T, class A = wide_t<T>>
RLRP_INLINE inline bits_t<A> law_of_row(const T* x, const T* weight, const T* r, int64_t in, int64_t out, A* sum, T* q) {
  bits_t<A> largest = 0;
  for (int64_t i = 0; i < in; ++i) sum[i] = 0;
  for (int64_t j = 0; j < out; ++j, weight += in) {
    A divisor = 0;
#pragma omp simd reduction(+ : divisor)
    for (int64_t i = 0; i < in; ++i) divisor += absolute(widen(x[i])) * absolute(widen(weight[i]));
    A s;
    const bits_t<A> bits = magnitude(Divide<A>::run(widen(r[j]), divisor, s));
    largest = bits > largest ? bits : largest;
#pragma omp simd
    for (int64_t i = 0; i < in; ++i) sum[i] += s * widen(weight[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < in; ++i) q[i] = narrow<T>(widen(x[i]) * sum[i]);
  return largest;
}

std::tuple<Tensor, Tensor> linear_law(const Tensor& x, const Tensor& weight, const Tensor& r) {
  const char* op = "linear_law";
  RLRP_CHECK(x.dim() == 2 && weight.dim() == 2 && r.dim() == 2, op, "x, weight and r must have 2 axes");
  check_like(op, "weight", weight, "x", x, false);
  check_like(op, "r", r, "x", x, false);
  const int64_t rows = x.size(0), in = x.size(1), out = weight.size(0);
  RLRP_CHECK(weight.size(1) == in && r.size(0) == rows && r.size(1) == out, op,
             "weight must be (outputs, inputs), and r (rows, outputs)");
  const Tensor xs = dense(x, false), weights = dense(weight, false), rs = dense(r, false);
  Tensor q = new_image(x, {rows, in}, false), seen = new_vector(x, 1, sum_type(x.scalar_type()));
  dispatch(x.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    using A = wide_t<T>;
    std::vector<A> sum(in);
    bits_t<A> largest = 0;
    simd::run([&]() RLRP_INLINE {
      for (int64_t n = 0; n < rows; ++n) {
        const bits_t<A> bits = law_of_row<T>(data_of<T>(xs) + n * in, data_of<T>(weights), data_of<T>(rs) + n * out, in,
                                             out, sum.data(), result_of<T>(q) + n * in);
        largest = bits > largest ? bits : largest;
      }
    });
    memcpy(seen.mutable_data_ptr(), &largest, sizeof largest);
  });
  return {q, seen};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) { m.impl("linear_law", TORCH_BOX(&linear_law)); }

}  // namespace rlrp
