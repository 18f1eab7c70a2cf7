// Just enough of CUDA to run kernels on a CPU, where there is no GPU: a block's threads are fibers that
// take turns at barriers, in changing order, so that a missing barrier shows. Blocks run one after
// another. What a GPU does differently, above all how fast it is, this cannot tell.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 1 << 16;

enum class State { kReady, kAtBlockBarrier, kDone };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kReady;
};

inline std::mutex one_launch_at_a_time;
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline unsigned running;
inline std::function<void()> body;

inline void run_body() {
  body();
  threads[running].state = State::kDone;
}

inline void wait(State barrier) {
  threads[running].state = barrier;
  swapcontext(&threads[running].context, &scheduler);
}

inline bool all(State state, unsigned from, unsigned to) {
  for (unsigned i = from; i < to; ++i) {
    if (threads[i].state != state) return false;
  }
  return true;
}

// Whether any thread may go on.
inline bool release(unsigned count) {
  bool released = false;
  const auto open = [&](State barrier, unsigned from, unsigned to) {
    if (!all(barrier, from, to)) return;
    for (unsigned i = from; i < to; ++i) threads[i].state = State::kReady;
    released = true;
  };
  open(State::kAtBlockBarrier, 0, count);
  return released;
}

inline void run_block() {
  const unsigned count = blockDim.x;
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, run_body, 0);
    thread.state = State::kReady;
  }
  bool upwards = false;
  do {
    upwards = !upwards;
    for (unsigned i = 0; i < count; ++i) {
      running = upwards ? i : count - 1 - i;
      threadIdx.x = running;
      if (threads[running].state == State::kReady) {
        swapcontext(&scheduler, &threads[running].context);
      }
    }
  } while (release(count));
  if (!all(State::kDone, 0, count)) throw std::logic_error("threads of a block wait for ever");
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::State::kAtBlockBarrier); }

// Threads take turns at barriers only, so any update is atomic.
template <class T>
T atomicMax(T* address, T value) {
  const T before = *address;
  *address = before < value ? value : before;
  return before;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace emulation;
  const std::lock_guard<std::mutex> guard(one_launch_at_a_time);
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (blockDim.x % kWarp != 0) throw std::logic_error("only whole warps are emulated");
  while (threads.size() < blockDim.x) threads.emplace_back();
  const std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  body = [&] { std::apply(kernel, copies); };
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block();
  return cudaSuccess;
}
