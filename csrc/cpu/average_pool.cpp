// Average pooling, backwards: every input gathers from the outputs that saw it.
#include "pooling.h"

#include <algorithm>

#include "simd.h"

namespace rlrp {
namespace {

constexpr int64_t kPiece = 16384;  // elements that make a task worth its while
constexpr int kLanes = 16;         // channels handled at a time in channels_last

int64_t grain(int64_t elements_per_task) {
  return std::max<int64_t>(1, kPiece / std::max<int64_t>(1, elements_per_task));
}

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

struct Cpu {
  template <class T>
  static void spread(const Tensor& result, const Pooling& p, const AverageRule& rule,
                     bool channels_last, const T* r) {
    const auto run = channels_last ? average_channels_last<T> : average_contiguous<T>;
    run(p, rule, r, result_of<T>(result));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) {
  m.impl("avg_pool", TORCH_BOX(&AveragePooling<Cpu>::windows));
  m.impl("adaptive_avg_pool", TORCH_BOX(&AveragePooling<Cpu>::adaptive));
}

}  // namespace rlrp
