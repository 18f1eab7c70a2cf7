// Depthwise: each output is made of one channel, so vectors run along the channels, for a few pixels at a time.
// Where there are many taps, a tile of the image is copied first, so that what they meet lies side by side.
#pragma once

#include <algorithm>
#include <vector>

#include "convolution_run.h"

namespace rlrp {
namespace convolution {

constexpr int kPixels = 4;   // of a row, that meet each tap together
constexpr int kVectors = 4;  // of channels, for a pixel at the edge

constexpr int64_t kManyTaps = 16;   // that are worth the copy of an input each
constexpr int kStretch = 8;         // pixels of a tile's row, that meet each tap together
constexpr int64_t kAlong = 128;     // outputs of a tile's row, at most
constexpr int64_t kTile = 1 << 16;  // floats of a tile, if that is enough for an output

// A depthwise convolution, whose taps lie side by side for all channels.
class Depthwise {
 public:
  explicit Depthwise(const Convolution& conv)
      : conv_(conv), channels_(conv.in.channels), count_(conv.kernel[0] * conv.kernel[1]) {
    const Filters& f = conv.filters;
    taps_.resize(count_ * channels_);
    for (int64_t k = 0; k < count_; ++k) {
      const int64_t i = k / conv.kernel[1], j = k % conv.kernel[1];
      offsets_.push_back(i * conv.in.step[0] + j * conv.in.step[1]);
      for (int64_t c = 0; c < channels_; ++c) {
        const simd::Vector<1> tap{f.taps[c * f.out + i * f.step[0] + j * f.step[1]]};
        taps_[k * channels_ + c] = f.finished<1>(tap, c)[0];
      }
    }
  }

  void run() const {
    if (count_ >= kManyTaps * conv_.stride[0] * conv_.stride[1]) return run_by_tiles();
    const int64_t rows = conv_.out.size[0], all = conv_.batch * rows;
    std::vector<float> sums(all, 0.0f);
    run_tasks(torch::stable::get_num_threads(), all, [&](auto lanes, int64_t, int64_t first, int64_t last) RLRP_INLINE {
      for (int64_t row = first; row < last; ++row) sums[row] = convolve_row<lanes>(row / rows, row % rows);
    });
    if (!conv_.sums) return;
    for (int64_t row = 0; row < all; ++row) conv_.sums[row / rows] += sums[row];
  }

 private:
  const Convolution& conv_;
  const int64_t channels_, count_;
  std::vector<float> taps_;       // (tap, channel)
  std::vector<int64_t> offsets_;  // of the taps' inputs from the first tap's

  // Returns the sum of what was put.
  template <int kLanes>
  RLRP_INLINE float convolve_row(int64_t n, int64_t h) const {
    const int64_t width = conv_.out.size[1], step = conv_.stride[1] * conv_.in.step[1];
    std::vector<const float*> inputs(count_);
    std::vector<const float*> taps(count_);
    Vector<kLanes> sum{};
    for (int64_t w = 0; w < width;) {
      const Place at{n, h, w};
      const int64_t to = conv_.out.offset(n, h, w);
      if (w + kPixels <= width && is_inside(at) && is_inside({n, h, w + kPixels - 1})) {
        const float* first = conv_.pixel(at, 0, 0, nullptr);
        convolve<kLanes, kPixels, 1>(
            to, count_, [&](int64_t k) RLRP_INLINE { return taps_.data() + k * channels_; },
            [&](int p, int64_t k) RLRP_INLINE { return first + p * step + offsets_[k]; }, sum);
        w += kPixels;
      } else {  // by the taps that meet the image
        int64_t count = 0;
        for (int64_t k = 0; k < count_; ++k) {
          const float* input = conv_.pixel(at, k / conv_.kernel[1], k % conv_.kernel[1], nullptr);
          if (!input) continue;
          inputs[count] = input;
          taps[count++] = taps_.data() + k * channels_;
        }
        convolve<kLanes, 1, kVectors>(
            to, count, [&](int64_t k) RLRP_INLINE { return taps[k]; },
            [&](int, int64_t k) RLRP_INLINE { return inputs[k]; }, sum);
        w += 1;
      }
    }
    return total<kLanes>(sum);
  }

