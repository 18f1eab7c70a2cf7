// Comes before everything else: the ops on the GPU as ops on the CPU, in a library of their own.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>

namespace torch::stable::accelerator {

struct NoGuard {
  explicit NoGuard(int32_t) {}
};

}  // namespace torch::stable::accelerator

inline int no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

#define captum_rlrp captum_rlrp_emulated
#define CUDA CPU
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream no_stream
