// The law of a dense layer in one call: q = x ⊙ (Wᵀ s), s = r / (|W| |x|).
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "convolution_run.h"
#include "core/elementwise.h"
#include "simd.h"
#include "tensor.h"

namespace rlrp {
namespace {

using simd::Vector;

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

// ---- few rows: what takes the time is reading the weight, so it is read once ----

constexpr int64_t kParts = 16;   // of the outputs at most, each with a sum of its own, whatever threads there are
constexpr int64_t kOfPart = 32;  // outputs at least
constexpr int kRows = 4;         // at a time
template <int kLanes>
constexpr int kOutputs = kLanes == 16 ? 4 : 2;

// From how many on, laying out the weight takes less than going through it in these small steps.
bool are_few(int64_t rows, int64_t in) { return rows <= (in < 256 ? 4 : 16); }

struct Layer {
  const float *x, *sizes, *weight, *r;  // sizes is |x|
  int64_t in, out;
};

// The law of some outputs at some rows: adds to sum what is to be multiplied by x. Returns what tells whether all was
// finite.
template <int kLanes, int kCount, int kOf>
RLRP_INLINE inline double law_of_block(const Layer& layer, int64_t output, int64_t row, float* sum) {
  const int64_t in = layer.in;
  const float *weight = layer.weight + output * in, *sizes = layer.sizes + row * in;
  const float* r = layer.r + row * layer.out + output;
  bool any = false;
  for (int k = 0; k < kCount; ++k) {
    for (int j = 0; j < kOf; ++j) any |= r[k * layer.out + j] != 0;
  }
  if (!any) return 0;
  Vector<kLanes> divisor[kCount][kOf] = {};
  simd::each_vector<kLanes>(in, [&](int64_t i, const auto& some) RLRP_INLINE {
    Vector<kLanes> w[kOf];
    for (int j = 0; j < kOf; ++j) w[j] = simd::magnitude(some.load(weight + j * in + i));
    for (int k = 0; k < kCount; ++k) {
      const Vector<kLanes> x = some.load(sizes + k * in + i);
      for (int j = 0; j < kOf; ++j) divisor[k][j] += x * w[j];
    }
  });
  float s[kCount][kOf];
  double seen = 0;
  for (int k = 0; k < kCount; ++k) {
    for (int j = 0; j < kOf; ++j) {
      const float d = convolution::total<kLanes>(divisor[k][j]);
      seen += std::abs(Divide<float>::run(r[k * layer.out + j], d, s[k][j]));
    }
  }
  simd::each_vector<kLanes>(in, [&](int64_t i, const auto& some) RLRP_INLINE {
    Vector<kLanes> w[kOf];
    for (int j = 0; j < kOf; ++j) w[j] = some.load(weight + j * in + i);
    for (int k = 0; k < kCount; ++k) {
      Vector<kLanes> total = some.load(sum + (row + k) * in + i);
      for (int j = 0; j < kOf; ++j) total += s[k][j] * w[j];
      some.store(sum + (row + k) * in + i, total);
    }
  });
  return seen;
}

template <int kLanes, int kOf>
RLRP_INLINE inline double law_of_outputs(const Layer& layer, int64_t output, int64_t rows, float* sum) {
  double seen = 0;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) seen += law_of_block<kLanes, kRows, kOf>(layer, output, row, sum);
  for (; row + 2 <= rows; row += 2) seen += law_of_block<kLanes, 2, kOf>(layer, output, row, sum);
  if (row < rows) seen += law_of_block<kLanes, 1, kOf>(layer, output, row, sum);
  return seen;
}

void run_by_outputs(const Tensor& x, const Tensor& weight, const Tensor& r, Tensor& q, Tensor& seen) {
  const int64_t in = weight.size(1), out = weight.size(0), rows = x.numel() / in;
  const int64_t parts = std::clamp<int64_t>(out / kOfPart, 1, kParts), each = rows * in;
  Tensor memory = new_vector(x, (parts + 1) * each, ScalarType::Float);
  float *sums = result_of<float>(memory), *sizes = sums + parts * each;
  const Layer layer{data_of<float>(x), sizes, data_of<float>(weight), data_of<float>(r), in, out};
  for (int64_t i = 0; i < each; ++i) sizes[i] = std::abs(layer.x[i]);
  std::vector<double> totals(parts);
  convolution::run_tasks(torch::stable::get_num_threads(), parts,
                         [&](auto lanes, int64_t, int64_t first, int64_t last) RLRP_INLINE {
    for (int64_t part = first; part < last; ++part) {
      float* sum = sums + part * each;
      std::fill_n(sum, each, 0.0f);
      int64_t j = out * part / parts;
      const int64_t end = out * (part + 1) / parts;
      constexpr int kOf = kOutputs<lanes>;
      for (; j + kOf <= end; j += kOf) totals[part] += law_of_outputs<lanes, kOf>(layer, j, rows, sum);
      for (; j < end; ++j) totals[part] += law_of_outputs<lanes, 1>(layer, j, rows, sum);
    }
  });
  float* to = result_of<float>(q);
  convolution::run_tasks(torch::stable::get_num_threads(), ceil_div(each, 1 << 12),
                         [&](auto lanes, int64_t, int64_t first, int64_t last) RLRP_INLINE {
    const int64_t start = first << 12, end = min64(last << 12, each);
    simd::each_vector<lanes>(end - start, [&](int64_t k, const auto& some) RLRP_INLINE {
      Vector<lanes> total = some.load(sums + start + k);
      for (int64_t part = 1; part < parts; ++part) total += some.load(sums + part * each + start + k);
      some.store(to + start + k, total * some.load(layer.x + start + k));
    });
  });
  *result_of<float>(seen) = std::accumulate(totals.begin(), totals.end(), 0.0);
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
    if (weight.is_contiguous() && are_few(x.numel() / weight.size(1), weight.size(1))) {
      run_by_outputs(xs, weight, rs, q, seen);
    } else {
      run_by_products(xs, has_lines ? weight : torch::stable::contiguous(weight), rs, q, seen);
    }
  } else {
    const Tensor weights = dense(weight, false);
    dispatch(x.scalar_type(), op, [&](auto zero) { run_by_rows<decltype(zero)>(xs, weights, rs, q, seen); });
  }
  return {q, seen};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) { m.impl("linear_law", TORCH_BOX(&linear_law)); }

}  // namespace rlrp
