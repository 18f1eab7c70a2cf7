// Max pooling, backwards: the inputs of a window race, and the winner takes the output's relevance.
//
// Races run side by side, in lanes. In channels_last images the lanes are the channels of an output. In
// contiguous ones they are neighbouring outputs, so rows are read into a scratch that puts inputs
// `stride` apart next to each other; relevance is collected in the same order and sorted on its way out.
#include "pooling.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "simd.h"

namespace rlrp {
namespace {

constexpr int64_t kLanes = 256;   // races at a time: what they remember stays in the L1 cache
constexpr int64_t kVector = 16;   // rows in the scratch are rounded up to it: no remainder loops
constexpr int64_t kGrain = 65536;  // elements that make a task worth its while

RLRP_HD int64_t round_up(int64_t n) { return ceil_div(n, kVector) * kVector; }

int slab_axis_of(const Pooling& p) { return p.axis[0].in == 1 && p.axis[0].out == 1 ? 1 : 0; }

// The races of one image at a time. Slabs are its rows, or its planes where it has three spatial axes:
// the unit in which relevance is collected. A ring holds those that the coming outputs see.
//
// kTiled: every input is in exactly one window, so relevance is written, not added up.
template <class T, bool kChannelsLast, bool kTiled>
class Races {
 public:
  using A = wide_t<T>;
  using X = std::conditional_t<kChannelsLast, T, A>;  // what races read
  using S = std::conditional_t<kTiled, T, A>;         // what relevance is collected in
  using R = X;                                        // what it is read as
  using Position = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  // Relevance is collected in the result itself where that has the right type and order.
  static constexpr bool kInPlace = kChannelsLast && sizeof(S) == sizeof(T);

  explicit Races(const Pooling& pooling)
      : p(pooling),
        slab_axis(slab_axis_of(p)),
        by(p.axis[slab_axis]),
        along(p.axis[2]),
        together(!kChannelsLast && !along.adaptive && along.stride <= along.in &&
                 along.kernel * along.dilation <= 2 * along.in),
        lines(slab_axis == 0 ? p.axis[1].in : 1),
        lanes(kChannelsLast ? p.channels : 1),
        before(together ? along.padding : 0),
        phases(together ? along.stride : 1),
        pitch(together ? round_up(along.out) + along.kernel * along.dilation / along.stride + 1
                       : along.in),
        line(phases * pitch * lanes),
        height(std::bit_ceil(static_cast<uint64_t>(min64(max64(by.extent(), by.stride), by.in)))),
        sums(kInPlace ? 0 : height * lines * line),
        inputs(kChannelsLast ? 0 : sums.size(), X(-INFINITY)),
        nowhere(line),
        from(p.axis[0].extent() * p.axis[1].extent()),
        to(from.size()),
        start(together ? along.kernel : along.extent()),
        relevance(kChannelsLast ? 0 : round_up(along.out)),
        first(max64(1, relevance.size())) {
    for (int64_t k = 0; k < phases * pitch; ++k) {
      place.push_back((k % phases * pitch + k / phases) * lanes);
    }
    for (int64_t w = 0; together && w < along.out; ++w) {
      first[w] = (along.inputs(w).begin + along.padding - w * along.stride) / along.dilation;
    }
  }

  // Slabs `band` of an image; windows that reach beyond the band count for what is inside.
  RLRP_INLINE void run(const T* x, const T* r, T* result, Span band) {
    const Span outputs{by.outputs(band.begin).begin, by.outputs(band.end - 1).end};
    int64_t read = 0, opened = band.begin, written = band.begin;
    for (int64_t o = outputs.begin; o < outputs.end; ++o) {
      const int64_t end = by.inputs(o).end;
      if constexpr (!kChannelsLast) {
        for (read = max64(read, by.lowest(o)); read < end; ++read) load(x, read);
      }
      for (; opened < min64(end, band.end); ++opened) clear(result, opened);
      const int64_t rows = slab_axis == 0 ? p.axis[1].out : 1;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t d = slab_axis == 0 ? o : 0, h = slab_axis == 0 ? row : o;
        gather(x, result, d, h, band);
        race_row(r + p.out_index(d, h, 0) * lanes);
      }
      if constexpr (!kInPlace) {
        const int64_t done = o + 1 < outputs.end ? by.lowest(o + 1) : opened;
        for (; written < min64(done, opened); ++written) store(result, written);
      }
    }
    for (; opened < band.end; ++opened) {  // what no output sees
      clear(result, opened);
      if constexpr (!kInPlace) store(result, opened);
    }
  }

