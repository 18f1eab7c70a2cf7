// Max pooling. Forwards the inputs of a window race, and the number of the winner is kept: in a byte where
// windows are small. Backwards each input collects the relevance of the windows it won.
//
// In channels_last images loops run over the channels of a pixel, which lie next to each other. In contiguous
// ones, where neighbours are a stride apart, one output follows the other.
#include "pooling.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "simd.h"

namespace rlrp {
namespace {

constexpr int64_t kLanes = 256;    // races at a time: what they remember stays in the L1 cache
constexpr int64_t kGrain = 65536;  // elements that make a task worth its while

template <class T>
using position_t = std::conditional_t<sizeof(wide_t<T>) == 8, int64_t, int32_t>;

// first ? a : b. The choice is made in bits: of a conditional the compiler makes branches.
template <class A>
RLRP_INLINE inline A choose(bool first, A a, A b) {
  using Bits = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  const Bits mask = -static_cast<Bits>(first);
  return std::bit_cast<A>((std::bit_cast<Bits>(a) & mask) | (std::bit_cast<Bits>(b) & ~mask));
}

template <class A>
RLRP_INLINE inline A if_won(bool won, A r) {
  return choose(won, r, A(0));
}

// Calls f with `value` as a constant if it is one of those listed, else with 0.
template <int... kListed, class F>
RLRP_INLINE inline void with_constant(int64_t value, const F& f) {
  const bool found = ((value == kListed && (f(std::integral_constant<int, kListed>{}), true)) || ...);
  if (!found) f(std::integral_constant<int, 0>{});
}

// An output that sees an input, and the input's number in its window.
struct Sight {
  int64_t output, number;
};

// Those of every input along an axis, worked out once: the divisions would be felt at every pixel.
std::vector<std::vector<Sight>> sights_of(const Window& window) {
  std::vector<std::vector<Sight>> all(window.in);
  for (int64_t i = 0; i < window.in; ++i) {
    const Span span = window.outputs(i);
    for (int64_t o = span.begin; o < span.end; ++o) {
      if (window.sees(o, i)) all[i].push_back({o, window.number(o, i)});
    }
  }
  return all;
}

// Inputs a stride apart that have the same numbers in their windows; each one's outputs come right behind
// those of the one before.
struct Stretch {
  int64_t first, step, length;
  std::vector<Sight> sights;  // of the first
};

// All inputs along an axis, in as few stretches as there are.
std::vector<Stretch> stretches_of(const Window& window) {
  const std::vector<std::vector<Sight>> sights = sights_of(window);
  const int64_t step = window.adaptive ? 1 : window.stride;
  const auto continues = [&](const Stretch& stretch, int64_t i) {
    return std::equal(sights[i].begin(), sights[i].end(), stretch.sights.begin(), stretch.sights.end(),
                      [&](const Sight& a, const Sight& b) {
                        return a.number == b.number && a.output == b.output + stretch.length;
                      });
  };
  std::vector<Stretch> all;
  for (int64_t phase = 0; phase < min64(step, window.in); ++phase) {
    all.push_back({phase, step, 1, sights[phase]});
    for (int64_t i = phase + step; i < window.in; i += step) {
      if (continues(all.back(), i)) {
        ++all.back().length;
      } else {
        all.push_back({i, step, 1, sights[i]});
      }
    }
  }
  return all;
}

// A row of pixels at a time, the lanes of a pixel side by side.
template <class T, class N>
class Pixels {
 public:
  using A = wide_t<T>;
  using P = position_t<T>;

  explicit Pixels(const Pooling& pooling)
      : p(pooling),
        lanes(p.channels),
        width(p.axis[2].most_inputs()),
        height(p.axis[1].most_inputs()),
        whole(p.axis[2].whole()),
        sights{sights_of(p.axis[0]), sights_of(p.axis[1])},
        stretches(stretches_of(p.axis[2])),
        values(max64(p.most_inputs(), p.most_outputs())),
        winners(values.size()),
        number(values.size()) {}