  // Each task takes kLine channels of an image.
  void run_by_tiles() const {
    const int64_t parts = ceil_div(channels_, kLine), all = conv_.batch * parts;
    const Tile tile(conv_);
    std::vector<float> sums(all, 0.0f);
    run_tasks(torch::stable::get_num_threads(), all, [&](auto lanes, int64_t, int64_t first, int64_t last) RLRP_INLINE {
      std::vector<float> inputs(tile.rows * tile.width * kLine), taps(count_ * kLine);
      for (int64_t k = first; k < last; ++k) {
        const int64_t c = k % parts * kLine;
        for (int64_t tap = 0; tap < count_; ++tap) {
          std::copy_n(taps_.data() + tap * channels_ + c, min64(kLine, channels_ - c), taps.data() + tap * kLine);
        }
        sums[k] = convolve_part<lanes>(tile, k / parts, c, taps.data(), inputs.data());
      }
    });
    for (int64_t k = 0; conv_.sums && k < all; ++k) conv_.sums[k / parts] += sums[k];
  }

  // Some outputs, and the inputs that they meet.
  struct Tile {
    int64_t down, along, rows, width;

    explicit Tile(const Convolution& conv) {
      along = min64(conv.out.size[1], kAlong);
      width = (along - 1) * conv.stride[1] + conv.kernel[1];
      const int64_t room = kTile / (width * kLine) - conv.kernel[0];
      down = min64(conv.out.size[0], room > 0 ? room / conv.stride[0] + 1 : 1);
      rows = (down - 1) * conv.stride[0] + conv.kernel[0];
    }
  };

  // kLine channels of an image; returns the sum of what was put.
  template <int kLanes>
  RLRP_INLINE float convolve_part(const Tile& tile, int64_t n, int64_t c, const float* taps, float* inputs) const {
    Vector<kLanes> sum{};
    for (int64_t h = 0; h < conv_.out.size[0]; h += tile.down) {
      const int64_t down = min64(tile.down, conv_.out.size[0] - h);
      for (int64_t w = 0; w < conv_.out.size[1]; w += tile.along) {
        const int64_t along = min64(tile.along, conv_.out.size[1] - w);
        copy_tile<kLanes>(tile, {n, h, w}, c, inputs);
        for (int64_t row = 0; row < down; ++row) {
          const float* first = inputs + row * conv_.stride[0] * tile.width * kLine;
          const int64_t to = conv_.out.offset(n, h + row, w) + c;
          int64_t k = 0;
          for (; k + kStretch <= along; k += kStretch) {
            convolve_stretch<kLanes, kStretch>(tile, first, k, taps, to, c, sum);
          }
          for (; k + kPixels <= along; k += kPixels) {
            convolve_stretch<kLanes, kPixels>(tile, first, k, taps, to, c, sum);
          }
          for (; k < along; ++k) convolve_stretch<kLanes, 1>(tile, first, k, taps, to, c, sum);
        }
      }
    }
    return total<kLanes>(sum);
  }

  // What the outputs of a tile meet, with zeros around the image.
  template <int kLanes>
  RLRP_INLINE void copy_tile(const Tile& tile, const Place& at, int64_t c, float* to) const {
    const int64_t count = min64(kLine, channels_ - c);
    for (int64_t i = 0; i < tile.rows; ++i) {
      for (int64_t j = 0; j < tile.width; ++j, to += kLine) {
        const int64_t h = at.h * conv_.stride[0] - conv_.padding[0] + i;
        const int64_t w = at.w * conv_.stride[1] - conv_.padding[1] + j;
        const bool has = conv_.in.has(h, w);
        const float* from = conv_.x + (has ? conv_.in.offset(at.n, h, w) + c : 0);
        __builtin_prefetch(from + kLine, 0, 2);  // the next channels', which lie too far apart to be foreseen
        if (has && count == kLine) {
          for (int64_t k = 0; k < kLine; k += kLanes) store<kLanes>(to + k, meant<kLanes>(load<kLanes>(from + k)));
        } else {
          for (int64_t k = 0; k < kLine; ++k) {
            const Vector<1> x{has && k < count ? from[k] : 0.0f};
            to[k] = meant<1>(x)[0];
          }
        }
      }
    }
  }

  template <int kLanes>
  RLRP_INLINE Vector<kLanes> meant(const Vector<kLanes>& x) const {
    return conv_.absolute ? magnitude(x) : x;
  }

