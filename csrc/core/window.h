// Pooling windows along one axis: which inputs an output sees, and which outputs see an input. By integers of 32 bits
// on a GPU, where those of 64 are slow.
#pragma once

#include "scalar.h"

namespace rlrp {

template <class I>
struct SpanOf {
  I begin, end;  // end is exclusive

  RLRP_HD bool has(I i) const { return begin <= i && i < end; }
};

template <class I>
struct WindowOf {
  using Span = SpanOf<I>;

  I in = 1, out = 1;
  I kernel = 1, stride = 1, padding = 0, dilation = 1;
  bool adaptive = false;

  RLRP_HD I step() const { return adaptive ? 1 : dilation; }

  // The inputs begin, begin + step(), ... < end of output o that lie inside the axis.
  RLRP_HD Span inputs(I o) const {
    if (adaptive) return part(o, in, out);
    const I first = o * stride - padding;
    const I skipped = first < 0 ? ceil_div(-first, dilation) * dilation : 0;
    return {first + skipped, least(first + (kernel - 1) * dilation + 1, in)};
  }

  // The outputs whose span from first to last input includes input i. With dilation > 1 it must
  // still be asked whether i is one of their inputs.
  RLRP_HD Span outputs(I i) const {
    if (adaptive) return part(i, out, in);
    const I reach = i + padding - (kernel - 1) * dilation;  // first output: o * stride >= reach
    return {reach > 0 ? ceil_div(reach, stride) : 0, least((i + padding) / stride + 1, out)};
  }

  // The outputs none of whose inputs is padding.
  RLRP_HD Span whole() const {
    const I room = in + padding - (kernel - 1) * dilation - 1;  // for o * stride
    if (adaptive || room < 0) return {0, 0};
    const I end = least(room / stride + 1, out);
    return {least(ceil_div(padding, stride), end), end};
  }

  // The most inputs that an output has, and the most outputs that see an input.
  RLRP_HD I most_inputs() const {
    return least(adaptive ? in / out + 2 : kernel, step() == 1 ? in : ceil_div(in, step()));
  }
  RLRP_HD I most_outputs() const {
    return least(adaptive ? out / in + 2 : (kernel - 1) * dilation / stride + 1, out);
  }

  RLRP_HD bool sees(I o, I i) const {
    return adaptive || dilation == 1 || (i + padding - o * stride) % dilation == 0;
  }

  // The number of input i among those of output o, which sees it.
  RLRP_HD I number(I o, I i) const {
    const I away = i - inputs(o).begin;
    return step() == 1 ? away : away / step();  // divisions are slow, on a GPU above all
  }

  // Number of elements of output o, with the padding counted.
  RLRP_HD I padded_count(I o) const {
    const I first = o * stride - padding;
    return least(first + kernel, in + padding) - first;
  }

  // Size of the output that PyTorch would give this window; negative where it fits nowhere.
  int64_t expected_out(bool ceil_mode) const {
    const int64_t room = in + 2 * padding - dilation * (kernel - 1) - 1;
    if (room < 0) return ceil_mode && room > -stride ? 1 : -1;
    int64_t size = (ceil_mode ? ceil_div(room, stride) : room / stride) + 1;
    if (ceil_mode && (size - 1) * stride >= in + padding) --size;
    return size;
  }

  // Whether integers of 32 bits hold all that is computed here.
  bool is_moderate() const {
    constexpr int64_t kMost = int64_t{1} << 30;
    return in + 2 * padding < kMost && out < kMost && kernel < kMost;
  }

  // The same by other integers.
  template <class J>
  WindowOf<J> as() const {
    const auto to = [](I value) { return static_cast<J>(value); };
    // Of a single element the next one is nowhere.
    return {to(in), to(out), to(kernel), to(least(stride, in + padding)), to(padding),
            to(kernel == 1 ? 1 : dilation), adaptive};
  }

 private:
  static RLRP_HD I least(I a, I b) { return a < b ? a : b; }
  static RLRP_HD I ceil_div(I a, I b) { return (a + b - 1) / b; }  // a >= 0, b > 0

  // The i-th of `parts` parts of an axis; they overlap. The products may be long whatever I is.
  static RLRP_HD Span part(I i, int64_t size, int64_t parts) {
    return {static_cast<I>(i * size / parts), static_cast<I>(rlrp::ceil_div((i + 1) * size, parts))};
  }
};

using Span = SpanOf<int64_t>;
using Window = WindowOf<int64_t>;

}  // namespace rlrp
