// Depthwise: each output is made of one channel, so vectors run along the channels, for a few pixels at a time.
#pragma once

#include <vector>

#include "convolution_run.h"

namespace rlrp {
namespace convolution {

constexpr int kPixels = 4;   // of a row, that meet each tap together
constexpr int kVectors = 4;  // of channels, for a pixel at the edge

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

  bool is_inside(const Place& at) const {
    const int64_t h = at.h * conv_.stride[0] - conv_.padding[0], w = at.w * conv_.stride[1] - conv_.padding[1];
    return count_ > 0 && conv_.in.has(h, w) && conv_.in.has(h + conv_.kernel[0] - 1, w + conv_.kernel[1] - 1);
  }

  // All channels of some pixels, whose outputs begin at `to`: input(p, k) is what a pixel meets by tap(k).
  template <int kLanes, int kCount, int kWidth, class Tap, class Input>
  RLRP_INLINE void convolve(int64_t to, int64_t count, const Tap& tap, const Input& input, Vector<kLanes>& sum) const {
    int64_t c = 0;
    for (; c + kWidth * kLanes <= channels_; c += kWidth * kLanes) {
      convolve_some<kLanes, kCount, kWidth, kLanes>(to, c, count, tap, input, sum);
    }
    for (; c + kLanes <= channels_; c += kLanes) convolve_some<kLanes, kCount, 1, kLanes>(to, c, count, tap, input, sum);
    if constexpr (kLanes > kHalf) {
      if (c < channels_) convolve_some<kLanes, kCount, 1, kHalf>(to, c, count, tap, input, sum);
    }
  }

  template <int kLanes, int kCount, int kWidth, int kSome, class Tap, class Input>
  RLRP_INLINE void convolve_some(int64_t to, int64_t c, int64_t count, const Tap& tap, const Input& input,
                                 Vector<kLanes>& sum) const {
    Vector<kLanes> y[kCount][kWidth] = {};
    for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; ++j) {
        const Vector<kLanes> factor = load<kLanes, kSome>(tap(k) + c + j * kLanes);
#pragma GCC unroll 4
        for (int p = 0; p < kCount; ++p) y[p][j] += load<kLanes, kSome>(input(p, k) + c + j * kLanes) * factor;
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < kCount; ++p) {
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; ++j) {
        const int64_t channel = c + j * kLanes;
        if (conv_.bias) y[p][j] += load<kLanes, kSome>(conv_.bias + channel);
        put<kLanes, kSome>(conv_, to + p * conv_.out.step[1] + channel, y[p][j], sum);
      }
    }
  }
};

}  // namespace convolution
}  // namespace rlrp
