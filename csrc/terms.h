// Arguments of the element-by-element ops: checks, and terms as kernels read them.
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
      : t(static_cast<const T*>(first.const_data_ptr())),
        u(kTwo ? static_cast<const T*>(second->const_data_ptr()) : nullptr),
        t_factor(first_factor ? static_cast<const A*>(first_factor->const_data_ptr()) : nullptr),
        u_factor(second_factor ? static_cast<const A*>(second_factor->const_data_ptr()) : nullptr) {}

  RLRP_HD Terms<T, kTwo> at(int64_t sample, int64_t t_offset, int64_t t_step, int64_t u_offset,
                            int64_t u_step) const {
    return {t + t_offset,
            kTwo ? u + u_offset : nullptr,
            t_step,
            u_step,
            t_factor ? t_factor[sample] : A(1),
            u_factor ? u_factor[sample] : A(1)};
  }
};

inline std::optional<Tensor> packed(const std::optional<Tensor>& factor) {
  if (!factor) return std::nullopt;
  return torch::stable::contiguous(*factor);
}

}  // namespace rlrp
