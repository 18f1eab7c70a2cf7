// 1×1: a matrix product over the pixels as they lie, whose sums are finished while they are in registers.
#pragma once

#include <algorithm>
#include <cmath>

#include "convolution.h"

namespace rlrp {
namespace convolution {

struct Point {
  static constexpr int kTerms = 1;
  static constexpr int64_t outputs[2] = {1, 1};
  static constexpr int64_t kGap = kPad;

  int64_t depth(int) const { return 1; }

  // One of the strides of the taps must be 1. What is left of a panel is laid out a vector at a time.
  template <int kLanes>
  RLRP_INLINE void transform_filters(const Convolution& conv, const Planes<kTerms>&, const Range& range,
                                     int64_t first, int64_t last, float* result) const {
    const int64_t in = conv.in.channels;
    const Filters& f = conv.filters;
    int64_t k = first;
    for (; k + kPanel<kLanes> <= last; k += kPanel<kLanes>) {
      float* panel = result + k * in;
      if (f.in != 1) {
        copy_panel<kLanes>(f, range.first + k, in, panel);
      } else {
        const int64_t turned = in / kLanes * kLanes;
        for (int64_t j = 0; j < kPanel<kLanes>; j += kLanes) {
          turn_half<kLanes>(f, range.first + k + j, turned, panel + j);
          lay_out(f, range.first + k + j, kLanes, turned, in, panel + j, kLanes, kPanel<kLanes>);
        }
      }
    }
    for (; k < last; k += kLanes) {
      lay_out(f, range.first + k, min64(kLanes, last - k), 0, in, result + k * in, kLanes, kLanes);
    }
  }

 private:
  // Some filters' taps from one input to another, one by one, and zeros to so many.
  static void lay_out(const Filters& f, int64_t out, int64_t count, int64_t first, int64_t last, float* panel,
                      int64_t all, int64_t step) {
    for (int64_t c = first; c < last; ++c) {
      for (int64_t k = 0; k < all; ++k) {
        const Vector<1> tap{k < count ? f.taps[(out + k) * f.out + c * f.in] : 0.0f};
        panel[c * step + k] = k < count ? f.finished<1>(tap, out + k)[0] : 0.0f;
      }
    }
  }

  // Of filters that lie side by side.
  template <int kLanes>
  RLRP_INLINE static void copy_panel(const Filters& f, int64_t out, int64_t in, float* panel) {
    constexpr int kAhead = 16;
    for (int64_t c = 0; c < in; ++c, panel += kPanel<kLanes>) {
      for (int j = 0; j < kColumns; ++j) {
        const float* taps = f.taps + out + j * kLanes + c * f.in;
        __builtin_prefetch(taps + kAhead * f.in);
        scale_taps<kLanes>(f, out + j * kLanes, load<kLanes>(taps), panel + j * kLanes);
      }
    }
  }

  // Of filters one behind the other, as many as a vector holds.
  template <int kLanes>
  RLRP_INLINE static void turn_half(const Filters& f, int64_t out, int64_t in, float* panel) {
    for (int64_t c = 0; c < in; c += kLanes) {
      Vector<kLanes> taps[kLanes];
      for (int i = 0; i < kLanes; ++i) taps[i] = load<kLanes>(f.taps + (out + i) * f.out + c);
      simd::transpose<kLanes>(taps);
      for (int i = 0; i < kLanes; ++i, panel += kPanel<kLanes>) {
        scale_taps<kLanes>(f, out, taps[i], panel);
      }
    }
  }

