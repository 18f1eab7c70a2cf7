// What the schemes of convolution.cpp share: a convolution, its patches, where terms lie, what follows sums.
#pragma once

#include <vector>

#include "simd.h"
#include "tensor.h"

namespace rlrp {
namespace convolution {

using simd::each_vector;
using simd::load;
using simd::magnitude;
using simd::store;
using simd::Vector;

constexpr int kColumns = 2;     // vectors of outputs that a matrix product holds at a time
constexpr int64_t kBlock = 48;  // patches at a time; a multiple of the rows below
constexpr int64_t kMost = 60;   // of the last block: a few more are not worth one of their own
constexpr int64_t kPad = 16;    // keeps the planes of a buffer out of each other's cache lines

constexpr int64_t kLine = 16;   // floats that memory hands over at a time
constexpr int64_t kCached = 5 << 19;  // of a result that caches may still hold when it is read

template <int kLanes>
constexpr int kPanel = kColumns * kLanes;
template <int kLanes>
constexpr int kRows = kLanes == 16 ? 12 : 6;  // what the registers hold, times kColumns
template <int kLanes>
constexpr int kFewRows = kRows<kLanes> / 3;  // at the end of a block

// Images in channels_last, or some of their pixels: every so many of a column and a row.
struct Image {
  int64_t channels, size[2];
  int64_t batch, step[2];  // strides

  static Image dense(int64_t channels, int64_t height, int64_t width) {
    return {channels, {height, width}, height * width * channels, {width * channels, channels}};
  }
  int64_t offset(int64_t n, int64_t h, int64_t w) const { return n * batch + h * step[0] + w * step[1]; }
  bool has(int64_t h, int64_t w) const { return h >= 0 && h < size[0] && w >= 0 && w < size[1]; }
};

struct Filters {
  const float* taps;
  int64_t out, in, step[2];      // strides
  const float* scale;            // of the outputs
  bool absolute;                 // whether the absolute values of the taps are meant

  // The taps of some outputs, from one on, as they are multiplied by.
  template <int kLanes, class Some = simd::Whole<kLanes>>
  RLRP_INLINE Vector<kLanes> finished(const Vector<kLanes>& taps, int64_t out, const Some& some = {}) const {
    const Vector<kLanes> meant = absolute ? magnitude(taps) : taps;
    return scale ? meant * some.load(scale + out) : meant;
  }
};

struct Place {
  int64_t n, h, w;  // of a patch's first output
};

struct Convolution {
  Image in, out;
  int64_t batch;
  int64_t kernel[2], stride[2], padding[2];  // padding may be negative: then it cuts
  Filters filters;
  const float *x, *bias, *other;
  float* y;
  bool relu;
  bool depthwise;  // each output is of its own channel
  bool exact;    // no output may be rounded by inputs that it does not meet
  bool streams;  // y past the caches, which it would only empty
  bool absolute;  // whether the absolute values of x are meant
  const float* times;     // what y is multiplied by, before other is added,
  bool times_absolute;    // or by its absolute values
  const float* dividend;  // what is divided by y; 0/0 = 0
  bool skips;             // whether y need not be computed, nor be seen to be finite, where that is 0
  double* sums;           // of each sample, if they are wanted: of |y| of a quotient, else of what precedes ReLU

  void write_to(Tensor& result) {
    y = result_of<float>(result);
    streams = result.numel() > kCached && simd::streams(y) && out.channels % kLine == 0;
  }

  // The input that the output at a place meets by the tap (i, j); zeros outside of the image.
  const float* pixel(const Place& at, int64_t i, int64_t j, const float* zeros) const {
    const int64_t h = at.h * stride[0] + i - padding[0], w = at.w * stride[1] + j - padding[1];
    return in.has(h, w) ? x + in.offset(at.n, h, w) : zeros;
  }
};

// How images are cut into patches, each of `size` outputs; or single outputs, listed.
struct Grid {
  int64_t size[2], down, along;
  const std::vector<Place>* listed = nullptr;

