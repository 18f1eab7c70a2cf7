// The element-by-element ops: checks, results, and terms as kernels read them; the same on every device.
// `Device` does the work.
#pragma once

#include "core/elementwise.h"
#include "tensor.h"

namespace rlrp {

inline void check_product(const char* op, const Tensor& x, const Tensor& g,
                          const std::optional<Tensor>& factor) {
  check_first(op, "x", x);
  check_like(op, "g", g, "x", x);
  check_factor(op, "factor", factor, x);
}

inline void check_writable(const char* op, const char* name, const Tensor& t) {
  for (int64_t axis = 0; axis < t.dim(); ++axis) {
    RLRP_CHECK(t.stride(axis) != 0 || t.size(axis) <= 1, op, name,
               " is written to and must not be expanded");
  }
}

// t and u with their factors: the one or two terms of a relevance.
inline void check_terms(const char* op, const Tensor& t, const std::optional<Tensor>& t_factor,
                        const std::optional<Tensor>& u, const std::optional<Tensor>& u_factor) {
  check_first(op, "t", t);
  check_factor(op, "t_factor", t_factor, t);
  if (u) check_like(op, "u", *u, "t", t);
  RLRP_CHECK(u || !u_factor, op, "u_factor is given without u");
  if (u) check_factor(op, "u_factor", u_factor, *u);
}

// The pointers, strides and factors of a relevance's terms, as operands of a layout.
template <class T, bool kTwo>
struct Given {
  using A = wide_t<T>;
  const T* t;
  const T* u;
  const A* t_factor;
  const A* u_factor;

  Given(const Tensor& first, const std::optional<Tensor>& first_factor,
        const std::optional<Tensor>& second, const std::optional<Tensor>& second_factor)
      : t(data_of<T>(first)),
        u(kTwo ? data_of<T>(*second) : nullptr),
        t_factor(first_factor ? data_of<A>(*first_factor) : nullptr),
        u_factor(second_factor ? data_of<A>(*second_factor) : nullptr) {}

  // Those at the given addresses.
  RLRP_HD Terms<T, kTwo> of(int64_t sample, const T* ts, int64_t t_step, const T* us,
                            int64_t u_step) const {
    return {ts,
            us,
            t_step,
            u_step,
            t_factor ? t_factor[sample] : A(1),
            u_factor ? u_factor[sample] : A(1)};
  }

  RLRP_HD Terms<T, kTwo> at(int64_t sample, int64_t t_offset, int64_t t_step, int64_t u_offset,
                            int64_t u_step) const {
    return of(sample, t + t_offset, t_step, kTwo ? u + u_offset : nullptr, u_step);
  }
};

inline std::optional<Tensor> packed(const std::optional<Tensor>& factor) {
  if (!factor || factor->is_contiguous()) return factor;
  return torch::stable::contiguous(*factor);
}

using Pair = std::tuple<Tensor, Tensor>;
using Quadruple = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Device::product<T>(layout, s, q, x, g, factor), accumulate<T, kTwo>(layout, s, r, given),
// split<T, kTwo, kFromSum>(layout, s_a, s_b, r_a, r_b, a, b, given) and finish<T>(layout, s, y, other,
// scale, shift, relu), masses as tensors.
template <class Device>
struct Elementwise {
  using Factor = std::optional<Tensor>;

  static Pair product(const Tensor& x, const Tensor& g, const Factor& factor) {
    check_product("product", x, g, factor);
    Tensor q = new_like(x);
    return {q, multiply(x, g, factor, q)};
  }

  static Tensor product_(const Tensor& x, const Tensor& g, const Factor& factor) {
    check_product("product_", x, g, factor);
    check_writable("product_", "g", g);
    return multiply(x, g, factor, g);
  }

  static Pair accumulate(const Tensor& t, const Factor& t_factor, const Factor& u,
                         const Factor& u_factor) {
    check_terms("accumulate", t, t_factor, u, u_factor);
    Tensor r = new_like(t);
    return {r, sum(r, t, t_factor, u, u_factor)};
  }

  // Writes to r, in whatever layout it has.
  static Tensor accumulate_(const Tensor& r, const Tensor& t, const Factor& t_factor, const Factor& u,
                            const Factor& u_factor) {
    check_terms("accumulate_", t, t_factor, u, u_factor);
    check_like("accumulate_", "r", r, "t", t);
    check_writable("accumulate_", "r", r);
    return sum(r, t, t_factor, u, u_factor);
  }

  static Quadruple split(const Tensor& a, const Tensor& b, const Tensor& t, const Factor& t_factor,
                         const Factor& u, const Factor& u_factor, bool from_sum) {
    check_split("split", a, b, t, t_factor, u, u_factor);
    Tensor r_a = new_like(t), r_b = new_like(t);
    const auto [s_a, s_b] = share(a, b, t, t_factor, u, u_factor, from_sum, r_a, r_b);
    return {r_a, s_a, r_b, s_b};
  }

