// The law's two convolutions by Winograd's algorithm, guarded.
//
// The algorithm mixes the inputs of a patch, so that each output is rounded by all of them: by some 1e-7 of what they
// would add up to, were each of them as large as the largest. That is nothing to an output that is a fair share of it,
// and ruin to one that is not, as beside an edge or a dead region: the law divides by it. Such outputs are found, and
// computed directly; so is whatever is too large or too small for the terms in between.
#pragma once

#include <vector>

#include "convolution_direct.h"
#include "convolution_run.h"
#include "convolution_square.h"

namespace rlrp {
namespace convolution {

constexpr float kLeastBound = 1e-28f, kMostBound = 1e30f;  // between which no term overflows, and none is denormal

// Divisors, which are sums of absolute values. How large one could be is told by one more term: the largest inputs
// of the patch, channel by channel, times the sums of the filters' taps.
struct Divisor : Square {
  static constexpr int kBound = Square::kTerms, kTerms = kBound + 1;
  static constexpr float kShare = 1.0f / 64;

  template <int kLanes>
  RLRP_INLINE void transform_filters(const Convolution& conv, const Planes<kTerms>& planes, const Range& range,
                                     int64_t first, int64_t last, float* result) const {
    each_filter<kLanes>(conv, range, first, last, result, [&](const auto& taps, float* to) RLRP_INLINE {
      Vector<kLanes> sum{};
      const auto seen = [&](int i, int j) RLRP_INLINE {
        const Vector<kLanes> tap = taps(i, j);
        sum += tap;
        return tap;
      };
      transform_filter<kLanes>(seen, planes, to);
      store<kLanes>(to + planes.filters[kBound], sum);
    });
  }

  template <int kLanes>
  RLRP_INLINE void transform_patch(const Work& work, const Planes<kTerms>& planes, int64_t patch, int64_t row,
                                   float* result) const {
    const Patch pixels(work.conv, work.grid.place(patch), work.zeros);
    const int64_t depth = work.conv.in.channels;
    each_vector<kLanes>(depth, [&](int64_t c, const auto& some) RLRP_INLINE {
      float* to = result + row * depth + c;
      Vector<kLanes> largest{};
      const auto seen = [&](int i, int j) RLRP_INLINE {
        const Vector<kLanes> x = magnitude(some.load(pixels.at[i][j] + c));
        largest = x > largest ? x : largest;
        return x;
      };
      transform_pixels<kLanes>(seen, planes, to, some);
      some.store(to + planes.patches[kBound], largest);
    });
  }

  // The quotients; those of divisors that cannot be trusted are 0 for now.
  template <int kLanes>
  RLRP_INLINE float finish_patch(const Work& work, const Planes<kTerms>& planes, int64_t patch,
                                 const float* rows) const {
    const Convolution& conv = work.conv;
    Vector<kLanes> sum{}, missed{};
    each_divisor<kLanes>(work, planes, patch, rows,
                         [&](int, int64_t offset, const Vector<kLanes>& d, const Trust<kLanes>& trust,
                             const auto& some) RLRP_INLINE {
                           const Vector<kLanes> quotient = some.load(conv.dividend + offset) / d;
                           const Vector<kLanes> s = d >= trust.least ? quotient : Vector<kLanes>{};
                           sum += magnitude(s);
                           missed += trust.missed(d);
                           write<kLanes>(conv, offset, s, some);
                         });
    if (any<kLanes>(missed)) {
      each_divisor<kLanes>(work, planes, patch, rows,
                           [&](int output, int64_t, const Vector<kLanes>& d, const Trust<kLanes>& trust,
                               const auto&) RLRP_INLINE {
                             work.failed[patch] |= any<kLanes>(trust.missed(d)) << output;
                           });
    }
    return total<kLanes>(sum);
  }

 private:
  // From where on divisors can be trusted.
  template <int kLanes>
  struct Trust {
    Vector<kLanes> least, blame;

    RLRP_INLINE explicit Trust(const Vector<kLanes>& bound) {
      const Vector<kLanes> nan = Vector<kLanes>{} / Vector<kLanes>{};  // with which all comparisons fail
      least = bound >= kLeastBound ? kShare * bound : nan;
      least = bound <= kMostBound ? least : nan;
      blame = bound == 0 ? Vector<kLanes>{} : Vector<kLanes>{} + 1;
    }
    // Not 0 where a divisor is to be computed directly; of no inputs at all it is 0, but beside a NaN.
    RLRP_INLINE Vector<kLanes> missed(const Vector<kLanes>& d) const {
      return d >= least ? Vector<kLanes>{} : blame + 0 * d;
    }
  };

  // Calls f with the number of each output, where some channels of it lie, and their divisors.
  template <int kLanes, class F>
  RLRP_INLINE static void each_divisor(const Work& work, const Planes<kTerms>& planes, int64_t patch,
                                       const float* rows, const F& f) {
    const Convolution& conv = work.conv;
    const Place at = work.grid.place(patch);
    const int64_t start = conv.out.offset(at.n, at.h, at.w) + work.range.first;
    each_vector<kLanes>(work.range.count, [&](int64_t c, const auto& some) RLRP_INLINE {
      const Trust<kLanes> trust(load<kLanes>(rows + kBound * planes.products + c));
      transform_both<kLanes, kReach, kSide>(
          [&](int i, int j) RLRP_INLINE { return load<kLanes>(rows + (i * kReach + j) * planes.products + c); },
          [](const auto& m, auto& y) RLRP_INLINE { finish_terms(m, y); },
          [&](int i, int j, const Vector<kLanes>& d) RLRP_INLINE {
            if (!conv.out.has(at.h + i, at.w + j)) return;
            f(i * kSide + j, start + i * conv.out.step[0] + j * conv.out.step[1] + c, d, trust, some);
          });
    });
  }
};

// The way back, where inputs have either sign, and outputs cancel. So magnitudes are compared that have no channels: of
// inputs their sums, of filters the sums of each tap.
struct Transpose : Square {
  static constexpr int kInputs = kReach * kReach;
  static constexpr double kShare = 1.0 / 128;

