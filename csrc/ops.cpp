// The ops and their signatures; csrc/cpu and csrc/cuda register what they do.
//
// captum_rlrp/kernels/reference.py defines every op.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(captum_rlrp, m) {
  m.def("divide(Tensor r, Tensor d) -> (Tensor, Tensor)");
  m.def("multiply(Tensor x, Tensor g, bool absolute) -> Tensor");
  m.def("linear_law(Tensor x, Tensor weight, Tensor r) -> (Tensor, Tensor)");
  m.def("matmul(Tensor a, Tensor b) -> Tensor");
  m.def("split(Tensor a, Tensor b, Tensor r, bool from_sum) -> (Tensor, Tensor)");
  m.def(
      "finish_(Tensor(a!) y, Tensor? scale, Tensor? shift, Tensor? other, bool relu) -> Tensor");
  m.def("sums(Tensor[] values) -> Tensor");
  m.def("empty_like(Tensor x) -> Tensor");
  m.def(
      "max_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) "
      "-> (Tensor, Tensor)");
  m.def(
      "max_unpool(Tensor r, Tensor winners, int[] input_shape, int[] kernel, int[] stride, "
      "int[] padding, int[] dilation, bool ceil_mode) -> Tensor");
  m.def("adaptive_max_pool(Tensor x, int[] output_size) -> (Tensor, Tensor)");
  m.def("adaptive_max_unpool(Tensor r, Tensor winners, int[] input_shape) -> Tensor");
  m.def(
      "avg_pool(Tensor r, int[] input_shape, int[] kernel, int[] stride, int[] padding, "
      "bool ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor");
  m.def("adaptive_avg_pool(Tensor r, int[] input_shape) -> Tensor");
  m.def(
      "conv_few(Tensor g, Tensor weight, int[] input_shape, int[] stride, int[] padding) -> Tensor");
  m.def(
      "convolution(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? other, int[] stride, "
      "int[] padding, bool relu) -> (Tensor, Tensor)");
  m.def(
      "convolution_divide(Tensor r, Tensor x, Tensor weight, int[] stride, int[] padding, bool nonnegative) "
      "-> (Tensor, Tensor)");
  m.def(
      "convolution_product(Tensor x, Tensor s, Tensor weight, Tensor? other, int[] stride, int[] padding) -> Tensor");
}
