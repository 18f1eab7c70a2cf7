// Where the elements lie, for several tensors of one shape and any strides.
//
// Axes of size 1 are dropped, the rest sorted by the first tensor's strides and merged where all
// tensors allow it. Tensors that share a dense layout (contiguous, channels_last, ...) become one axis.
#pragma once

#include "scalar.h"

namespace rlrp {

constexpr int kMaxAxes = 8;

template <int K>
struct Axes {
  int rank = 0;
  int64_t size[kMaxAxes] = {};
  int64_t stride[K][kMaxAxes] = {};  // the last axis is the innermost

  RLRP_HD int64_t numel() const {
    int64_t count = 1;
    for (int axis = 0; axis < rank; ++axis) count *= size[axis];
    return count;
  }

  // Length of the innermost axis: the rows that kernels run along.
  RLRP_HD int64_t row() const { return rank == 0 ? 1 : size[rank - 1]; }

  RLRP_HD int64_t step(int k) const { return rank == 0 ? 1 : stride[k][rank - 1]; }

  // Offsets of the element at position `index`, counted with the innermost axis fastest.
  RLRP_HD void offsets(int64_t index, int64_t* out) const {
    for (int k = 0; k < K; ++k) out[k] = 0;
    for (int axis = rank - 1; axis >= 0; --axis) {
      const int64_t quotient = index / size[axis];
      const int64_t coordinate = index - quotient * size[axis];
      for (int k = 0; k < K; ++k) out[k] += coordinate * stride[k][axis];
      index = quotient;
    }
  }
};

// The rows, one after the other: divisions are made for the first one only.
template <int K>
struct Rows {
  const Axes<K>& axes;
  int64_t coordinate[kMaxAxes] = {};  // of the row's beginning, in the outer axes
  int64_t offset[K] = {};

  // At the row of the element at position `index`.
  RLRP_HD Rows(const Axes<K>& of, int64_t index) : axes(of) {
    int64_t number = index / axes.row();
    for (int axis = axes.rank - 2; axis >= 0; --axis) {
      coordinate[axis] = number % axes.size[axis];
      number /= axes.size[axis];
      for (int k = 0; k < K; ++k) offset[k] += coordinate[axis] * axes.stride[k][axis];
    }
  }

  RLRP_HD void next() {
    for (int axis = axes.rank - 2; axis >= 0; --axis) {
      for (int k = 0; k < K; ++k) offset[k] += axes.stride[k][axis];
      if (++coordinate[axis] < axes.size[axis]) return;
      for (int k = 0; k < K; ++k) offset[k] -= axes.size[axis] * axes.stride[k][axis];
      coordinate[axis] = 0;
    }
  }
};

// `size` and the strides are of the axes; rank <= kMaxAxes.
template <int K>
Axes<K> simplify(int rank, const int64_t* size, const int64_t* const (&stride)[K]) {
  int order[kMaxAxes];
  int kept = 0;
  for (int axis = 0; axis < rank; ++axis) {
    if (size[axis] == 1) continue;
    int at = kept++;
    for (; at > 0 && stride[0][order[at - 1]] < stride[0][axis]; --at) order[at] = order[at - 1];
    order[at] = axis;
  }
  Axes<K> axes;
  for (int i = 0; i < kept; ++i) {
    const int axis = order[i];
    const int last = axes.rank - 1;
    bool mergeable = last >= 0;
    for (int k = 0; k < K && mergeable; ++k) {
      mergeable = axes.stride[k][last] == stride[k][axis] * size[axis];
    }
    const int to = mergeable ? last : axes.rank++;
    axes.size[to] = mergeable ? axes.size[to] * size[axis] : size[axis];
    for (int k = 0; k < K; ++k) axes.stride[k][to] = stride[k][axis];
  }
  return axes;
}

template <int K>
struct Offsets {
  int64_t of[K] = {};
};

constexpr int64_t kGrain = 16;  // of which what comes before a cut is a multiple

// Calls f(part, offsets of its first element) for parts that make up the axes, in each of which no operand's last
// element lies `most` or more behind its first.
template <int K, class F>
void in_parts(const Axes<K>& axes, int64_t most, const F& f, const Offsets<K>& offset = {}) {
  int longest = 0;
  int64_t furthest = 0;
  bool fits = true;
  for (int k = 0; k < K; ++k) {
    int64_t reach = 0;
    for (int axis = 0; axis < axes.rank; ++axis) {
      const int64_t along = (axes.size[axis] - 1) * axes.stride[k][axis];
      reach += along;
      if (along > furthest) furthest = along, longest = axis;
    }
    fits = fits && reach < most;
  }
  if (fits) return f(axes, offset);
  const int64_t size = axes.size[longest];
  const int64_t cut = size < 2 * kGrain ? size / 2 : size / 2 / kGrain * kGrain;
  Axes<K> part = axes;
  part.size[longest] = cut;
  in_parts(part, most, f, offset);
  Offsets<K> behind = offset;
  for (int k = 0; k < K; ++k) behind.of[k] += cut * axes.stride[k][longest];
  part.size[longest] = size - cut;
  in_parts(part, most, f, behind);
}

}  // namespace rlrp
