// V elements that lie side by side, read and written at once where there are several.
#pragma once

#include "scalar.h"

namespace rlrp {

constexpr int kBytesAtOnce = 16;  // what a thread of a GPU moves in one instruction, aligned

template <class T>
constexpr int kElementsAtOnce = kBytesAtOnce / static_cast<int>(sizeof(T));

template <class T, int V>
struct alignas(V * sizeof(T) < kBytesAtOnce ? V * sizeof(T) : kBytesAtOnce) Pack {
  T at[V];
};

template <int V, class T>
RLRP_HD Pack<T, V> load_pack(const T* from) {
  if constexpr (V == 1) return {*from};
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <int V, class T>
RLRP_HD void store_pack(T* to, const Pack<T, V>& pack) {
  if constexpr (V == 1) {
    *to = pack.at[0];
  } else {
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
  }
}

// Whether packs may start at an address.
inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kBytesAtOnce == 0;
}

}  // namespace rlrp
