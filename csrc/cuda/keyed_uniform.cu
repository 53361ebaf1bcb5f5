#include "launch.h"

#include "../keyed_tensors.h"
#include "../philox.h"

namespace scorematch {
namespace {

// samples [N], out [N, count]; a thread makes four numbers of one sample.
template <typename T>
__global__ void keyed_uniform_kernel(const int64_t* samples, T* out, int64_t rows, int64_t count, int64_t blocks, uint64_t seed,
                                     uint64_t stream) {
  for (int64_t i = first_index(); i < rows * blocks; i += index_stride()) {
    const int64_t n = i / blocks, block = i - n * blocks, sample = samples[n];
    uint32_t words[4][1] = {{static_cast<uint32_t>(block)},
                            {static_cast<uint32_t>(sample)},
                            {static_cast<uint32_t>(stream)},
                            {static_cast<uint32_t>(stream >> 32)}};
    philox(words, seed);
    const bool known = 0 <= sample && sample < kCounters;
    SCOREMATCH_UNROLL
    for (int k = 0; k < 4; ++k)
      if (4 * block + k < count) out[n * count + 4 * block + k] = known ? unit_interval<T>(words[k][0]) : T(NAN);
  }
}

Tensor keyed_uniform_cuda(const Tensor& samples_, int64_t count, int64_t seed, int64_t stream, ScalarType dtype) {
  const DeviceGuard guard(samples_.get_device_index());
  Tensor out = keyed_output(samples_, count, seed, stream, dtype);
  if (out.numel() == 0) return out;
  const Tensor samples = as_contiguous(samples_);
  const int64_t rows = samples.size(0), blocks = (count + 3) / 4;
  dispatch(dtype, "keyed_uniform", Types<float, double>{}, [&](auto type) {
    using T = decltype(type);
    launch(keyed_uniform_kernel<T>, blocks_for(rows * blocks, kThreads), current_stream(samples),
           samples.const_data_ptr<int64_t>(), out.mutable_data_ptr<T>(), rows, count, blocks, static_cast<uint64_t>(seed),
           static_cast<uint64_t>(stream));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CUDA, m) {
  m.impl("keyed_uniform", TORCH_BOX(&keyed_uniform_cuda));
}

}  // namespace scorematch
