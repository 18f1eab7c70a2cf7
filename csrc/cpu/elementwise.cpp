// Element by element: one pass that writes the result and sums absolute values.
#include "core/rows.h"

#include <array>
#include <numeric>

#include "elementwise.h"
#include "simd.h"

namespace rlrp {
namespace {

// Work is cut into pieces of one sample that do not depend on the number of threads, and the pieces'
// masses are added in order: the same input gives the same bits however many threads there are.
constexpr int64_t kPiece = 16384;
constexpr int64_t kGrain = 2;  // pieces below which another thread does not pay

template <int S>
using Masses = std::array<double, S>;

// Calls body(sample, offsets, count) for every run of elements along the innermost axis and adds up
// what it returns, per sample, into the S mass tensors.
template <int S, int K, class Body>
void sweep(const Layout<K>& layout, const std::array<const Tensor*, S>& masses, const Body& body) {
  const int64_t numel = layout.numel();
  const int64_t pieces = ceil_div(numel, kPiece);
  std::vector<Masses<S>> partial(layout.batch * pieces);
  torch::stable::parallel_for(0, layout.batch * pieces, kGrain, [&](int64_t from, int64_t to) {
    for (int64_t piece = from; piece < to; ++piece) {
      Masses<S> sum{};
      simd::run([&]() RLRP_INLINE {
        const int64_t sample = piece / pieces;
        const int64_t row = layout.axes.row();
        int64_t at = (piece % pieces) * kPiece;
        const int64_t end = min64(at + kPiece, numel);
        int64_t within = at % row;
        for (Rows<K> rows(layout.axes, at); at < end; rows.next(), within = 0) {
          int64_t offsets[K];
          for (int k = 0; k < K; ++k) {
            offsets[k] = sample * layout.batch_stride[k] + rows.offset[k] + within * layout.axes.step(k);
          }
          const int64_t count = min64(row - within, end - at);
          const Masses<S> more = body(sample, offsets, count);
          for (int s = 0; s < S; ++s) sum[s] += more[s];
          at += count;
        }
      });
      partial[piece] = sum;
    }
  });
  for (int s = 0; s < S; ++s) {
    const bool wide = is_wide(masses[s]->scalar_type());
    void* out = masses[s]->mutable_data_ptr();
    for (int64_t sample = 0; sample < layout.batch; ++sample) {
      double total = 0;
      for (int64_t i = 0; i < pieces; ++i) total += partial[sample * pieces + i][s];
      if (wide) {
        static_cast<double*>(out)[sample] = total;
      } else {
        static_cast<float*>(out)[sample] = static_cast<float>(total);
      }
    }
  }
}

struct Cpu {
  template <class T>
  static void product(const Layout<3>& layout, const Tensor& s, T* q, const T* x, const T* g,
                      const wide_t<T>* factor) {
    using A = wide_t<T>;
    const int64_t q_step = layout.axes.step(0), x_step = layout.axes.step(1),
                  g_step = layout.axes.step(2);
    sweep<1, 3>(layout, {&s}, [=](int64_t sample, const int64_t* o, int64_t count) RLRP_INLINE {
      const A f = factor ? factor[sample] : A(1);
      T* to = q + o[0];
      const T* from = x + o[1];
      const T* gain = g + o[2];
      if (q_step == 1 && x_step == 1 && g_step == 1) {
        return Masses<1>{product_row(count, from, 1, gain, 1, f, to, 1)};
      }
      if (q_step == 1 && x_step == 1 && g_step == 0) {
        return Masses<1>{product_row(count, from, 1, gain, 0, f, to, 1)};
      }
      return Masses<1>{product_row(count, from, x_step, gain, g_step, f, to, q_step)};
    });
  }

