// Pooling windows along one axis: which inputs an output sees, and which outputs see an input.
#pragma once

#include "scalar.h"

namespace rlrp {

struct Span {
  int64_t begin, end;  // end is exclusive

  RLRP_HD bool has(int64_t i) const { return begin <= i && i < end; }
};

struct Window {
  int64_t in = 1, out = 1;
  int64_t kernel = 1, stride = 1, padding = 0, dilation = 1;
  bool adaptive = false;

  RLRP_HD int64_t step() const { return adaptive ? 1 : dilation; }

  // The inputs begin, begin + step(), ... < end of output o that lie inside the axis.
  RLRP_HD Span inputs(int64_t o) const {
    if (adaptive) return {o * in / out, ceil_div((o + 1) * in, out)};
    const int64_t first = o * stride - padding;
    const int64_t skipped = first < 0 ? ceil_div(-first, dilation) * dilation : 0;
    return {first + skipped, min64(first + (kernel - 1) * dilation + 1, in)};
  }

  // The outputs whose span from first to last input includes input i. With dilation > 1 it must
  // still be asked whether i is one of their inputs.
  RLRP_HD Span outputs(int64_t i) const {
    if (adaptive) return {i * out / in, ceil_div((i + 1) * out, in)};
    const int64_t reach = i + padding - (kernel - 1) * dilation;  // first output: o * stride >= reach
    return {reach > 0 ? ceil_div(reach, stride) : 0, min64((i + padding) / stride + 1, out)};
  }

  // The outputs none of whose inputs is padding.
  RLRP_HD Span whole() const {
    const int64_t room = in + padding - (kernel - 1) * dilation - 1;  // for o * stride
    if (adaptive || room < 0) return {0, 0};
    const int64_t end = min64(room / stride + 1, out);
    return {min64(ceil_div(padding, stride), end), end};
  }

  // The most inputs that an output has, and the most outputs that see an input.
  RLRP_HD int64_t most_inputs() const {
    return min64(adaptive ? in / out + 2 : kernel, step() == 1 ? in : ceil_div(in, step()));
  }
  RLRP_HD int64_t most_outputs() const {
    return min64(adaptive ? out / in + 2 : (kernel - 1) * dilation / stride + 1, out);
  }

  RLRP_HD bool sees(int64_t o, int64_t i) const {
    return adaptive || dilation == 1 || (i + padding - o * stride) % dilation == 0;
  }

  // The number of input i among those of output o, which sees it.
  RLRP_HD int64_t number(int64_t o, int64_t i) const {
    const int64_t away = i - inputs(o).begin;
    return step() == 1 ? away : away / step();  // divisions are slow, on a GPU above all
  }

  // Number of elements of output o, with the padding counted.
  RLRP_HD int64_t padded_count(int64_t o) const {
    const int64_t first = o * stride - padding;
    return min64(first + kernel, in + padding) - first;
  }

  // Size of the output that PyTorch would give this window; negative where it fits nowhere.
  int64_t expected_out(bool ceil_mode) const {
    const int64_t room = in + 2 * padding - dilation * (kernel - 1) - 1;
    if (room < 0) return ceil_mode && room > -stride ? 1 : -1;
    int64_t size = (ceil_mode ? ceil_div(room, stride) : room / stride) + 1;
    if (ceil_mode && (size - 1) * stride >= in + padding) --size;
    return size;
  }
};

}  // namespace rlrp
