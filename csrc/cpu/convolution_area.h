// Filters along both axes, by F(2, k) along each: of 3×3 16 multiplications for 4 outputs instead of 36
// (Lavin and Gray, arXiv:1509.09308), with a stride of 2 25, of 5×5 49 instead of 100.
#pragma once

#include "convolution_axis.h"

namespace rlrp {
namespace convolution {

struct Area {
  static constexpr int kTerms = kAxisTerms * kAxisTerms;
  static constexpr int64_t outputs[2] = {2, 2};
  static constexpr int64_t kGap = 0;

  Axis down, along;

  Area(const int64_t (&taps)[2], const int64_t (&stride)[2])
      : down(taps[0], stride[0]), along(taps[1], stride[1]) {}

  int64_t depth(int term) const { return down.depth[term / kAxisTerms] * along.depth[term % kAxisTerms]; }

  template <int kLanes>
  RLRP_INLINE void transform_filters(const Convolution& conv, const Planes<kTerms>& planes, const Range& range,
                                     int64_t first, int64_t last, float* result) const {
    for (int64_t k = first; k < last; k += kLanes) {
      const int64_t out = range.first + k;
      each_pair(conv, kPanel<kLanes>, [&](auto taps_down, auto taps_along, const Pair& pair) RLRP_INLINE {
        constexpr int a = taps_down, b = taps_along;
        float* to[kTerms];
        for (int t = 0; t < kTerms; ++t) {
          to[t] = result + planes.filters[t] + k / kPanel<kLanes> * kPanel<kLanes> * planes.depth[t] +
                  k % kPanel<kLanes> + pair.start[t % kAxisTerms];
        }
        for (int64_t in = 0; in < conv.in.channels; ++in) {
          const Taps<kLanes> taps(conv, out, in);
          Vector<kLanes> half[b][kAxisTerms];
#pragma GCC unroll 3
          for (int j = 0; j < b; ++j) {
            Vector<kLanes> w[a];
            for (int i = 0; i < a; ++i) w[i] = taps(pair.h + i * down.stride, pair.w + j * along.stride);
            transform_taps<a>(w, half[j]);
          }
#pragma GCC unroll 4
          for (int i = 0; i < kAxisTerms; ++i) {
            if (!shares(a, i)) continue;
            Vector<kLanes> w[b], term[kAxisTerms];
#pragma GCC unroll 3
            for (int j = 0; j < b; ++j) w[j] = half[j][i];
            transform_taps<b>(w, term);
#pragma GCC unroll 4
            for (int j = 0; j < kAxisTerms; ++j) {
              if (shares(b, j)) store<kLanes>(to[i * kAxisTerms + j] + in * kPanel<kLanes>, term[j]);
            }
          }
        }
      });
    }
  }

  template <int kLanes>
  RLRP_INLINE void transform_patch(const Work& work, const Planes<kTerms>& planes, int64_t patch, int64_t row,
                                   float* result) const {
    const Convolution& conv = work.conv;
    const Place at = work.grid.place(patch);
    each_pair(conv, 1, [&](auto taps_down, auto taps_along, const Pair& pair) RLRP_INLINE {
      constexpr int a = taps_down, b = taps_along;
      const float* pixel[a + 1][b + 1];
      for (int i = 0; i <= a; ++i) {
        for (int j = 0; j <= b; ++j) {
          pixel[i][j] = conv.pixel(at, pair.h + i * down.stride, pair.w + j * along.stride, work.zeros);
        }
      }
      float* to[kTerms];
      for (int t = 0; t < kTerms; ++t) {
        to[t] = result + planes.patches[t] + row * planes.depth[t] + pair.start[t % kAxisTerms];
      }
      each_vector<kLanes>(conv.in.channels, [&](int64_t c, const auto& some) RLRP_INLINE {
        Vector<kLanes> half[b + 1][kAxisTerms];
#pragma GCC unroll 4
        for (int j = 0; j <= b; ++j) {
          Vector<kLanes> x[a + 1];
#pragma GCC unroll 4
          for (int i = 0; i <= a; ++i) x[i] = some.load(pixel[i][j] + c);
          transform_inputs<a>(x, half[j]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kAxisTerms; ++i) {
          if (!shares(a, i)) continue;
          Vector<kLanes> x[b + 1], term[kAxisTerms];
#pragma GCC unroll 4
          for (int j = 0; j <= b; ++j) x[j] = half[j][i];
          transform_inputs<b>(x, term);
#pragma GCC unroll 4
          for (int j = 0; j < kAxisTerms; ++j) {
            if (shares(b, j)) some.store(to[i * kAxisTerms + j] + c, term[j]);
          }
        }
      });
    });
  }

  template <int kLanes>
  RLRP_INLINE float finish_patch(const Work& work, const Planes<kTerms>& planes, int64_t patch,
                                 const float* rows) const {
    return finish_both<kLanes, kAxisTerms, 2>(
        work, planes.products, patch, rows, [](const auto& m, auto& y) RLRP_INLINE { finish_terms(m, y); });
  }

 private:
  // A group of either axis: the first taps, and where its numbers start in a term of each column.
  struct Pair {
    int64_t h, w, start[kAxisTerms];
  };

  // Calls f with the numbers of taps as constants, and each pair.
  template <class F>
  RLRP_INLINE void each_pair(const Convolution& conv, int64_t width, const F& f) const {
    for (size_t i = 0; i < down.groups.size(); ++i) {
      for (size_t j = 0; j < along.groups.size(); ++j) {
        Pair pair{down.groups[i].first, along.groups[j].first, {}};
        for (int t = 0; t < kAxisTerms; ++t) {
          pair.start[t] = (i * along.depth[t] + j) * conv.in.channels * width;
        }
        with_taps(down.groups[i].taps, [&](auto a) RLRP_INLINE {
          with_taps(along.groups[j].taps, [&](auto b) RLRP_INLINE { f(a, b, pair); });
        });
      }
    }
  }
};

}  // namespace convolution
}  // namespace rlrp