 private:
  const Pooling& p;
  const int slab_axis;
  const Window &by, &along;  // the windows from slab to slab and along a line
  const bool together;  // neighbouring outputs run side by side; not where windows dwarf the image
  const int64_t lines, lanes;   // per slab; per element along a line
  const int64_t before;         // the padding that is kept in the scratch
  const int64_t phases, pitch;  // inputs k, k + phases, ... are neighbours; the phases lie `pitch` apart
  const int64_t line;           // elements of a line, with all this
  const int64_t height;  // of the rings: a power of two, as a division per line would be felt
  std::vector<S> sums;    // rings of `height` slabs
  std::vector<X> inputs;  // with minus infinity where there is padding
  std::vector<S> nowhere;  // takes what belongs to another band
  std::vector<const X*> from;  // the lines that a row of outputs sees, and where their relevance goes
  std::vector<S*> to;
  int64_t entered = 0;         // their number
  std::vector<int64_t> start;  // the inputs of a window along a line
  std::vector<A> relevance;      // of a row of outputs, 0 beyond its end
  std::vector<Position> first;   // which of its inputs is an output's first that is no padding
  std::vector<int64_t> place;    // of the k-th input of a line
  A best[kLanes];
  Position at[kLanes];

  RLRP_INLINE int64_t slot(int64_t slab) const { return (slab & (height - 1)) * lines * line; }

  RLRP_INLINE S* sums_of(T* result, int64_t slab) {
    if constexpr (kInPlace) {
      return result + slab * lines * line;
    } else {
      return sums.data() + slot(slab);
    }
  }

  RLRP_INLINE void clear(T* result, int64_t slab) {
    if constexpr (!kTiled) std::fill_n(sums_of(result, slab), lines * line, S(0));
  }

  // Reads a slab into the ring, inputs `phases` apart next to each other.
  RLRP_INLINE void load(const T* x, int64_t slab) {
    for (int64_t l = 0; l < lines; ++l) {
      const T* in = x + (slab * lines + l) * along.in;
      A* out = inputs.data() + slot(slab) + l * line;
      A* even = out + place[before];
      if (phases == 1) {
#pragma omp simd
        for (int64_t k = 0; k < along.in; ++k) even[k] = widen(in[k]);
      } else if (phases == 2) {
        A* odd = out + place[before + 1];
#pragma omp simd
        for (int64_t k = 0; k < along.in / 2; ++k) {
          even[k] = widen(in[2 * k]);
          odd[k] = widen(in[2 * k + 1]);
        }
        if (along.in % 2 == 1) even[along.in / 2] = widen(in[along.in - 1]);
      } else {
        for (int64_t k = 0; k < along.in; ++k) out[place[before + k]] = widen(in[k]);
      }
    }
  }

  // Writes a slab's relevance out.
  RLRP_INLINE void store(T* result, int64_t slab) {
    for (int64_t l = 0; l < lines; ++l) {
      const A* sum = sums.data() + slot(slab) + l * line;
      T* out = result + (slab * lines + l) * along.in * lanes;
      const A* even = sum + place[before];
      if (phases == 1) {
#pragma omp simd
        for (int64_t k = 0; k < along.in * lanes; ++k) out[k] = narrow<T>(even[k]);
      } else if (phases == 2) {
        const A* odd = sum + place[before + 1];
#pragma omp simd
        for (int64_t k = 0; k < along.in / 2; ++k) {
          out[2 * k] = narrow<T>(even[k]);
          out[2 * k + 1] = narrow<T>(odd[k]);
        }
        if (along.in % 2 == 1) out[along.in - 1] = narrow<T>(even[along.in / 2]);
      } else {
        for (int64_t k = 0; k < along.in; ++k) out[k] = narrow<T>(sum[place[before + k]]);
      }
    }
  }

