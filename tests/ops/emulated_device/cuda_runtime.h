// Stands for the CUDA runtime: csrc/cuda, compiled by a C++ compiler, runs on the CPU as on a GPU (build.py).
//
// A block is 256 fibers of one thread. A fiber runs until it waits for the other lanes of its warp (a shuffle) or for
// the other threads of its block (a barrier), and another one goes on. Blocks run one after the other, and there are
// three at most, so that kernels meet their grid stride. What a GPU leaves open is decided by the schedule, in several
// ways, so that a result that depends on it changes:
//
//   SCOREMATCH_SCHEDULE=first   the first thread runs as far as it can before the next one begins (the default)
//   SCOREMATCH_SCHEDULE=last    the last one does
//   SCOREMATCH_SCHEDULE=N       a thread is drawn at random each time, by the seed N
//
// Fails, with an exception that the caller of the operator gets: a barrier or a shuffle that not all threads concerned
// reach, lanes that shuffle differently. Blocks leave their shared memory to the next, as on a GPU. Reads and writes
// outside of a tensor or of shared memory are for the address sanitizer to find.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static

using std::max;
using std::min;

struct cudaStreamOfTheEmulatedDevice;
using cudaStream_t = cudaStreamOfTheEmulatedDevice*;
inline int aoti_torch_get_current_cuda_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

constexpr int kWarp = 32;
constexpr unsigned kMostBlocks = 3;
constexpr size_t kStack = 64 * 1024;  // the address sanitizer clears its notes on all of it at each switch

enum class State : char { ready, shuffling, at_barrier, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  int shuffles = 0;
};

struct Warp {
  int arrived = 0, lane_mask = 0;
  double slots[2][kWarp];  // of one shuffle and the next: who is ahead must not overwrite what others still read
};

// The threads of one block.
class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  void run(int threads, const std::function<void()>& body) {
    body_ = &body;
    const char* schedule = std::getenv("SCOREMATCH_SCHEDULE");
    schedule_ = schedule == nullptr ? "first" : schedule;
    fibers_.resize(static_cast<size_t>(threads));
    states_.assign(static_cast<size_t>(threads), State::ready);
    warps_.assign(static_cast<size_t>((threads + kWarp - 1) / kWarp), Warp{});
    at_barrier_ = 0;
    for (int t = 0; t < threads; ++t) prepare(t);
    for (int t = next(); t >= 0; t = next()) resume(t);
    const std::string stuck = unfinished();
    if (failure_ || !stuck.empty()) fibers_.clear();  // their stacks are of no use any more
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    if (!stuck.empty()) throw std::logic_error("a block is stuck: " + stuck);
  }

  void barrier() {
    if (++at_barrier_ == static_cast<int>(fibers_.size())) {
      at_barrier_ = 0;
      std::fill(states_.begin(), states_.end(), State::ready);
      return yield();
    }
    state() = State::at_barrier;
    yield();
  }

  template <typename T>
  T shuffle_xor(unsigned mask, T value, int lane_mask) {
    static_assert(sizeof(T) <= sizeof(double));
    if (mask != 0xffffffffu) throw std::logic_error("a shuffle by a part of a warp is not emulated");
    const int t = running_, lane = t % kWarp;
    Warp& warp = warps_[static_cast<size_t>(t / kWarp)];
    if (warp.arrived > 0 && warp.lane_mask != lane_mask)
      throw std::logic_error("the lanes of a warp shuffle differently");
    warp.lane_mask = lane_mask;
    auto& slots = warp.slots[running().shuffles++ % 2];
    std::memcpy(&slots[lane], &value, sizeof(T));
    if (++warp.arrived == kWarp) {
      warp.arrived = 0;
      std::fill_n(states_.begin() + (t - lane), kWarp, State::ready);
    } else {
      state() = State::shuffling;
    }
    yield();
    T result;
    std::memcpy(&result, &slots[(lane ^ lane_mask) % kWarp], sizeof(T));
    return result;
  }

 private:
  Fiber& running() { return fibers_[static_cast<size_t>(running_)]; }
  State& state() { return states_[static_cast<size_t>(running_)]; }

  void prepare(int t) {
    Fiber& fiber = fibers_[static_cast<size_t>(t)];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.shuffles = 0;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  static void enter() {
    Block& block = current();
    block.arrive(nullptr);
    try {
      (*block.body_)();
    } catch (...) {
      if (!block.failure_) block.failure_ = std::current_exception();
    }
    block.state() = State::done;
    block.leave(nullptr);
  }

  // The fiber whose turn it is, or -1.
  int next() {
    static std::mt19937 random(static_cast<unsigned>(std::strtoul(schedule_.c_str(), nullptr, 10)));
    const int count = static_cast<int>(fibers_.size());
    const bool last = schedule_ == "last";
    const int start = last || schedule_ == "first" ? 0 : static_cast<int>(random() % static_cast<unsigned>(count));
    for (int k = 0; k < count; ++k) {
      const int t = last ? count - 1 - k : (start + k) % count;
      if (states_[static_cast<size_t>(t)] == State::ready) return t;
    }
    return -1;
  }

  void resume(int t) {
    running_ = t;
    threadIdx.x = static_cast<unsigned>(t);
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fibers_[static_cast<size_t>(t)].stack.get(), kStack);
#endif
    swapcontext(&scheduler_, &running().context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  void yield() {
    void* fake = nullptr;
    leave(&fake);
    arrive(fake);
  }

  // From the fiber to the scheduler, and back in it.
  void leave([[maybe_unused]] void** fake) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake, scheduler_bottom_, scheduler_size_);
#endif
    swapcontext(&running().context, &scheduler_);
  }
  void arrive([[maybe_unused]] void* fake) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &scheduler_bottom_, &scheduler_size_);
