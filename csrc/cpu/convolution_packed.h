// What a few neighbouring pixels are made of, without what is 0 at all of them: behind a ReLU that is much of it, as
// neighbours are mostly 0 together, and on the way back, too, as relevance is 0 there.
#pragma once

#include <algorithm>

#include "convolution.h"

namespace rlrp {
namespace convolution {

constexpr int kGroup = 6;  // pixels
constexpr uint32_t kOrder[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// How the numbers lie that an output is made of.
struct Runs {
  int64_t count, depth;  // numbers that lie side by side
  int64_t ahead;         // how far the next block's lie behind, to be brought near; 0 if that is not to be
};

// A group of pixels: a row of numbers for each, and of which taps they are.
struct Group {
  float* rows;
  uint32_t* taps;
  int64_t count;
};

// The groups of a block.
class Packed {
 public:
  static int64_t memory(int64_t depth) { return kMost / kGroup * (kGroup + 1) * (depth + kPad); }

  Packed(float* memory, int64_t depth) : step(depth + kPad), memory_(memory) {}

  // Packs a group, of pixels whose runs begin at `from`, `steps` apart.
  template <int kLanes>
  RLRP_INLINE Group& pack(int64_t g, const float* const* from, const int64_t* steps, const Runs& runs) {
    float* rows = memory_ + g * (kGroup + 1) * step;
    Group& group = groups_[g] = {rows, reinterpret_cast<uint32_t*>(rows + kGroup * step), 0};
    const float* at[kGroup];
    std::copy_n(from, kGroup, at);
    for (int64_t run = 0, tap = 0; run < runs.count; ++run, tap += runs.depth) {
      int64_t k = 0;
      for (; k + kLanes <= runs.depth; k += kLanes) {
        for (int r = 0; runs.ahead && r < kGroup; ++r) __builtin_prefetch(at[r] + runs.ahead + k, 0, 2);
        add<kLanes>(group, at, k, tap + k);
      }
      for (; k < runs.depth; ++k) add<1>(group, at, k, tap + k);
      for (int r = 0; r < kGroup; ++r) at[r] += steps[r];
    }
    return group;
  }

  const Group& operator[](int64_t g) const { return groups_[g]; }

  const int64_t step;  // from a row to the next

 private:
  template <int kLanes>
  RLRP_INLINE void add(Group& group, const float* const (&at)[kGroup], int64_t k, uint32_t tap) const {
    simd::Integers<kLanes> any{}, order;
    memcpy(&order, kOrder, sizeof order);
    Vector<kLanes> x[kGroup];
#pragma GCC unroll 6
    for (int r = 0; r < kGroup; ++r) {
      x[r] = load<kLanes>(at[r] + k);
      any |= reinterpret_cast<simd::Integers<kLanes>>(x[r]);
    }
    const simd::Chosen chosen = simd::choose<kLanes>(any & 0x7fffffff);  // a zero may have a sign
#pragma GCC unroll 6
    for (int r = 0; r < kGroup; ++r) simd::store_chosen<kLanes>(group.rows + r * step + group.count, x[r], chosen);
    simd::store_chosen<kLanes>(group.taps + group.count, order + tap, chosen);
    group.count += __builtin_popcount(chosen);
  }

  float* memory_;
  Group groups_[kMost / kGroup];
};

}  // namespace convolution
}  // namespace rlrp