  // The outputs of row (d, h).
  RLRP_INLINE void race(const T* x, T* y, N* won, int64_t d, int64_t h) {
    const Span ds = p.axis[0].inputs(d), hs = p.axis[1].inputs(h);
    const int64_t most = p.most_inputs();
    int64_t length = 1;
    for (int64_t w = 0; w < p.axis[2].out; w += length, y += length * lanes, won += length * lanes) {
      length = whole.has(w) ? whole.end - w : 1;
      const Span ws = p.axis[2].inputs(w);
      int64_t count = 0, a = 0;
      for (int64_t i = ds.begin; i < ds.end; i += p.axis[0].step(), ++a) {
        int64_t b = 0;
        for (int64_t j = hs.begin; j < hs.end; j += p.axis[1].step(), ++b) {
          int64_t c = 0;
          for (int64_t k = ws.begin; k < ws.end; k += p.axis[2].step(), ++c, ++count) {
            values[count] = x + p.in_index(i, j, k) * lanes;
            number[count] = static_cast<P>(number_of(a, b, c));
          }
        }
      }
      // Without padding the entrants' numbers are 0, 1, ...
      with_constant<4, 9>(count == most ? count : 0, [&](auto known) RLRP_INLINE {
        if constexpr (known > 0) {
          race_of<known>(y, won, length);
        } else {
          race_of(count, y, won, length);
        }
      });
    }
  }

  // The inputs of row (d, h).
  RLRP_INLINE void collect(const T* r, const N* won, T* result, int64_t d, int64_t h) {
    for (const Stretch& stretch : stretches) {
      int64_t count = 0;
      for (const Sight& i : sights[0][d]) {
        for (const Sight& j : sights[1][h]) {
          for (const Sight& k : stretch.sights) {
            const int64_t at = p.out_index(i.output, j.output, k.output) * lanes;
            values[count] = r + at;
            winners[count] = won + at;
            number[count++] = static_cast<P>(number_of(i.number, j.number, k.number));
          }
        }
      }
      T* first = result + stretch.first * lanes;
      const int64_t step = stretch.step * lanes;
      with_constant<1, 2, 4>(count, [&](auto known) RLRP_INLINE {
        if constexpr (known > 0) {
          collect_of<known>(first, stretch.length, step);
        } else {
          collect_of(count, first, stretch.length, step);
        }
      });
    }
  }

 private:
  const Pooling& p;
  const int64_t lanes;
  const int64_t width, height;  // of a window
  const Span whole;             // the outputs of a row that see no padding
  const std::vector<std::vector<Sight>> sights[2];
  const std::vector<Stretch> stretches;
  std::vector<const T*> values;    // what races, or what may be collected
  std::vector<const N*> winners;   // of the windows it comes from
  std::vector<P> number;           // in its window
  A best[kLanes];
  P at[kLanes];

  // Pooling::number, without its divisions.
  RLRP_INLINE int64_t number_of(int64_t a, int64_t b, int64_t c) const {
    return (a * height + b) * width + c;
  }

  // Outputs next to each other, as many as `length`.
  template <int kCount>
  RLRP_INLINE void race_of(T* y, N* won, int64_t length) {
    const T* x[kCount];
    std::copy_n(values.data(), kCount, x);
    const int64_t step = p.axis[2].stride * lanes;
    for (int64_t n = 0; n < length; ++n, y += lanes, won += lanes) {
      for (int64_t first = 0; first < lanes; first += kLanes) {
        const int64_t size = min64(kLanes, lanes - first), from = n * step + first;
#pragma omp simd
        for (int64_t l = 0; l < size; ++l) {
          A highest = widen(x[0][from + l]);
          P winner = 0;
#pragma GCC unroll 16
          for (int t = 1; t < kCount; ++t) {
            const A here = widen(x[t][from + l]);
            const bool higher = beats(here, highest);
            highest = higher ? here : highest;
            winner = higher ? P(t) : winner;
          }
          y[first + l] = narrow<T>(highest);
          at[l] = winner;
        }
        // Apart, or the compiler would race in vectors of bytes.
#pragma omp simd
        for (int64_t l = 0; l < size; ++l) won[first + l] = static_cast<N>(at[l]);
      }
    }
  }

  RLRP_INLINE void race_of(int64_t count, T* y, N* won, int64_t length) {
    const int64_t step = p.axis[2].stride * lanes;
    for (int64_t n = 0; n < length; ++n, y += lanes, won += lanes) {
      for (int64_t first = 0; first < lanes; first += kLanes) {
        const int64_t size = min64(kLanes, lanes - first);
        std::fill_n(best, size, A(-INFINITY));
        std::fill_n(at, size, P(0));
        for (int64_t t = 0; t < count; ++t) {
          const T* x = values[t] + n * step + first;
          const P index = number[t];
#pragma omp simd
          for (int64_t l = 0; l < size; ++l) {
            const A here = widen(x[l]);
            const bool higher = beats(here, best[l]);
            best[l] = higher ? here : best[l];
            at[l] = higher ? index : at[l];
          }
        }
#pragma omp simd
        for (int64_t l = 0; l < size; ++l) {
          y[first + l] = narrow<T>(best[l]);
          won[first + l] = static_cast<N>(at[l]);
        }
      }
    }
  }