  // Writes r_a over a and r_b over t.
  static Pair split_(const Tensor& a, const Tensor& b, const Tensor& t, const Factor& t_factor,
                     const Factor& u, const Factor& u_factor, bool from_sum) {
    check_split("split_", a, b, t, t_factor, u, u_factor);
    check_writable("split_", "a", a);
    check_writable("split_", "t", t);
    RLRP_CHECK(a.const_data_ptr() != t.const_data_ptr() || t.numel() == 0, "split_",
               "a and t are written to and must not be the same tensor");
    return share(a, b, t, t_factor, u, u_factor, from_sum, a, t);
  }

  // Writes scale y + shift + other over y, or the ReLU of that; returns the mass in front of the ReLU.
  static Tensor finish_(const Tensor& y, const Factor& scale, const Factor& shift, const Factor& other,
                        bool relu) {
    check_first("finish_", "y", y);
    check_writable("finish_", "y", y);
    check_factor("finish_", "scale", scale, y, 1);
    check_factor("finish_", "shift", shift, y, 1);
    if (other) check_like("finish_", "other", *other, "y", y);
    // One number for each channel, wherever the element lies.
    const int64_t of_channels[kMaxAxes] = {0, 1};
    const int64_t* const own = y.strides().data();
    const auto layout =
        layout_with<4>(y, {own, other ? other->strides().data() : own, scale ? of_channels : own,
                           shift ? of_channels : own});
    const Factor scales = packed(scale), shifts = packed(shift);
    Tensor s = new_masses(y);
    dispatch(y.scalar_type(), "finish_", [&](auto zero) {
      using T = decltype(zero);
      using A = wide_t<T>;
      Device::template finish<T>(layout, s, result_of<T>(y), other ? data_of<T>(*other) : nullptr,
                                 scales ? data_of<A>(*scales) : nullptr,
                                 shifts ? data_of<A>(*shifts) : nullptr, relu);
    });
    return s;
  }

 private:
  static Tensor multiply(const Tensor& x, const Tensor& g, const Factor& given, const Tensor& q) {
    const Factor factor = packed(given);
    Tensor s = new_masses(x);
    dispatch(x.scalar_type(), "product", [&](auto zero) {
      using T = decltype(zero);
      Device::template product<T>(layout_of(q, x, g), s, result_of<T>(q), data_of<T>(x),
                                  data_of<T>(g), factor ? data_of<wide_t<T>>(*factor) : nullptr);
    });
    return s;
  }

  static Tensor sum(const Tensor& r, const Tensor& t, const Factor& t_factor, const Factor& u,
                    const Factor& u_factor) {
    return (u ? add<true> : add<false>)(r, t, packed(t_factor), u, packed(u_factor));
  }

  template <bool kTwo>
  static Tensor add(const Tensor& r, const Tensor& t, const Factor& t_factor, const Factor& u,
                    const Factor& u_factor) {
    Tensor s = new_masses(t);
    dispatch(t.scalar_type(), "accumulate", [&](auto zero) {
      using T = decltype(zero);
      Device::template accumulate<T, kTwo>(layout_of(r, t, kTwo ? *u : t), s, result_of<T>(r),
                                           Given<T, kTwo>(t, t_factor, u, u_factor));
    });
    return s;
  }

  static void check_split(const char* op, const Tensor& a, const Tensor& b, const Tensor& t,
                          const Factor& t_factor, const Factor& u, const Factor& u_factor) {
    check_terms(op, t, t_factor, u, u_factor);
    check_like(op, "a", a, "t", t);
    check_like(op, "b", b, "t", t);
  }

  static Pair share(const Tensor& a, const Tensor& b, const Tensor& t, const Factor& t_factor,
                    const Factor& u, const Factor& u_factor, bool from_sum, const Tensor& r_a,
                    const Tensor& r_b) {
    return (u ? from_sum ? share_terms<true, true> : share_terms<true, false>
              : from_sum ? share_terms<false, true> : share_terms<false, false>)(
        a, b, t, packed(t_factor), u, packed(u_factor), r_a, r_b);
  }

  template <bool kTwo, bool kFromSum>
  static Pair share_terms(const Tensor& a, const Tensor& b, const Tensor& t, const Factor& t_factor,
                          const Factor& u, const Factor& u_factor, const Tensor& r_a,
                          const Tensor& r_b) {
    Tensor s_a = new_masses(t), s_b = new_masses(t);
    dispatch(t.scalar_type(), "split", [&](auto zero) {
      using T = decltype(zero);
      Device::template split<T, kTwo, kFromSum>(
          layout_of(r_a, r_b, a, b, t, kTwo ? *u : t), s_a, s_b, result_of<T>(r_a),
          result_of<T>(r_b), data_of<T>(a), data_of<T>(b),
          Given<T, kTwo>(t, t_factor, u, u_factor));
    });
    return {s_a, s_b};
  }
};

}  // namespace rlrp
