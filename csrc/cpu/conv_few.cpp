// The input gradient of a 2-d convolution over few channels, as over an RGB image: libraries that block
// channels by 16 do most of their work on padding there.
//
// Inputs of a row that lie `stride` apart meet the same taps of the filters, at neighbouring outputs. So rows of
// outputs are turned, with pixels side by side for each filter, and vectors run along them.
#include <algorithm>

#include "simd.h"
#include "tensor.h"

namespace rlrp {
namespace {

using simd::load;
using simd::store;
using simd::Vector;

constexpr int kMostChannels = 4;
constexpr int kMostVectors = 4;      // of inputs at a time
constexpr int64_t kMostLanes = 16;
constexpr int64_t kFilters = 8;      // come in multiples of it
constexpr int64_t kGrain = 1 << 20;  // multiplications that make a task worth its while

struct Axis {
  int64_t in, out, kernel, stride, padding;

  // Input i meets an output o by tap i + padding - o * stride, if there is such a tap: the first tap, and the
  // output for it; each next tap is a stride away, and meets the output before.
  int64_t first_tap(int64_t i) const { return (i + padding) % stride; }
  int64_t first_output(int64_t i) const { return (i + padding) / stride; }
  int64_t inputs(int64_t phase) const { return in > phase ? ceil_div(in - phase, stride) : 0; }
  // How many outputs an input meets at most.
  int64_t overlap() const { return ceil_div(kernel, stride); }
};

struct Few {
  int64_t batch, filters;
  Axis down, along;
  const float *g, *weight;  // (batch, out, out, filters), (filters, kernel, kernel, channels)
  float* result;

  // Of a turned row: zeros before and behind the outputs, for taps that reach over the edges.
  int64_t before() const { return along.overlap(); }
  int64_t width() const {
    const int64_t inputs = ceil_div(along.inputs(0), kMostLanes) * kMostLanes;
    return before() + std::max(along.out, along.first_output(along.stride - 1) + inputs);
  }
};

// The rows of outputs that a row of inputs meets, turned. Rows are met in order, so few are held at a time.
class TurnedRows {
 public:
  explicit TurnedRows(const Few& few)
      : few_(few),
        width_(few.width()),
        count_(few.down.overlap()),
        held_(count_, -1),
        values_(count_ * few.filters * width_, 0.0f) {}

  // (filters, width); where output 0 lies. `row` counts through all images.
  template <int kLanes>
  RLRP_INLINE const float* get(int64_t row) {
    const int64_t slot = row % count_;
    float* to = values_.data() + slot * few_.filters * width_ + few_.before();
    if (held_[slot] != row) turn<kLanes>(few_.g + row * few_.along.out * few_.filters, to);
    held_[slot] = row;
    return to;
  }
  int64_t width() const { return width_; }

 private:
  template <int kLanes>
  RLRP_INLINE void turn(const float* from, float* to) const {
    const int64_t pixels = few_.along.out, filters = few_.filters;
    if (pixels < kLanes || filters < kLanes) {
      for (int64_t k = 0; k < filters; ++k) {
        for (int64_t o = 0; o < pixels; ++o) to[k * width_ + o] = from[o * filters + k];
      }
      return;
    }
    // The last ones overlap those before.
    for (int64_t o = 0; o < pixels; o += kLanes) {
      const int64_t first = min64(o, pixels - kLanes);
      for (int64_t k = 0; k < filters; k += kLanes) {
        const int64_t filter = min64(k, filters - kLanes);
        Vector<kLanes> block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load<kLanes>(from + (first + i) * filters + filter);
        simd::transpose<kLanes>(block);
        for (int i = 0; i < kLanes; ++i) store<kLanes>(to + (filter + i) * width_ + first, block[i]);
      }
    }
  }

