// product, accumulate and split: one pass that writes the result and sums its absolute values.
#include "core/rows.h"

#include <array>

#include "simd.h"
#include "terms.h"

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
        while (at < end) {
          int64_t offsets[K];
          layout.axes.offsets(at, offsets);
          for (int k = 0; k < K; ++k) offsets[k] += sample * layout.batch_stride[k];
          const int64_t count = min64(row - at % row, end - at);
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

Tensor multiply(const Tensor& x, const Tensor& g, const std::optional<Tensor>& given,
                const Tensor& q) {
  const auto factor = packed(given);
  Tensor s = new_masses(x);
  const auto layout = layout_of(q, x, g);
  dispatch(x.scalar_type(), "product", [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(q.mutable_data_ptr());
    const T* in = static_cast<const T*>(x.const_data_ptr());
    const T* by = static_cast<const T*>(g.const_data_ptr());
    using A = wide_t<T>;
    const A* factors = factor ? static_cast<const A*>(factor->const_data_ptr()) : nullptr;
    const int64_t q_step = layout.axes.step(0), x_step = layout.axes.step(1),
                  g_step = layout.axes.step(2);
    sweep<1, 3>(layout, {&s}, [=](int64_t sample, const int64_t* o, int64_t count) RLRP_INLINE {
      const A f = factors ? factors[sample] : A(1);
      T* to = out + o[0];
      const T* from = in + o[1];
      const T* gain = by + o[2];
      if (q_step == 1 && x_step == 1 && g_step == 1) {
        return Masses<1>{product_row(count, from, 1, gain, 1, f, to, 1)};
      }
      if (q_step == 1 && x_step == 1 && g_step == 0) {
        return Masses<1>{product_row(count, from, 1, gain, 0, f, to, 1)};
      }
      return Masses<1>{product_row(count, from, x_step, gain, g_step, f, to, q_step)};
    });
  });
  return s;
}

std::tuple<Tensor, Tensor> product(const Tensor& x, const Tensor& g,
                                   const std::optional<Tensor>& factor) {
  check_product("product", x, g, factor);
  Tensor q = torch::stable::empty_like(x);
  Tensor s = multiply(x, g, factor, q);
  return {q, s};
}

Tensor product_(const Tensor& x, const Tensor& g, const std::optional<Tensor>& factor) {
  check_product("product_", x, g, factor);
  check_writable("product_", "g", g);
  return multiply(x, g, factor, g);
}

template <bool kTwo>
std::tuple<Tensor, Tensor> accumulate_terms(const Tensor& t, const std::optional<Tensor>& t_factor,
                                            const std::optional<Tensor>& u,
                                            const std::optional<Tensor>& u_factor) {
  Tensor r = torch::stable::empty_like(t);
  Tensor s = new_masses(t);
  const auto layout = layout_of(r, t, kTwo ? *u : t);
  dispatch(t.scalar_type(), "accumulate", [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(r.mutable_data_ptr());
    const Given<T, kTwo> given(t, t_factor, u, u_factor);
    const int64_t r_step = layout.axes.step(0), t_step = layout.axes.step(1),
                  u_step = layout.axes.step(2);
    const bool unit = r_step == 1 && t_step == 1 && u_step == 1;
    sweep<1, 3>(layout, {&s}, [=](int64_t sample, const int64_t* o, int64_t count) RLRP_INLINE {
      if (unit) {
        const auto terms = given.at(sample, o[1], 1, o[2], 1);
        return Masses<1>{accumulate_row<T, kTwo>(count, terms, out + o[0], 1)};
      }
      const auto terms = given.at(sample, o[1], t_step, o[2], u_step);
      return Masses<1>{accumulate_row<T, kTwo>(count, terms, out + o[0], r_step)};
    });
  });
  return {r, s};
}

std::tuple<Tensor, Tensor> accumulate(const Tensor& t, const std::optional<Tensor>& t_factor,
                                      const std::optional<Tensor>& u,
                                      const std::optional<Tensor>& u_factor) {
  check_terms("accumulate", t, t_factor, u, u_factor);
  const auto f = packed(t_factor), h = packed(u_factor);
  return u ? accumulate_terms<true>(t, f, u, h) : accumulate_terms<false>(t, f, u, h);
}

using Split = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using SplitMasses = std::tuple<Tensor, Tensor>;

template <bool kTwo, bool kFromSum>
SplitMasses split_terms(const Tensor& a, const Tensor& b, const Tensor& t,
                        const std::optional<Tensor>& t_factor, const std::optional<Tensor>& u,
                        const std::optional<Tensor>& u_factor, const Tensor& r_a,
                        const Tensor& r_b) {
  Tensor s_a = new_masses(t), s_b = new_masses(t);
  const auto layout = layout_of(r_a, r_b, a, b, t, kTwo ? *u : t);
  dispatch(t.scalar_type(), "split", [&](auto zero) {
    using T = decltype(zero);
    T* to_a = static_cast<T*>(r_a.mutable_data_ptr());
    T* to_b = static_cast<T*>(r_b.mutable_data_ptr());
    const T* in_a = static_cast<const T*>(a.const_data_ptr());
    const T* in_b = static_cast<const T*>(b.const_data_ptr());
    const Given<T, kTwo> given(t, t_factor, u, u_factor);
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
                        count, given.at(sample, o[4], 1, o[5], 1), in_a + o[2], 1, in_b + o[3], 1,
                        to_a + o[0], 1, to_b + o[1], 1);
                  } else {
                    mass = split_row<T, kTwo, kFromSum>(
                        count, given.at(sample, o[4], step[4], o[5], step[5]), in_a + o[2], step[2],
                        in_b + o[3], step[3], to_a + o[0], step[0], to_b + o[1], step[1]);
                  }
                  return Masses<2>{mass.a, mass.b};
                });
  });
  return {s_a, s_b};
}

