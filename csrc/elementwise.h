// The element-by-element ops: checks, results and layouts; the same on every device. `Device` does the work.
#pragma once

#include "core/elementwise.h"
#include "tensor.h"

namespace rlrp {

inline void check_writable(const char* op, const char* name, const Tensor& t) {
  for (int64_t axis = 0; axis < t.dim(); ++axis) {
    RLRP_CHECK(t.stride(axis) != 0 || t.size(axis) <= 1, op, name,
               " is written to and must not be expanded");
  }
}

inline std::optional<Tensor> packed(const std::optional<Tensor>& numbers) {
  if (!numbers || numbers->is_contiguous()) return numbers;
  return torch::stable::contiguous(*numbers);
}

using Pair = std::tuple<Tensor, Tensor>;

// Device::map<T, Function>(op, model, seen, axes, to, from) and Device::finish<T>(axes, seen, y, other, scale, shift, relu);
// `seen` gets the largest magnitude of what is watched, if there is such a tensor.
template <class Device>
struct Elementwise {
  using Numbers = std::optional<Tensor>;

  // s = r / d, and what tells whether that is to be trusted.
  static Pair divide(const Tensor& r, const Tensor& d) {
    check_pair("divide", "r", r, "d", d);
    Tensor s = new_like(d), seen = new_seen(d);
    dispatch(r.scalar_type(), "divide", [&](auto zero) {
      using T = decltype(zero);
      Device::template map<T, Divide<T>>("divide", d, &seen, axes_of(s, r, d), {result_of<T>(s)},
                                         {data_of<T>(r), data_of<T>(d)});
    });
    return {s, seen};
  }

  // x g, or |x| g, laid out as x is.
  static Tensor multiply(const Tensor& x, const Tensor& g, bool absolute) {
    check_pair("multiply", "x", x, "g", g);
    Tensor q = new_like(x);
    dispatch(x.scalar_type(), "multiply", [&](auto zero) {
      using T = decltype(zero);
      const auto run = [&]<bool kAbsolute>() {
        Device::template map<T, Multiply<T, kAbsolute>>("multiply", x, nullptr, axes_of(q, x, g), {result_of<T>(q)},
                                                        {data_of<T>(x), data_of<T>(g)});
      };
      absolute ? run.template operator()<true>() : run.template operator()<false>();
    });
    return q;
  }

  // Shares of the relevance r at a sum of a and b, laid out as r is.
  static Pair split(const Tensor& a, const Tensor& b, const Tensor& r, bool from_sum) {
    check_pair("split", "r", r, "a", a);
    check_like("split", "b", b, "r", r);
    Tensor r_a = new_like(r), r_b = new_like(r);
    dispatch(r.scalar_type(), "split", [&](auto zero) {
      using T = decltype(zero);
      const auto run = [&]<bool kFromSum>() {
        Device::template map<T, Split<T, kFromSum>>("split", r, nullptr, axes_of(r_a, r_b, a, b, r),
                                                    {result_of<T>(r_a), result_of<T>(r_b)},
                                                    {data_of<T>(a), data_of<T>(b), data_of<T>(r)});
      };
      from_sum ? run.template operator()<true>() : run.template operator()<false>();
    });
    return {r_a, r_b};
  }

  // Writes scale y + shift + other over y, or the ReLU of that; returns the largest magnitude in front of the ReLU.
  static Tensor finish_(const Tensor& y, const Numbers& scale, const Numbers& shift, const Numbers& other, bool relu) {
    check_first("finish_", "y", y);
    check_writable("finish_", "y", y);
    check_channels("finish_", "scale", scale, y);
    check_channels("finish_", "shift", shift, y);
    if (other) check_like("finish_", "other", *other, "y", y);
    // One number for each channel, wherever the element lies.
    const int64_t of_channels[kMaxAxes] = {0, 1};
    const int64_t* const own = y.strides().data();
    const auto axes = axes_with<4>(y, {own, other ? other->strides().data() : own, scale ? of_channels : own,
                                       shift ? of_channels : own});
    const Numbers scales = packed(scale), shifts = packed(shift);
    Tensor seen = new_seen(y);
    dispatch(y.scalar_type(), "finish_", [&](auto zero) {
      using T = decltype(zero);
      using A = wide_t<T>;
      Device::template finish<T>(axes, seen, result_of<T>(y), other ? data_of<T>(*other) : nullptr,
                                 scales ? data_of<A>(*scales) : nullptr, shifts ? data_of<A>(*shifts) : nullptr, relu);
    });
    return seen;
  }

 private:
  static Tensor new_seen(const Tensor& t) { return new_vector(t, 1, sum_type(t.scalar_type())); }

  static void check_pair(const char* op, const char* first_name, const Tensor& first, const char* name,
                         const Tensor& t) {
    check_first(op, first_name, first);
    check_like(op, name, t, first_name, first);
  }

  static void check_channels(const char* op, const char* name, const Numbers& numbers, const Tensor& y) {
    check_factor(op, name, numbers, y, 1);
  }
};

}  // namespace rlrp
