// The skip split: which part of a sum's relevance goes to its first operand.
#pragma once

#include "scalar.h"

namespace rlrp {

template <class A>
RLRP_HD A absolute(A v) {
  return v < A(0) ? -v : v;
}

template <class A>
struct Shares {
  A a, b;
};

// |a| / (|a|+|b|) and |b| / (|a|+|b|), or 1/2 each where both are 0. Formed from min/max, so that
// neither overflow nor the size of a and b matters.
template <class A>
RLRP_HD Shares<A> shares(A a, A b) {
  a = absolute(a);
  b = absolute(b);
  const bool a_leads = a >= b;
  const A large = a_leads ? a : b;
  const A small = a_leads ? b : a;
  const bool zero = large == A(0);
  const A ratio = zero ? A(1) : small / (zero ? A(1) : large);
  const A major = A(1) / (A(1) + ratio);
  const A minor = ratio * major;
  return {a_leads ? major : minor, a_leads ? minor : major};
}

}  // namespace rlrp