  template <int kLanes>
  RLRP_INLINE static void scale_taps(const Filters& f, int64_t out, const Vector<kLanes>& taps, float* to) {
    store<kLanes>(to, f.finished<kLanes>(taps, out));
  }
};

constexpr int64_t kCrowd = 1024;  // floats: rows so far apart share a few places of the first cache

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

// How the numbers lie that an output is made of.
struct Runs {
  int64_t count, depth;  // numbers that lie side by side
  int64_t ahead;         // how far the next block's lie behind, to be brought near; 0 if that is not to be
};

// So many vectors' outputs of some of them, kSome of the last vector's.
template <int kLanes, int kCount, int kWidth, int kSome>
RLRP_INLINE inline void multiply_pixels(const Convolution& conv, Pixels<kLanes>& pixels, int64_t first,
                                        const Runs& runs, const float* panel, int64_t channel) {
  const float* row[kCount];
  for (int r = 0; r < kCount; ++r) {
    row[r] = pixels.from[first + r];
    for (int j = 0; j < kWidth; ++j) {  // what the sums will meet
      const int64_t offset = pixels.to[first + r] + channel + j * kLanes;
      if (!conv.streams) __builtin_prefetch(conv.y + offset, 1);
      if (conv.other) __builtin_prefetch(conv.other + offset);
      if (conv.times) __builtin_prefetch(conv.times + offset);
      if (conv.dividend) __builtin_prefetch(conv.dividend + offset);
    }
  }
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
#pragma GCC unroll 12
  for (int r = 0; r < kCount; ++r) {
    Vector<kLanes> total = pixels.sum[first + r];
#pragma GCC unroll 2
    for (int j = 0; j < kWidth; ++j) {
      const int64_t c = channel + j * kLanes;
      if (conv.bias) sum[r][j] += load<kLanes, kSome>(conv.bias + c);
      put<kLanes, kSome>(conv, pixels.to[first + r] + c, sum[r][j], total);
    }
    pixels.sum[first + r] = total;
  }
}

// Some of the outputs of a block of pixels, from a channel on: kSome if that is less than a vector, else kWidth vectors.
template <int kLanes, int kWidth, int kSome = kLanes>
RLRP_INLINE inline void multiply_panel(const Work& work, Pixels<kLanes>& pixels, int64_t count, Runs runs,
                                       int64_t channel) {
  const Convolution& conv = work.conv;
  constexpr int kMany = kRows<kLanes>, kFew = kFewRows<kLanes>;
  const float* panel = work.filters + channel * runs.count * runs.depth;
  channel += work.range.first;
  int64_t k = 0;
  for (; k + kMany <= count; k += kMany) {
    multiply_pixels<kLanes, kMany, kWidth, kSome>(conv, pixels, k, runs, panel, channel);
  }
  runs.ahead = 0;
  for (; k + kFew <= count; k += kFew) {
    multiply_pixels<kLanes, kFew, kWidth, kSome>(conv, pixels, k, runs, panel, channel);
  }
  for (; k < count; ++k) multiply_pixels<kLanes, 1, kWidth, kSome>(conv, pixels, k, runs, panel, channel);
}

// All outputs of a block of pixels, from the patch `first` on.
template <int kLanes>
RLRP_INLINE inline void multiply_block(const Work& work, Pixels<kLanes>& pixels, int64_t first, int64_t count,
                                       Runs runs) {
  const int64_t channels = work.range.count;
  int64_t c = 0;
  for (; c + kPanel<kLanes> <= channels; c += kPanel<kLanes>) {
    multiply_panel<kLanes, kColumns>(work, pixels, count, runs, c);
    runs.ahead = 0;
  }
  for (; c + kLanes <= channels; c += kLanes) multiply_panel<kLanes, 1>(work, pixels, count, runs, c);
  if constexpr (kLanes > kHalf) {
    if (c < channels) multiply_panel<kLanes, 1, kHalf>(work, pixels, count, runs, c);
  }
  for (int64_t k = 0; work.conv.sums && k < count; ++k) work.sums[first + k] += total<kLanes>(pixels.sum[k]);
}

template <int kLanes>
RLRP_INLINE inline void copy_pixel(const float* pixel, int64_t count, bool absolute, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    const Vector<kLanes> x = load<kLanes>(pixel + c);
    store<kLanes>(to + c, absolute ? magnitude(x) : x);
  }
  for (; c < count; ++c) to[c] = absolute ? std::abs(pixel[c]) : pixel[c];
}

template <int kLanes>
RLRP_INLINE inline void convolve(const Work& work, const Point&, const Planes<Point::kTerms>&, int64_t first,
                                 int64_t last, float* buffer) {
  const Convolution& conv = work.conv;
  Pixels<kLanes> pixels;
  const int64_t count = last - first, in = conv.in.channels;
  const bool copied = in % kCrowd == 0 || conv.absolute;
  const bool dense = conv.in.step[1] == in && conv.stride[0] == 1 && conv.stride[1] == 1;
  work.grid.each(first, last, [&](int64_t k, const Place& at) RLRP_INLINE {
    const float* pixel = conv.pixel(at, 0, 0, work.zeros);
    if (copied) {
      float* apart = buffer + k * (in + Point::kGap);
      copy_pixel<kLanes>(pixel, in, conv.absolute, apart);
      pixel = apart;
    }
    pixels.add(k, conv, at, pixel, 0);
  });
  multiply_block<kLanes>(work, pixels, first, count, {1, in, dense && !copied ? kBlock * in : 0});
}

}  // namespace convolution
}  // namespace rlrp
