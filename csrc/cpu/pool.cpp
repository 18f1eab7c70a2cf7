// Pooling, backwards: max pooling sends an output's relevance to its winner, found again from the
// saved input; average pooling spreads it.
#include "core/pooling.h"

#include <algorithm>

#include "simd.h"
#include "tensor.h"

namespace rlrp {
namespace {

constexpr int64_t kPiece = 16384;  // elements that make a task worth its while
constexpr int kLanes = 16;         // channels handled at a time in channels_last

int64_t grain(int64_t elements_per_task) {
  return std::max<int64_t>(1, kPiece / std::max<int64_t>(1, elements_per_task));
}

// Where to add up in the wide type: straight in the result, or in a scratch that is rounded at the end.
template <class T>
class Sums {
 public:
  using A = wide_t<T>;
  static constexpr bool kDirect = sizeof(A) == sizeof(T);

  Sums(T* result, int64_t count) : result_(result), count_(count) {
    if constexpr (kDirect) {
      std::fill_n(result, count, T(0));
    } else {
      scratch_.assign(count, A(0));
    }
  }
  ~Sums() {
    if constexpr (!kDirect) {
      for (int64_t i = 0; i < count_; ++i) result_[i] = narrow<T>(scratch_[i]);
    }
  }
  Sums(const Sums&) = delete;
  Sums& operator=(const Sums&) = delete;

  A* data() {
    if constexpr (kDirect) {
      return result_;
    } else {
      return scratch_.data();
    }
  }