  // Inputs `step` apart, as many as `length`.
  template <int kCount>
  RLRP_INLINE void collect_of(T* result, int64_t length, int64_t step) {
    const T* r[kCount];
    const N* won[kCount];
    P index[kCount];
    std::copy_n(values.data(), kCount, r);
    std::copy_n(winners.data(), kCount, won);
    std::copy_n(number.data(), kCount, index);
    for (int64_t n = 0; n < length; ++n, result += step) {
      const int64_t from = n * lanes;
#pragma omp simd
      for (int64_t l = 0; l < lanes; ++l) {
        A sum = if_won(static_cast<P>(won[0][from + l]) == index[0], widen(r[0][from + l]));
#pragma GCC unroll 16
        for (int t = 1; t < kCount; ++t) {
          sum += if_won(static_cast<P>(won[t][from + l]) == index[t], widen(r[t][from + l]));
        }
        result[l] = narrow<T>(sum);
      }
    }
  }

  RLRP_INLINE void collect_of(int64_t count, T* result, int64_t length, int64_t step) {
    for (int64_t n = 0; n < length; ++n, result += step) {
      for (int64_t first = 0; first < lanes; first += kLanes) {
        const int64_t size = min64(kLanes, lanes - first), from = n * lanes + first;
        std::fill_n(best, size, A(0));
        for (int64_t t = 0; t < count; ++t) {
          const T* r = values[t] + from;
          const N* won = winners[t] + from;
          const P index = number[t];
#pragma omp simd
          for (int64_t l = 0; l < size; ++l) {
            best[l] += if_won(static_cast<P>(won[l]) == index, widen(r[l]));
          }
        }
#pragma omp simd
        for (int64_t l = 0; l < size; ++l) result[first + l] = narrow<T>(best[l]);
      }
    }
  }
};

// A contiguous plane at a time, one output after the other.
template <class T, class N>
class Planes {
 public:
  using A = wide_t<T>;

  explicit Planes(const Pooling& pooling)
      : p(pooling),
        whole{p.axis[0].whole(), p.axis[1].whole(), p.axis[2].whole()},
        first{firsts_of(p.axis[0]), firsts_of(p.axis[1]), firsts_of(p.axis[2])},
        offsets(p.most_inputs()) {
    int64_t number = 0;
    for (int64_t a = 0; a < p.axis[0].most_inputs(); ++a) {
      for (int64_t b = 0; b < p.axis[1].most_inputs(); ++b) {
        for (int64_t c = 0; c < p.axis[2].most_inputs(); ++c) {
          offsets[number++] =
              p.in_index(a * p.axis[0].step(), b * p.axis[1].step(), c * p.axis[2].step());
        }
      }
    }
  }

  RLRP_INLINE void race(const T* x, T* y, N* won) {
    with_constant<2, 3, 4, 9>(p.most_inputs(), [&](auto known) RLRP_INLINE {
      const int64_t* offset = offsets.data();
      const int64_t count = known > 0 ? int64_t{known} : p.most_inputs();
      for (int64_t d = 0; d < p.axis[0].out; ++d) {
        for (int64_t h = 0; h < p.axis[1].out; ++h) {
          const bool inside = whole[0].has(d) && whole[1].has(h);
          const Span inner = inside ? whole[2] : Span{0, 0};
          const T* window = x + p.in_index(first[0][d], first[1][h], 0);
          int64_t w = 0;
          const auto border = [&]() RLRP_INLINE {
            const Winner<T, 1> found = winner(p, x, 1, d, h, w);
            *y++ = found.value.at[0];
            *won++ = static_cast<N>(found.number[0]);
          };
          for (; w < inner.begin; ++w) border();
          for (; w < inner.end; ++w) {
            const T* element = window + first[2][w];
            A highest = widen(element[0]);
            int64_t number = 0;
#pragma GCC unroll 16
            for (int64_t t = 1; t < count; ++t) {
              const A here = widen(element[offset[t]]);
              const bool higher = beats(here, highest);
              highest = choose(higher, here, highest);
              number = choose(higher, t, number);
            }
            *y++ = narrow<T>(highest);
            *won++ = static_cast<N>(number);
          }
          for (; w < p.axis[2].out; ++w) border();
        }
      }
    });
  }

