// What lets one function run on the CPU and on the GPU, and for every element type.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RLRP_HD __host__ __device__ __forceinline__
#else
#define RLRP_HD inline __attribute__((always_inline))
#endif

namespace rlrp {

// Arithmetic is done in A: double for double, float for float and the 16-bit types.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <class T>
using wide_t = typename Wide<T>::type;

template <class T>
RLRP_HD wide_t<T> widen(T value) {
  return static_cast<wide_t<T>>(value);
}

template <class T>
RLRP_HD T narrow(wide_t<T> value) {
  return static_cast<T>(value);
}

RLRP_HD int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
RLRP_HD int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
RLRP_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }  // a >= 0, b > 0

}  // namespace rlrp