 private:
  T* result_;
  int64_t count_;
  std::vector<A> scratch_;
};

// ---- max, contiguous: one plane (n, c) at a time ----

template <class T>
RLRP_INLINE inline void max_plane(const Pooling& p, const T* x, const T* r, wide_t<T>* sums) {
  using A = wide_t<T>;
  const int64_t step = p.axis[2].step(), width = p.axis[2].in;
  for (int64_t d = 0; d < p.axis[0].out; ++d) {
    const Span ds = p.axis[0].inputs(d);
    for (int64_t h = 0; h < p.axis[1].out; ++h) {
      const Span hs = p.axis[1].inputs(h);
      for (int64_t w = 0; w < p.axis[2].out; ++w) {
        const Span ws = p.axis[2].inputs(w);
        int64_t at = p.in_index(ds.begin, hs.begin, ws.begin);
        A best = widen(x[at]);
        for (int64_t i = ds.begin; i < ds.end; i += p.axis[0].step()) {
          for (int64_t j = hs.begin; j < hs.end; j += p.axis[1].step()) {
            const int64_t row = (i * p.axis[1].in + j) * width;
            for (int64_t k = ws.begin; k < ws.end; k += step) {
              const A value = widen(x[row + k]);
              const bool higher = value > best;
              best = higher ? value : best;
              at = higher ? row + k : at;
            }
          }
        }
        sums[at] += widen(*r++);
      }
    }
  }
}

// 2x2 windows side by side, the common case: every input belongs to one window.
template <class T>
RLRP_INLINE inline void max_plane_2x2(const Pooling& p, const T* x, const T* r, wide_t<T>* sums) {
  using A = wide_t<T>;
  const int64_t width = p.axis[2].in, out = p.axis[2].out;
  for (int64_t h = 0; h < p.axis[1].out; ++h) {
    const T* top = x + 2 * h * width;
    const T* bottom = top + width;
    A* to_top = sums + 2 * h * width;
    A* to_bottom = to_top + width;
    const T* from = r + h * out;
#pragma omp simd
    for (int64_t w = 0; w < out; ++w) {
      const A a = widen(top[2 * w]), b = widen(top[2 * w + 1]);
      const A c = widen(bottom[2 * w]), d = widen(bottom[2 * w + 1]);
      const A value = widen(from[w]);
      const bool right_top = b > a, right_bottom = d > c;
      const bool low = (right_bottom ? d : c) > (right_top ? b : a);
      to_top[2 * w] = !low & !right_top ? value : A(0);
      to_top[2 * w + 1] = !low & right_top ? value : A(0);
      to_bottom[2 * w] = low & !right_bottom ? value : A(0);
      to_bottom[2 * w + 1] = low & right_bottom ? value : A(0);
    }
  }
}

bool tiles_2x2(const Pooling& p) {
  auto two = [](const Window& w) {
    return !w.adaptive && w.kernel == 2 && w.stride == 2 && w.padding == 0 && w.dilation == 1 &&
           2 * w.out <= w.in;
  };
  return p.axis[0].in == 1 && p.axis[0].out == 1 && two(p.axis[1]) && two(p.axis[2]);
}

template <class T>
void max_contiguous(const Pooling& p, const T* x, const T* r, T* result) {
  const int64_t in = p.in_plane(), out = p.out_plane();
  const bool tiled = tiles_2x2(p);
  torch::stable::parallel_for(
      0, p.batch * p.channels, grain(in), [&](int64_t from, int64_t to) {
        for (int64_t plane = from; plane < to; ++plane) {
          Sums<T> sums(result + plane * in, in);
          wide_t<T>* data = sums.data();
          simd::run([&]() RLRP_INLINE {
            if (tiled) {
              max_plane_2x2(p, x + plane * in, r + plane * out, data);
            } else {
              max_plane(p, x + plane * in, r + plane * out, data);
            }
          });
        }
      });
}

// ---- max, channels_last: a band of input rows at a time, all channels ----

// The relevance of one output and `count` channels. Only inputs in rows of the band are written to.
template <class T>
RLRP_INLINE inline void max_pixel(const Pooling& p, const T* x, const T* r, wide_t<T>* sums,
                                  Span ds, Span hs, Span ws, int band_axis, Span band, int count) {
  using A = wide_t<T>;
  const int64_t channels = p.channels;
  A best[kLanes];
  int32_t at[kLanes];
  int32_t position = 0;
  for (int l = 0; l < count; ++l) at[l] = 0;
  for (int64_t i = ds.begin; i < ds.end; i += p.axis[0].step()) {
    for (int64_t j = hs.begin; j < hs.end; j += p.axis[1].step()) {
      for (int64_t k = ws.begin; k < ws.end; k += p.axis[2].step(), ++position) {
        const T* here = x + p.in_index(i, j, k) * channels;
        if (position == 0) {
          for (int l = 0; l < count; ++l) best[l] = widen(here[l]);
          continue;
        }
#pragma omp simd
        for (int l = 0; l < count; ++l) {
          const A value = widen(here[l]);
          const bool higher = value > best[l];
          best[l] = higher ? value : best[l];
          at[l] = higher ? position : at[l];
        }
      }
    }
  }
  position = 0;
  for (int64_t i = ds.begin; i < ds.end; i += p.axis[0].step()) {
    for (int64_t j = hs.begin; j < hs.end; j += p.axis[1].step()) {
      const int64_t row = band_axis == 0 ? i : j;
      const bool inside = row >= band.begin && row < band.end;
      for (int64_t k = ws.begin; k < ws.end; k += p.axis[2].step(), ++position) {
        if (!inside) continue;
        A* here = sums + p.in_index(i, j, k) * channels;
#pragma omp simd
        for (int l = 0; l < count; ++l) here[l] += at[l] == position ? widen(r[l]) : A(0);
      }
    }
  }
}

template <class T>
void max_channels_last(const Pooling& p, const T* x, const T* r, T* result) {
  const int64_t channels = p.channels;
  const int band_axis = p.axis[0].in > 1 ? 0 : 1;
  const int64_t rows = p.axis[band_axis].in;
  const int64_t row_size = p.in_plane() / rows * channels;
  // Windows that straddle two bands are worked out twice, so bands are several windows high.
  const int64_t height = std::max<int64_t>({1, ceil_div(4 * kPiece, row_size),
                                            4 * ceil_div(rows, p.axis[band_axis].out)});
  const int64_t bands = ceil_div(rows, height);
  torch::stable::parallel_for(0, p.batch * bands, 1, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t sample = task / bands, first = task % bands * height;
      const Span band{first, min64(first + height, rows)};
      const T* in = x + sample * p.in_plane() * channels;
      const T* out = r + sample * p.out_plane() * channels;
      Sums<T> sums(result + (sample * rows + first) * row_size, (band.end - first) * row_size);
      wide_t<T>* data = sums.data() - first * row_size;  // addressed by position in the sample
      Span outputs[3] = {{0, p.axis[0].out}, {0, p.axis[1].out}, {0, p.axis[2].out}};
      outputs[band_axis] = {p.axis[band_axis].outputs(band.begin).begin,
                            p.axis[band_axis].outputs(band.end - 1).end};
      simd::run([&]() RLRP_INLINE {
        for (int64_t d = outputs[0].begin; d < outputs[0].end; ++d) {
          const Span ds = p.axis[0].inputs(d);
          for (int64_t h = outputs[1].begin; h < outputs[1].end; ++h) {
            const Span hs = p.axis[1].inputs(h);
            for (int64_t w = 0; w < p.axis[2].out; ++w) {
              const Span ws = p.axis[2].inputs(w);
              const T* value = out + p.out_index(d, h, w) * channels;
              int64_t c = 0;
              for (; c + kLanes <= channels; c += kLanes) {
                max_pixel(p, in + c, value + c, data + c, ds, hs, ws, band_axis, band, kLanes);
              }
              if (c < channels) {
                max_pixel(p, in + c, value + c, data + c, ds, hs, ws, band_axis, band,
                          static_cast<int>(channels - c));
              }
            }
          }
        }
      });
    }
  });
}

