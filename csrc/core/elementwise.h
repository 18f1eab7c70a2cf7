// What the element-by-element kernels compute for one element; the same on the CPU and on the GPU.
#pragma once

#include "scalar.h"
#include "share.h"

namespace rlrp {

// q = factor x g
template <class T>
RLRP_HD T multiply(T x, T g, wide_t<T> factor) {
  return narrow<T>(widen(x) * (widen(g) * factor));
}

// max(value, 0); a NaN stays.
template <class T>
RLRP_HD T rectified(T value) {
  return widen(value) < wide_t<T>(0) ? T{} : value;
}

// One or two terms of a relevance, with the factors of the sample at hand.
template <class T, bool kTwo>
struct Terms {
  using A = wide_t<T>;
  const T* t;
  const T* u;
  int64_t t_step, u_step;
  A t_factor, u_factor;

  RLRP_HD A at(int64_t i) const {
    const A first = t_factor * widen(t[i * t_step]);
    if constexpr (kTwo) return first + u_factor * widen(u[i * u_step]);
    return first;
  }
};

template <class T>
struct Parts {
  T a, b;
};

// r|a|/(|a|+|b|) and r|b|/(|a|+|b|); with kFromSum the first summand is given as relu(a + b).
template <class T, bool kFromSum>
RLRP_HD Parts<T> divide(wide_t<T> r, T a, T b) {
  using A = wide_t<T>;
  const A second = widen(b);
  const A given = widen(a);
  const Shares<A> share = shares<A>(kFromSum ? given - second : given, second);
  return {narrow<T>(r * share.a), narrow<T>(r * share.b)};
}

}  // namespace rlrp
