// Winograd's F(2, k) along one axis: taps are taken by threes, each by F(2, 3) with 4 multiplications for 2
// outputs instead of 6, and what is left over by F(2, 2) with 3 instead of 4, or by F(2, 1) with 2. With a stride,
// those of each of its phases are taken together.
//
// All of these end in the same 4 terms, so that one matrix product runs over channels and groups of taps:
//   y0 = m0 + m1 + m2,  y1 = m1 - m2 - m3.
#pragma once

#include <algorithm>

#include "convolution.h"

namespace rlrp {
namespace convolution {

constexpr int kAxisTerms = 4;

// Whether so many taps have a share in a term.
constexpr bool shares(int taps, int term) { return term == 1 ? taps >= 2 : term == 2 ? taps == 3 : true; }

struct Axis {
  struct Group {
    int64_t first;
    int taps;  // from 1 to 3, `stride` apart
  };

  int64_t stride;
  std::vector<Group> groups;  // large ones first, so that those with a share in a term are numbered in a row
  int64_t depth[kAxisTerms] = {};  // how many those are

  Axis(int64_t taps, int64_t stride) : stride(stride) {
    for (int64_t phase = 0; phase < min64(stride, taps); ++phase) {
      for (int64_t tap = phase; tap < taps; tap += 3 * stride) {
        groups.push_back({tap, static_cast<int>(min64(3, ceil_div(taps - tap, stride)))});
      }
    }
    std::stable_sort(groups.begin(), groups.end(), [](auto& a, auto& b) { return a.taps > b.taps; });
    for (const Group& group : groups) {
      for (int term = 0; term < kAxisTerms; ++term) depth[term] += shares(group.taps, term);
    }
  }
};

// Calls f with the number of a group's taps as a constant.
template <class F>
RLRP_INLINE inline void with_taps(int taps, const F& f) {
  if (taps == 3) {
    f(std::integral_constant<int, 3>{});
  } else if (taps == 2) {
    f(std::integral_constant<int, 2>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

// A group's taps, transformed; terms that it has no share in are left out.
template <int kTaps, class V>
RLRP_INLINE inline void transform_taps(const V (&w)[kTaps], V (&term)[kAxisTerms]) {
  term[0] = w[0];
  term[3] = w[kTaps - 1];
  if constexpr (kTaps == 3) {
    term[1] = 0.5f * (w[0] + w[2] + w[1]);
    term[2] = 0.5f * (w[0] + w[2] - w[1]);
  } else if constexpr (kTaps == 2) {
    term[1] = w[0] + w[1];
  }
}

// The inputs that 2 outputs meet by a group's taps, likewise.
template <int kTaps, class V>
RLRP_INLINE inline void transform_inputs(const V (&x)[kTaps + 1], V (&term)[kAxisTerms]) {
  if constexpr (kTaps == 3) {
    term[0] = x[0] - x[2];
    term[1] = x[1] + x[2];
    term[2] = x[2] - x[1];
    term[3] = x[1] - x[3];
  } else if constexpr (kTaps == 2) {
    term[0] = x[0] - x[1];
    term[1] = x[1];
    term[3] = x[1] - x[2];
  } else {
    term[0] = x[0];
    term[3] = -x[1];
  }
}

// The 2 outputs of 4 terms.
template <class V>
RLRP_INLINE inline void finish_terms(const V (&m)[kAxisTerms], V (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

}  // namespace convolution
}  // namespace rlrp
