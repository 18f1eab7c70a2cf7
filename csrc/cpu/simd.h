// One binary for every x86: the same code compiled for several instruction sets, chosen at run time.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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

// What the loops run on here, in words.
inline const char* instructions() {
  switch (detect()) {
    case Level::kAvx512:
      return "AVX-512";
    case Level::kAvx2:
      return "AVX2";
    default:
      return "vectors of 4 floats: this processor has neither AVX2 nor AVX-512";
  }
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

// Runs f, which is code for so many lanes, as a function of its own, where it has all registers for itself.
template <int kLanes, class F>
RLRP_INLINE inline void run_apart(const F& f) {
  if constexpr (kLanes == 16) {
    on_avx512(f);
  } else if constexpr (kLanes == 8) {
    on_avx2(f);
  } else {
    f();
  }
}

#else

inline const char* instructions() {
  return "vectors of 4 floats: kernels for wider ones are written for x86-64 only";
}

template <class F>
void run_wide(const F& f) {
  f(std::integral_constant<int, 4>{});
}

template <int, class F>
RLRP_INLINE inline void run_apart(const F& f) {
  f();
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
  typedef uint32_t Integers __attribute__((vector_size(kLanes * sizeof(uint32_t))));
};
template <int kLanes>
using Vector = typename Lanes<kLanes>::Vector;
template <int kLanes>
using Integers = typename Lanes<kLanes>::Integers;

template <int kLanes>
RLRP_INLINE inline Vector<kLanes> load(const float* from) {
  return *reinterpret_cast<const typename Lanes<kLanes>::Unaligned*>(from);
}

template <int kLanes>
RLRP_INLINE inline void store(float* to, Vector<kLanes> value) {
  *reinterpret_cast<typename Lanes<kLanes>::Unaligned*>(to) = value;
}

// A whole vector in memory.
template <int kLanes>
struct Whole {
  static constexpr bool is_whole = true;

  RLRP_INLINE Vector<kLanes> load(const float* from) const { return simd::load<kLanes>(from); }
  RLRP_INLINE void store(float* to, const Vector<kLanes>& value) const { simd::store<kLanes>(to, value); }
};

// The first few lanes of one; the others are 0, and their memory is not touched.
template <int kLanes>
struct Start {
  static constexpr bool is_whole = false;

  int count;

  RLRP_INLINE Vector<kLanes> load(const float* from) const {
    Vector<kLanes> value{};
#if defined(__x86_64__) && !defined(__clang_analyzer__)
    if constexpr (kLanes == 16) {
      asm("vmovups %1, %0%{%2%}%{z%}" : "=v"(value) : "m"(*reinterpret_cast<const float(*)[16]>(from)), "Yk"(mask()));
      return value;
    }
#endif
    for (int lane = 0; lane < count; ++lane) value[lane] = from[lane];
    return value;
  }

  RLRP_INLINE void store(float* to, const Vector<kLanes>& value) const {
#if defined(__x86_64__) && !defined(__clang_analyzer__)
    if constexpr (kLanes == 16) {
      asm("vmovups %1, %0%{%2%}" : "+m"(*reinterpret_cast<float(*)[16]>(to)) : "v"(value), "Yk"(mask()));
      return;
    }
#endif
    for (int lane = 0; lane < count; ++lane) to[lane] = value[lane];
  }

 private:
  RLRP_INLINE uint16_t mask() const { return (1 << count) - 1; }
};

// Calls f with where each vector of so many numbers begins, and how much of it there is.
template <int kLanes, class F>
RLRP_INLINE inline void each_vector(int64_t count, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) f(c, Whole<kLanes>{});
  if (c < count) f(c, Start<kLanes>{static_cast<int>(count - c)});
}

#if defined(__x86_64__) && !defined(__clang_analyzer__)

// Whether vectors may be stored past the caches from here on: their addresses must be multiples of their size.
inline bool streams(const void* to) { return reinterpret_cast<uintptr_t>(to) % 64 == 0; }

template <int kLanes>
RLRP_INLINE inline void stream(float* to, Vector<kLanes> value) {
  Vector<kLanes>& place = *reinterpret_cast<Vector<kLanes>*>(to);
#if defined(__clang__)
  __builtin_nontemporal_store(value, &place);
#else
  if constexpr (kLanes == 4) {
    asm volatile("movntps %1, %0" : "=m"(place) : "x"(value));
  } else {
    asm volatile("vmovntps %1, %0" : "=m"(place) : "v"(value));
  }
#endif
}

// Has what was stored so seen by others.
inline void end_stream() { asm volatile("sfence" ::: "memory"); }

#else

inline bool streams(const void*) { return false; }

template <int kLanes>
RLRP_INLINE inline void stream(float* to, Vector<kLanes> value) {
  store<kLanes>(to, value);
}

inline void end_stream() {}

#endif

// A vector that stays in a register: gcc might read it from memory anew for every use.
template <int kLanes>
RLRP_INLINE inline Vector<kLanes> hold(Vector<kLanes> value) {
#if defined(__x86_64__) && !defined(__clang__)
  asm("" : "+v"(value));
#endif
  return value;
}

typedef uint16_t Chosen;  // a bit for each lane

// The lanes in which not all bits are 0.
template <int kLanes>
RLRP_INLINE inline Chosen choose(const Integers<kLanes>& bits) {
  Chosen chosen = 0;
#if defined(__x86_64__) && !defined(__clang_analyzer__)
  if constexpr (kLanes == 16) {
    asm("vptestmd %1, %1, %0" : "=k"(chosen) : "v"(bits));
    return chosen;
  }
#endif
  for (int lane = 0; lane < kLanes; ++lane) chosen |= (bits[lane] != 0) << lane;
  return chosen;
}

// Stores the lanes chosen one behind the other, and what nobody reads up to kLanes.
template <int kLanes, class T, class V>
RLRP_INLINE inline void store_chosen(T* to, const V& lanes, Chosen chosen) {
#if defined(__x86_64__) && !defined(__clang_analyzer__)
  if constexpr (kLanes == 16) {
    V front;
    asm("vpcompressd %1, %0%{%2%}%{z%}" : "=v"(front) : "v"(lanes), "Yk"(chosen));
    memcpy(to, &front, sizeof front);
    return;
  }
#endif
  for (int lane = 0; lane < kLanes; ++lane) {
    *to = lanes[lane];
    to += chosen >> lane & 1;
  }
}

// Exchanges blocks of kStep lanes off the diagonal of two rows of blocks.
template <int kLanes, int kStep, int... kLane>
RLRP_INLINE inline void exchange(Vector<kLanes>& a, Vector<kLanes>& b, std::integer_sequence<int, kLane...>) {
  const Vector<kLanes> upper = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane : kLane + kStep)...);
  a = upper;
}

// As many vectors as each has lanes, as a matrix.
template <int kLanes, int kStep = kLanes / 2>
RLRP_INLINE inline void transpose(Vector<kLanes> (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    exchange<kLanes, kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes>{});
  }
  if constexpr (kStep > 1) transpose<kLanes, kStep / 2>(rows);
}

template <class V>
RLRP_INLINE inline V magnitude(const V& v) {
  return v < 0 ? -v : v;
}

}  // namespace simd
}  // namespace rlrp