  // So many pixels of a row of outputs, which begins at `to`.
  template <int kLanes, int kCount>
  RLRP_INLINE void convolve_stretch(const Tile& tile, const float* first, int64_t pixel, const float* taps, int64_t to,
                                    int64_t c, Vector<kLanes>& sum) const {
    for (int64_t lane = 0; lane < min64(kLine, channels_ - c); lane += kLanes) {
      Vector<kLanes> y[kCount] = {};
      const float* tap = taps + lane;
      for (int64_t i = 0; i < conv_.kernel[0]; ++i) {
        const float* row = first + (i * tile.width + pixel * conv_.stride[1]) * kLine + lane;
        if (conv_.stride[1] == 1) {  // a constant: the pixels' addresses differ by it
          meet_row<kLanes, kCount>(row, 1, tap, y);
        } else {
          meet_row<kLanes, kCount>(row, conv_.stride[1], tap, y);
        }
        tap += conv_.kernel[1] * kLine;
      }
      for (int p = 0; p < kCount; ++p) prefetch(to + (pixel + p) * conv_.out.step[1] + kLine);
      each_vector<kLanes>(min64(kLanes, channels_ - c - lane), [&](int64_t, const auto& some) RLRP_INLINE {
#pragma GCC unroll 8
        for (int p = 0; p < kCount; ++p) {
          if (conv_.bias) y[p] += some.load(conv_.bias + c + lane);
          put<kLanes>(conv_, to + (pixel + p) * conv_.out.step[1] + lane, y[p], some, sum);
        }
      });
    }
  }

  RLRP_INLINE void prefetch(int64_t at) const {
    if (!conv_.streams) __builtin_prefetch(conv_.y + at, 1, 2);
    if (conv_.other) __builtin_prefetch(conv_.other + at, 0, 2);
    if (conv_.times) __builtin_prefetch(conv_.times + at, 0, 2);
    if (conv_.dividend) __builtin_prefetch(conv_.dividend + at, 0, 2);
  }

  template <int kLanes, int kCount>
  RLRP_INLINE void meet_row(const float* row, int64_t stride, const float* tap, Vector<kLanes> (&y)[kCount]) const {
    for (int64_t j = 0; j < conv_.kernel[1]; ++j, tap += kLine, row += kLine) {
      const Vector<kLanes> factor = load<kLanes>(tap);
#pragma GCC unroll 8
      for (int p = 0; p < kCount; ++p) y[p] += load<kLanes>(row + p * stride * kLine) * factor;
    }
  }

  bool is_inside(const Place& at) const {
    const int64_t h = at.h * conv_.stride[0] - conv_.padding[0], w = at.w * conv_.stride[1] - conv_.padding[1];
    return count_ > 0 && conv_.in.has(h, w) && conv_.in.has(h + conv_.kernel[0] - 1, w + conv_.kernel[1] - 1);
  }

  // All channels of some pixels, whose outputs begin at `to`: input(p, k) is what a pixel meets by tap(k).
  template <int kLanes, int kCount, int kWidth, class Tap, class Input>
  RLRP_INLINE void convolve(int64_t to, int64_t count, const Tap& tap, const Input& input, Vector<kLanes>& sum) const {
    int64_t c = 0;
    for (; c + kWidth * kLanes <= channels_; c += kWidth * kLanes) {
      convolve_some<kLanes, kCount, kWidth>(to, c, count, tap, input, simd::Whole<kLanes>{}, sum);
    }
    each_vector<kLanes>(channels_ - c, [&](int64_t more, const auto& some) RLRP_INLINE {
      convolve_some<kLanes, kCount, 1>(to, c + more, count, tap, input, some, sum);
    });
  }

  template <int kLanes, int kCount, int kWidth, class Tap, class Input, class Some>
  RLRP_INLINE void convolve_some(int64_t to, int64_t c, int64_t count, const Tap& tap, const Input& input,
                                 const Some& some, Vector<kLanes>& sum) const {
    Vector<kLanes> y[kCount][kWidth] = {};
    for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; ++j) {
        const Vector<kLanes> factor = some.load(tap(k) + c + j * kLanes);
#pragma GCC unroll 4
        for (int p = 0; p < kCount; ++p) y[p][j] += meant<kLanes>(some.load(input(p, k) + c + j * kLanes)) * factor;
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < kCount; ++p) {
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; ++j) {
        const int64_t channel = c + j * kLanes;
        if (conv_.bias) y[p][j] += some.load(conv_.bias + channel);
        put<kLanes>(conv_, to + p * conv_.out.step[1] + channel, y[p][j], some, sum);
      }
    }
  }
};

}  // namespace convolution
}  // namespace rlrp
