// How a convolution goes by a scheme. An image is cut into patches, one for every few outputs. By Winograd's
// algorithms, patches and filters are transformed to a few terms a channel; for each term, a matrix product over the
// channels; and back. That is done for some of the filters and a block of patches at a time, few enough to stay in
// the caches.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "convolution_packed.h"

namespace rlrp {
namespace convolution {

constexpr int64_t kLeast = 8;          // patches that are worth a task of their own
constexpr int64_t kFilters = 1 << 20;  // elements of the filters that are transformed at a time
constexpr int64_t kDepth = 128;        // summed at a time: it rounds less, and a panel of it stays near
constexpr int64_t kMultiple = 32;      // filters that are transformed at a time

// With those of zeros that complete the last kMultiple.
inline int64_t padded(int64_t filters) { return ceil_div(filters, kMultiple) * kMultiple; }

// Some rows of a matrix product over some of the depth, which is added to what was found before.
template <int kLanes, int kCount>
RLRP_INLINE inline void multiply_rows(int64_t first, int64_t last, const float* rows, int64_t depth,
                                      const float* panel, float* result, int64_t result_step) {
  Vector<kLanes> sum[kCount][kColumns] = {};
  multiply<kLanes, kCount>(
      first, last, [&](int r, int64_t k) RLRP_INLINE { return rows[r * depth + k]; }, panel, sum);
#pragma GCC unroll 12
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) {
      float* to = result + r * result_step + j * kLanes;
      store<kLanes>(to, first ? load<kLanes>(to) + sum[r][j] : sum[r][j]);
    }
  }
}

// Where the terms of so many patches and filters lie.
template <class Scheme>
Planes<Scheme::kTerms> planes_of(const Convolution& conv, const Scheme& scheme, int64_t patches, int64_t filters) {
  Planes<Scheme::kTerms> planes{};
  for (int term = 0; term < Scheme::kTerms; ++term) {
    const int64_t depth = scheme.depth(term) * conv.in.channels;
    planes.depth[term] = depth;
    planes.patches[term + 1] = planes.patches[term] + patches * (depth + Scheme::kGap) + kPad;
    planes.filters[term + 1] = planes.filters[term] + padded(filters) * depth + kPad;
  }
  const bool is_direct = Scheme::kTerms == 1;  // by convolution_pixels.h, which keeps no products
  planes.products = (is_direct ? Packed::memory(planes.depth[0]) : kMost * padded(filters)) + kPad;
  return planes;
}

// Transforms the patches from one to another to as many rows, and adds rows of zeros to a number that is
// multiplied at a time.
template <int kLanes, class Scheme>
RLRP_INLINE inline void transform(const Work& work, const Scheme& scheme, const Planes<Scheme::kTerms>& planes,
                                  int64_t first, int64_t last, int64_t row, float* patches) {
  for (int64_t k = first; k < last; ++k, ++row) {
    scheme.template transform_patch<kLanes>(work, planes, k, row, patches);
  }
  const int64_t more = ceil_div(row, kFewRows<kLanes>) * kFewRows<kLanes> - row;
  for (int term = 0; term < Scheme::kTerms; ++term) {
    const int64_t depth = planes.depth[term];
    std::fill_n(patches + planes.patches[term] + row * depth, more * depth, 0.0f);
  }
}

