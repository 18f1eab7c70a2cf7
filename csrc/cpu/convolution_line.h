// Filters along one axis, by F(2, k): of 7 taps 10 multiplications for 2 outputs instead of 14.
#pragma once

#include "convolution_axis.h"

namespace rlrp {
namespace convolution {

struct Line {
  static constexpr int kTerms = kAxisTerms;
  static constexpr int64_t kGap = 0;

  int axis;
  Axis along;
  int64_t outputs[2];  // of a patch

  Line(int axis, int64_t taps, int64_t stride) : axis(axis), along(taps, stride), outputs{2 - axis, 1 + axis} {}

  int64_t depth(int term) const { return along.depth[term]; }

  // Filters, transformed: for each term (outputs / panel, groups, in, panel), where a panel is what the matrix
  // product holds. From one of the range to another.
  template <int kLanes>
  RLRP_INLINE void transform_filters(const Convolution& conv, const Planes<kTerms>& planes, const Range& range,
                                     int64_t first, int64_t last, float* result) const {
    for (int64_t k = first; k < last; k += kLanes) {
      const int64_t out = range.first + k;
      float* to[kTerms];
      for (int t = 0; t < kTerms; ++t) {
        to[t] = result + planes.filters[t] + k / kPanel<kLanes> * kPanel<kLanes> * planes.depth[t] +
                k % kPanel<kLanes>;
      }
      for (int64_t in = 0; in < conv.in.channels; ++in) {
        const Taps<kLanes> taps(conv, out, in);
        int64_t at = in * kPanel<kLanes>;
        for (const Axis::Group& group : along.groups) {
          with_taps(group.taps, [&](auto count) RLRP_INLINE {
            Vector<kLanes> w[count], term[kTerms];
            for (int i = 0; i < count; ++i) {
              const int64_t tap = group.first + i * along.stride;
              w[i] = axis ? taps(0, tap) : taps(tap, 0);
            }
            transform_taps<count>(w, term);
            for (int t = 0; t < kTerms; ++t) {
              if (shares(count, t)) store<kLanes>(to[t] + at, term[t]);
            }
          });
          at += conv.in.channels * kPanel<kLanes>;
        }
      }
    }
  }

  // A patch, transformed, into row number `row` of each plane.
  template <int kLanes>
  RLRP_INLINE void transform_patch(const Work& work, const Planes<kTerms>& planes, int64_t patch, int64_t row,
                                   float* result) const {
    const Convolution& conv = work.conv;
    const Place at = work.grid.place(patch);
    const float* zeros = work.zeros;
    float* to[kTerms];
    for (int t = 0; t < kTerms; ++t) to[t] = result + planes.patches[t] + row * planes.depth[t];
    for (const Axis::Group& group : along.groups) {
      with_taps(group.taps, [&](auto count) RLRP_INLINE {
        const float* pixel[count + 1];
        for (int i = 0; i <= count; ++i) {
          const int64_t tap = group.first + i * along.stride;
          pixel[i] = axis ? conv.pixel(at, 0, tap, zeros) : conv.pixel(at, tap, 0, zeros);
        }
        each_vector<kLanes>(conv.in.channels, [&](int64_t c, const auto& some) RLRP_INLINE {
          Vector<kLanes> x[count + 1], term[kTerms];
          for (int i = 0; i <= count; ++i) x[i] = some.load(pixel[i] + c);
          transform_inputs<count>(x, term);
          for (int t = 0; t < kTerms; ++t) {
            if (shares(count, t)) some.store(to[t] + c, term[t]);
          }
        });
      });
      for (float*& term : to) term += conv.in.channels;
    }
  }

  // The outputs of a patch from its row of each plane; returns their sum.
  template <int kLanes>
  RLRP_INLINE float finish_patch(const Work& work, const Planes<kTerms>& planes, int64_t patch,
                                 const float* rows) const {
    const Convolution& conv = work.conv;
    const Range& range = work.range;
    const Place at = work.grid.place(patch);
    const int64_t start = conv.out.offset(at.n, at.h, at.w) + range.first, next = conv.out.step[axis];
    const bool has_next = (axis ? at.w : at.h) + 1 < conv.out.size[axis];
    Vector<kLanes> sum{};
    each_vector<kLanes>(range.count, [&](int64_t c, const auto& some) RLRP_INLINE {
      Vector<kLanes> term[kTerms], y[2];
      for (int t = 0; t < kTerms; ++t) term[t] = load<kLanes>(rows + t * planes.products + c);
      finish_terms(term, y);
      const Vector<kLanes> bias = conv.bias ? some.load(conv.bias + range.first + c) : Vector<kLanes>{};
      put<kLanes>(conv, start + c, y[0] + bias, some, sum);
      if (has_next) put<kLanes>(conv, start + next + c, y[1] + bias, some, sum);
    });
    return total<kLanes>(sum);
  }
};

}  // namespace convolution
}  // namespace rlrp