  Grid(const Convolution& conv, const int64_t (&size)[2])
      : size{size[0], size[1]},
        down(ceil_div(conv.out.size[0], size[0])),
        along(ceil_div(conv.out.size[1], size[1])) {}
  explicit Grid(const std::vector<Place>& places) : size{1, 1}, down(0), along(0), listed(&places) {}

  int64_t count(int64_t batch) const { return listed ? listed->size() : batch * down * along; }
  Place place(int64_t patch) const {
    if (listed) return (*listed)[patch];
    const int64_t row = patch / along;
    return {row / down, row % down * size[0], patch % along * size[1]};
  }
  // Calls f with each patch of some, counted from the first, and its place.
  template <class F>
  RLRP_INLINE void each(int64_t first, int64_t last, const F& f) const {
    if (first == last) return;
    Place at = place(first);
    for (int64_t k = 0; k < last - first; ++k) {
      f(k, at);
      if (first + k + 1 < last) at = listed ? place(first + k + 1) : next(at);
    }
  }

 private:
  // That of the patch behind, by no division.
  Place next(Place at) const {
    at.w += size[1];
    if (at.w < along * size[1]) return at;
    at = {at.n, at.h + size[0], 0};
    return at.h < down * size[0] ? at : Place{at.n + 1, 0, 0};
  }
};

// Where a block of patches ends.
inline int64_t block_end(int64_t first, int64_t end) { return end - first <= kMost ? end : first + kBlock; }

// Some of the outputs.
struct Range {
  int64_t first, count;
};

// What is done at a time: some of the filters, already transformed.
struct Work {
  const Convolution& conv;
  Grid grid;
  Range range;
  const float *filters, *zeros;
  float* sums;       // of each patch
  uint16_t* failed;  // of each patch: a bit for every output that is yet to be computed
};

// Where each term of patches, filters and products begins, and how many numbers a patch has of it.
template <int kTerms>
struct Planes {
  int64_t depth[kTerms], patches[kTerms + 1], filters[kTerms + 1], products;
};

// The taps (i, j) of an input's filters, one for each lane's output, scaled; 0 of outputs that there are not.
template <int kLanes>
struct Taps {
  const Filters& f;
  const float* first;
  int64_t out, count;  // the first output, and of how many

  RLRP_INLINE Taps(const Convolution& conv, int64_t out, int64_t in)
      : f(conv.filters), first(f.taps + out * f.out + in * f.in), out(out), count(conv.out.channels) {
    constexpr int kAhead = 8;  // inputs: their filters lie too far apart for the processor to foresee
    for (int lane = 0; lane < kLanes; ++lane) __builtin_prefetch(first + lane * f.out + kAhead * f.in);
  }