// Multiplies and finishes the patches from one to another, at most kMost of them, which begin at a row.
template <int kLanes, class Scheme>
RLRP_INLINE inline void finish(const Work& work, const Scheme& scheme, const Planes<Scheme::kTerms>& planes,
                               int64_t first, int64_t last, int64_t row, const float* patches, float* products) {
  constexpr int kMany = kRows<kLanes>, kFew = kFewRows<kLanes>;
  const int64_t out = padded(work.range.count), count = last - first, rows = ceil_div(count, kFew) * kFew;
  for (int term = 0; term < Scheme::kTerms; ++term) {
    const int64_t depth = planes.depth[term];
    const float* from = patches + planes.patches[term] + row * depth;
    float* to = products + term * planes.products;
    for (int64_t c = 0; c < out; c += kPanel<kLanes>) {
      const float* panel = work.filters + planes.filters[term] + c * depth;
      for (int64_t start = 0; start == 0 || start < depth; start += kDepth) {  // once where there are none
        const int64_t end = min64(start + kDepth, depth);
        int64_t k = 0;
        for (; k + kMany <= rows; k += kMany) {
          multiply_rows<kLanes, kMany>(start, end, from + k * depth, depth, panel, to + k * out + c, out);
        }
        for (; k < rows; k += kFew) {
          multiply_rows<kLanes, kFew>(start, end, from + k * depth, depth, panel, to + k * out + c, out);
        }
      }
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    const float sum = scheme.template finish_patch<kLanes>(work, planes, first + k, products + k * out);
    if (work.conv.sums) work.sums[first + k] += sum;
  }
}

// The patches from one to another, at most kMost of them.
template <int kLanes, class Scheme>
RLRP_INLINE inline void convolve(const Work& work, const Scheme& scheme, const Planes<Scheme::kTerms>& planes,
                                 int64_t first, int64_t last, float* buffer) {
  transform<kLanes>(work, scheme, planes, first, last, 0, buffer);
  finish<kLanes>(work, scheme, planes, first, last, 0, buffer, buffer + planes.patches[Scheme::kTerms]);
}

// Calls f with the number of each task, at most so many, and with where its share of `count` begins and ends.
template <class F>
void run_tasks(int64_t most, int64_t count, const F& f) {
  const int64_t tasks = min64(most, count);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first_task, int64_t last_task) {
    simd::run_wide([&](auto lanes) RLRP_INLINE {
      for (int64_t task = first_task; task < last_task; ++task) {
        f(lanes, task, count * task / tasks, count * (task + 1) / tasks);
      }
    });
    simd::end_stream();
  });
}

inline Tensor workspace(const Tensor& model, int64_t size) {
  return new_vector(model, size, ScalarType::Float);
}

// Adds sums of each patch, by one or several parts of the filters, to its sample's; always in the same order.
inline void add_up(const std::vector<float>& sums, const Grid& grid, const Convolution& conv) {
  if (grid.listed) {
    for (size_t k = 0; k < sums.size(); ++k) conv.sums[(*grid.listed)[k].n] += sums[k];
    return;
  }
  const int64_t count = grid.count(1);
  for (auto sum = sums.begin(); sum != sums.end();) {
    for (int64_t n = 0; n < conv.batch; ++n, sum += count) {
      conv.sums[n] += std::accumulate(sum, sum + count, 0.0);
    }
  }
}

// Each task takes some patches; the filters are transformed, as many as the caches hold, for all of them. `failed`
// is for a scheme that leaves outputs to be computed.
template <class Scheme>
void run_by_patches(const Convolution& conv, const Scheme& scheme, const Grid& grid, const float* zeros,
                    const Tensor& model, std::vector<uint16_t>* failed = nullptr) {
  constexpr int kTerms = Scheme::kTerms;
  const int64_t out = conv.out.channels, count = grid.count(conv.batch);
  const int64_t threads = torch::stable::get_num_threads(), tasks = min64(threads, ceil_div(count, kLeast));
  const int64_t cached = kFilters / planes_of(conv, scheme, 0, kMultiple).filters[kTerms];
  const int64_t most = min64(std::max<int64_t>(cached, 1), ceil_div(out, kMultiple)) * kMultiple;
  const Planes<kTerms> largest = planes_of(conv, scheme, kMost, most);
  const int64_t each = largest.patches[kTerms] + kTerms * largest.products;
  Tensor memory = workspace(model, largest.filters[kTerms] + tasks * each);
  float *filters = result_of<float>(memory), *buffers = filters + largest.filters[kTerms];
  std::vector<float> sums(conv.sums ? count : 0, 0.0f);
  if (failed) failed->assign(count, 0);
  for (Range range{0, 0}; range.first < out; range.first += range.count) {
    range.count = min64(most, out - range.first);
    const Planes<kTerms> planes = planes_of(conv, scheme, kMost, range.count);
    const int64_t parts = ceil_div(range.count, kMultiple);
    run_tasks(threads, parts, [&](auto lanes, int64_t, int64_t first, int64_t last) RLRP_INLINE {
      scheme.template transform_filters<lanes>(conv, planes, range, first * kMultiple, last * kMultiple, filters);
    });
    const Work work{conv, grid, range, filters, zeros, sums.data(), failed ? failed->data() : nullptr};
    run_tasks(tasks, count, [&](auto lanes, int64_t task, int64_t start, int64_t end) RLRP_INLINE {
      for (int64_t first = start, last = 0; first < end; first = last) {
        last = block_end(first, end);
        convolve<lanes>(work, scheme, planes, first, last, buffers + task * each);
      }
    });
  }
  add_up(sums, grid, conv);
}

