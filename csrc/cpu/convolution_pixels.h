// The product of pixels as they lie, or packed, by panels of filters; its sums are finished while they are in registers.
// Point and Direct go by it.
#pragma once

#include "convolution_packed.h"

namespace rlrp {
namespace convolution {

template <int kLanes>
constexpr int kWideColumns = kLanes == 16 ? 4 : 2;  // what the registers hold, times kGroup
template <int kLanes>
constexpr int64_t kToPack = kLanes == 16 ? 16 : 64;  // outputs that take as long as packing what they are made of

constexpr int64_t kWorthPacking = 4 * kGroup;  // pixels: of fewer, those left over would take the filters once more each

// The places of some pixels of the output, of what they are made of, and what becomes of them.
template <int kLanes>
struct Pixels {
  const float* from[kMost];
  int64_t step[kMost];  // to the next run of numbers
  int64_t to[kMost];
  Vector<kLanes> sum[kMost];

  RLRP_INLINE void add(int64_t k, const Convolution& conv, const Place& at, const float* inputs, int64_t inputs_step) {
    from[k] = inputs;
    step[k] = inputs_step;
    to[k] = conv.out.offset(at.n, at.h, at.w);
    sum[k] = Vector<kLanes>{};
  }
};

// Brings near what the sums of kCount pixels will meet.
template <int kLanes, int kCount, int kWidth>
RLRP_INLINE inline void prefetch_pixels(const Convolution& conv, const Pixels<kLanes>& pixels, int64_t first,
                                        int64_t channel) {
  for (int r = 0; r < kCount; ++r) {
    for (int j = 0; j < kWidth; ++j) {
      const int64_t offset = pixels.to[first + r] + channel + j * kLanes;
      if (!conv.streams) __builtin_prefetch(conv.y + offset, 1);
      if (conv.other) __builtin_prefetch(conv.other + offset);
      if (conv.times) __builtin_prefetch(conv.times + offset);
      if (conv.dividend) __builtin_prefetch(conv.dividend + offset);
    }
  }
}

// Writes so many vectors of their outputs, or some of one.
template <int kLanes, int kCount, int kWidth, class Some>
RLRP_INLINE inline void put_pixels(const Convolution& conv, Pixels<kLanes>& pixels, int64_t first, int64_t channel,
                                   const Some& some, Vector<kLanes> (&sum)[kCount][kWidth]) {
#pragma GCC unroll 12
  for (int r = 0; r < kCount; ++r) {
    Vector<kLanes> total = pixels.sum[first + r];
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; ++j) {
      const int64_t c = channel + j * kLanes;
      if (conv.bias) sum[r][j] += some.load(conv.bias + c);
      put<kLanes>(conv, pixels.to[first + r] + c, sum[r][j], some, total);
    }
    pixels.sum[first + r] = total;
  }
}

// Writes the quotients if they are 0 whatever they are divided by: where there is no relevance.
template <int kLanes, int kCount, int kWidth, class Some>
RLRP_INLINE inline bool skip_pixels(const Convolution& conv, const Pixels<kLanes>& pixels, int64_t first,
                                    int64_t channel, const Some& some) {
  if (!conv.skips) return false;
  const auto each = [&](const auto& f) RLRP_INLINE {
    for (int r = 0; r < kCount; ++r) {
      for (int j = 0; j < kWidth; ++j) f(pixels.to[first + r] + channel + j * kLanes);
    }
  };
  Vector<kLanes> found{};
  each([&](int64_t offset) RLRP_INLINE { found += magnitude(some.load(conv.dividend + offset)); });
  if (any<kLanes>(found)) return false;
  each([&](int64_t offset) RLRP_INLINE { write<kLanes>(conv, offset, Vector<kLanes>{}, some); });
  return true;
}

template <int kLanes, int kCount, int kWidth, class Some>
RLRP_INLINE inline void multiply_pixels(const Convolution& conv, Pixels<kLanes>& pixels, int64_t first,
                                        const Runs& runs, const float* panel, int64_t channel, const Some& some) {
  if (skip_pixels<kLanes, kCount, kWidth>(conv, pixels, first, channel, some)) return;
  const float* row[kCount];
  for (int r = 0; r < kCount; ++r) row[r] = pixels.from[first + r];
  prefetch_pixels<kLanes, kCount, kWidth>(conv, pixels, first, channel);
  Vector<kLanes> sum[kCount][kWidth] = {};
  const auto at = [&](int r, int64_t k) RLRP_INLINE { return row[r][k]; };
  if (runs.ahead) {
    int64_t k = 0;
    for (; k + kLine <= runs.depth; k += kLine) {
      for (int r = 0; r < kCount; ++r) __builtin_prefetch(row[r] + runs.ahead + k, 0, 2);
      multiply<kLanes, kCount>(k, k + kLine, at, panel, sum);
    }
    multiply<kLanes, kCount>(k, runs.depth, at, panel, sum);
  }
  for (int64_t run = 0; !runs.ahead && run < runs.count; ++run, panel += runs.depth * kWidth * kLanes) {
    multiply<kLanes, kCount>(0, runs.depth, at, panel, sum);
    for (int r = 0; r < kCount; ++r) row[r] += pixels.step[first + r];
  }
  put_pixels<kLanes, kCount, kWidth>(conv, pixels, first, channel, some, sum);
}

// The same of a group, by what is left of its pixels; `next` is how far the next panel lies behind.
template <int kLanes, int kWidth, class Some>
RLRP_INLINE inline void multiply_group(const Convolution& conv, Pixels<kLanes>& pixels, int64_t first,
                                       const Group& group, int64_t step, const float* panel, int64_t next,
                                       int64_t channel, const Some& some) {
  constexpr int kOfPanel = kWidth < kColumns ? kWidth : kColumns;
  if (skip_pixels<kLanes, kGroup, kWidth>(conv, pixels, first, channel, some)) return;
  prefetch_pixels<kLanes, kGroup, kWidth>(conv, pixels, first, channel);
  Vector<kLanes> sum[kGroup][kWidth] = {};
  const float* rows = group.rows;
  for (int64_t k = 0; k < group.count; ++k) {
    const float* taps = panel + static_cast<int64_t>(group.taps[k]) * kOfPanel * kLanes;
    Vector<kLanes> factor[kWidth];
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; ++j) factor[j] = load<kLanes>(taps + j / kOfPanel * next + j % kOfPanel * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; ++j) sum[r][j] += rows[r * step + k] * factor[j];
    }
  }
  put_pixels<kLanes, kGroup, kWidth>(conv, pixels, first, channel, some, sum);
}

