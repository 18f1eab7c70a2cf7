// Memory that results and workspaces on the CPU take from one explanation to the next: the system hands it out
// page by page, which costs as much as the arithmetic on it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rlrp {

class Memory : public std::enable_shared_from_this<Memory> {
 public:
  static constexpr int64_t kLeast = 1 << 18;  // bytes; the C library is good at less

  // What this thread takes memory from: the innermost that was entered and not left; or null.
  static Memory* current() { return entered().empty() ? nullptr : entered().back().get(); }

  void enter() {
    entered().push_back(shared_from_this());
    std::lock_guard<std::mutex> guard(lock_);
    ++inside_;
  }

  // The last to leave gives back to the system what has not been used since the last time.
  void leave() {
    entered().pop_back();
    std::lock_guard<std::mutex> guard(lock_);
    if (--inside_ > 0) return;
    std::erase_if(blocks_, [](const Block& block) { return !block.used && block.is_free(); });
    for (Block& block : blocks_) block.used = false;
  }

  // Bytes taken from the system.
  int64_t size() {
    std::lock_guard<std::mutex> guard(lock_);
    int64_t total = 0;
    for (const Block& block : blocks_) total += block.size();
    return total;
  }

  // An uninitialised tensor, whose memory comes back when it goes.
  torch::stable::Tensor take(int64_t bytes, int64_t axes, const int64_t* sizes, const int64_t* strides,
                             torch::headeronly::ScalarType dtype) {
    bytes = (bytes + kLine - 1) / kLine * kLine;
    auto give_back = [self = shared_from_this(), bytes](void* at) {
      self->give_back(static_cast<char*>(at), bytes);
    };
    using Shape = torch::headeronly::IntHeaderOnlyArrayRef;
    const size_t count = static_cast<size_t>(axes);
    return torch::stable::from_blob(find(bytes), Shape(sizes, count), Shape(strides, count),
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype, give_back);
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kBlock = 1 << 26;  // bytes asked of the system at a time

  struct Block {
    torch::stable::Tensor memory;
    std::map<int64_t, int64_t> free;  // place and size of what is not in use
    bool used = false;

    explicit Block(int64_t size) : memory(torch::stable::empty({size}, torch::headeronly::ScalarType::Byte)) {
      free[0] = size;
#ifdef __linux__
      // Larger pages are quicker to come by, and to find. A hint: nothing is lost where it is not taken.
      constexpr uintptr_t page = 1 << 21;
      const uintptr_t begin = (reinterpret_cast<uintptr_t>(start()) + page - 1) / page * page;
      const uintptr_t end = reinterpret_cast<uintptr_t>(start() + size) / page * page;
      if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
    }

    char* start() const { return static_cast<char*>(memory.mutable_data_ptr()); }
    int64_t size() const { return memory.numel(); }
    bool is_free() const { return free.size() == 1 && free.begin()->second == size(); }
  };

  static std::vector<std::shared_ptr<Memory>>& entered() {
    static thread_local std::vector<std::shared_ptr<Memory>> stack;
    return stack;
  }

  // The first place with room: what lies behind stays unused.
  char* find(int64_t bytes) {
    std::lock_guard<std::mutex> guard(lock_);
    for (Block& block : blocks_) {
      for (auto it = block.free.begin(); it != block.free.end(); ++it) {
        if (it->second >= bytes) return cut(block, it, bytes);
      }
    }
    Block& block = blocks_.emplace_back(bytes > kBlock ? bytes : kBlock);
    return cut(block, block.free.begin(), bytes);
  }

  static char* cut(Block& block, std::map<int64_t, int64_t>::iterator it, int64_t bytes) {
    const auto [at, size] = *it;
    block.free.erase(it);
    if (size > bytes) block.free[at + bytes] = size - bytes;
    block.used = true;
    return block.start() + at;
  }

  void give_back(char* place, int64_t bytes) {
    std::lock_guard<std::mutex> guard(lock_);
    for (Block& block : blocks_) {
      if (place < block.start() || place >= block.start() + block.size()) continue;
      auto it = block.free.emplace(place - block.start(), bytes).first;
      const auto next = std::next(it);
      if (next != block.free.end() && it->first + it->second == next->first) {
        it->second += next->second;
        block.free.erase(next);
      }
      if (it != block.free.begin()) {
        const auto before = std::prev(it);
        if (before->first + before->second == it->first) {
          before->second += it->second;
          block.free.erase(it);
        }
      }
      return;
    }
  }

  std::mutex lock_;
  int inside_ = 0;  // how often it was entered and not left
  std::vector<Block> blocks_;
};

}  // namespace rlrp
