// Rows of the element-by-element kernels on the CPU. Each returns the mass of what it wrote.
//
// Strides are in elements; callers
// pass the constants 1 and 0 where they can, which is what lets the compiler vectorise.
#pragma once

#include "elementwise.h"

namespace rlrp {

// A block is short enough for a plain float sum; blocks are added up in double.
constexpr int64_t kBlock = 1024;

template <class T>
RLRP_HD double product_row(int64_t count, const T* x, int64_t x_step, const T* g, int64_t g_step,
                           wide_t<T> factor, T* q, int64_t q_step) {
  using A = wide_t<T>;
  double mass = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t end = count < start + kBlock ? count : start + kBlock;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < end; ++i) {
      const T value = multiply(x[i * x_step], g[i * g_step], factor);
      q[i * q_step] = value;
      sum += absolute(widen(value));
    }
    mass += static_cast<double>(sum);
  }
  return mass;
}

// scale y + shift + other in place of y, where those are given, or its ReLU; the mass is that in front
// of the ReLU.
template <class T, bool kOther, bool kScale, bool kShift>
RLRP_HD double finish_row(int64_t count, T* y, int64_t y_step, const T* other, int64_t other_step,
                          const wide_t<T>* scale, const wide_t<T>* shift, int64_t channel_step,
                          bool relu) {
  using A = wide_t<T>;
  double mass = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t end = count < start + kBlock ? count : start + kBlock;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < end; ++i) {
      A value = widen(y[i * y_step]);
      if constexpr (kScale) value *= scale[i * channel_step];
      if constexpr (kShift) value += shift[i * channel_step];
      if constexpr (kOther) value += widen(other[i * other_step]);
      const T rounded = narrow<T>(value);
      sum += absolute(widen(rounded));  // in which an overflow is to show
      y[i * y_step] = relu ? rectified(rounded) : rounded;
    }
    mass += static_cast<double>(sum);
  }
  return mass;
}

// In double from the start: finite whenever all elements are.
template <class T>
RLRP_HD double sum_row(int64_t count, const T* x) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(widen(x[i]));
  return sum;
}

template <class T, bool kTwo>
RLRP_HD double accumulate_row(int64_t count, Terms<T, kTwo> terms, T* r, int64_t r_step) {
  using A = wide_t<T>;
  double mass = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t end = count < start + kBlock ? count : start + kBlock;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < end; ++i) {
      const T value = narrow<T>(terms.at(i));
      r[i * r_step] = value;
      sum += absolute(widen(value));
    }
    mass += static_cast<double>(sum);
  }
  return mass;
}

struct TwoMasses {
  double a, b;
};

template <class T, bool kTwo, bool kFromSum>
RLRP_HD TwoMasses split_row(int64_t count, Terms<T, kTwo> terms, const T* a, int64_t a_step,
                            const T* b, int64_t b_step, T* r_a, int64_t r_a_step, T* r_b,
                            int64_t r_b_step) {
  using A = wide_t<T>;
  TwoMasses mass{0, 0};
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t end = count < start + kBlock ? count : start + kBlock;
    A sum_a = 0, sum_b = 0;
#pragma omp simd reduction(+ : sum_a, sum_b)
    for (int64_t i = start; i < end; ++i) {
      const Parts<T> part =
          divide<T, kFromSum>(terms.at(i), a[i * a_step], b[i * b_step]);
      r_a[i * r_a_step] = part.a;
      r_b[i * r_b_step] = part.b;
      sum_a += absolute(widen(part.a));
      sum_b += absolute(widen(part.b));
    }
    mass.a += static_cast<double>(sum_a);
    mass.b += static_cast<double>(sum_b);
  }
  return mass;
}

}  // namespace rlrp
