// What every CUDA launcher needs: the current stream, grid sizes, rows in global memory.
#pragma once
#include "../tensor.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../lanes.h"

namespace scorematch {

using torch::stable::accelerator::DeviceGuard;
using CudaTypes = Types<float, double, torch::headeronly::Half, torch::headeronly::BFloat16>;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) != 0) refuse("no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Blocks for `count` units of work at `per_block` a block; kernels loop with a grid stride, so the limit only bounds
// the grid.
inline unsigned blocks_for(int64_t count, int64_t per_block) {
  return static_cast<unsigned>(std::min<int64_t>((count + per_block - 1) / per_block, int64_t(1) << 20));
}

#if defined(__CUDACC__)
// Queue a kernel with blocks of kThreads. Without nvcc, the emulated CUDA runtime defines launch().
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<blocks, kThreads, 0, stream>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}
#endif

__device__ inline int64_t first_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t index_stride() { return int64_t(gridDim.x) * blockDim.x; }

// A row in global memory, read and written in the accumulator type A.
template <typename A, typename S>
struct DeviceRow {
  S* data;
  __device__ A operator()(int64_t j) const { return static_cast<A>(data[j]); }
  __device__ A get(int64_t j) const { return static_cast<A>(data[j]); }
  __device__ void put(int64_t j, A value) const { data[j] = static_cast<S>(value); }
  __device__ void operator()(int64_t j, A value) const { put(j, value); }
};

}  // namespace scorematch
