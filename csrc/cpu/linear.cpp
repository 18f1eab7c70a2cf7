// The law of a dense layer in one call: q = x ⊙ (Wᵀ s), s = r / (|W| |x|).
#include "convolution.h"
#include "core/elementwise.h"
#include "simd.h"
#include "tensor.h"

namespace rlrp {
namespace {

constexpr int64_t kFew = 1 << 15;  // products, up to which the layer goes row by row

// One row; returns the largest magnitude of what is watched.
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

// Row by row: where there is little to multiply, calls are what takes the time.
template <class T, class A = wide_t<T>>
void run_by_rows(const Tensor& x, const Tensor& weight, const Tensor& r, Tensor& q, Tensor& seen) {
  const int64_t in = weight.size(1), out = weight.size(0), rows = in ? x.numel() / in : 0;
  std::vector<A> sum(in);
  bits_t<A> largest = 0;
  simd::run([&]() RLRP_INLINE {
    for (int64_t n = 0; n < rows; ++n) {
      const bits_t<A> bits = law_of_row<T>(data_of<T>(x) + n * in, data_of<T>(weight), data_of<T>(r) + n * out, in, out,
                                           sum.data(), result_of<T>(q) + n * in);
      largest = bits > largest ? bits : largest;
    }
  });
  memcpy(seen.mutable_data_ptr(), &largest, sizeof largest);
}

// As two convolutions of 1×1 over an image of one line.
void run_by_products(const Tensor& x, const Tensor& weight, const Tensor& r, Tensor& q, Tensor& seen) {
  const int64_t in = weight.size(1), out = weight.size(0), rows = x.numel() / in;
  const int64_t step[2] = {weight.stride(0), weight.stride(1)};
  const float* taps = data_of<float>(weight);
  double sum = 0;
  Tensor s = new_vector(x, rows * out, ScalarType::Float);
  convolution::Convolution conv{};
  conv.batch = conv.kernel[0] = conv.kernel[1] = conv.stride[0] = conv.stride[1] = 1;
  conv.in = convolution::Image::dense(in, 1, rows);
  conv.out = convolution::Image::dense(out, 1, rows);

  convolution::Convolution divide = conv;
  divide.x = data_of<float>(x);
  divide.filters = {taps, step[0], step[1], {0, 0}, nullptr, true};
  divide.absolute = true;
  divide.dividend = data_of<float>(r);
  divide.skips = true;  // the keys and queries of attention, the gates of gated layers
  divide.sums = &sum;
  divide.write_to(s);
  convolution::run_point(divide, x);

  convolution::Convolution back = conv;
  std::swap(back.in, back.out);
  back.x = data_of<float>(s);
  back.filters = {taps, step[1], step[0], {0, 0}, nullptr, false};
  back.times = data_of<float>(x);
  back.write_to(q);
  convolution::run_point(back, x);
  *result_of<float>(seen) = sum;
}

std::tuple<Tensor, Tensor> linear_law(const Tensor& x, const Tensor& weight, const Tensor& r) {
  const char* op = "linear_law";
  RLRP_CHECK(x.dim() > 0 && x.dim() == r.dim() && weight.dim() == 2, op,
             "weight must have 2 axes, and x and r as many as each other");
  check_like(op, "weight", weight, "x", x, false);
  check_like(op, "r", r, "x", x, false);
  Ints shape = sizes_of(x);
  RLRP_CHECK(shape.back() == weight.size(1), op, "weight must have as many inputs as x");
  shape.back() = weight.size(0);
  RLRP_CHECK(sizes_of(r) == shape, op, "r must have the shape of the outputs");
  const Tensor xs = dense(x, false), rs = dense(r, false);
  Tensor q = new_image(x, sizes_of(x), false), seen = new_vector(x, 1, sum_type(x.scalar_type()));
  if (x.scalar_type() == ScalarType::Float && x.numel() * weight.size(0) > kFew) {
    const bool has_lines = weight.stride(0) == 1 || weight.stride(1) == 1;
    run_by_products(xs, has_lines ? weight : torch::stable::contiguous(weight), rs, q, seen);
  } else {
    const Tensor weights = dense(weight, false);
    dispatch(x.scalar_type(), op, [&](auto zero) { run_by_rows<decltype(zero)>(xs, weights, rs, q, seen); });
  }
  return {q, seen};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) { m.impl("linear_law", TORCH_BOX(&linear_law)); }

}  // namespace rlrp