Tensor send_to_winners(const char* op, const Pooling& p, const Tensor& x, const Tensor& r) {
  check_like(op, "r", r, "x", x, false);
  const bool last = prefers_channels_last(x);
  Tensor result = new_image(x, sizes_of(x), last);
  if (result.numel() == 0) return result;
  const Tensor in = dense(x, last), out = dense(r, last);
  dispatch(x.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    (last ? max_channels_last<T> : max_contiguous<T>)(
        p, static_cast<const T*>(in.const_data_ptr()), static_cast<const T*>(out.const_data_ptr()),
        static_cast<T*>(result.mutable_data_ptr()));
  });
  return result;
}

Tensor max_pool(const Tensor& x, const Tensor& r, const Ints& kernel, const Ints& stride,
                const Ints& padding, const Ints& dilation, bool ceil_mode) {
  const Pooling p = check_pooling("max_pool", sizes_of(x), r, kernel, stride, padding, dilation,
                                  ceil_mode);
  return send_to_winners("max_pool", p, x, r);
}

Tensor adaptive_max_pool(const Tensor& x, const Tensor& r) {
  return send_to_winners("adaptive_max_pool", check_adaptive("adaptive_max_pool", sizes_of(x), r), x,
                         r);
}

// ---- average: every input gathers from the outputs that saw it ----

// Along one axis: the outputs that see an input, and what an output is multiplied by.
template <class A>
struct Tables {
  std::vector<Span> outputs;
  std::vector<A> weight;

  Tables(const Window& window, const AverageRule& rule) {
    outputs.reserve(window.in);
    for (int64_t i = 0; i < window.in; ++i) outputs.push_back(window.outputs(i));
    weight.reserve(window.out);
    for (int64_t o = 0; o < window.out; ++o) weight.push_back(A(1) / A(rule.count(window, o)));
  }
};

// Contiguous: the output rows that an input row belongs to are added up, then spread along the row.
template <class T>
void average_contiguous(const Pooling& p, const AverageRule& rule, const T* r, T* result) {
  using A = wide_t<T>;
  const Tables<A> table[3] = {{p.axis[0], rule}, {p.axis[1], rule}, {p.axis[2], rule}};
  const A scale = rule.divisor == 0 ? A(1) : A(1) / A(rule.divisor);
  const int64_t lines = p.axis[0].in * p.axis[1].in, width = p.axis[2].in, out = p.axis[2].out;
  bool apart = true;  // no two outputs share an input
  std::vector<int32_t> source(width);
  for (int64_t w = 0; w < width; ++w) {
    const Span span = table[2].outputs[w];
    apart = apart && span.end - span.begin <= 1;
    source[w] = static_cast<int32_t>(span.begin < span.end ? span.begin : out);
  }
  torch::stable::parallel_for(
      0, p.batch * p.channels * lines, grain(width), [&](int64_t from, int64_t to) {
        std::vector<A> row(out + 1);  // the last one stays 0, for inputs that no output saw
        simd::run([&]() RLRP_INLINE {
          A* sum = row.data();
          const A* weight = table[2].weight.data();
          const int32_t* at = source.data();
          for (int64_t line = from; line < to; ++line) {
            const T* plane = r + line / lines * p.out_plane();
            const Span ds = table[0].outputs[line % lines / p.axis[1].in];
            const Span hs = table[1].outputs[line % p.axis[1].in];
            std::fill_n(sum, out, A(0));
            for (int64_t i = ds.begin; i < ds.end; ++i) {
              for (int64_t j = hs.begin; j < hs.end; ++j) {
                const A outer = scale * table[0].weight[i] * table[1].weight[j];
                const T* value = plane + p.out_index(i, j, 0);
#pragma omp simd
                for (int64_t k = 0; k < out; ++k) sum[k] += outer * weight[k] * widen(value[k]);
              }
            }
            T* to_line = result + line * width;
            if (apart) {
#pragma omp simd
              for (int64_t w = 0; w < width; ++w) to_line[w] = narrow<T>(sum[at[w]]);
            } else {
              for (int64_t w = 0; w < width; ++w) {
                const Span span = table[2].outputs[w];
                A total = 0;
                for (int64_t k = span.begin; k < span.end; ++k) total += sum[k];
                to_line[w] = narrow<T>(total);
              }
            }
          }
        });
      });
}