  template <class T, bool kTwo>
  static void accumulate(const Layout<3>& layout, const Tensor& s, T* r,
                         const Given<T, kTwo>& given) {
    const int64_t r_step = layout.axes.step(0), t_step = layout.axes.step(1),
                  u_step = layout.axes.step(2);
    const bool unit = r_step == 1 && t_step == 1 && u_step == 1;
    sweep<1, 3>(layout, {&s}, [=](int64_t sample, const int64_t* o, int64_t count) RLRP_INLINE {
      if (unit) {
        const auto terms = given.at(sample, o[1], 1, o[2], 1);
        return Masses<1>{accumulate_row<T, kTwo>(count, terms, r + o[0], 1)};
      }
      const auto terms = given.at(sample, o[1], t_step, o[2], u_step);
      return Masses<1>{accumulate_row<T, kTwo>(count, terms, r + o[0], r_step)};
    });
  }

  template <class T, bool kTwo, bool kFromSum>
  static void split(const Layout<6>& layout, const Tensor& s_a, const Tensor& s_b, T* r_a, T* r_b,
                    const T* a, const T* b, const Given<T, kTwo>& given) {
    std::array<int64_t, 6> step;
    bool unit = true;
    for (int k = 0; k < 6; ++k) {
      step[k] = layout.axes.step(k);
      unit = unit && step[k] == 1;
    }
    sweep<2, 6>(layout, {&s_a, &s_b},
                [=](int64_t sample, const int64_t* o, int64_t count) RLRP_INLINE {
                  TwoMasses mass;
                  if (unit) {
                    mass = split_row<T, kTwo, kFromSum>(
                        count, given.at(sample, o[4], 1, o[5], 1), a + o[2], 1, b + o[3], 1,
                        r_a + o[0], 1, r_b + o[1], 1);
                  } else {
                    mass = split_row<T, kTwo, kFromSum>(
                        count, given.at(sample, o[4], step[4], o[5], step[5]), a + o[2], step[2],
                        b + o[3], step[3], r_a + o[0], step[0], r_b + o[1], step[1]);
                  }
                  return Masses<2>{mass.a, mass.b};
                });
  }

  template <class T>
  static void finish(const Layout<4>& layout, const Tensor& s, T* y, const T* other,
                     const wide_t<T>* scale, const wide_t<T>* shift, bool relu) {
    const auto run = [&]<bool kOther, bool kScale, bool kShift>() {
      finish_with<T, kOther, kScale, kShift>(layout, s, y, other, scale, shift, relu);
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
  template <class T, bool kOther, bool kScale, bool kShift>
  static void finish_with(const Layout<4>& layout, const Tensor& s, T* y, const T* other,
                          const wide_t<T>* scale, const wide_t<T>* shift, bool relu) {
    std::array<int64_t, 4> step;
    for (int k = 0; k < 4; ++k) step[k] = layout.axes.step(k);
    const bool unit = step[0] == 1 && step[1] == 1;
    const int64_t channel = kScale ? step[2] : step[3];  // along rows of pixels 0, of channels 1
    sweep<1, 4>(layout, {&s}, [=](int64_t, const int64_t* o, int64_t count) RLRP_INLINE {
      const auto row = [&](int64_t y_step, int64_t other_step, int64_t channel_step) RLRP_INLINE {
        return Masses<1>{finish_row<T, kOther, kScale, kShift>(
            count, y + o[0], y_step, kOther ? other + o[1] : nullptr, other_step,
            kScale ? scale + o[2] : nullptr, kShift ? shift + o[3] : nullptr, channel_step, relu)};
      };
      if (unit && channel == 0) return row(1, 1, 0);
      if (unit && channel == 1) return row(1, 1, 1);
      return row(step[0], step[1], channel);
    });
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
  m.impl("product", TORCH_BOX(&Elementwise<Cpu>::product));
  m.impl("product_", TORCH_BOX(&Elementwise<Cpu>::product_));
  m.impl("accumulate", TORCH_BOX(&Elementwise<Cpu>::accumulate));
  m.impl("accumulate_", TORCH_BOX(&Elementwise<Cpu>::accumulate_));
  m.impl("split", TORCH_BOX(&Elementwise<Cpu>::split));
  m.impl("split_", TORCH_BOX(&Elementwise<Cpu>::split_));
  m.impl("finish_", TORCH_BOX(&Elementwise<Cpu>::finish_));
  m.impl("sums", TORCH_BOX(&sums));
}

}  // namespace rlrp