// So many vectors of the outputs of a block of pixels, from one on, and from a channel on; or some of one.
template <int kLanes, int kWidth, class Some>
RLRP_INLINE inline void multiply_panel(const Work& work, Pixels<kLanes>& pixels, int64_t first, int64_t last, Runs runs,
                                       int64_t channel, const Some& some) {
  const Convolution& conv = work.conv;
  constexpr int kMany = kRows<kLanes>, kFew = kFewRows<kLanes>;
  const float* panel = work.filters + channel * runs.count * runs.depth;
  channel += work.range.first;
  int64_t k = first;
  for (; k + kMany <= last; k += kMany) {
    multiply_pixels<kLanes, kMany, kWidth>(conv, pixels, k, runs, panel, channel, some);
  }
  runs.ahead = 0;
  for (; k + kFew <= last; k += kFew) {
    multiply_pixels<kLanes, kFew, kWidth>(conv, pixels, k, runs, panel, channel, some);
  }
  for (; k < last; ++k) multiply_pixels<kLanes, 1, kWidth>(conv, pixels, k, runs, panel, channel, some);
}

// Calls f with each so many vectors of outputs: kMany as long as there are, then a panel's, then one, and some of one.
template <int kLanes, int kMany, class F>
RLRP_INLINE inline void each_columns(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kMany * kLanes <= channels; c += kMany * kLanes) {
    f(std::integral_constant<int, kMany>{}, c, simd::Whole<kLanes>{});
  }
  for (; kMany > kColumns && c + kPanel<kLanes> <= channels; c += kPanel<kLanes>) {
    f(std::integral_constant<int, kColumns>{}, c, simd::Whole<kLanes>{});
  }
  each_vector<kLanes>(channels - c, [&](int64_t more, const auto& some) RLRP_INLINE {
    f(std::integral_constant<int, 1>{}, c + more, some);
  });
}

// All outputs of some pixels of a block, which are not packed.
template <int kLanes>
RLRP_INLINE inline void multiply_whole(const Work& work, Pixels<kLanes>& pixels, int64_t first, int64_t last,
                                       Runs runs) {
  each_columns<kLanes, kColumns>(work.range.count, [&](auto width, int64_t c, const auto& some) RLRP_INLINE {
    multiply_panel<kLanes, width>(work, pixels, first, last, runs, c, some);
    runs.ahead = 0;
  });
}

// So many vectors of the outputs of groups, likewise.
template <int kLanes, int kWidth, class Some>
RLRP_INLINE inline void multiply_groups(const Work& work, Pixels<kLanes>& pixels, int64_t count, const Packed& packed,
                                        int64_t depth, int64_t channel, const Some& some) {
  const float* panel = work.filters + channel * depth;
  for (int64_t g = 0; g < count; ++g) {
    simd::run_apart<kLanes>([&]() RLRP_INLINE {
      multiply_group<kLanes, kWidth>(work.conv, pixels, g * kGroup, packed[g], packed.step, panel,
                                     kPanel<kLanes> * depth, work.range.first + channel, some);
    });
  }
}

// All outputs of the groups of a block, if enough can be left out of them; returns of how many pixels.
template <int kLanes>
RLRP_INLINE inline int64_t multiply_packed(const Work& work, Pixels<kLanes>& pixels, int64_t count, const Runs& runs,
                                           float* memory) {
  const int64_t depth = runs.count * runs.depth, groups = count / kGroup, channels = work.range.count;
  if (channels <= kToPack<kLanes> || count < kWorthPacking) return 0;
  Packed packed(memory, depth);
  for (int64_t g = 0; g < groups; ++g) {
    const Group& group = packed.pack<kLanes>(g, pixels.from + g * kGroup, pixels.step + g * kGroup, runs);
    const int64_t left_out = depth - group.count;
    if (g == 0 && left_out * channels < depth * kToPack<kLanes>) return 0;  // as the first, so the others
  }
  each_columns<kLanes, kWideColumns<kLanes>>(channels, [&](auto width, int64_t c, const auto& some) RLRP_INLINE {
    multiply_groups<kLanes, width>(work, pixels, groups, packed, depth, c, some);
  });
  return groups * kGroup;
}

// Adds what a block's pixels sum to, from the patch `first` on.
template <int kLanes>
RLRP_INLINE inline void add_sums(const Work& work, const Pixels<kLanes>& pixels, int64_t first, int64_t count) {
  for (int64_t k = 0; work.conv.sums && k < count; ++k) work.sums[first + k] += total<kLanes>(pixels.sum[k]);
}

}  // namespace convolution
}  // namespace rlrp
