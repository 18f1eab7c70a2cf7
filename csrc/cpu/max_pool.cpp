// Max pooling. Forwards the inputs of a window race, and the number of the winner is kept: in a byte where
// windows are small. Backwards each input collects the relevance of the windows it won.
//
// Loops run over lanes that lie next to each other: the channels of a pixel in channels_last images, the
// outputs of a row in contiguous ones.
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

// won ? r : 0. The choice is made in bits: of a conditional the compiler makes branches.
template <class A>
RLRP_INLINE inline A if_won(bool won, A r) {
  using Bits = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  return std::bit_cast<A>(std::bit_cast<Bits>(r) & -static_cast<Bits>(won));
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
        sights{sights_of(p.axis[0]), sights_of(p.axis[1]), sights_of(p.axis[2])},
        values(max64(p.most_inputs(), p.most_outputs())),
        winners(values.size()),
        number(values.size()) {}

  static int64_t images(const Pooling& p) { return p.batch; }

  // The outputs of row (d, h).
  RLRP_INLINE void race(const T* x, T* y, N* won, int64_t d, int64_t h) {
    const Span ds = p.axis[0].inputs(d), hs = p.axis[1].inputs(h);
    const int64_t most = p.most_inputs();
    for (int64_t w = 0; w < p.axis[2].out; ++w, y += lanes, won += lanes) {
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
          race_of<known>(y, won);
        } else {
          race_of(count, y, won);
        }
      });
    }
  }

  // The inputs of row (d, h).
  RLRP_INLINE void collect(const T* r, const N* won, T* result, int64_t d, int64_t h) {
    for (int64_t w = 0; w < p.axis[2].in; ++w, result += lanes) {
      int64_t count = 0;
      for (const Sight& i : sights[0][d]) {
        for (const Sight& j : sights[1][h]) {
          for (const Sight& k : sights[2][w]) {
            const int64_t at = p.out_index(i.output, j.output, k.output) * lanes;
            values[count] = r + at;
            winners[count] = won + at;
            number[count++] = static_cast<P>(number_of(i.number, j.number, k.number));
          }
        }
      }
      with_constant<1, 2, 4>(count, [&](auto known) RLRP_INLINE {
        if constexpr (known > 0) {
          collect_of<known>(result);
        } else {
          collect_of(count, result);
        }
      });
    }
  }

 private:
  const Pooling& p;
  const int64_t lanes;
  const int64_t width, height;  // of a window
  const std::vector<std::vector<Sight>> sights[3];
  std::vector<const T*> values;    // what races, or what may be collected
  std::vector<const N*> winners;   // of the windows it comes from
  std::vector<P> number;           // in its window
  A best[kLanes];
  P at[kLanes];

  // Pooling::number, without its divisions.
  RLRP_INLINE int64_t number_of(int64_t a, int64_t b, int64_t c) const {
    return (a * height + b) * width + c;
  }

  template <int kCount>
  RLRP_INLINE void race_of(T* y, N* won) {
    const T* x[kCount];
    std::copy_n(values.data(), kCount, x);
#pragma omp simd
    for (int64_t l = 0; l < lanes; ++l) {
      A highest = widen(x[0][l]);
      P winner = 0;
#pragma GCC unroll 16
      for (int t = 1; t < kCount; ++t) {
        const A here = widen(x[t][l]);
        const bool higher = beats(here, highest);
        highest = higher ? here : highest;
        winner = higher ? P(t) : winner;
      }
      y[l] = narrow<T>(highest);
      won[l] = static_cast<N>(winner);
    }
  }

  RLRP_INLINE void race_of(int64_t count, T* y, N* won) {
    for (int64_t first = 0; first < lanes; first += kLanes) {
      const int64_t size = min64(kLanes, lanes - first);
      std::fill_n(best, size, A(-INFINITY));
      std::fill_n(at, size, P(0));
      for (int64_t t = 0; t < count; ++t) {
        const T* x = values[t] + first;
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

  template <int kCount>
  RLRP_INLINE void collect_of(T* result) {
    const T* r[kCount];
    const N* won[kCount];
    P index[kCount];
    std::copy_n(values.data(), kCount, r);
    std::copy_n(winners.data(), kCount, won);
    std::copy_n(number.data(), kCount, index);
#pragma omp simd
    for (int64_t l = 0; l < lanes; ++l) {
      A sum = if_won(static_cast<P>(won[0][l]) == index[0], widen(r[0][l]));
#pragma GCC unroll 16
      for (int t = 1; t < kCount; ++t) {
        sum += if_won(static_cast<P>(won[t][l]) == index[t], widen(r[t][l]));
      }
      result[l] = narrow<T>(sum);
    }
  }

  RLRP_INLINE void collect_of(int64_t count, T* result) {
    for (int64_t first = 0; first < lanes; first += kLanes) {
      const int64_t size = min64(kLanes, lanes - first);
      std::fill_n(best, size, A(0));
      for (int64_t t = 0; t < count; ++t) {
        const T* r = values[t] + first;
        const N* won = winners[t] + first;
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
};

// A row of a contiguous plane at a time, its outputs side by side, `kStride` apart at the input; 0 where
// that is no small constant, and outputs are treated one by one.
template <class T, class N, int kStride>
class Rows {
 public:
  using A = wide_t<T>;
  using P = position_t<T>;

  explicit Rows(const Pooling& pooling)
      : p(pooling),
        along(p.axis[2]),
        inner(kStride == 0 ? Span{0, 0} : along.whole()),
        padding(kStride == 0 ? 0 : along.padding),
        pitch(ceil_div(along.in + padding, kPhases)),
        best(along.out),
        at(along.out),
        sums(kPhases * pitch) {}

  static int64_t images(const Pooling& p) { return p.batch * p.channels; }

  RLRP_INLINE void race(const T* x, T* y, N* won, int64_t d, int64_t h) {
    const Span ds = p.axis[0].inputs(d), hs = p.axis[1].inputs(h);
    if (inner.begin < inner.end) {
      A* highest = best.data();
      P* winner = at.data();
      std::fill_n(highest, along.out, A(-INFINITY));
      std::fill_n(winner, along.out, P(0));
      int64_t a = 0;
      for (int64_t i = ds.begin; i < ds.end; i += p.axis[0].step(), ++a) {
        int64_t b = 0;
        for (int64_t j = hs.begin; j < hs.end; j += p.axis[1].step(), ++b) {
          for (int64_t k = 0; k < along.kernel; ++k) {
            const T* value = x + p.in_index(i, j, inner.begin * kStride - padding + k * along.dilation);
            const P index = static_cast<P>(p.number(a, b, k));
            A* high = highest + inner.begin;
            P* which = winner + inner.begin;
#pragma omp simd
            for (int64_t o = 0; o < inner.end - inner.begin; ++o) {
              const A here = widen(value[o * kStride]);
              const bool higher = beats(here, high[o]);
              high[o] = higher ? here : high[o];
              which[o] = higher ? index : which[o];
            }
          }
        }
      }
#pragma omp simd
      for (int64_t o = inner.begin; o < inner.end; ++o) {
        y[o] = narrow<T>(highest[o]);
        won[o] = static_cast<N>(winner[o]);
      }
    }
    each_border([&](int64_t o) RLRP_INLINE {
      const Winner<T> found = winner(p, x, 1, d, h, o);
      y[o] = found.value;
      won[o] = static_cast<N>(found.number);
    });
  }

  // Relevance is collected with inputs `kStride` apart next to each other, and sorted on its way out.
  RLRP_INLINE void collect(const T* r, const N* won, T* result, int64_t d, int64_t h) {
    const Span ds = p.axis[0].outputs(d), hs = p.axis[1].outputs(h);
    A* sum = sums.data();
    std::fill_n(sum, kPhases * pitch, A(0));
    for (int64_t i = ds.begin; i < ds.end; ++i) {
      if (!p.axis[0].sees(i, d)) continue;
      for (int64_t j = hs.begin; j < hs.end; ++j) {
        if (!p.axis[1].sees(j, h)) continue;
        const int64_t plane = p.number(p.axis[0].number(i, d), p.axis[1].number(j, h), 0);
        const T* row = r + p.out_index(i, j, 0);
        const N* winner = won + p.out_index(i, j, 0);
        if (inner.begin < inner.end) {
          for (int64_t k = 0; k < along.kernel; ++k) {
            A* to = sum + place(inner.begin * kPhases + k * along.dilation);
            const T* from = row + inner.begin;
            const N* which = winner + inner.begin;
            const P index = static_cast<P>(plane + k);
#pragma omp simd
            for (int64_t o = 0; o < inner.end - inner.begin; ++o) {
              to[o] += if_won(static_cast<P>(which[o]) == index, widen(from[o]));
            }
          }
        }
        each_border([&](int64_t o) RLRP_INLINE {
          const Span ks = along.inputs(o);
          int64_t index = plane;
          for (int64_t k = ks.begin; k < ks.end; k += along.step(), ++index) {
            if (static_cast<int64_t>(winner[o]) == index) sum[place(k + padding)] += widen(row[o]);
          }
        });
      }
    }
    const A* phase[kPhases];
    for (int f = 0; f < kPhases; ++f) phase[f] = sum + place(f + padding);
    const int64_t whole = along.in / kPhases;
#pragma omp simd
    for (int64_t k = 0; k < whole; ++k) {
#pragma GCC unroll 4
      for (int f = 0; f < kPhases; ++f) result[k * kPhases + f] = narrow<T>(phase[f][k]);
    }
    for (int64_t k = whole * kPhases; k < along.in; ++k) {
      result[k] = narrow<T>(phase[k % kPhases][whole]);
    }
  }

 private:
  static constexpr int kPhases = kStride == 0 ? 1 : kStride;

  const Pooling& p;
  const Window& along;
  const Span inner;       // the outputs that see no padding
  const int64_t padding;  // that is kept in `sums`
  const int64_t pitch;    // inputs k, k + kPhases, ... are neighbours there; the phases lie `pitch` apart
  std::vector<A> best;
  std::vector<P> at;
  std::vector<A> sums;

  RLRP_INLINE static int64_t place_of(int64_t k, int64_t pitch) {
    return k % kPhases * pitch + k / kPhases;
  }
  // Where input k, counted from the first padding, lies in `sums`.
  RLRP_INLINE int64_t place(int64_t k) const { return place_of(k, pitch); }

  template <class F>
  RLRP_INLINE void each_border(const F& f) const {
    for (int64_t o = 0; o < inner.begin; ++o) f(o);
    for (int64_t o = inner.end; o < along.out; ++o) f(o);
  }
};

// Calls f(worker, image, d, h) for every row of an image's outputs or inputs.
template <class Worker, class F>
void each_row(const Pooling& p, int64_t depth, int64_t height, int64_t row_elements, const F& f) {
  const int64_t rows = depth * height;
  torch::stable::parallel_for(
      0, Worker::images(p) * rows, ceil_div(kGrain, row_elements), [&](int64_t first, int64_t last) {
        Worker worker(p);
        simd::run([&]() RLRP_INLINE {
          for (int64_t k = first; k < last; ++k) {
            f(worker, k / rows, k % rows / height, k % height);
          }
        });
      });
}

template <class Worker, class T, class N>
void race(const Pooling& p, int64_t lanes, const T* x, T* y, N* winners) {
  const int64_t in = p.in_plane() * lanes, out = p.out_plane() * lanes;
  const int64_t elements = out / (p.axis[0].out * p.axis[1].out) * p.most_inputs();
  each_row<Worker>(p, p.axis[0].out, p.axis[1].out, elements,
                   [&](Worker& worker, int64_t image, int64_t d, int64_t h) RLRP_INLINE {
                     const int64_t row = image * out + p.out_index(d, h, 0) * lanes;
                     worker.race(x + image * in, y + row, winners + row, d, h);
                   });
}

template <class Worker, class T, class N>
void collect(const Pooling& p, int64_t lanes, const N* winners, const T* r, T* result) {
  const int64_t in = p.in_plane() * lanes, out = p.out_plane() * lanes;
  const int64_t elements = in / (p.axis[0].in * p.axis[1].in) * p.most_outputs();
  each_row<Worker>(p, p.axis[0].in, p.axis[1].in, elements,
                   [&](Worker& worker, int64_t image, int64_t d, int64_t h) RLRP_INLINE {
                     T* row = result + image * in + p.in_index(d, h, 0) * lanes;
                     worker.collect(r + image * out, winners + image * out, row, d, h);
                   });
}

// Calls f(Worker*, lanes).
template <class T, class N, class F>
void with_worker(const Pooling& p, bool channels_last, const F& f) {
  if (channels_last) return f(static_cast<Pixels<T, N>*>(nullptr), p.channels);
  if constexpr (sizeof(N) == 1) {  // no window is adaptive, and none is large
    with_constant<1, 2>(p.axis[2].stride,
                        [&](auto known) { f(static_cast<Rows<T, N, known>*>(nullptr), 1); });
  } else {
    f(static_cast<Rows<T, N, 0>*>(nullptr), 1);
  }
}

struct Cpu {
  template <class T, class N>
  static void race(const Tensor& y, const Tensor& winners, const Pooling& p, bool channels_last,
                   const T* x) {
    with_worker<T, N>(p, channels_last, [&](auto* worker, int64_t lanes) {
      using Worker = std::remove_pointer_t<decltype(worker)>;
      rlrp::race<Worker>(p, lanes, x, result_of<T>(y), result_of<N>(winners));
    });
  }

  template <class T, class N>
  static void collect(const Tensor& result, const Pooling& p, bool channels_last, const N* winners,
                      const T* r) {
    with_worker<T, N>(p, channels_last, [&](auto* worker, int64_t lanes) {
      using Worker = std::remove_pointer_t<decltype(worker)>;
      rlrp::collect<Worker>(p, lanes, winners, r, result_of<T>(result));
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