SplitMasses split_into(const char* op, const Tensor& a, const Tensor& b, const Tensor& t,
                       const std::optional<Tensor>& t_factor, const std::optional<Tensor>& u,
                       const std::optional<Tensor>& u_factor, bool from_sum, const Tensor& r_a,
                       const Tensor& r_b) {
  check_like(op, "a", a, "t", t);
  check_like(op, "b", b, "t", t);
  const auto f = packed(t_factor), h = packed(u_factor);
  if (u) {
    return from_sum ? split_terms<true, true>(a, b, t, f, u, h, r_a, r_b)
                    : split_terms<true, false>(a, b, t, f, u, h, r_a, r_b);
  }
  return from_sum ? split_terms<false, true>(a, b, t, f, u, h, r_a, r_b)
                  : split_terms<false, false>(a, b, t, f, u, h, r_a, r_b);
}

Split split(const Tensor& a, const Tensor& b, const Tensor& t, const std::optional<Tensor>& t_factor,
            const std::optional<Tensor>& u, const std::optional<Tensor>& u_factor, bool from_sum) {
  check_terms("split", t, t_factor, u, u_factor);
  Tensor r_a = torch::stable::empty_like(t), r_b = torch::stable::empty_like(t);
  auto [s_a, s_b] = split_into("split", a, b, t, t_factor, u, u_factor, from_sum, r_a, r_b);
  return {r_a, s_a, r_b, s_b};
}

SplitMasses split_(const Tensor& a, const Tensor& b, const Tensor& t,
                   const std::optional<Tensor>& t_factor, const std::optional<Tensor>& u,
                   const std::optional<Tensor>& u_factor, bool from_sum) {
  check_terms("split_", t, t_factor, u, u_factor);
  check_writable("split_", "a", a);
  check_writable("split_", "t", t);
  RLRP_CHECK(a.const_data_ptr() != t.const_data_ptr() || t.numel() == 0, "split_",
             "a and t are written to and must not be the same tensor");
  return split_into("split_", a, b, t, t_factor, u, u_factor, from_sum, a, t);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) {
  m.impl("product", TORCH_BOX(&product));
  m.impl("product_", TORCH_BOX(&product_));
  m.impl("accumulate", TORCH_BOX(&accumulate));
  m.impl("split", TORCH_BOX(&split));
  m.impl("split_", TORCH_BOX(&split_));
}

}  // namespace rlrp
