// 3×3 filters with a stride of 1 by F(4, 3) along both axes: 36 multiplications for 16 outputs instead of 144
// (Lavin and Gray, arXiv:1509.09308).
//
// Polynomials are evaluated at 0, 1, -1, 1/2, -2 and infinity, which rounds less than 0, ±1, ±2 (Barabasz et
// al., arXiv:1803.10986). 1 is among them so that equal inputs have one term that is not 0, by which all outputs are
// equal: a uniform region of an image has the ties that it has without this algorithm.
#pragma once

#include "convolution_area.h"

namespace rlrp {
namespace convolution {

struct Square {
  static constexpr int kTaps = 3, kSide = 4;        // inputs of an output and outputs of a patch, along an axis
  static constexpr int kReach = kSide + kTaps - 1;  // inputs of a patch, and terms
  static constexpr int kTerms = kReach * kReach;
  static constexpr int64_t outputs[2] = {kSide, kSide};
  static constexpr int64_t kGap = 0;

  // Whether it takes fewer multiplications than Area, which rounds less: not of some small images.
  static bool suits(const Convolution& conv) {
    for (int axis = 0; axis < 2; ++axis) {
      if (conv.kernel[axis] != kTaps || conv.stride[axis] != 1) return false;
    }
    return kTerms * Grid(conv, outputs).count(1) < Area::kTerms * Grid(conv, Area::outputs).count(1);
  }

  int64_t depth(int) const { return 1; }

  template <int kLanes>
  RLRP_INLINE void transform_filters(const Convolution& conv, const Planes<kTerms>& planes, const Range& range,
                                     int64_t first, int64_t last, float* result) const {
    each_filter<kLanes>(conv, range, first, last, result, [&](const auto& taps, float* to) RLRP_INLINE {
      transform_filter<kLanes>(taps, planes, to);
    });
  }

  template <int kLanes>
  RLRP_INLINE void transform_patch(const Work& work, const Planes<kTerms>& planes, int64_t patch, int64_t row,
                                   float* result) const {
    const Patch pixels(work.conv, work.grid.place(patch), work.zeros);
    const int64_t depth = work.conv.in.channels;
    each_vector<kLanes>(depth, [&](int64_t c, const auto& some) RLRP_INLINE {
      transform_pixels<kLanes>([&](int i, int j) RLRP_INLINE { return some.load(pixels.at[i][j] + c); }, planes,
                               result + row * depth + c, some);
    });
  }

  template <int kLanes>
  RLRP_INLINE float finish_patch(const Work& work, const Planes<kTerms>& planes, int64_t patch,
                                 const float* rows) const {
    return finish_both<kLanes, kReach, kSide>(
        work, planes.products, patch, rows, [](const auto& m, auto& y) RLRP_INLINE { finish_terms(m, y); });
  }

 protected:
  struct Patch {
    const float* at[kReach][kReach];

    // What only outputs outside of the image would meet may be anything: it repeats what lies before it.
    Patch(const Convolution& conv, const Place& place, const float* zeros) {
      const int64_t last_h = conv.out.size[0] - place.h + kTaps - 2, last_w = conv.out.size[1] - place.w + kTaps - 2;
      for (int64_t i = 0; i < kReach; ++i) {
        for (int64_t j = 0; j < kReach; ++j) at[i][j] = conv.pixel(place, min64(i, last_h), min64(j, last_w), zeros);
      }
    }
  };

  // Calls f with the taps of each input's filters, and where their terms go.
  template <int kLanes, class F>
  RLRP_INLINE static void each_filter(const Convolution& conv, const Range& range, int64_t first, int64_t last,
                                      float* result, const F& f) {
    const int64_t depth = conv.in.channels;
    for (int64_t k = first; k < last; k += kLanes) {
      float* to = result + k / kPanel<kLanes> * kPanel<kLanes> * depth + k % kPanel<kLanes>;
      for (int64_t in = 0; in < depth; ++in, to += kPanel<kLanes>) {
        f(Taps<kLanes>(conv, range.first + k, in), to);
      }
    }
  }

  template <int kLanes, int kPlanes, class At>
  RLRP_INLINE static void transform_filter(const At& taps, const Planes<kPlanes>& planes, float* to) {
    transform_both<kLanes, kTaps, kReach>(
        taps, [](const auto& w, auto& term) RLRP_INLINE { transform_taps(w, term); },
        [&](int i, int j, const Vector<kLanes>& term) RLRP_INLINE {
          store<kLanes>(to + planes.filters[i * kReach + j], term);
        });
  }

  template <int kLanes, int kPlanes, class At, class Some>
  RLRP_INLINE static void transform_pixels(const At& at, const Planes<kPlanes>& planes, float* to, const Some& some) {
    transform_both<kLanes, kReach, kReach>(
        at, [](const auto& x, auto& term) RLRP_INLINE { transform_inputs(x, term); },
        [&](int i, int j, const Vector<kLanes>& term) RLRP_INLINE {
          some.store(to + planes.patches[i * kReach + j], term);
        });
  }

  // Terms are of the points in the order above.
  template <class V>
  RLRP_INLINE static void transform_taps(const V (&w)[kTaps], V (&term)[kReach]) {
    const V even = (1.0f / 3) * (w[0] + w[2]), odd = (1.0f / 3) * w[1];
    term[0] = w[0];
    term[1] = even + odd;
    term[2] = odd - even;
    term[3] = (-16.0f / 15) * (w[0] + 0.5f * w[1] + 0.25f * w[2]);
    term[4] = (1.0f / 15) * (w[0] - 2 * w[1] + 4 * w[2]);
    term[5] = w[2];
  }

  // All but the term of 1 by differences, so that they are exactly 0 where inputs are equal.
  template <class V>
  RLRP_INLINE static void transform_inputs(const V (&x)[kReach], V (&term)[kReach]) {
    const V e[kReach - 1] = {x[1] - x[0], x[2] - x[1], x[3] - x[2], x[4] - x[3], x[5] - x[4]};
    term[0] = e[3] - e[0] + 2.5f * e[2] + 0.5f * e[1];
    term[1] = x[4] - x[1] + 2.5f * x[3] + 0.5f * x[2];
    term[2] = e[3] - e[1] + 1.5f * e[2];
    term[3] = e[3] + 3 * e[2] + 2 * e[1];
    term[4] = e[3] + 0.5f * (e[2] - e[1]);
    term[5] = e[4] - e[1] + 2.5f * e[3] + 0.5f * e[2];
  }

  template <class V>
  RLRP_INLINE static void finish_terms(const V (&m)[kReach], V (&y)[kSide]) {
    const V even = m[1] + m[2], odd = m[1] - m[2];
    y[0] = even + m[3] + m[4] + m[0];
    y[1] = odd + 0.5f * m[3] - 2 * m[4];
    y[2] = even + 0.25f * m[3] + 4 * m[4];
    y[3] = odd + 0.125f * m[3] - 8 * m[4] + m[5];
  }
};

}  // namespace convolution
}  // namespace rlrp