  float* inputs;  // of each patch: the sums over channels

  template <int kLanes>
  RLRP_INLINE void transform_patch(const Work& work, const Planes<kTerms>& planes, int64_t patch, int64_t row,
                                   float* result) const {
    Square::transform_patch<kLanes>(work, planes, patch, row, result);
    if (work.range.first > 0) return;
    const Patch pixels(work.conv, work.grid.place(patch), work.zeros);
    for (int k = 0; k < kInputs; ++k) {
      Vector<kLanes> sum{};
      const float* pixel = pixels.at[k / kReach][k % kReach];
      each_vector<kLanes>(work.conv.in.channels, [&](int64_t c, const auto& some) RLRP_INLINE {
        sum += magnitude(some.load(pixel + c));
      });
      inputs[patch * kInputs + k] = total<kLanes>(sum);
    }
  }

  // The outputs of a patch that are to be computed directly, by the sums of each tap.
  uint16_t find(const Convolution& conv, const Place& at, int64_t patch, const double (&taps)[kTaps][kTaps]) const {
    const float* x = inputs + patch * kInputs;
    double largest = 0, all = 0;
    for (int k = 0; k < kInputs; ++k) largest += x[k];
    for (int k = 0; k < kTaps * kTaps; ++k) all += taps[k / kTaps][k % kTaps];
    if (largest == 0) return 0;
    const double bound = largest * all, mean = bound / (conv.in.channels * conv.out.channels);
    const bool moderate = mean >= kLeastBound && bound <= kMostBound && largest <= kMostBound && all <= kMostBound;
    uint16_t failed = 0;
    for (int o = 0; o < kSide * kSide; ++o) {
      const int i = o / kSide, j = o % kSide;
      double sum = 0;
      for (int k = 0; k < kTaps * kTaps; ++k) {
        sum += taps[k / kTaps][k % kTaps] * x[(i + k / kTaps) * kReach + j + k % kTaps];
      }
      const bool sound = moderate && sum >= kShare * bound;
      if (!sound && conv.out.has(at.h + i, at.w + j)) failed |= 1 << o;
    }
    return failed;
  }
};

// The sums of each tap's magnitudes.
inline void add_taps(const Convolution& conv, double (&taps)[Square::kTaps][Square::kTaps]) {
  constexpr int kTaps = Square::kTaps;
  const Filters& f = conv.filters;
  std::vector<float> sums(conv.out.channels * kTaps * kTaps);
  torch::stable::parallel_for(0, conv.out.channels, 8, [&](int64_t first, int64_t last) {
    for (int64_t out = first; out < last; ++out) {
      float sum[kTaps * kTaps] = {};
      for (int64_t in = 0; in < conv.in.channels; ++in) {
        const float* tap = f.taps + out * f.out + in * f.in;
        for (int k = 0; k < kTaps * kTaps; ++k) {
          sum[k] += std::abs(tap[k / kTaps * f.step[0] + k % kTaps * f.step[1]]);
        }
      }
      std::copy_n(sum, kTaps * kTaps, sums.data() + out * kTaps * kTaps);
    }
  });
  for (size_t k = 0; k < sums.size(); ++k) taps[k / kTaps % kTaps][k % kTaps] += sums[k];
}

// A convolution of the law: quotients if it has a dividend, else its products.
inline void run_guarded(const Convolution& conv, const Tensor& model) {
  const Grid grid(conv, Square::outputs);
  const int64_t count = grid.count(conv.batch);
  std::vector<uint16_t> failed;
  if (conv.dividend) {
    run_by(conv, Divisor{}, model, &failed);
  } else {
    std::vector<float> inputs(count * Transpose::kInputs);
    const Transpose scheme{{}, inputs.data()};
    run_by(conv, scheme, model);
    double taps[Square::kTaps][Square::kTaps] = {};
    add_taps(conv, taps);
    failed.resize(count);
    torch::stable::parallel_for(0, count, 256, [&](int64_t first, int64_t last) {
      grid.each(first, last, [&](int64_t k, const Place& at) RLRP_INLINE {
        failed[first + k] = scheme.find(conv, at, first + k, taps);
      });
    });
  }
  std::vector<Place> places;
  for (int64_t k = 0; k < count; ++k) {
    const Place at = grid.place(k);
    for (int o = 0; failed[k] >> o; ++o) {
      if (failed[k] >> o & 1) places.push_back({at.n, at.h + o / Square::kSide, at.w + o % Square::kSide});
    }
  }
  const std::vector<float> zeros(conv.in.channels, 0.0f);
  if (!places.empty()) run_by_patches(conv, Direct(conv.kernel), Grid(places), zeros.data(), model);
}

}  // namespace convolution
}  // namespace rlrp