// Each task takes some filters, and transforms them a few at a time; the patches are transformed for all of them.
template <class Scheme>
void run_by_filters(const Convolution& conv, const Scheme& scheme, const Grid& grid, const float* zeros,
                    const Tensor& model, std::vector<uint16_t>* failed = nullptr) {
  constexpr int kTerms = Scheme::kTerms;
  constexpr int64_t kStep = kFewRows<16>;  // patches; of fewer lanes a multiple of their kFewRows
  const int64_t count = grid.count(conv.batch), groups = ceil_div(count, kStep);
  const int64_t threads = torch::stable::get_num_threads(), parts = ceil_div(conv.out.channels, kMultiple);
  const int64_t shares = min64(ceil_div(threads, parts), groups);  // of the patches, by each part
  const Planes<kTerms> planes = planes_of(conv, scheme, groups * kStep, kMultiple);
  const int64_t each = planes.filters[kTerms] + kTerms * planes.products;
  Tensor memory = workspace(model, planes.patches[kTerms] + min64(threads, parts * shares) * each);
  float *patches = result_of<float>(memory), *buffers = patches + planes.patches[kTerms];
  std::vector<float> sums(conv.sums ? parts * count : 0, 0.0f);
  std::vector<uint16_t> marks(failed ? parts * count : 0, 0);
  const Work all{conv, grid, {}, nullptr, zeros, nullptr, nullptr};
  run_tasks(threads, groups, [&](auto lanes, int64_t, int64_t start, int64_t end) RLRP_INLINE {
    const int64_t first = start * kStep;
    transform<lanes>(all, scheme, planes, first, min64(end * kStep, count), first, patches);
  });
  run_tasks(threads, parts * shares, [&](auto lanes, int64_t task, int64_t start, int64_t end) RLRP_INLINE {
    float *filters = buffers + task * each, *products = filters + planes.filters[kTerms];
    for (int64_t k = start; k < end; ++k) {
      const int64_t part = k / shares, share = k % shares;
      const Range range{part * kMultiple, min64(kMultiple, conv.out.channels - part * kMultiple)};
      if (k == start || share == 0) {
        scheme.template transform_filters<lanes>(conv, planes, range, 0, kMultiple, filters);
      }
      const Work work{conv, grid, range, filters, zeros, sums.data() + (conv.sums ? part * count : 0),
                      marks.data() + (failed ? part * count : 0)};
      const int64_t stop = min64(groups * (share + 1) / shares * kStep, count);
      for (int64_t first = groups * share / shares * kStep, last = 0; first < stop; first = last) {
        last = block_end(first, stop);
        finish<lanes>(work, scheme, planes, first, last, first, patches, products);
      }
    }
  });
  if (failed) failed->assign(count, 0);
  for (size_t k = 0; k < marks.size(); ++k) (*failed)[k % count] |= marks[k];
  add_up(sums, grid, conv);
}

template <class Scheme>
void run_by(const Convolution& conv, const Scheme& scheme, const Tensor& model,
            std::vector<uint16_t>* failed = nullptr) {
  const Grid grid(conv, scheme.outputs);
  const std::vector<float> zeros(conv.in.channels, 0.0f);
  if constexpr (Scheme::kTerms > 1) {  // whatever takes less memory transformed stays as a whole
    if (grid.count(conv.batch) <= conv.out.channels) {
      return run_by_filters(conv, scheme, grid, zeros.data(), model, failed);
    }
  }
  run_by_patches(conv, scheme, grid, zeros.data(), model, failed);
}

}  // namespace convolution
}  // namespace rlrp
