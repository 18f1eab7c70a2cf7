// Winograd's F(2, k) along one axis: taps are taken by threes, each by F(2, 3) with 4 multiplications for 2
// outputs instead of 6, and what is left over by F(2, 2) with 3 instead of 4, or by F(2, 1) with 2. Of 7 taps:
// 10 instead of 14. With a stride, those of each of its phases are taken together.
//
// All of these end in the same 4 terms, so that one matrix product runs over channels and groups of taps:
//   y0 = m0 + m1 + m2,  y1 = m1 - m2 - m3.
#pragma once

#include <algorithm>

#include "convolution.h"

namespace rlrp {
namespace convolution {

struct Line {
  static constexpr int kTerms = 4;
  static constexpr int64_t kGap = 0;
  struct Group {
    int64_t first, taps;  // from 1 to 3, `stride` apart
  };

  int axis;
  int64_t stride;
  std::vector<Group> groups;  // large ones first, so that those with a share in a term are numbered in a row
  int64_t outputs[2];  // of a patch

  Line(int axis, int64_t taps, int64_t stride) : axis(axis), stride(stride), outputs{2 - axis, 1 + axis} {
    for (int64_t phase = 0; phase < min64(stride, taps); ++phase) {
      for (int64_t tap = phase; tap < taps; tap += 3 * stride) {
        groups.push_back({tap, min64(3, ceil_div(taps - tap, stride))});
      }
    }
    std::stable_sort(groups.begin(), groups.end(), [](auto& a, auto& b) { return a.taps > b.taps; });
  }

  int64_t depth(int term) const {
    const int64_t least = term == 1 ? 2 : term == 2 ? 3 : 1;
    return std::count_if(groups.begin(), groups.end(), [&](auto& group) { return group.taps >= least; });
  }

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
        const Taps<kLanes> taps(conv.filters, out, in);
        int64_t at = in * kPanel<kLanes>;
        for (const Group& group : groups) {
          Vector<kLanes> w[3] = {};
          for (int64_t i = 0; i < group.taps; ++i) {
            const int64_t tap = group.first + i * stride;
            w[i] = axis ? taps(0, tap) : taps(tap, 0);
          }
          store<kLanes>(to[0] + at, w[0]);
          store<kLanes>(to[3] + at, w[group.taps - 1]);
          if (group.taps == 3) {
            store<kLanes>(to[1] + at, 0.5f * (w[0] + w[2] + w[1]));
            store<kLanes>(to[2] + at, 0.5f * (w[0] + w[2] - w[1]));
          } else if (group.taps == 2) {
            store<kLanes>(to[1] + at, w[0] + w[1]);
          }
          at += conv.in.channels * kPanel<kLanes>;
        }
      }
    }
  }

  template <int kLanes>
  RLRP_INLINE void transform_patch(const Convolution& conv, const Planes<kTerms>& planes, const Place& at,
                                   const float* zeros, int64_t row, float* result) const {
    float* to[kTerms];
    for (int t = 0; t < kTerms; ++t) to[t] = result + planes.patches[t] + row * planes.depth[t];
    for (const Group& group : groups) {
      const float* pixel[4] = {zeros, zeros, zeros, zeros};
      for (int64_t i = 0; i <= group.taps; ++i) {
        const int64_t tap = group.first + i * stride;
        pixel[i] = axis ? conv.pixel(at, 0, tap, zeros) : conv.pixel(at, tap, 0, zeros);
      }
      for (int64_t c = 0; c < conv.in.channels; c += kLanes) {
        const Vector<kLanes> a = load<kLanes>(pixel[0] + c), b = load<kLanes>(pixel[1] + c);
        if (group.taps == 3) {
          const Vector<kLanes> d = load<kLanes>(pixel[2] + c), e = load<kLanes>(pixel[3] + c);
          store<kLanes>(to[0] + c, a - d);
          store<kLanes>(to[1] + c, b + d);
          store<kLanes>(to[2] + c, d - b);
          store<kLanes>(to[3] + c, b - e);
        } else if (group.taps == 2) {
          store<kLanes>(to[0] + c, a - b);
          store<kLanes>(to[1] + c, b);
          store<kLanes>(to[3] + c, b - load<kLanes>(pixel[2] + c));
        } else {
          store<kLanes>(to[0] + c, a);
          store<kLanes>(to[3] + c, -b);
        }
      }
      for (float*& term : to) term += conv.in.channels;
    }
  }

  template <int kLanes>
  RLRP_INLINE float finish_patch(const Convolution& conv, const Planes<kTerms>& planes, const Range& range,
                                 const Place& at, const float* rows) const {
    const int64_t start = conv.out.offset(at.n, at.h, at.w) + range.first, next = conv.out.step[axis];
    const bool has_next = (axis ? at.w : at.h) + 1 < conv.out.size[axis];
    const float factor = conv.factor ? conv.factor[at.n] : 1.0f;
    Vector<kLanes> sum{};
    for (int64_t c = 0; c < range.count; c += kLanes) {
      const Vector<kLanes> a = load<kLanes>(rows + c), b = load<kLanes>(rows + planes.products + c);
      const Vector<kLanes> d = load<kLanes>(rows + 2 * planes.products + c);
      const Vector<kLanes> e = load<kLanes>(rows + 3 * planes.products + c);
      const Vector<kLanes> bias = conv.bias ? load<kLanes>(conv.bias + range.first + c) : Vector<kLanes>{};
      put<kLanes>(conv, start + c, a + b + d + bias, factor, sum);
      if (has_next) put<kLanes>(conv, start + next + c, b - d - e + bias, factor, sum);
    }
    return total<kLanes>(sum);
  }
};

}  // namespace convolution
}  // namespace rlrp
