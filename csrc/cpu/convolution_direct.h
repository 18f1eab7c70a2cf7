// Direct: a matrix product over the inputs that each output meets, which lie side by side for a row of taps; those at
// the edges are laid out first, with zeros around the image. No output is rounded by what it does not meet.
#pragma once

#include <cmath>

#include "convolution_pixels.h"

namespace rlrp {
namespace convolution {

struct Direct {
  static constexpr int kTerms = 1;
  static constexpr int64_t outputs[2] = {1, 1};
  static constexpr int64_t kGap = 0;

  int64_t taps;

  explicit Direct(const int64_t (&kernel)[2]) : taps(kernel[0] * kernel[1]) {}

  int64_t depth(int) const { return taps; }

  template <int kLanes>
  RLRP_INLINE void transform_filters(const Convolution& conv, const Planes<kTerms>& planes, const Range& range,
                                     int64_t first, int64_t last, float* result) const {
    last = min64(last, range.count);
    for (int64_t k = first, columns = 0; k < last; k += columns * kLanes) {
      columns = k + kPanel<kLanes> <= last ? kColumns : 1;  // what is left of a panel, a vector at a time
      float* to = result + k * planes.depth[0];
      for (int64_t i = 0; i < conv.kernel[0]; ++i) {
        for (int64_t j = 0; j < conv.kernel[1]; ++j) {
          for (int64_t c = 0; c < conv.in.channels; ++c) {
            for (int64_t column = 0; column < columns; ++column, to += kLanes) {
              store<kLanes>(to, Taps<kLanes>(conv, range.first + k + column * kLanes, c)(i, j));
            }
          }
        }
      }
    }
  }

  // Whether all inputs that an output meets are of the image, and lie side by side as they are meant.
  bool is_inside(const Convolution& conv, const Place& at) const {
    if (conv.absolute || conv.in.step[1] != conv.in.channels) return false;  // or one group of the channels
    const int64_t h = at.h * conv.stride[0] - conv.padding[0], w = at.w * conv.stride[1] - conv.padding[1];
    return conv.in.has(h, w) && conv.in.has(h + conv.kernel[0] - 1, w + conv.kernel[1] - 1);
  }

  // The inputs that an output meets, tap by tap.
  RLRP_INLINE void lay_out(const Convolution& conv, const Place& at, const float* zeros, float* to) const {
    for (int64_t i = 0; i < conv.kernel[0]; ++i) {
      for (int64_t j = 0; j < conv.kernel[1]; ++j, to += conv.in.channels) {
        const float* pixel = conv.pixel(at, i, j, zeros);
        for (int64_t c = 0; c < conv.in.channels; ++c) to[c] = conv.absolute ? std::abs(pixel[c]) : pixel[c];
      }
    }
  }
};

template <int kLanes>
RLRP_INLINE inline void convolve(const Work& work, const Direct& direct, const Planes<Direct::kTerms>& planes, int64_t first,
                                 int64_t last, float* buffer) {
  Pixels<kLanes> pixels;
  const Convolution& conv = work.conv;
  const int64_t width = conv.kernel[1] * conv.in.channels;
  work.grid.each(first, last, [&](int64_t k, const Place& at) RLRP_INLINE {
    if (direct.is_inside(conv, at)) {
      pixels.add(k, conv, at, conv.pixel(at, 0, 0, work.zeros), conv.in.step[0]);
    } else {
      float* row = buffer + k * planes.depth[0];
      direct.lay_out(conv, at, work.zeros, row);
      pixels.add(k, conv, at, row, width);
    }
  });
  const Runs runs{conv.kernel[0], width, 0};
  const int64_t packed = multiply_packed<kLanes>(work, pixels, last - first, runs, buffer + planes.patches[1]);
  multiply_whole<kLanes>(work, pixels, packed, last - first, runs);
  add_sums<kLanes>(work, pixels, first, last - first);
}

}  // namespace convolution
}  // namespace rlrp
