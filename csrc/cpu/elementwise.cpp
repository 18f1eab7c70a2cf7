// Element by element: one pass that writes the result, and finds the largest magnitude of what is watched.
#include "elementwise.h"

#include <algorithm>
#include <array>
#include <numeric>

#include "core/rows.h"
#include "simd.h"

namespace rlrp {
namespace {

constexpr int64_t kPiece = 16384;  // elements that a thread takes at a time
constexpr int64_t kGrain = 2;      // pieces below which another thread does not pay

// Calls body(offsets, count) for every run of elements along the innermost axis; the largest that it returns.
template <class Bits, int K, class Body>
Bits sweep(const Axes<K>& axes, const Body& body) {
  const int64_t numel = axes.numel();
  const int64_t pieces = ceil_div(numel, kPiece);
  std::vector<Bits> seen(pieces);
  torch::stable::parallel_for(0, pieces, kGrain, [&](int64_t from, int64_t to) {
    for (int64_t piece = from; piece < to; ++piece) {
      Bits largest = 0;
      simd::run([&]() RLRP_INLINE {
        const int64_t row = axes.row();
        int64_t at = piece * kPiece;
        const int64_t end = min64(at + kPiece, numel);
        int64_t within = at % row;
        for (Rows<K> rows(axes, at); at < end; rows.next(), within = 0) {
          int64_t offsets[K];
          for (int k = 0; k < K; ++k) offsets[k] = rows.offset[k] + within * axes.step(k);
          const int64_t count = min64(row - within, end - at);
          largest = std::max(largest, body(offsets, count));
          at += count;
        }
      });
      seen[piece] = largest;
    }
  });
  return pieces == 0 ? 0 : *std::max_element(seen.begin(), seen.end());
}

struct Cpu {
  template <class T, class Function>
  static void map(const char*, const Tensor&, const Tensor* seen, const Axes<Function::kTo + Function::kFrom>& axes,
                  T* const (&to)[Function::kTo], const T* const (&from)[Function::kFrom]) {
    constexpr int K = Function::kTo + Function::kFrom;
    using Bits = bits_t<wide_t<T>>;
    int64_t step[K];
    bool unit = true;
    for (int k = 0; k < K; ++k) {
      step[k] = axes.step(k);
      unit = unit && step[k] == 1;
    }
    const Bits largest = sweep<Bits>(axes, [&](const int64_t* offset, int64_t count) RLRP_INLINE {
      T* results[Function::kTo];
      const T* sources[Function::kFrom];
      for (int k = 0; k < Function::kTo; ++k) results[k] = to[k] + offset[k];
      for (int k = 0; k < Function::kFrom; ++k) sources[k] = from[k] + offset[Function::kTo + k];
      return unit ? map_row<T, Function, true>(count, results, sources, step)
                  : map_row<T, Function, false>(count, results, sources, step);
    });
    if (seen) note(*seen, largest);
  }

  template <class T>
  static void finish(const Axes<4>& axes, const Tensor& seen, T* y, const T* other, const wide_t<T>* scale,
                     const wide_t<T>* shift, bool relu) {
    const auto run = [&]<bool kOther, bool kScale, bool kShift>() {
      finish_with<T, kOther, kScale, kShift>(axes, seen, y, other, scale, shift, relu);
    };
    const auto with_shift = [&]<bool kOther, bool kScale>() {
      shift ? run.template operator()<kOther, kScale, true>()
            : run.template operator()<kOther, kScale, false>();
    };
    if (other) {
      scale ? with_shift.template operator()<true, true>() : with_shift.template operator()<true, false>();
    } else {
      scale ? with_shift.template operator()<false, true>() : with_shift.template operator()<false, false>();
    }
  }

 private:
  template <class Bits>
  static void note(const Tensor& seen, Bits largest) {
    memcpy(seen.mutable_data_ptr(), &largest, sizeof largest);
  }

  template <class T, bool kOther, bool kScale, bool kShift>
  static void finish_with(const Axes<4>& axes, const Tensor& seen, T* y, const T* other, const wide_t<T>* scale,
                          const wide_t<T>* shift, bool relu) {
    std::array<int64_t, 4> step;
    for (int k = 0; k < 4; ++k) step[k] = axes.step(k);
    const bool unit = step[0] == 1 && step[1] == 1;
    const int64_t channel = kScale ? step[2] : step[3];  // along rows of pixels 0, of channels 1
    using Bits = bits_t<wide_t<T>>;
    const Bits largest = sweep<Bits>(axes, [=](const int64_t* o, int64_t count) RLRP_INLINE {
      const auto row = [&](int64_t y_step, int64_t other_step, int64_t channel_step) RLRP_INLINE {
        return finish_row<T, kOther, kScale, kShift>(
            count, y + o[0], y_step, kOther ? other + o[1] : nullptr, other_step, kScale ? scale + o[2] : nullptr,
            kShift ? shift + o[3] : nullptr, channel_step, relu);
      };
      if (unit && channel == 0) return row(1, 1, 0);
      if (unit && channel == 1) return row(1, 1, 1);
      return row(step[0], step[1], channel);
    });
    note(seen, largest);
  }
};

template <class T>
double sum_of(const T* x, int64_t numel) {
  std::vector<double> partial(ceil_div(numel, kPiece));
  torch::stable::parallel_for(0, partial.size(), kGrain, [&](int64_t from, int64_t to) {
    for (int64_t piece = from; piece < to; ++piece) {
      simd::run([&]() RLRP_INLINE {
        const int64_t start = piece * kPiece;
        partial[piece] = sum_row(min64(kPiece, numel - start), x + start);
      });
    }
  });
  return std::accumulate(partial.begin(), partial.end(), 0.0);
}

// The sum of each tensor.
// Working memory for what PyTorch computes.
Tensor empty_like(const Tensor& x) { return new_like(x); }

Tensor sums(const std::vector<Tensor>& values) {
  RLRP_CHECK(!values.empty(), "sums", "needs a tensor at least");
  Tensor result = new_vector(values[0], values.size(), ScalarType::Double);
  double* to = result_of<double>(result);
  for (const Tensor& value : values) {
    const Tensor t = value.is_contiguous() ? value : dense(value, prefers_channels_last(value));
    dispatch(t.scalar_type(), "sums", [&](auto zero) {
      *to++ = sum_of(data_of<decltype(zero)>(t), t.numel());
    });
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) {
  m.impl("divide", TORCH_BOX(&Elementwise<Cpu>::divide));
  m.impl("multiply", TORCH_BOX(&Elementwise<Cpu>::multiply));
  m.impl("split", TORCH_BOX(&Elementwise<Cpu>::split));
  m.impl("finish_", TORCH_BOX(&Elementwise<Cpu>::finish_));
  m.impl("sums", TORCH_BOX(&sums));
  m.impl("empty_like", TORCH_BOX(&empty_like));
}

}  // namespace rlrp
