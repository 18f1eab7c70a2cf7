// 1×1: a matrix product over the pixels as they lie, whose sums are finished while they are in registers.
#pragma once

#include <algorithm>

#include "convolution.h"

namespace rlrp {
namespace convolution {

struct Point {
  static constexpr int kTerms = 1;
  static constexpr int64_t outputs[2] = {1, 1};
  static constexpr int64_t kGap = kPad;

  int64_t depth(int) const { return 1; }

  // One of the strides of the taps must be 1.
  template <int kLanes>
  RLRP_INLINE void transform_filters(const Convolution& conv, const Planes<kTerms>&, const Range& range,
                                     int64_t first, int64_t last, float* result) const {
    const int64_t in = conv.in.channels;
    for (int64_t k = first; k < last; k += kPanel<kLanes>) {
      float* panel = result + k * in;
      if (conv.filters.in != 1) {
        copy_panel<kLanes>(conv.filters, range.first + k, in, panel);
      } else {
        for (int64_t j = 0; j < kPanel<kLanes>; j += kLanes) {
          turn_half<kLanes>(conv.filters, range.first + k + j, in, panel + j);
        }
      }
    }
  }

 private:
  // Of filters that lie side by side.
  template <int kLanes>
  RLRP_INLINE static void copy_panel(const Filters& f, int64_t out, int64_t in, float* panel) {
    constexpr int kAhead = 16;
    for (int64_t c = 0; c < in; ++c, panel += kPanel<kLanes>) {
      for (int j = 0; j < kColumns; ++j) {
        const float* taps = f.taps + out + j * kLanes + c * f.in;
        __builtin_prefetch(taps + kAhead * f.in);
        scale_taps<kLanes>(f, out + j * kLanes, c, load<kLanes>(taps), panel + j * kLanes);
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
        scale_taps<kLanes>(f, out, c + i, taps[i], panel);
      }
    }
  }

  template <int kLanes>
  RLRP_INLINE static void scale_taps(const Filters& f, int64_t out, int64_t in, const Vector<kLanes>& taps,
                                     float* to) {
    store<kLanes>(to, taps * f.scale_of<kLanes>(out, in));
  }
};

constexpr int64_t kCrowd = 1024;  // floats: rows so far apart share a few places of the first cache
constexpr int64_t kLine = 16;     // floats that memory hands over at a time

// The places of some pixels of the input and the output, and what becomes of them.
template <int kLanes>
struct Pixels {
  const float* from[kMost];
  int64_t to[kMost];
  float factor[kMost];
  Vector<kLanes> sum[kMost];
};

// A panel's outputs of some of them. Pixels that lie `ahead` are brought near meanwhile, unless it is 0.
template <int kLanes, int kCount>
RLRP_INLINE inline void multiply_pixels(const Convolution& conv, Pixels<kLanes>& pixels, int64_t first,
                                        const float* panel, int64_t channel, int64_t ahead) {
  const float* row[kCount];
  for (int r = 0; r < kCount; ++r) {
    row[r] = pixels.from[first + r];
    for (int j = 0; j < kColumns; ++j) {  // what the sums will meet
      const int64_t offset = pixels.to[first + r] + channel + j * kLanes;
      if (!conv.streams) __builtin_prefetch(conv.y + offset, 1);
      if (conv.other) __builtin_prefetch(conv.other + offset);
      if (conv.times) __builtin_prefetch(conv.times + offset);
    }
  }
  Vector<kLanes> sum[kCount][kColumns] = {};
  const auto at = [&](int r, int64_t k) RLRP_INLINE { return row[r][k]; };
  const int64_t depth = conv.in.channels;
  for (int64_t k = 0; ahead && k < depth; k += kLine) {
    for (int r = 0; r < kCount; ++r) __builtin_prefetch(row[r] + ahead + k, 0, 2);
    multiply<kLanes, kCount>(k, k + kLine, at, panel, sum);
  }
  if (!ahead) multiply<kLanes, kCount>(0, depth, at, panel, sum);
#pragma GCC unroll 12
  for (int r = 0; r < kCount; ++r) {
    Vector<kLanes> total = pixels.sum[first + r];
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) {
      const int64_t c = channel + j * kLanes;
      if (conv.bias) sum[r][j] += load<kLanes>(conv.bias + c);
      put<kLanes>(conv, pixels.to[first + r] + c, sum[r][j], pixels.factor[first + r], total);
    }
    pixels.sum[first + r] = total;
  }
}

template <int kLanes>
RLRP_INLINE inline void convolve(const Work& work, const Point&, const Planes<Point::kTerms>&, int64_t first,
                                 int64_t last, float* buffer) {
  const Convolution& conv = work.conv;
  Pixels<kLanes> pixels;
  const int64_t count = last - first, in = conv.in.channels;
  const bool crowded = in % kCrowd == 0;
  const bool dense = conv.in.step[1] == in && conv.stride[0] == 1 && conv.stride[1] == 1;
  for (int64_t k = 0; k < count; ++k) {
    const Place at = work.grid.place(first + k);
    pixels.from[k] = conv.pixel(at, 0, 0, work.zeros);
    if (crowded) {
      float* apart = buffer + k * (in + Point::kGap);
      pixels.from[k] = std::copy_n(pixels.from[k], in, apart) - in;
    }
    pixels.to[k] = conv.out.offset(at.n, at.h, at.w);
    pixels.factor[k] = conv.factor ? conv.factor[at.n] : 1.0f;
    pixels.sum[k] = Vector<kLanes>{};
  }
  for (int64_t c = 0; c < work.range.count; c += kPanel<kLanes>) {
    const float* panel = work.filters + c * in;
    const int64_t channel = work.range.first + c;
    const int64_t ahead = c == 0 && dense && !crowded ? kBlock * in : 0;  // the next block's
    int64_t k = 0;
    for (; k + kRows<kLanes> <= count; k += kRows<kLanes>) {
      multiply_pixels<kLanes, kRows<kLanes>>(conv, pixels, k, panel, channel, ahead);
    }
    for (; k + kFewRows<kLanes> <= count; k += kFewRows<kLanes>) {
      multiply_pixels<kLanes, kFewRows<kLanes>>(conv, pixels, k, panel, channel, 0);
    }
    for (; k < count; ++k) multiply_pixels<kLanes, 1>(conv, pixels, k, panel, channel, 0);
  }
  for (int64_t k = 0; conv.sums && k < count; ++k) work.sums[first + k] += total<kLanes>(pixels.sum[k]);
}

}  // namespace convolution
}  // namespace rlrp
