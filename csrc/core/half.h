// float16 and bfloat16. On the CPU they are bit arithmetic without branches, so that loops over them
// vectorise with the plainest instruction sets; enums because compilers do not vectorise copies of
// structs. Rounds to nearest even; NaN stays NaN.
#pragma once

#include <bit>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "scalar.h"

namespace rlrp {

enum class Float16 : uint16_t {};
enum class BFloat16 : uint16_t {};

RLRP_HD float half_to_float(uint16_t bits) {
  constexpr uint32_t rebias = (127 - 15) << 23;
  const uint32_t magnitude = bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + rebias + (magnitude >= 0x7c00u ? rebias : 0u);
  const float tiny = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const uint32_t value = magnitude < 0x0400u ? std::bit_cast<uint32_t>(tiny) : normal;
  return std::bit_cast<float>(value | (static_cast<uint32_t>(bits & 0x8000u) << 16));
}

RLRP_HD uint16_t float_to_half(float value) {
  const uint32_t all = std::bit_cast<uint32_t>(value);
  const uint32_t sign = all & 0x80000000u;
  const uint32_t bits = all ^ sign;
  const uint32_t normal = (bits - ((127 - 15) << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // Adding 1/2 lines a subnormal up with the last bits of the sum and rounds it.
  const float half = std::bit_cast<float>(bits) + 0.5f;
  const uint32_t tiny = std::bit_cast<uint32_t>(half) - 0x3f000000u;
  const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = bits < 0x38800000u ? tiny : normal;
  const uint32_t result = bits >= 0x47800000u ? special : finite;
  return static_cast<uint16_t>(result | (sign >> 16));
}

RLRP_HD float bfloat_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

RLRP_HD uint16_t float_to_bfloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

template <>
RLRP_HD float widen(Float16 value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(static_cast<uint16_t>(value)));
#else
  return half_to_float(static_cast<uint16_t>(value));
#endif
}

template <>
RLRP_HD Float16 narrow<Float16>(float value) {
#ifdef __CUDA_ARCH__
  return static_cast<Float16>(__half_as_ushort(__float2half_rn(value)));
#else
  return static_cast<Float16>(float_to_half(value));
#endif
}

template <>
RLRP_HD float widen(BFloat16 value) {
#ifdef __CUDA_ARCH__
  return __bfloat162float(__ushort_as_bfloat16(static_cast<uint16_t>(value)));
#else
  return bfloat_to_float(static_cast<uint16_t>(value));
#endif
}

template <>
RLRP_HD BFloat16 narrow<BFloat16>(float value) {
#ifdef __CUDA_ARCH__
  return static_cast<BFloat16>(__bfloat16_as_ushort(__float2bfloat16_rn(value)));
#else
  return static_cast<BFloat16>(float_to_bfloat(value));
#endif
}

}  // namespace rlrp