#endif
  }

  std::string unfinished() const {
    const auto count = [&](State state) { return std::count(states_.begin(), states_.end(), state); };
    const auto barrier = count(State::at_barrier), shuffle = count(State::shuffling), done = count(State::done);
    if (barrier + shuffle == 0) return "";
    return std::to_string(barrier) + " threads wait at a barrier, " + std::to_string(shuffle) + " in a shuffle, " +
           std::to_string(done) + " have ended";
  }

  std::vector<Fiber> fibers_;
  std::vector<State> states_;
  std::vector<Warp> warps_;
  const std::function<void()>* body_ = nullptr;
  std::string schedule_;
  std::exception_ptr failure_;
  ucontext_t scheduler_;
  int running_ = 0, at_barrier_ = 0;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
};

// What ran, for the tests: a line for each launch in the file that SCOREMATCH_LAUNCHES names, with the blocks that were
// asked for and those that there were. If there were fewer, threads met the grid stride.
inline void record(const char* kernel, unsigned asked_for, unsigned blocks) {
  const char* path = std::getenv("SCOREMATCH_LAUNCHES");
  if (path == nullptr) return;
  const std::string name(kernel, std::strcspn(kernel, "<,("));
  std::FILE* file = std::fopen(path, "a");
  if (file == nullptr) throw std::runtime_error(std::string("cannot write ") + path);
  std::fprintf(file, "%s %u %u\n", name.c_str(), asked_for, blocks);
  std::fclose(file);
}

template <int threads, typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), unsigned blocks, cudaStream_t,
            const Arguments&... arguments) {
  blockDim.x = threads;
  gridDim.x = min(blocks, kMostBlocks);
  record(name, blocks, gridDim.x);
  const std::function<void()> body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) Block::current().run(threads, body);
}

}  // namespace emulated

#define launch(...) emulated::launch<kThreads>(#__VA_ARGS__, __VA_ARGS__)

inline void __syncthreads() { emulated::Block::current().barrier(); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return emulated::Block::current().shuffle_xor(mask, value, lane_mask);
}