  const Few& few_;
  int64_t width_, count_;
  std::vector<int64_t> held_;
  std::vector<float> values_;
};

// What the inputs of a row that lie `stride` apart meet.
struct Meeting {
  struct Row {
    const float* outputs;  // turned, for the first tap and the first of the inputs
    const float* taps;     // of the first filter
  };
  std::vector<Row> rows;
  int64_t taps;  // of a row
};

// kVectors vectors of these inputs, the first of them number `begin`. Where they are few, several filters' sums
// run side by side, as additions to one wait for each other.
template <int kLanes, int kChannels, int kVectors>
RLRP_INLINE inline void gradient_at(const Few& f, const Meeting& meeting, int64_t width, int64_t begin,
                                    float (&result)[kChannels][kMostVectors * kMostLanes]) {
  constexpr int kEach = kVectors * kChannels, kApart = kEach >= 8 ? 1 : kEach >= 4 ? 2 : 4;
  const int64_t step = f.along.stride * kChannels, filter = f.down.kernel * f.along.kernel * kChannels;
  Vector<kLanes> total[kVectors][kChannels] = {};
  for (int64_t some = 0; some < f.filters; some += kFilters) {  // whose sum is rounded apart from the rest
    Vector<kLanes> sum[kApart][kVectors][kChannels] = {};
    for (int64_t k = some; k < some + kFilters; k += kApart) {
      for (const Meeting::Row& row : meeting.rows) {
        const float *outputs = row.outputs + k * width + begin, *taps = row.taps + k * filter;
        for (int64_t t = 0; t < meeting.taps; ++t, --outputs, taps += step) {
#pragma GCC unroll 4
          for (int i = 0; i < kApart; ++i) {
            Vector<kLanes> g[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
              g[v] = simd::hold<kLanes>(load<kLanes>(outputs + i * width + v * kLanes));
            }
#pragma GCC unroll 4
            for (int c = 0; c < kChannels; ++c) {
#pragma GCC unroll 4
              for (int v = 0; v < kVectors; ++v) sum[i][v][c] += taps[i * filter + c] * g[v];
            }
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kApart; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
        for (int c = 0; c < kChannels; ++c) total[v][c] += sum[i][v][c];
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) store<kLanes>(result[c] + v * kLanes, total[v][c]);
  }
}

// Row h of an input; image n's.
template <int kLanes, int kChannels>
RLRP_INLINE inline void gradient_row(const Few& f, TurnedRows& turned, Meeting& meeting, int64_t n, int64_t h) {
  float* result = f.result + (n * f.down.in + h) * f.along.in * kChannels;
  for (int64_t phase = 0; phase < min64(f.along.stride, f.along.in); ++phase) {
    const int64_t tap = f.along.first_tap(phase), start = f.along.first_output(phase);
    meeting.rows.clear();
    meeting.taps = tap < f.along.kernel ? ceil_div(f.along.kernel - tap, f.along.stride) : 0;
    for (int64_t i = f.down.first_tap(h), o = f.down.first_output(h); i < f.down.kernel; i += f.down.stride, --o) {
      if (o < 0 || o >= f.down.out) continue;
      meeting.rows.push_back({turned.get<kLanes>(n * f.down.out + o) + start,
                              f.weight + (i * f.along.kernel + tap) * kChannels});
    }
    const int64_t count = f.along.inputs(phase);
    float sums[kChannels][kMostVectors * kMostLanes];
    for (int64_t begin = 0; begin < count;) {
      const int64_t vectors = min64(kMostVectors, ceil_div(count - begin, kLanes));
      const int64_t width = turned.width();
      if (vectors == 4) gradient_at<kLanes, kChannels, 4>(f, meeting, width, begin, sums);
      if (vectors == 3) gradient_at<kLanes, kChannels, 3>(f, meeting, width, begin, sums);
      if (vectors == 2) gradient_at<kLanes, kChannels, 2>(f, meeting, width, begin, sums);
      if (vectors == 1) gradient_at<kLanes, kChannels, 1>(f, meeting, width, begin, sums);
      const int64_t done = min64(vectors * kLanes, count - begin);
      for (int64_t t = 0; t < done; ++t) {
        float* input = result + (phase + (begin + t) * f.along.stride) * kChannels;
        for (int c = 0; c < kChannels; ++c) input[c] = sums[c][t];
      }
      begin += done;
    }
  }
}

template <int kChannels>
void gradient(const Few& f) {
  const int64_t taps = f.down.kernel * f.along.kernel;
  const int64_t work = f.along.in * kChannels * taps * f.filters / (f.down.stride * f.along.stride) + 1;
  torch::stable::parallel_for(
      0, f.batch * f.down.in, ceil_div(kGrain, work), [&](int64_t first, int64_t last) {
        TurnedRows turned(f);
        Meeting meeting;
        simd::run_wide([&](auto lanes) RLRP_INLINE {
          for (int64_t k = first; k < last; ++k) {
            gradient_row<lanes, kChannels>(f, turned, meeting, k / f.down.in, k % f.down.in);
          }
        });
      });
}

Tensor conv_few(const Tensor& g, const Tensor& weight, const Ints& input_shape, const Ints& stride,
                const Ints& padding) {
  const char* op = "conv_few";
  RLRP_CHECK(g.scalar_type() == ScalarType::Float, op, "g must have dtype float32");
  check_like(op, "weight", weight, "g", g, false);
  RLRP_CHECK(g.dim() == 4 && weight.dim() == 4, op, "g and weight must have 4 axes");
  RLRP_CHECK(input_shape.size() == 4, op, "input_shape must have 4 elements");
  RLRP_CHECK(stride.size() == 2 && padding.size() == 2, op, "stride and padding must have 2 elements");
  const int64_t channels = weight.size(1);
  RLRP_CHECK(channels >= 1 && channels <= kMostChannels, op, "weight must have 1 to ", kMostChannels,
             " input channels");
  RLRP_CHECK(weight.size(0) % kFilters == 0, op, "weight's filters must come in multiples of ", kFilters);
  RLRP_CHECK(g.size(1) == weight.size(0), op, "g must have a channel for every filter");
  RLRP_CHECK(input_shape[0] == g.size(0) && input_shape[1] == channels, op,
             "input_shape must have the batch of g and the input channels of weight");
  Axis axes[2];
  constexpr int64_t limit = int64_t{1} << 31;  // keeps products of two of them inside int64
  for (int i = 0; i < 2; ++i) {
    RLRP_CHECK(stride[i] >= 1 && stride[i] < limit, op, "stride must be positive");
    RLRP_CHECK(padding[i] >= 0 && padding[i] < limit, op, "padding must not be negative");
    RLRP_CHECK(input_shape[i + 2] >= 0 && input_shape[i + 2] < limit, op,
               "input_shape must not be negative");
    axes[i] = {input_shape[i + 2], g.size(i + 2), weight.size(i + 2), stride[i], padding[i]};
    const int64_t room = axes[i].in + 2 * padding[i] - axes[i].kernel;
    RLRP_CHECK(axes[i].kernel >= 1 && room >= 0 && room / stride[i] + 1 == axes[i].out, op,
               "g's spatial sizes do not follow from input_shape");
  }
  Tensor result = new_image(g, input_shape, true);
  if (result.numel() == 0) return result;
  const Tensor images = dense(g, true), filters = dense(weight, true);
  const Few few{g.size(0), g.size(1), axes[0], axes[1], data_of<float>(images), data_of<float>(filters),
                result_of<float>(result)};
  const auto run = channels == 1   ? gradient<1>
                   : channels == 2 ? gradient<2>
                   : channels == 3 ? gradient<3>
                                   : gradient<4>;
  run(few);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) { m.impl("conv_few", TORCH_BOX(&conv_few)); }

}  // namespace rlrp
