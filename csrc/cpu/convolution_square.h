// Winograd's F(2×2, 3×3): 16 multiplications for every 4 outputs instead of 36 (Lavin and Gray,
// arXiv:1509.09308).
#pragma once

#include "convolution.h"

namespace rlrp {
namespace convolution {

struct Square {
  static constexpr int kPatch = 4, kStep = 2;
  static constexpr int kTerms = kPatch * kPatch;
  static constexpr int64_t kGap = 0;
  static constexpr int64_t outputs[2] = {kStep, kStep};

  int64_t depth(int) const { return 1; }

  // Filters, transformed: for each term (outputs / panel, in, panel), where a panel is what the matrix
  // product holds. From one of the range to another.
  template <int kLanes>
  RLRP_INLINE void transform_filters(const Convolution& conv, const Planes<kTerms>& planes, const Range& range,
                                     int64_t first, int64_t last, float* result) const {
    const int64_t plane = planes.filters[1];
    for (int64_t k = first; k < last; k += kLanes) {
      const int64_t out = range.first + k;
      float* to = result + k / kPanel<kLanes> * kPanel<kLanes> * conv.in.channels + k % kPanel<kLanes>;
      for (int64_t in = 0; in < conv.in.channels; ++in, to += kPanel<kLanes>) {
        const Taps<kLanes> taps(conv.filters, out, in);
        Vector<kLanes> half[kPatch][3];
        for (int j = 0; j < 3; ++j) {
          const Vector<kLanes> a = taps(0, j), b = taps(1, j), d = taps(2, j);
          half[0][j] = a;
          half[1][j] = 0.5f * (a + d + b);
          half[2][j] = 0.5f * (a + d - b);
          half[3][j] = d;
        }
        for (int i = 0; i < kPatch; ++i) {
          float* term = to + i * kPatch * plane;
          const Vector<kLanes> ends = half[i][0] + half[i][2];
          store<kLanes>(term, half[i][0]);
          store<kLanes>(term + plane, 0.5f * (ends + half[i][1]));
          store<kLanes>(term + 2 * plane, 0.5f * (ends - half[i][1]));
          store<kLanes>(term + 3 * plane, half[i][2]);
        }
      }
    }
  }

  // A patch, transformed, into row number `row` of each plane.
  template <int kLanes>
  RLRP_INLINE void transform_patch(const Convolution& conv, const Planes<kTerms>& planes, const Place& at,
                                   const float* zeros, int64_t row, float* result) const {
    const int64_t plane = planes.patches[1];
    const float* pixel[kPatch][kPatch];
    for (int i = 0; i < kPatch; ++i) {
      for (int j = 0; j < kPatch; ++j) pixel[i][j] = conv.pixel(at, i, j, zeros);
    }
    result += row * conv.in.channels;
    for (int64_t c = 0; c < conv.in.channels; c += kLanes) {
      Vector<kLanes> half[kPatch][kPatch];
#pragma GCC unroll 4
      for (int j = 0; j < kPatch; ++j) {
        const Vector<kLanes> a = load<kLanes>(pixel[0][j] + c), b = load<kLanes>(pixel[1][j] + c);
        const Vector<kLanes> d = load<kLanes>(pixel[2][j] + c), e = load<kLanes>(pixel[3][j] + c);
        half[0][j] = a - d;
        half[1][j] = b + d;
        half[2][j] = d - b;
        half[3][j] = b - e;
      }
#pragma GCC unroll 4
      for (int i = 0; i < kPatch; ++i) {
        float* term = result + i * kPatch * plane + c;
        store<kLanes>(term, half[i][0] - half[i][2]);
        store<kLanes>(term + plane, half[i][1] + half[i][2]);
        store<kLanes>(term + 2 * plane, half[i][2] - half[i][1]);
        store<kLanes>(term + 3 * plane, half[i][1] - half[i][3]);
      }
    }
  }

  // The outputs of a patch from its row of each plane; returns their sum.
  template <int kLanes>
  RLRP_INLINE float finish_patch(const Convolution& conv, const Planes<kTerms>& planes, const Range& range,
                                 const Place& at, const float* rows) const {
    const int64_t plane = planes.products;
    const int64_t start = conv.out.offset(at.n, at.h, at.w) + range.first;
    const float factor = conv.factor ? conv.factor[at.n] : 1.0f;
    Vector<kLanes> sum{};
    for (int64_t c = 0; c < range.count; c += kLanes) {
      Vector<kLanes> half[kStep][kPatch];
#pragma GCC unroll 4
      for (int j = 0; j < kPatch; ++j) {
        const float* term = rows + j * plane + c;
        const Vector<kLanes> a = load<kLanes>(term), b = load<kLanes>(term + kPatch * plane);
        const Vector<kLanes> d = load<kLanes>(term + 2 * kPatch * plane);
        half[0][j] = a + b + d;
        half[1][j] = b - d - load<kLanes>(term + 3 * kPatch * plane);
      }
      const Vector<kLanes> bias = conv.bias ? load<kLanes>(conv.bias + range.first + c) : Vector<kLanes>{};
#pragma GCC unroll 2
      for (int i = 0; i < kStep; ++i) {
        const Vector<kLanes> y[kStep] = {half[i][0] + half[i][1] + half[i][2] + bias,
                                         half[i][1] - half[i][2] - half[i][3] + bias};
#pragma GCC unroll 2
        for (int j = 0; j < kStep; ++j) {
          if (!conv.out.has(at.h + i, at.w + j)) continue;
          put<kLanes>(conv, start + i * conv.out.step[0] + j * conv.out.step[1] + c, y[j], factor, sum);
        }
      }
    }
    return total<kLanes>(sum);
  }
};

}  // namespace convolution
}  // namespace rlrp
