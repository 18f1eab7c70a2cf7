// Launching on the stream that PyTorch uses for a tensor's device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "tensor.h"

namespace rlrp {

constexpr int kThreads = 256;

// The most elements of a launch, and the furthest that one of its operands reaches: so 32 bits hold every index.
#ifdef RLRP_MOST  // which tests make small, to see parts
constexpr int64_t kMost = RLRP_MOST;
#else
constexpr int64_t kMost = int64_t{1} << 30;
#endif

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

// One thread for each element of `kThreads` × blocks. By a function, not by <<<…>>>: kernels are then
// plain C++, and tests run them without a GPU as well.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, const OnDeviceOf& device,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  RLRP_CHECK(blocks < (int64_t{1} << 31), op, "the tensor is too large for one launch");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = device.stream();
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  RLRP_CHECK(error == cudaSuccess, op, "the kernel could not be launched: ", cudaGetErrorString(error));
}

}  // namespace rlrp
