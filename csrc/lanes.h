// How the elements of one row are shared out.
//
// A row body (threat_model.h, divergence.h, score_step.h) is written once against this contract and runs on a CPU
// thread, on the SIMD lanes of a CPU thread, on a GPU warp and on a GPU block:
//
//   lane(), width()   this lane owns the elements lane(), lane() + width(), lane() + 2 width(), ...
//   sum(v), max(v)    the reduction of v over all lanes, returned to every lane; every lane must call it.
//                     max may lose a NaN: row bodies must see NaN by way of a sum.
//   keeps_exponentials  memory near this lane is cheaper than a second exponential.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define SCOREMATCH_INLINE __host__ __device__ __forceinline__
#define SCOREMATCH_UNROLL _Pragma("unroll")
#else
#define SCOREMATCH_INLINE inline __attribute__((always_inline))
#define SCOREMATCH_UNROLL _Pragma("GCC unroll 16")
#endif

namespace scorematch {

// One lane that owns the whole row. The value type may still be a pack of rows (cpu/pack.h).
struct SerialLanes {
  static constexpr bool keeps_exponentials = true;
  SCOREMATCH_INLINE int64_t lane() const { return 0; }
  SCOREMATCH_INLINE int64_t width() const { return 1; }
  template <typename A>
  SCOREMATCH_INLINE A sum(A v) const {
    return v;
  }
  template <typename A>
  SCOREMATCH_INLINE A max(A v) const {
    return v;
  }
};

#if defined(__CUDACC__) || defined(SCOREMATCH_EMULATED_DEVICE)

// The 32 lanes of a warp share one row.
struct WarpLanes {
  static constexpr bool keeps_exponentials = false;
  __device__ int64_t lane() const { return threadIdx.x & 31; }
  __device__ int64_t width() const { return 32; }
  template <typename A>
  __device__ A sum(A v) const {
    for (int offset = 16; offset != 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
  }
  template <typename A>
  __device__ A max(A v) const {
    for (int offset = 16; offset != 0; offset >>= 1) {
      const A other = __shfl_xor_sync(0xffffffffu, v, offset);
      v = other > v ? other : v;
    }
    return v;
  }
};

// All threads of a block share one row. `warp_results` is shared memory for one value of each of up to 32 warps.
template <typename A>
struct BlockLanes {
  static constexpr bool keeps_exponentials = false;
  A* warp_results;

  __device__ int64_t lane() const { return threadIdx.x; }
  __device__ int64_t width() const { return blockDim.x; }
  __device__ A sum(A v) const { return across_warps(WarpLanes{}.sum(v), A(0), [](A a, A b) { return a + b; }); }
  __device__ A max(A v) const {
    return across_warps(WarpLanes{}.max(v), A(-INFINITY), [](A a, A b) { return b > a ? b : a; });
  }

 private:
  template <typename Reduce>
  __device__ A across_warps(A v, A neutral, Reduce reduce) const {
    const int warps = blockDim.x / 32;
    if ((threadIdx.x & 31) == 0) warp_results[threadIdx.x / 32] = v;
    __syncthreads();
    A total = neutral;
    for (int w = 0; w < warps; ++w) total = reduce(total, warp_results[w]);
    __syncthreads();  // the next reduction overwrites warp_results
    return total;
  }
};

#endif  // __CUDACC__ || SCOREMATCH_EMULATED_DEVICE

}  // namespace scorematch
