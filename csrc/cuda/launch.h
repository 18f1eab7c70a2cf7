// Launching on the stream that PyTorch uses for a tensor's device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "tensor.h"

namespace rlrp {

constexpr int kThreads = 256;

// While it lives, the tensor's device is the current one.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline unsigned blocks_for(const char* op, int64_t count) {
  RLRP_CHECK(count < (int64_t{1} << 31), op, "the tensor is too large for one launch");
  return static_cast<unsigned>(count);
}

}  // namespace rlrp
