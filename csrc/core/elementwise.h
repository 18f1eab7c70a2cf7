// What the element-by-element kernels compute for one element; the same on the CPU and on the GPU.
//
// Each is a function from kFrom elements to kTo (two to one, or three to two), and returns a number that has to be finite and moderate for the
// result to be trusted (0 where nothing can go wrong).
#pragma once

#include <cstring>
#include <type_traits>

#include "scalar.h"
#include "share.h"

namespace rlrp {

// s = r / d, and 0 where d is 0.
template <class T>
struct Divide {
  static constexpr int kFrom = 2, kTo = 1;

  RLRP_HD static wide_t<T> run(T relevance, T divisor, T& s) {
    using A = wide_t<T>;
    const A r = widen(relevance), d = widen(divisor);
    s = narrow<T>(d == A(0) ? A(0) : r / d);
    return widen(s) + (d - d);  // an infinite divisor, which leaves no trace in s, becomes a NaN
  }
};

// q = x g, or |x| g.
template <class T, bool kAbsolute>
struct Multiply {
  static constexpr int kFrom = 2, kTo = 1;

  RLRP_HD static wide_t<T> run(T given, T g, T& q) {
    const wide_t<T> x = widen(given);
    q = narrow<T>((kAbsolute ? absolute(x) : x) * widen(g));
    return 0;
  }
};

// r|a|/(|a|+|b|) and r|b|/(|a|+|b|); with kFromSum the first summand is given as relu(a + b).
template <class T, bool kFromSum>
struct Split {
  static constexpr int kFrom = 3, kTo = 2;

  RLRP_HD static wide_t<T> run(T first, T second, T relevance, T& r_a, T& r_b) {
    using A = wide_t<T>;
    const A given = widen(first), b = widen(second), r = widen(relevance);
    const Shares<A> share = shares<A>(kFromSum ? given - b : given, b);
    r_a = narrow<T>(r * share.a);
    r_b = narrow<T>(r * share.b);
    return 0;
  }
};

// max(value, 0); a NaN stays.
template <class T>
RLRP_HD T rectified(T value) {
  return widen(value) < wide_t<T>(0) ? T{} : value;
}

// The bits of |value| as an integer: ordered as the values are, then infinity, then NaN. So the largest can be found
// in any order, and no NaN is lost.
template <class A>
using bits_t = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

template <class A>
RLRP_HD bits_t<A> magnitude(A value) {
  bits_t<A> bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & static_cast<bits_t<A>>(~(bits_t<A>(1) << (8 * sizeof bits - 1)));
}

}  // namespace rlrp