// channels_last: pixel by pixel, all channels.
template <class T>
void average_channels_last(const Pooling& p, const AverageRule& rule, const T* r, T* result) {
  using A = wide_t<T>;
  const Tables<A> table[3] = {{p.axis[0], rule}, {p.axis[1], rule}, {p.axis[2], rule}};
  const A scale = rule.divisor == 0 ? A(1) : A(1) / A(rule.divisor);
  const int64_t channels = p.channels;
  const int64_t lines = p.axis[0].in * p.axis[1].in, width = p.axis[2].in;
  torch::stable::parallel_for(
      0, p.batch * lines, grain(width * channels), [&](int64_t from, int64_t to) {
        simd::run([&]() RLRP_INLINE {
          for (int64_t line = from; line < to; ++line) {
            const T* sample = r + line / lines * p.out_plane() * channels;
            const Span ds = table[0].outputs[line % lines / p.axis[1].in];
            const Span hs = table[1].outputs[line % p.axis[1].in];
            for (int64_t w = 0; w < width; ++w) {
              const Span ws = table[2].outputs[w];
              T* pixel = result + (line * width + w) * channels;
              if (ds.end - ds.begin == 1 && hs.end - hs.begin == 1 && ws.end - ws.begin == 1) {
                const A weight = scale * table[0].weight[ds.begin] * table[1].weight[hs.begin] *
                                 table[2].weight[ws.begin];
                const T* value = sample + p.out_index(ds.begin, hs.begin, ws.begin) * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) pixel[c] = narrow<T>(weight * widen(value[c]));
                continue;
              }
              for (int64_t c = 0; c < channels; c += kLanes) {
                const int count = static_cast<int>(min64(kLanes, channels - c));
                A sum[kLanes] = {};
                for (int64_t i = ds.begin; i < ds.end; ++i) {
                  for (int64_t j = hs.begin; j < hs.end; ++j) {
                    const A outer = scale * table[0].weight[i] * table[1].weight[j];
                    for (int64_t k = ws.begin; k < ws.end; ++k) {
                      const A weight = outer * table[2].weight[k];
                      const T* value = sample + p.out_index(i, j, k) * channels + c;
                      if (count == kLanes) {
#pragma omp simd
                        for (int l = 0; l < kLanes; ++l) sum[l] += weight * widen(value[l]);
                      } else {
                        for (int l = 0; l < count; ++l) sum[l] += weight * widen(value[l]);
                      }
                    }
                  }
                }
                for (int l = 0; l < count; ++l) pixel[c + l] = narrow<T>(sum[l]);
              }
            }
          }
        });
      });
}

Tensor spread(const char* op, const Pooling& p, const AverageRule& rule, const Tensor& r,
              const Ints& shape) {
  const bool last = prefers_channels_last(r);
  Tensor result = new_image(r, shape, last);
  if (result.numel() == 0) return result;
  const Tensor out = dense(r, last);
  dispatch(r.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    (last ? average_channels_last<T> : average_contiguous<T>)(
        p, rule, static_cast<const T*>(out.const_data_ptr()),
        static_cast<T*>(result.mutable_data_ptr()));
  });
  return result;
}

Tensor avg_pool(const Tensor& r, const Ints& input_shape, const Ints& kernel, const Ints& stride,
                const Ints& padding, bool ceil_mode, bool count_include_pad,
                std::optional<int64_t> divisor_override) {
  const AverageRule rule = check_average("avg_pool", count_include_pad, divisor_override);
  const Pooling p = check_pooling("avg_pool", input_shape, r, kernel, stride, padding,
                                  Ints(kernel.size(), 1), ceil_mode);
  return spread("avg_pool", p, rule, r, input_shape);
}

Tensor adaptive_avg_pool(const Tensor& r, const Ints& input_shape) {
  const Pooling p = check_adaptive("adaptive_avg_pool", input_shape, r);
  return spread("adaptive_avg_pool", p, {}, r, input_shape);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) {
  m.impl("max_pool", TORCH_BOX(&max_pool));
  m.impl("adaptive_max_pool", TORCH_BOX(&adaptive_max_pool));
  m.impl("avg_pool", TORCH_BOX(&avg_pool));
  m.impl("adaptive_avg_pool", TORCH_BOX(&adaptive_avg_pool));
}

}  // namespace rlrp
