// The input gradient of a 2-d convolution over few channels, as over an RGB image: libraries that block
// channels by 16 do most of their work on padding there.
//
// Inputs `stride` apart meet the same taps of the filters, at neighbouring outputs. So several of them are
// worked on at a time, each with its channels' sums in vectors over the filters.
#include <algorithm>
#include <array>
#include <bit>

#include "simd.h"
#include "tensor.h"

namespace rlrp {
namespace {

constexpr int kMost = 4;    // channels
constexpr int kTile = 4;    // inputs at a time
constexpr int kVector = 8;  // filters in a vector
constexpr int64_t kGrain = 1 << 20;  // multiplications that make a task worth its while

using Vector = simd::Vector<kVector>;

// The sum of a vector's elements, half by half.
template <int kLanes>
RLRP_INLINE inline float total(const simd::Vector<kLanes>& v) {
  if constexpr (kLanes == 2) {
    return v[0] + v[1];
  } else {
    const auto halves = std::bit_cast<std::array<simd::Vector<kLanes / 2>, 2>>(v);
    return total<kLanes / 2>(halves[0] + halves[1]);
  }
}

struct Axis {
  int64_t in, out, kernel, stride, padding, dilation;

  // The output whose tap k reaches input i, if i + padding - k * dilation is a multiple of the stride; it
  // may lie outside.
  int64_t output(int64_t i, int64_t k) const { return (i + padding - k * dilation) / stride; }
  bool meets(int64_t i, int64_t k) const { return (i + padding - k * dilation) % stride == 0; }
};

struct Few {
  int64_t batch, filters;
  Axis down, along;
};

// What one tap of the filters brings the inputs of a row that lie `stride` apart.
struct Tap {
  const float* row;     // of outputs
  const float* weight;  // (channels, filters)
  int64_t first;        // the output for the first of the inputs, the next one for the next
};

// Inputs number `begin` to `begin` + kTile of those.
template <int kChannels>
RLRP_INLINE inline void tile(const Few& f, const std::vector<Tap>& taps, const float* zeros,
                             int64_t begin, float (&result)[kTile][kChannels]) {
  Vector sum[kTile][kChannels] = {};
  for (const Tap& tap : taps) {
    const float* from[kTile];
    for (int t = 0; t < kTile; ++t) {
      const int64_t o = tap.first + begin + t;
      from[t] = o >= 0 && o < f.along.out ? tap.row + o * f.filters : zeros;
    }
    for (int64_t k = 0; k < f.filters; k += kVector) {
      Vector factor[kChannels];
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c) {
        factor[c] = simd::load<kVector>(tap.weight + c * f.filters + k);
      }
#pragma GCC unroll 8
      for (int t = 0; t < kTile; ++t) {
        const Vector value = simd::load<kVector>(from[t] + k);
#pragma GCC unroll 4
        for (int c = 0; c < kChannels; ++c) sum[t][c] += value * factor[c];
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTile; ++t) {
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) result[t][c] = total<kVector>(sum[t][c]);
  }
}

// Row h of an input.
template <int kChannels>
RLRP_INLINE inline void gradient_row(const Few& f, const float* g, const float* weight,
                                     const float* zeros, std::vector<Tap>& taps, int64_t h,
                                     float* result) {
  for (int64_t phase = 0; phase < min64(f.along.stride, f.along.in); ++phase) {
    taps.clear();
    for (int64_t i = 0; i < f.down.kernel; ++i) {
      const int64_t o = f.down.output(h, i);
      if (!f.down.meets(h, i) || o < 0 || o >= f.down.out) continue;
      for (int64_t j = 0; j < f.along.kernel; ++j) {
        if (!f.along.meets(phase, j)) continue;
        taps.push_back({g + o * f.along.out * f.filters,
                        weight + (i * f.along.kernel + j) * kChannels * f.filters,
                        f.along.output(phase, j)});
      }
    }
    const int64_t count = ceil_div(f.along.in - phase, f.along.stride);
    for (int64_t begin = 0; begin < count; begin += kTile) {
      float sums[kTile][kChannels];
      tile<kChannels>(f, taps, zeros, begin, sums);
      for (int64_t t = 0; t < min64(kTile, count - begin); ++t) {
        std::copy_n(sums[t], kChannels, result + (phase + (begin + t) * f.along.stride) * kChannels);
      }
    }
  }
}

template <int kChannels>
void gradient(const Few& f, const float* g, const float* weight, float* result) {
  // Filters side by side: (kernel, kernel, channels, filters).
  const int64_t taps = f.down.kernel * f.along.kernel;
  std::vector<Vector> turned(taps * kChannels * f.filters / kVector);  // aligned, as one of floats is not
  float* filters = reinterpret_cast<float*>(turned.data());
  const std::vector<float> zeros(f.filters, 0.0f);
  for (int64_t k = 0; k < f.filters; ++k) {
    for (int64_t c = 0; c < kChannels; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        filters[(tap * kChannels + c) * f.filters + k] = weight[(k * kChannels + c) * taps + tap];
      }
    }
  }
  const int64_t work = f.along.in * kChannels * taps * f.filters / (f.down.stride * f.along.stride) + 1;
  torch::stable::parallel_for(
      0, f.batch * f.down.in, ceil_div(kGrain, work), [&](int64_t first, int64_t last) {
        std::vector<Tap> taps;
        simd::run([&]() RLRP_INLINE {
          for (int64_t k = first; k < last; ++k) {
            const float* image = g + k / f.down.in * f.down.out * f.along.out * f.filters;
            float* row = result + k * f.along.in * kChannels;
            gradient_row<kChannels>(f, image, filters, zeros.data(), taps, k % f.down.in, row);
          }
        });
      });
}

Tensor conv_few(const Tensor& g, const Tensor& weight, const Ints& input_shape, const Ints& stride,
                const Ints& padding, const Ints& dilation) {
  const char* op = "conv_few";
  RLRP_CHECK(g.scalar_type() == ScalarType::Float, op, "g must have dtype float32");
  check_like(op, "weight", weight, "g", g, false);
  RLRP_CHECK(g.dim() == 4 && weight.dim() == 4, op, "g and weight must have 4 axes");
  RLRP_CHECK(input_shape.size() == 4, op, "input_shape must have 4 elements");
  for (const Ints* pair : {&stride, &padding, &dilation}) {
    RLRP_CHECK(pair->size() == 2, op, "stride, padding and dilation must have 2 elements");
  }
  const int64_t channels = weight.size(1);
  RLRP_CHECK(channels >= 1 && channels <= kMost, op, "weight must have 1 to ", kMost, " input channels");
  RLRP_CHECK(weight.size(0) % kVector == 0, op, "weight's filters must come in multiples of ", kVector);
  RLRP_CHECK(g.size(1) == weight.size(0), op, "g must have a channel for every filter");
  RLRP_CHECK(input_shape[0] == g.size(0) && input_shape[1] == channels, op,
             "input_shape must have the batch of g and the input channels of weight");
  Axis axes[2];
  constexpr int64_t limit = int64_t{1} << 31;  // keeps products of two of them inside int64
  for (int i = 0; i < 2; ++i) {
    RLRP_CHECK(stride[i] >= 1 && stride[i] < limit, op, "stride must be positive");
    RLRP_CHECK(dilation[i] >= 1 && dilation[i] < limit, op, "dilation must be positive");
    RLRP_CHECK(padding[i] >= 0 && padding[i] < limit, op, "padding must not be negative");
    RLRP_CHECK(input_shape[i + 2] >= 0 && input_shape[i + 2] < limit, op,
               "input_shape must not be negative");
    axes[i] = {input_shape[i + 2], g.size(i + 2), weight.size(i + 2), stride[i], padding[i], dilation[i]};
    const int64_t room = axes[i].in + 2 * padding[i] - dilation[i] * (axes[i].kernel - 1) - 1;
    RLRP_CHECK(axes[i].kernel >= 1 && room >= 0 && room / stride[i] + 1 == axes[i].out, op,
               "g's spatial sizes do not follow from input_shape");
  }
  const Few f{g.size(0), g.size(1), axes[0], axes[1]};
  Tensor result = new_image(g, input_shape, true);
  if (result.numel() == 0) return result;
  const Tensor images = dense(g, true), filters = dense(weight, false);
  const auto run = channels == 1   ? gradient<1>
                   : channels == 2 ? gradient<2>
                   : channels == 3 ? gradient<3>
                                   : gradient<4>;
  run(f, data_of<float>(images), data_of<float>(filters), result_of<float>(result));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) { m.impl("conv_few", TORCH_BOX(&conv_few)); }

}  // namespace rlrp
