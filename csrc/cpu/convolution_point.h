// 1×1: a matrix product over the pixels as they lie, whose sums are finished while they are in registers.
#pragma once

#include <algorithm>
#include <cmath>

#include "convolution_pixels.h"

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
    last = min64(last, range.count);
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

template <int kLanes>
RLRP_INLINE inline void copy_pixel(const float* pixel, int64_t count, bool absolute, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    const Vector<kLanes> x = load<kLanes>(pixel + c);
    store<kLanes>(to + c, absolute ? magnitude(x) : x);
  }
  for (; c < count; ++c) to[c] = absolute ? std::abs(pixel[c]) : pixel[c];
}

// Has some pixels of a block read from copies.
template <int kLanes>
RLRP_INLINE inline void copy_pixels(const Convolution& conv, Pixels<kLanes>& pixels, int64_t first, int64_t last,
                                    float* buffer) {
  const int64_t in = conv.in.channels;
  for (int64_t k = first; k < last; ++k) {
    float* apart = buffer + k * (in + Point::kGap);
    copy_pixel<kLanes>(pixels.from[k], in, conv.absolute, apart);
    pixels.from[k] = apart;
  }
}

template <int kLanes>
RLRP_INLINE inline void convolve(const Work& work, const Point&, const Planes<Point::kTerms>& planes, int64_t first,
                                 int64_t last, float* buffer) {
  const Convolution& conv = work.conv;
  Pixels<kLanes> pixels;
  const int64_t count = last - first, in = conv.in.channels;
  work.grid.each(first, last, [&](int64_t k, const Place& at) RLRP_INLINE {
    pixels.add(k, conv, at, conv.pixel(at, 0, 0, work.zeros), 0);
  });
  const bool dense = conv.in.step[1] == in && conv.stride[0] == 1 && conv.stride[1] == 1;
  if (conv.absolute) copy_pixels<kLanes>(conv, pixels, 0, count, buffer);
  Runs runs{1, in, dense && !conv.absolute ? kBlock * in : 0};
  const int64_t packed = multiply_packed<kLanes>(work, pixels, count, runs, buffer + planes.patches[1]);
  if (in % kCrowd == 0 && !conv.absolute) {
    copy_pixels<kLanes>(conv, pixels, packed, count, buffer);
    runs.ahead = 0;
  }
  multiply_whole<kLanes>(work, pixels, packed, count, runs);
  add_sums<kLanes>(work, pixels, first, count);
}

}  // namespace convolution
}  // namespace rlrp
