// Products of matrices, one for each index in front, as attention has them: small ones, which lie in memory in any way.
// The right one is laid out in panels; the left one is read as it lies.
#include <vector>

#include "convolution_run.h"

namespace rlrp {
namespace {

using namespace convolution;

struct Product {
  int64_t rows, depth, columns;
  int64_t a[2], b[2];  // strides; one of each is 1
};

// So many vectors of each row of the right factor, from a column on.
template <int kLanes, int kWidth, class Some>
RLRP_INLINE inline void lay_out(const Product& p, const float* b, int64_t column, const Some& some, float* panel) {
  constexpr int64_t kStep = kWidth * kLanes;
  if (p.b[1] == 1) {
    for (int64_t k = 0; k < p.depth; ++k, panel += kStep) {
      const float* from = b + k * p.b[0] + column;
      for (int j = 0; j < kWidth - 1; ++j) store<kLanes>(panel + j * kLanes, load<kLanes>(from + j * kLanes));
      store<kLanes>(panel + kStep - kLanes, some.load(from + kStep - kLanes));
    }
    return;
  }
  const int64_t count = min64(kStep, p.columns - column), turned = p.depth / kLanes * kLanes;
  for (int64_t j = 0; j < kStep; j += kLanes) {
    for (int64_t k = 0; k < turned; k += kLanes) {
      Vector<kLanes> rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = j + i < count ? load<kLanes>(b + (column + j + i) * p.b[1] + k) : Vector<kLanes>{};
      }
      simd::transpose<kLanes>(rows);
      for (int i = 0; i < kLanes; ++i) store<kLanes>(panel + (k + i) * kStep + j, rows[i]);
    }
    for (int64_t k = turned; k < p.depth; ++k) {
      for (int i = 0; i < kLanes; ++i) {
        panel[k * kStep + j + i] = j + i < count ? b[(column + j + i) * p.b[1] + k] : 0.0f;
      }
    }
  }
}

// Some rows of the result, of so many columns.
template <int kLanes, int kCount, int kWidth, class Some>
RLRP_INLINE inline void multiply_some(const Product& p, const float* a, const float* panel, const Some& some, float* y) {
  Vector<kLanes> sum[kCount][kWidth] = {};
  if (p.a[1] == 1) {
    const float* row[kCount];
    for (int r = 0; r < kCount; ++r) row[r] = a + r * p.a[0];
    multiply<kLanes, kCount>(0, p.depth, [&](int r, int64_t k) RLRP_INLINE { return row[r][k]; }, panel, sum);
  } else {
    multiply<kLanes, kCount>(0, p.depth, [&](int r, int64_t k) RLRP_INLINE { return a[k * p.a[1] + r]; }, panel, sum);
  }
#pragma GCC unroll 12
  for (int r = 0; r < kCount; ++r, y += p.columns) {
    for (int j = 0; j < kWidth - 1; ++j) store<kLanes>(y + j * kLanes, sum[r][j]);
    some.store(y + (kWidth - 1) * kLanes, sum[r][kWidth - 1]);
  }
}

// The same from a row to another, kCount at a time; the last of them overlap with those before. Returns whether there
// are so many.
template <int kLanes, int kCount, int kWidth, class Some>
RLRP_INLINE inline bool multiply_range(const Product& p, int64_t first, int64_t last, const float* a, const float* panel,
                                      const Some& some, float* y) {
  if (last - first < kCount) return false;
  for (int64_t row = first; row < last; row += kCount) {
    row = min64(row, last - kCount);
    multiply_some<kLanes, kCount, kWidth>(p, a + row * p.a[0], panel, some, y + row * p.columns);
  }
  return true;
}

template <int kLanes>
RLRP_INLINE inline void multiply_matrices(const Product& p, int64_t first, int64_t last, const float* a, const float* b,
                                          float* panel, float* y) {
  const auto columns = [&](auto width, int64_t c, const auto& some) RLRP_INLINE {
    lay_out<kLanes, width>(p, b, c, some, panel);
    multiply_range<kLanes, kRows<kLanes>, width>(p, first, last, a, panel, some, y + c) ||
        multiply_range<kLanes, kFewRows<kLanes>, width>(p, first, last, a, panel, some, y + c) ||
        multiply_range<kLanes, 1, width>(p, first, last, a, panel, some, y + c);
  };
  int64_t c = 0;
  for (; c + kPanel<kLanes> <= p.columns; c += kPanel<kLanes>) {
    columns(std::integral_constant<int, kColumns>{}, c, simd::Whole<kLanes>{});
  }
  const int64_t left = p.columns - c;
  if (left > kLanes) {
    columns(std::integral_constant<int, kColumns>{}, c, simd::Start<kLanes>{static_cast<int>(left - kLanes)});
  } else if (left) {
    columns(std::integral_constant<int, 1>{}, c, simd::Start<kLanes>{static_cast<int>(left)});
  }
}

// Where the matrix of a number lies.
const float* matrix(const Tensor& t, int64_t number) {
  const float* at = data_of<float>(t);
  for (int64_t axis = t.dim() - 3; axis >= 0; --axis) {
    at += number % t.size(axis) * t.stride(axis);
    number /= t.size(axis);
  }
  return at;
}

Tensor matmul(const Tensor& a, const Tensor& b) {
  const char* op = "matmul";
  const int64_t axes = a.dim();
  RLRP_CHECK(axes >= 2 && b.dim() == axes, op, "both factors must be matrices, with the same axes in front");
  RLRP_CHECK(a.scalar_type() == ScalarType::Float, op, "needs float32");
  check_like(op, "b", b, "a", a, false);
  const Product p{a.size(axes - 2), a.size(axes - 1), b.size(axes - 1), {a.stride(axes - 2), a.stride(axes - 1)},
                  {b.stride(axes - 2), b.stride(axes - 1)}};
  RLRP_CHECK(b.size(axes - 2) == p.depth, op, "a must have as many columns as b has rows");
  RLRP_CHECK((p.a[0] == 1 || p.a[1] == 1) && (p.b[0] == 1 || p.b[1] == 1), op, "a stride of each matrix must be 1");
  Ints shape = sizes_of(a);
  int64_t count = 1;
  for (int64_t axis = 0; axis < axes - 2; ++axis) {
    RLRP_CHECK(a.size(axis) == b.size(axis), op, "the factors must have the same axes in front");
    count *= a.size(axis);
  }
  shape.back() = p.columns;
  Tensor y = new_image(a, shape, false);
  const int64_t threads = torch::stable::get_num_threads(), parts = count < threads ? threads : 1;
  const int64_t each = kPanel<16> * p.depth + kPad;
  Tensor panels = new_vector(a, threads * each, ScalarType::Float);
  run_tasks(threads, count * parts, [&](auto lanes, int64_t task, int64_t first, int64_t last) RLRP_INLINE {
    for (int64_t k = first; k < last; ++k) {
      const int64_t number = k / parts, part = k % parts;
      multiply_matrices<lanes>(p, p.rows * part / parts, p.rows * (part + 1) / parts, matrix(a, number),
                               matrix(b, number), result_of<float>(panels) + task * each,
                               result_of<float>(y) + number * p.rows * p.columns);
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) { m.impl("matmul", TORCH_BOX(&matmul)); }

}  // namespace rlrp