  RLRP_INLINE Vector<kLanes> operator()(int64_t i, int64_t j) const {
    float gathered[kLanes] = {};
    const float* tap = first + i * f.step[0] + j * f.step[1];
    if (out + kLanes <= count) {
      for (int lane = 0; lane < kLanes; ++lane) gathered[lane] = tap[lane * f.out];
      return f.finished<kLanes>(load<kLanes>(gathered), out);
    }
    for (int lane = 0; out + lane < count; ++lane) gathered[lane] = tap[lane * f.out];
    return f.finished<kLanes>(load<kLanes>(gathered), out, simd::Start<kLanes>{static_cast<int>(count - out)});
  }
};

// Transforms a matrix along its columns and then its rows, each of kIn numbers to kOut: at(i, j) is what it is made
// of, and put(i, j, value) takes the result.
template <int kLanes, int kIn, int kOut, class At, class Transform, class Put>
RLRP_INLINE inline void transform_both(const At& at, const Transform& transform, const Put& put) {
  Vector<kLanes> half[kIn][kOut];
#pragma GCC unroll 6
  for (int j = 0; j < kIn; ++j) {
    Vector<kLanes> x[kIn];
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) x[i] = at(i, j);
    transform(x, half[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < kOut; ++i) {
    Vector<kLanes> x[kIn], result[kOut];
#pragma GCC unroll 6
    for (int j = 0; j < kIn; ++j) x[j] = half[j][i];
    transform(x, result);
#pragma GCC unroll 6
    for (int j = 0; j < kOut; ++j) put(i, j, result[j]);
  }
}

// Adds up some rows of a matrix product: (kCount, depth) times (depth, a panel), from one depth to another.
// at(r, k) is the left factor.
template <int kLanes, int kCount, int kWidth, class At>
RLRP_INLINE inline void multiply(int64_t first, int64_t last, const At& at, const float* panel,
                                 Vector<kLanes> (&sum)[kCount][kWidth]) {
  for (int64_t k = first; k < last; ++k) {
    Vector<kLanes> factor[kWidth];
#pragma GCC unroll 2
    for (int j = 0; j < kWidth; ++j) factor[j] = load<kLanes>(panel + (k * kWidth + j) * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
      for (int j = 0; j < kWidth; ++j) sum[r][j] += at(r, k) * factor[j];
    }
  }
}

template <int kLanes, class Some>
RLRP_INLINE inline void write(const Convolution& conv, int64_t offset, const Vector<kLanes>& y, const Some& some) {
  if (Some::is_whole && conv.streams) {
    simd::stream<kLanes>(conv.y + offset, y);
  } else {
    some.store(conv.y + offset, y);
  }
}

// What becomes of some channels of an output: offset says where they lie. Adds to the output's sum.
template <int kLanes, class Some>
RLRP_INLINE inline void put(const Convolution& conv, int64_t offset, const Vector<kLanes>& output, const Some& some,
                            Vector<kLanes>& sum) {
  Vector<kLanes> y = output;
  if (conv.dividend) {
    const Vector<kLanes> quotient = some.load(conv.dividend + offset) / y;
    const Vector<kLanes> infinite = y - y;  // NaN where the divisor is not finite, else 0
    y = y == 0 ? Vector<kLanes>{} : quotient;
    sum += magnitude(y) + infinite;
  } else {
    if (conv.times) {
      const Vector<kLanes> times = some.load(conv.times + offset);
      y *= conv.times_absolute ? magnitude(times) : times;
    }
    if (conv.other) y += some.load(conv.other + offset);
    sum += y;
  }
  if (conv.relu) y = y < 0 ? Vector<kLanes>{} : y;
  write<kLanes>(conv, offset, y, some);
}

template <int kLanes>
RLRP_INLINE inline float total(const Vector<kLanes>& lanes) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// Whether not all is 0.
template <int kLanes>
RLRP_INLINE inline bool any(const Vector<kLanes>& v) {
  return !(total<kLanes>(magnitude(v)) == 0);
}

// The outputs, kSide × kSide, of a patch from its row of each plane, of kReach × kReach terms; returns their sum.
template <int kLanes, int kReach, int kSide, class Finish>
RLRP_INLINE inline float finish_both(const Work& work, int64_t plane, int64_t patch, const float* rows,
                                     const Finish& finish_terms) {
  const Convolution& conv = work.conv;
  const Range& range = work.range;
  const Place at = work.grid.place(patch);
  const int64_t start = conv.out.offset(at.n, at.h, at.w) + range.first;
  Vector<kLanes> sum{};
  each_vector<kLanes>(range.count, [&](int64_t c, const auto& some) RLRP_INLINE {
    const Vector<kLanes> bias = conv.bias ? some.load(conv.bias + range.first + c) : Vector<kLanes>{};
    transform_both<kLanes, kReach, kSide>(
        [&](int i, int j) RLRP_INLINE { return load<kLanes>(rows + (i * kReach + j) * plane + c); }, finish_terms,
        [&](int i, int j, const Vector<kLanes>& y) RLRP_INLINE {
          if (!conv.out.has(at.h + i, at.w + j)) return;
          const int64_t offset = start + i * conv.out.step[0] + j * conv.out.step[1] + c;
          put<kLanes>(conv, offset, y + bias, some, sum);
        });
  });
  return total<kLanes>(sum);
}

// A convolution of 1×1; the model tells where memory is to be had.
void run_point(const Convolution& conv, const Tensor& model);

}  // namespace convolution
}  // namespace rlrp
