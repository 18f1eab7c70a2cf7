// Between tensors and kernels: checks, dtype dispatch, layouts. Used by the CPU and the CUDA ops alike.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

#include <optional>
#include <vector>

#include "core/axes.h"
#include "core/half.h"
#include "memory.h"

#define RLRP_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, "captum_rlrp::", op, ": ", __VA_ARGS__)

namespace rlrp {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// Calls f(T{}) for the tensor's element type.
template <class F>
void dispatch(ScalarType dtype, const char* op, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(Float16{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      RLRP_CHECK(false, op, "needs float32, float64, float16 or bfloat16 tensors, not ",
                 torch::headeronly::toString(dtype));
  }
}

inline bool is_wide(ScalarType dtype) { return dtype == ScalarType::Double; }

inline ScalarType sum_type(ScalarType dtype) {
  return is_wide(dtype) ? ScalarType::Double : ScalarType::Float;
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t axis = 0; axis < a.dim(); ++axis) {
    if (a.size(axis) != b.size(axis)) return false;
  }
  return true;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// A tensor that the kernels can walk.
inline void check_first(const char* op, const char* name, const Tensor& t) {
  RLRP_CHECK(t.dim() >= 1 && t.dim() <= kMaxAxes, op, name, " must have 1 to ", kMaxAxes,
             " axes, not ", t.dim());
}

inline void check_like(const char* op, const char* name, const Tensor& t, const char* model_name,
                       const Tensor& model, bool same_shape = true) {
  RLRP_CHECK(same_device(t, model), op, name, " must be on the device of ", model_name);
  RLRP_CHECK(t.scalar_type() == model.scalar_type(), op, name, " must have the dtype of ",
             model_name, ", not ", torch::headeronly::toString(t.scalar_type()));
  RLRP_CHECK(!same_shape || same_sizes(t, model), op, name, " must have the shape of ", model_name);
}

// One number for each sample of t, or each channel.
inline void check_factor(const char* op, const char* name, const std::optional<Tensor>& factor,
                         const Tensor& t, int64_t axis = 0) {
  if (!factor) return;
  RLRP_CHECK(same_device(*factor, t), op, name, " must be on the device of what it is applied to");
  RLRP_CHECK(factor->scalar_type() == sum_type(t.scalar_type()), op, name, " must have dtype ",
             torch::headeronly::toString(sum_type(t.scalar_type())));
  RLRP_CHECK(axis < t.dim() && factor->dim() == 1 && factor->size(0) == t.size(axis), op, name,
             " must have one element per ", axis == 0 ? "sample" : "channel");
}

inline int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    default:
      return 8;
  }
}

// Uninitialised and without gaps, on the device of t. By the C function, as torch::stable's look their op up by its
// name in every call, which takes longer than a small kernel.
inline Tensor new_strided(const Tensor& t, int64_t axes, const int64_t* sizes, const int64_t* strides,
                          ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  if (Memory* memory = t.is_cuda() ? nullptr : Memory::current()) {
    int64_t bytes = bytes_of(dtype);
    for (int64_t axis = 0; axis < axes; ++axis) bytes *= sizes[axis];
    if (bytes >= Memory::kLeast) return memory->take(bytes, axes, sizes, strides, dtype);
  }
  int32_t device = 0;
  AtenTensorHandle made = nullptr;
  const bool done =
      aoti_torch_get_device_type(t.get(), &device) == AOTI_TORCH_SUCCESS &&
      aoti_torch_empty_strided(axes, sizes, strides, to<int32_t>(from(dtype)), device, t.get_device_index(),
                               &made) == AOTI_TORCH_SUCCESS;
  RLRP_CHECK(done, "new_strided", "no memory for the result");
  return Tensor(made);
}

inline Tensor new_vector(const Tensor& t, int64_t size, ScalarType dtype) {
  const int64_t step = 1;
  return new_strided(t, 1, &size, &step, dtype);
}

// One number for each sample.
inline Tensor new_sums(const Tensor& t) { return new_vector(t, t.size(0), sum_type(t.scalar_type())); }

template <class T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* result_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Where the elements of operands with the shape of t and these strides lie.
template <int K>
Axes<K> axes_with(const Tensor& t, const int64_t* const (&strides)[K]) {
  return simplify<K>(static_cast<int>(t.dim()), t.sizes().data(), strides);
}

template <class... Tensors>
Axes<1 + sizeof...(Tensors)> axes_of(const Tensor& t, const Tensors&... others) {
  return axes_with<1 + sizeof...(Tensors)>(t, {t.strides().data(), others.strides().data()...});
}

// ---- images: tensors (N, C, *spatial), contiguous or channels_last; so may signals (N, C, L) be ----

// Calls f with each axis, the innermost first, for as long as it returns true; whether it always did.
template <class F>
bool all_axes(int64_t rank, bool channels_last, const F& f) {
  if (channels_last && !f(1)) return false;
  for (int64_t axis = rank - 1; axis >= (channels_last ? 2 : 1); --axis) {
    if (!f(axis)) return false;
  }
  return f(0);
}

inline bool dense_in(const Tensor& t, bool channels_last) {
  if (channels_last && t.dim() < 3) return false;
  int64_t expected = 1;
  return all_axes(t.dim(), channels_last, [&](int64_t axis) {
    const bool fits = t.size(axis) == 1 || t.stride(axis) == expected;
    expected *= t.size(axis);
    return fits;
  });
}

// Tensors that are both (one channel, one pixel) count as contiguous.
inline bool prefers_channels_last(const Tensor& t) {
  return t.numel() > 0 && !dense_in(t, false) && dense_in(t, true);
}

inline MemoryFormat format_of(const Tensor& t, bool channels_last) {
  if (!channels_last) return MemoryFormat::Contiguous;
  return t.dim() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

inline bool is_signal(const Tensor& t) { return t.dim() == 3; }  // for which there is no format

inline Tensor dense(const Tensor& t, bool channels_last) {
  using torch::stable::transpose;
  if (dense_in(t, channels_last)) return t;
  if (channels_last && is_signal(t)) return transpose(dense(transpose(t, 1, 2), false), 1, 2);
  return torch::stable::contiguous(t, format_of(t, channels_last));
}

// An uninitialised image on the device of t, and of its dtype unless another is named.
inline Tensor new_image(const Tensor& t, const Ints& shape, bool channels_last,
                        std::optional<ScalarType> dtype = std::nullopt) {
  const int64_t axes = static_cast<int64_t>(shape.size());
  Ints strides(axes);
  int64_t step = 1;
  all_axes(axes, channels_last, [&](int64_t axis) {
    strides[axis] = step;
    step *= shape[axis] > 0 ? shape[axis] : 1;
    return true;
  });
  return new_strided(t, axes, shape.data(), strides.data(), dtype.value_or(t.scalar_type()));
}

// Laid out as t is.
inline Tensor new_like(const Tensor& t) {
  if (!dense_in(t, false) && !dense_in(t, true)) return torch::stable::empty_like(t);
  return new_strided(t, t.dim(), t.sizes().data(), t.strides().data(), t.scalar_type());
}

inline Ints sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Ints(sizes.begin(), sizes.end());
}

}  // namespace rlrp