  // Notes the lines that the outputs of row (d, h) see. Those outside the band take part and receive
  // nothing.
  RLRP_INLINE void gather(const T* x, T* result, int64_t d, int64_t h, Span band) {
    const Span ds = p.axis[0].inputs(d), hs = p.axis[1].inputs(h);
    entered = 0;
    for (int64_t i = ds.begin; i < ds.end; i += p.axis[0].step()) {
      for (int64_t j = hs.begin; j < hs.end; j += p.axis[1].step(), ++entered) {
        const int64_t slab = slab_axis == 0 ? i : j;
        const int64_t within = slab_axis == 0 ? j * line : 0;
        const bool inside = slab >= band.begin && slab < band.end;
        to[entered] = inside ? sums_of(result, slab) + within : nowhere.data();
        if constexpr (kChannelsLast) {
          from[entered] = x + slab * lines * line + within;
        } else {
          from[entered] = inputs.data() + slot(slab) + within;
        }
      }
    }
  }

  RLRP_INLINE void race_row(const T* r) {
    if constexpr (!kChannelsLast) {
#pragma omp simd
      for (int64_t w = 0; w < along.out; ++w) relevance[w] = widen(r[w]);
      if (together) {
        for (int64_t k = 0; k < along.kernel; ++k) start[k] = place[k * along.dilation];
        for (int64_t w = 0; w < along.out; w += kLanes) {
          race(along.kernel, w, &relevance[w], &first[w], min64(kLanes, round_up(along.out - w)));
        }
        return;
      }
    }
    for (size_t k = 0; k < start.size(); ++k) start[k] = k * along.step() * lanes;
    const Span whole = along.whole();
    for (int64_t w = 0; w < along.out; ++w) {
      const Span ks = along.inputs(w);
      const bool all = w >= whole.begin && w < whole.end;
      const int64_t wide = all ? along.kernel : ceil_div(ks.end - ks.begin, along.step());
      for (int64_t c = 0; c < lanes; c += kLanes) {
        const R* value;
        if constexpr (kChannelsLast) {
          value = r + w * lanes + c;
        } else {
          value = &relevance[w];
        }
        race(wide, ks.begin * lanes + c, value, first.data(), min64(kLanes, lanes - c));
      }
    }
  }

  // `count` races side by side: `wide` inputs of each line, `offset` elements on.
  RLRP_INLINE void race(int64_t wide, int64_t offset, const R* r, const Position* begin,
                        int64_t count) {
    if (entered == 2 && wide == 2) {
      race_of<2, 2>(offset, r, begin, count);
      if (kChannelsLast) return;
    } else if (entered == 3 && wide == 3) {
      race_of<3, 3>(offset, r, begin, count);
      if (kChannelsLast) return;
    } else {
      find(wide, offset, begin, count);
    }
    Position position = 0;
    for (int64_t e = 0; e < entered; ++e) {
      for (int64_t k = 0; k < wide; ++k, ++position) {
        S* sum = to[e] + start[k] + offset;
#pragma omp simd
        for (int64_t l = 0; l < count; ++l) sum[l] = plus(sum[l], at[l] == position, r[l]);
      }
    }
  }

  // Finds the winners of any window.
  RLRP_INLINE void find(int64_t wide, int64_t offset, const Position* begin, int64_t count) {
#pragma omp simd
    for (int64_t l = 0; l < count; ++l) {
      best[l] = widen(from[0][start[0] + offset + l]);
      at[l] = kChannelsLast ? 0 : begin[l];
    }
    Position position = 0;
    for (int64_t e = 0; e < entered; ++e) {
      for (int64_t k = 0; k < wide; ++k, ++position) {
        const X* x = from[e] + start[k] + offset;
#pragma omp simd
        for (int64_t l = 0; l < count; ++l) {
          const A value = widen(x[l]);
          const bool higher = value > best[l];
          best[l] = higher ? value : best[l];
          at[l] = higher ? position : at[l];
        }
      }
    }
  }

