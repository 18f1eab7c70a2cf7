// Rows of the element-by-element kernels on the CPU. Each returns the largest magnitude of what it watches.
//
// Strides are in elements; callers pass the constants 1 and 0 where they can, which is what lets the compiler
// vectorise.
#pragma once

#include "elementwise.h"

namespace rlrp {

template <class T, class Function, bool kUnit>
RLRP_HD bits_t<wide_t<T>> map_row(int64_t count, T* const (&to)[Function::kTo], const T* const (&from)[Function::kFrom],
                                  const int64_t* step) {
  // Local arrays would keep the compiler from vectorising.
  constexpr bool kThree = Function::kFrom == 3;
  T *const p = to[0], *const q = to[Function::kTo - 1];
  const T *const a = from[0], *const b = from[1], *const c = from[Function::kFrom - 1];
  const int64_t p_step = kUnit ? 1 : step[0], q_step = kUnit ? 1 : step[Function::kTo - 1];
  const int64_t a_step = kUnit ? 1 : step[Function::kTo], b_step = kUnit ? 1 : step[Function::kTo + 1];
  const int64_t c_step = kUnit ? 1 : step[Function::kTo + Function::kFrom - 1];
  bits_t<wide_t<T>> seen = 0;
#pragma omp simd reduction(max : seen)
  for (int64_t i = 0; i < count; ++i) {
    T first, second;
    bits_t<wide_t<T>> bits;
    if constexpr (kThree) {
      bits = magnitude(Function::run(a[i * a_step], b[i * b_step], c[i * c_step], first, second));
      q[i * q_step] = second;
    } else {
      bits = magnitude(Function::run(a[i * a_step], b[i * b_step], first));
    }
    p[i * p_step] = first;
    seen = bits > seen ? bits : seen;
  }
  return seen;
}

// scale y + shift + other in place of y, where those are given, or its ReLU; what is watched is in front of that.
template <class T, bool kOther, bool kScale, bool kShift>
RLRP_HD bits_t<wide_t<T>> finish_row(int64_t count, T* y, int64_t y_step, const T* other, int64_t other_step,
                                     const wide_t<T>* scale, const wide_t<T>* shift, int64_t channel_step, bool relu) {
  using A = wide_t<T>;
  bits_t<A> seen = 0;
#pragma omp simd reduction(max : seen)
  for (int64_t i = 0; i < count; ++i) {
    A value = widen(y[i * y_step]);
    if constexpr (kScale) value *= scale[i * channel_step];
    if constexpr (kShift) value += shift[i * channel_step];
    if constexpr (kOther) value += widen(other[i * other_step]);
    const T rounded = narrow<T>(value);
    const bits_t<A> bits = magnitude(widen(rounded));  // in which an overflow is to show
    seen = bits > seen ? bits : seen;
    y[i * y_step] = relu ? rectified(rounded) : rounded;
  }
  return seen;
}

// In double from the start: finite whenever all elements are.
template <class T>
RLRP_HD double sum_row(int64_t count, const T* x) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(widen(x[i]));
  return sum;
}

}  // namespace rlrp
