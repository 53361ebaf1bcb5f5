#include "../keyed_tensors.h"
#include "parallel.h"

namespace scorematch {
namespace {

Tensor keyed_uniform_cpu(const Tensor& samples_, int64_t count, int64_t seed, int64_t stream, ScalarType dtype) {
  Tensor out = keyed_output(samples_, count, seed, stream, dtype);
  if (out.numel() == 0) return out;
  const Tensor samples = as_contiguous(samples_);
  const int64_t* ids = samples.const_data_ptr<int64_t>();
  const int64_t rows = samples.size(0), blocks = (count + 3) / 4;
  for (int64_t n = 0; n < rows; ++n)
    if (ids[n] < 0 || ids[n] >= kCounters) refuse("samples must be at least 0 and less than 2^32, got ", ids[n], " at ", n);
  dispatch(dtype, "keyed_uniform", CpuTypes{}, [&](auto type) {
    using T = decltype(type);
    run_parallel(KeyedUniform<T>{ids, out.mutable_data_ptr<T>(), count, blocks, static_cast<uint64_t>(seed),
                                 static_cast<uint64_t>(stream)},
                 rows * blocks, 2048);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CPU, m) {
  m.impl("keyed_uniform", TORCH_BOX(&keyed_uniform_cpu));
}

}  // namespace scorematch