  // The same in registers, for the usual windows. In channels_last images, where no two lanes share an
  // input, it hands out the relevance as well.
  template <int kHigh, int kWide>
  RLRP_INLINE void race_of(int64_t offset, const R* r, const Position* begin, int64_t count) {
    constexpr int kInputs = kHigh * kWide;
    const X* x[kInputs];
    S* sum[kInputs];
    for (int e = 0; e < kHigh; ++e) {
      for (int k = 0; k < kWide; ++k) {
        x[e * kWide + k] = from[e] + start[k] + offset;
        sum[e * kWide + k] = to[e] + start[k] + offset;
      }
    }
#pragma omp simd
    for (int64_t l = 0; l < count; ++l) {
      A highest = widen(x[0][l]);
      Position winner = kChannelsLast ? 0 : begin[l];
#pragma GCC unroll 16
      for (int t = 1; t < kInputs; ++t) {
        const A here = widen(x[t][l]);
        const bool higher = here > highest;
        highest = higher ? here : highest;
        winner = higher ? Position(t) : winner;
      }
      if constexpr (kChannelsLast) {
        // All are read before any is written: rows often lie a multiple of 4 KiB apart, and a read
        // would wait for the write before it.
        S total[kInputs];
#pragma GCC unroll 16
        for (int t = 0; t < kInputs; ++t) total[t] = plus(sum[t][l], winner == t, r[l]);
#pragma GCC unroll 16
        for (int t = 0; t < kInputs; ++t) sum[t][l] = total[t];
      } else {
        at[l] = winner;
      }
    }
  }

  // sum + (won ? r : 0). The choice is made in bits: of a conditional the compiler makes branches.
  RLRP_INLINE static S plus(S sum, bool won, R r) {
    if constexpr (kTiled) {
      using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, Position>;
      const Position bits = std::bit_cast<Bits>(r) & -static_cast<Position>(won);
      return std::bit_cast<S>(static_cast<Bits>(bits));
    } else {
      return sum + std::bit_cast<A>(std::bit_cast<Position>(widen(r)) & -static_cast<Position>(won));
    }
  }
};

bool is_tiled(const Pooling& p) {
  return std::all_of(p.axis, p.axis + 3, [](const Window& w) {
    return !w.adaptive && w.stride == w.kernel && w.padding == 0 && w.dilation == 1 &&
           w.in == w.out * w.kernel;
  });
}

template <class T, bool kChannelsLast, bool kTiled>
void race(const Pooling& p, const T* x, const T* r, T* result) {
  const int64_t slabs = p.axis[slab_axis_of(p)].in;
  const int64_t per_image = kChannelsLast ? p.channels : 1;
  const int64_t images = p.batch * p.channels / per_image;
  const int64_t in = p.in_plane() * per_image, out = p.out_plane() * per_image;
  const int64_t grain = ceil_div(kGrain * slabs, in);
  torch::stable::parallel_for(0, images * slabs, grain, [&](int64_t first, int64_t last) {
    Races<T, kChannelsLast, kTiled> races(p);
    while (first < last) {
      const int64_t image = first / slabs, begin = first % slabs;
      const Span band{begin, min64(begin + last - first, slabs)};
      simd::run([&]() RLRP_INLINE {
        races.run(x + image * in, r + image * out, result + image * in, band);
      });
      first += band.end - band.begin;
    }
  });
}

struct Cpu {
  template <class T>
  static void send(const Tensor& result, const Pooling& p, bool channels_last, const T* x, const T* r) {
    const auto run = !channels_last ? race<T, false, false>
                     : is_tiled(p)  ? race<T, true, true>
                                    : race<T, true, false>;
    run(p, x, r, result_of<T>(result));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(captum_rlrp, CPU, m) {
  m.impl("max_pool", TORCH_BOX(&MaxPooling<Cpu>::windows));
  m.impl("adaptive_max_pool", TORCH_BOX(&MaxPooling<Cpu>::adaptive));
}

}  // namespace rlrp
