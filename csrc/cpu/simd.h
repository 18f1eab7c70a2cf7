// One binary for every x86: the same code compiled for several instruction sets, chosen at run time.
#pragma once

#include <cstdint>
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

// A vector of floats; of as many as run_wide says, one register.
template <int kLanes>
struct Lanes {
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
  typedef float Unaligned __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
  typedef int Indices __attribute__((vector_size(kLanes * sizeof(int))));
};
template <int kLanes>
using Vector = typename Lanes<kLanes>::Vector;

template <int kLanes>
RLRP_INLINE inline Vector<kLanes> load(const float* from) {
  return *reinterpret_cast<const typename Lanes<kLanes>::Unaligned*>(from);
}

template <int kLanes>
RLRP_INLINE inline void store(float* to, Vector<kLanes> value) {
  *reinterpret_cast<typename Lanes<kLanes>::Unaligned*>(to) = value;
}

#if defined(__x86_64__) && !defined(__clang_analyzer__)

// Whether vectors may be stored past the caches from here on: their addresses must be multiples of their size.
inline bool streams(const void* to) { return reinterpret_cast<uintptr_t>(to) % 64 == 0; }

template <int kLanes>
RLRP_INLINE inline void stream(float* to, Vector<kLanes> value) {
  if constexpr (kLanes == 16) {
    __builtin_ia32_movntps512(to, value);
  } else if constexpr (kLanes == 8) {
    __builtin_ia32_movntps256(to, value);
  } else {
    __builtin_ia32_movntps(to, value);
  }
}

// Has what was stored so seen by others.
inline void end_stream() { __builtin_ia32_sfence(); }

#else

inline bool streams(const void*) { return false; }

template <int kLanes>
RLRP_INLINE inline void stream(float* to, Vector<kLanes> value) {
  store<kLanes>(to, value);
}

inline void end_stream() {}

#endif

// A vector that stays in a register: the compiler might read it from memory anew for every use.
template <int kLanes>
RLRP_INLINE inline Vector<kLanes> hold(Vector<kLanes> value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#endif
  return value;
}

// As many vectors as each has lanes, as a matrix.
template <int kLanes>
RLRP_INLINE inline void transpose(Vector<kLanes> (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) {
    typename Lanes<kLanes>::Indices upper, lower;
    for (int lane = 0; lane < kLanes; ++lane) {
      upper[lane] = lane & step ? kLanes + lane - step : lane;
      lower[lane] = lane & step ? kLanes + lane : lane + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const Vector<kLanes> a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + step] = __builtin_shuffle(a, b, lower);
    }
  }
}

template <class V>
RLRP_INLINE inline V magnitude(const V& v) {
  return v < 0 ? -v : v;
}

}  // namespace simd
}  // namespace rlrp
