// V elements that lie side by side, read and written at once where there are several.
#pragma once

#include <array>
#include <bit>
#include <type_traits>

#include "scalar.h"

namespace rlrp {

constexpr int kBytesAtOnce = 16;  // what a thread of a GPU moves in one instruction, aligned

template <class T>
constexpr int kElementsAtOnce = kBytesAtOnce / static_cast<int>(sizeof(T));

template <class T, int V>
struct alignas(V * sizeof(T) < kBytesAtOnce ? V * sizeof(T) : kBytesAtOnce) Pack {
  T at[V];
};

#ifdef __CUDACC__
// What is moved by one instruction; structs may fall apart into their members.
template <int kBytes>
using Word = std::conditional_t<
    kBytes % 16 == 0, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
#else
template <int kBytes>
struct alignas(kBytes < kBytesAtOnce ? kBytes : kBytesAtOnce) Word {
  char bytes[kBytes < kBytesAtOnce ? kBytes : kBytesAtOnce];
};
#endif

template <class T, int V>
using Words = std::array<Word<V * sizeof(T)>, sizeof(Pack<T, V>) / sizeof(Word<V * sizeof(T)>)>;

template <int V, class T>
RLRP_HD Pack<T, V> load_pack(const T* from) {
  if constexpr (V == 1) return {*from};
  return std::bit_cast<Pack<T, V>>(*reinterpret_cast<const Words<T, V>*>(from));
}

template <int V, class T>
RLRP_HD void store_pack(T* to, const Pack<T, V>& pack) {
  if constexpr (V == 1) {
    *to = pack.at[0];
  } else {
    *reinterpret_cast<Words<T, V>*>(to) = std::bit_cast<Words<T, V>>(pack);
  }
}

// Whether packs may start at an address.
inline bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kBytesAtOnce == 0;
}

}  // namespace rlrp
