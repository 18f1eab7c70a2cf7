// One binary for every x86: the same code compiled for several instruction sets, chosen at run time.
#pragma once

#include <type_traits>

#define RLRP_INLINE __attribute__((always_inline))

namespace rlrp {
namespace simd {

#if defined(__x86_64__) && !defined(__clang_analyzer__)

enum class Level { kBase, kAvx2, kAvx512 };

inline Level detect() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 && avx512 ? Level::kAvx512 : avx2 ? Level::kAvx2 : Level::kBase;
}

template <class F>
__attribute__((noinline, target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void on_avx512(
    const F& f) {
  f();
}

template <class F>
__attribute__((noinline, target("avx2,fma"))) void on_avx2(const F& f) {
  f();
}

// Runs f, whose code must be marked RLRP_INLINE throughout to be compiled for the instruction set, with a
// constant: how many floats a vector of it holds.
template <class F>
void run_wide(const F& f) {
  static const Level level = detect();
  switch (level) {
    case Level::kAvx512:
      return on_avx512([&]() RLRP_INLINE { f(std::integral_constant<int, 16>{}); });
    case Level::kAvx2:
      return on_avx2([&]() RLRP_INLINE { f(std::integral_constant<int, 8>{}); });
    default:
      return f(std::integral_constant<int, 4>{});
  }
}

#else

template <class F>
void run_wide(const F& f) {
  f(std::integral_constant<int, 4>{});
}

#endif

// The same for code that leaves vectors to the compiler.
template <class F>
void run(const F& f) {
  run_wide([&](auto) RLRP_INLINE { f(); });
}

}  // namespace simd
}  // namespace rlrp