  RLRP_INLINE void collect(const T* r, const N* won, T* result) {
    A* sum = target(result);
    std::fill_n(sum, p.in_plane(), A(0));
    const uint64_t count = offsets.size(), size = p.in_plane();
    for (int64_t d = 0; d < p.axis[0].out; ++d) {
      for (int64_t h = 0; h < p.axis[1].out; ++h) {
        const int64_t row = p.in_index(first[0][d], first[1][h], 0);
        for (int64_t w = 0; w < p.axis[2].out; ++w, ++r, ++won) {
          const uint64_t number = static_cast<uint64_t>(*won);
          if (number >= count) continue;  // no winner of this pooling, as any tensor may be given
          const uint64_t at = row + first[2][w] + offsets[number];
          if (at < size) sum[at] += widen(*r);
        }
      }
    }
    if constexpr (!std::is_same_v<A, T>) {
      std::transform(sum, sum + p.in_plane(), result, [](A value) RLRP_INLINE { return narrow<T>(value); });
    }
  }

 private:
  const Pooling& p;
  const Span whole[3];                  // the outputs that see no padding
  const std::vector<int64_t> first[3];  // the first input of every output that is no padding
  std::vector<int64_t> offsets;         // of a window's elements from its first, by their number
  std::vector<A> sums;                  // of a plane, where T is too narrow for them

  static std::vector<int64_t> firsts_of(const Window& window) {
    std::vector<int64_t> all(window.out);
    for (int64_t o = 0; o < window.out; ++o) all[o] = window.inputs(o).begin;
    return all;
  }

  RLRP_INLINE A* target(T* result) {
    if constexpr (std::is_same_v<A, T>) {
      return result;
    } else {
      sums.resize(p.in_plane());
      return sums.data();
    }
  }
};

// Calls f(worker, k) for every k below `tasks`; each treats so many elements.
template <class Worker, class F>
void each(const Pooling& p, int64_t tasks, int64_t elements, const F& f) {
  torch::stable::parallel_for(0, tasks, ceil_div(kGrain, elements), [&](int64_t first, int64_t last) {
    Worker worker(p);
    simd::run([&]() RLRP_INLINE {
      for (int64_t k = first; k < last; ++k) f(worker, k);
    });
  });
}

struct Cpu {
  template <class T, class N>
  static void race(const Tensor& y, const Tensor& winners, const Pooling& p, bool channels_last,
                   const T* x) {
    T* maxima = result_of<T>(y);
    N* won = result_of<N>(winners);
    const int64_t in = p.in_plane(), out = p.out_plane();
    if (!channels_last) {
      each<Planes<T, N>>(p, p.batch * p.channels, out * p.most_inputs(),
                         [&](Planes<T, N>& worker, int64_t k) RLRP_INLINE {
                           worker.race(x + k * in, maxima + k * out, won + k * out);
                         });
      return;
    }
    const int64_t height = p.axis[1].out, rows = p.axis[0].out * height, row = out / rows * p.channels;
    each<Pixels<T, N>>(p, p.batch * rows, row * p.most_inputs(),
                       [&](Pixels<T, N>& worker, int64_t k) RLRP_INLINE {
                         const T* image = x + k / rows * in * p.channels;
                         worker.race(image, maxima + k * row, won + k * row, k % rows / height, k % height);
                       });
  }

  template <class T, class N>
  static void collect(const Tensor& result, const Pooling& p, bool channels_last, const N* winners,
                      const T* r) {
    T* relevance = result_of<T>(result);
    const int64_t in = p.in_plane(), out = p.out_plane();
    if (!channels_last) {
      each<Planes<T, N>>(p, p.batch * p.channels, in + out,
                         [&](Planes<T, N>& worker, int64_t k) RLRP_INLINE {
                           worker.collect(r + k * out, winners + k * out, relevance + k * in);
                         });
      return;
    }
    const int64_t height = p.axis[1].in, rows = p.axis[0].in * height, row = in / rows * p.channels;
    each<Pixels<T, N>>(p, p.batch * rows, row * p.most_outputs(),
                       [&](Pixels<T, N>& worker, int64_t k) RLRP_INLINE {
                         const int64_t image = k / rows * out * p.channels;
                         worker.collect(r + image, winners + image, relevance + k * row,
                                        k % rows / height, k % height);
                       });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) {
  m.impl("max_pool", TORCH_BOX(&MaxPooling<Cpu>::windows));
  m.impl("max_unpool", TORCH_BOX(&MaxPooling<Cpu>::unpool));
  m.impl("adaptive_max_pool", TORCH_BOX(&MaxPooling<Cpu>::adaptive));
  m.impl("adaptive_max_unpool", TORCH_BOX(&MaxPooling<Cpu>::adaptive_unpool));
}

}  // namespace rlrp
