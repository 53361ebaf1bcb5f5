#include "../square_tensors.h"
#include "parallel.h"

namespace scorematch {
namespace {

Tensor square_linf_cpu(const Tensor& best_, const Tensor& x0_, const Tensor& corner_, const Tensor& sign_, int64_t side,
                       double eps, double lower, double upper) {
  check_square({"best", best_}, {"x0", x0_}, {"corner", corner_}, 2, {"sign", sign_}, side);
  const auto format = memory_format(best_);
  const Tensor best = in_format(best_, format), x0 = in_format(x0_, format);
  const Tensor corner = as_contiguous(corner_), sign = as_contiguous(sign_);
  Tensor out = torch::stable::empty_like(best);
  if (best.numel() == 0) return out;
  dispatch(best.scalar_type(), "square_linf", CpuTypes{}, [&](auto type) {
    using T = decltype(type);
    run_parallel(SquareLinf<T>{best.const_data_ptr<T>(), x0.const_data_ptr<T>(), corner.const_data_ptr<int64_t>(),
                               sign.const_data_ptr<T>(), out.mutable_data_ptr<T>(), image_of(best), side, T(eps),
                               {T(lower), T(upper)}},
                 best.size(0), worth_a_thread(16384, elements_per_row(best)));
  });
  return out;
}

Tensor square_l2_cpu(const Tensor& best_, const Tensor& x0_, const Tensor& corner_, const Tensor& sign_, const Tensor& pattern_,
                     const Tensor& transpose_, double eps, double lower, double upper) {
  const int64_t side = rows_of(pattern_);
  check_square({"best", best_}, {"x0", x0_}, {"corner", corner_}, 4, {"sign", sign_}, side);
  check_square_pattern({"best", best_}, {"pattern", pattern_}, {"transpose", transpose_});
  const auto format = memory_format(best_);
  const Tensor best = in_format(best_, format), x0 = in_format(x0_, format);
  const Tensor corner = as_contiguous(corner_), sign = as_contiguous(sign_), pattern = as_contiguous(pattern_),
               transpose = as_contiguous(transpose_);
  Tensor out = torch::stable::empty_like(best);
  if (best.numel() == 0) return out;
  dispatch(best.scalar_type(), "square_l2", CpuTypes{}, [&](auto type) {
    using T = decltype(type);
    const Tensor channel = square_scratch<T>(best);
    run_parallel(SquareL2<T>{best.const_data_ptr<T>(), x0.const_data_ptr<T>(), corner.const_data_ptr<int64_t>(),
                             sign.const_data_ptr<T>(), pattern.const_data_ptr<T>(), transpose.const_data_ptr<bool>(),
                             out.mutable_data_ptr<T>(), static_cast<SquareChannel<T>*>(channel.mutable_data_ptr()),
                             image_of(best), side, T(eps), {T(lower), T(upper)}},
                 best.size(0), worth_a_thread(8192, elements_per_row(best)));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CPU, m) {
  m.impl("square_linf", TORCH_BOX(&square_linf_cpu));
  m.impl("square_l2", TORCH_BOX(&square_l2_cpu));
}

}  // namespace scorematch
