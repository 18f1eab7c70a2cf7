// Pooling as index arithmetic: one output's winner, one input's share. A pooling always has three
// spatial axes; missing ones have size 1.
#pragma once

#include "pack.h"
#include "window.h"

namespace rlrp {

template <class I>
struct PoolingOf {
  int64_t batch = 0, channels = 0;
  WindowOf<I> axis[3];

  RLRP_HD I in_plane() const { return axis[0].in * axis[1].in * axis[2].in; }
  RLRP_HD I out_plane() const { return axis[0].out * axis[1].out * axis[2].out; }
  RLRP_HD I in_index(I d, I h, I w) const { return (d * axis[1].in + h) * axis[2].in + w; }
  RLRP_HD I out_index(I d, I h, I w) const { return (d * axis[1].out + h) * axis[2].out + w; }

  // A number for each element of a window, counted along the axes from its first that is no padding.
  RLRP_HD I number(I d, I h, I w) const {
    return (d * axis[1].most_inputs() + h) * axis[2].most_inputs() + w;
  }
  RLRP_HD I most_inputs() const {
    return axis[0].most_inputs() * axis[1].most_inputs() * axis[2].most_inputs();
  }
  RLRP_HD I most_outputs() const {
    return axis[0].most_outputs() * axis[1].most_outputs() * axis[2].most_outputs();
  }
};

using Pooling = PoolingOf<int64_t>;

template <class I>
using Same = std::type_identity_t<I>;  // of an argument that may be of another type

template <class A>
RLRP_HD bool beats(A value, A best) {
  return (value > best) | (value != value);
}

// The maxima that output (d, h, w) sees in V channels and the numbers of their elements in the window;
// the first one in a tie. NaN wins. Elements of x lie `step` apart, and channels side by side.
template <class T, int V>
struct Winner {
  Pack<T, V> value;
  int32_t number[V];  // windows have fewer elements than 2^31
};

template <int V = 1, class I, class T>
RLRP_HD Winner<T, V> winner(const PoolingOf<I>& p, const T* x, int64_t step, Same<I> d, Same<I> h,
                     Same<I> w) {
  const SpanOf<I> ds = p.axis[0].inputs(d), hs = p.axis[1].inputs(h), ws = p.axis[2].inputs(w);
  Winner<T, V> best{load_pack<V>(x + p.in_index(ds.begin, hs.begin, ws.begin) * step), {}};
  I a = 0;
  for (I i = ds.begin; i < ds.end; i += p.axis[0].step(), ++a) {
    I b = 0;
    for (I j = hs.begin; j < hs.end; j += p.axis[1].step(), ++b) {
      I number = p.number(a, b, 0);
      for (I k = ws.begin; k < ws.end; k += p.axis[2].step(), ++number) {
        const auto value = load_pack<V>(x + p.in_index(i, j, k) * step);
        for (int v = 0; v < V; ++v) {
          if (!beats(widen(value.at[v]), widen(best.value.at[v]))) continue;
          best.value.at[v] = value.at[v];
          best.number[v] = static_cast<int32_t>(number);
        }
      }
    }
  }
  return best;
}

// What the element at (d, h, w) receives from max pooling, in V channels: the relevance r of the outputs
// whose winner it is. Neighbours in `winners` and r lie `step` apart, and channels side by side.
template <int V = 1, class I, class T, class N>
RLRP_HD Pack<wide_t<T>, V> won(const PoolingOf<I>& p, const N* winners, const T* r, int64_t step, Same<I> d,
                               Same<I> h, Same<I> w) {
  const SpanOf<I> ds = p.axis[0].outputs(d), hs = p.axis[1].outputs(h), ws = p.axis[2].outputs(w);
  Pack<wide_t<T>, V> sum = {};
  for (I i = ds.begin; i < ds.end; ++i) {
    if (!p.axis[0].sees(i, d)) continue;
    for (I j = hs.begin; j < hs.end; ++j) {
      if (!p.axis[1].sees(j, h)) continue;
      const I plane = p.number(p.axis[0].number(i, d), p.axis[1].number(j, h), 0);
      for (I k = ws.begin; k < ws.end; ++k) {
        if (!p.axis[2].sees(k, w)) continue;
        const int64_t at = p.out_index(i, j, k) * step;
        const auto from = load_pack<V>(winners + at);
        const auto relevance = load_pack<V>(r + at);
        const I mine = plane + p.axis[2].number(k, w);
        for (int v = 0; v < V; ++v) {
          if (static_cast<I>(from.at[v]) == mine) sum.at[v] += widen(relevance.at[v]);
        }
      }
    }
  }
  return sum;
}

// How average pooling weighs an output along one axis; the three axes' weights are multiplied.
struct AverageRule {
  bool count_include_pad = true;
  int64_t divisor = 0;  // 0: the number of elements

  template <class I>
  RLRP_HD I count(const WindowOf<I>& window, Same<I> o) const {
    if (divisor != 0) return 1;
    if (count_include_pad && !window.adaptive) return window.padded_count(o);
    const SpanOf<I> span = window.inputs(o);
    return span.end - span.begin;
  }
};

// What the element at (d, h, w) receives from average pooling, in V channels that lie side by side.
template <int V = 1, class I, class T>
RLRP_HD Pack<wide_t<T>, V> averaged(const PoolingOf<I>& p, const AverageRule& rule, const T* r, int64_t step,
                                    Same<I> d, Same<I> h, Same<I> w) {
  using A = wide_t<T>;
  const SpanOf<I> ds = p.axis[0].outputs(d), hs = p.axis[1].outputs(h), ws = p.axis[2].outputs(w);
  Pack<A, V> sum = {};
  for (I i = ds.begin; i < ds.end; ++i) {
    for (I j = hs.begin; j < hs.end; ++j) {
      const A outer = A(rule.count(p.axis[0], i)) * A(rule.count(p.axis[1], j));
      for (I k = ws.begin; k < ws.end; ++k) {
        const auto relevance = load_pack<V>(r + p.out_index(i, j, k) * step);
        const A count = outer * A(rule.count(p.axis[2], k));
        for (int v = 0; v < V; ++v) sum.at[v] += widen(relevance.at[v]) / count;
      }
    }
  }
  for (int v = 0; v < V && rule.divisor != 0; ++v) sum.at[v] /= A(rule.divisor);
  return sum;
}

}  // namespace rlrp
