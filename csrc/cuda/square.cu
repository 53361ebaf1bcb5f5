#include "launch.h"

#include "../square.h"
#include "../square_tensors.h"

namespace scorematch {
namespace {

// corner [N, 2], sign [N, C]; a block is one channel of one sample.
template <typename S, typename A>
__global__ void square_linf_kernel(const S* best, const S* x0, const int64_t* corner, const S* sign, S* out, int64_t samples,
                                   Image image, int64_t side, A eps, Box<A> box) {
  const int64_t count = image.channels * image.rows * image.columns;
  for (int64_t plane = blockIdx.x; plane < samples * image.channels; plane += gridDim.x) {
    const int64_t n = plane / image.channels, c = plane - n * image.channels;
    const Window window(corner + 2 * n, side, image);
    const A direction = static_cast<A>(sign[plane]);
    for (Walk at(BlockLanes<A>{nullptr}, image.columns); at.row < image.rows; at.next()) {
      const int64_t j = n * count + offset_in(image, c, at.row, at.column);
      const A inside = window.holds(at.row, at.column) ? direction : A(0);
      out[j] = static_cast<S>(linf_step(static_cast<A>(best[j]), inside, static_cast<A>(x0[j]), 2 * eps, eps, box));
    }
  }
}

template <typename S, typename A>
struct SquareL2Arguments {
  const S *best, *x0;         // [N, C, H, W]
  const int64_t* corner;      // [N, 4]
  const S* sign;              // [N, C]
  const S* pattern;           // [side, side]
  const bool* transpose;      // [N]
  S* out;                     // [N, C, H, W]
  SquareChannel<A>* channel;  // [N, C], scratch
  int64_t samples;
  Image image;
  int64_t side;
  A eps;
  Box<A> box;
};

// A block is one sample.
template <typename S, typename A>
__global__ void square_l2_kernel(SquareL2Arguments<S, A> args) {
  __shared__ A warp_results[kWarps];
  const BlockLanes<A> lanes{warp_results};
  const Image image = args.image;
  const int64_t count = image.channels * image.rows * image.columns, side = args.side;
  for (int64_t n = blockIdx.x; n < args.samples; n += gridDim.x) {
    const S *best = args.best + n * count, *x0 = args.x0 + n * count;
    const auto delta_at = [=](int64_t j) { return static_cast<A>(best[j]) - static_cast<A>(x0[j]); };
    A squares(0);
    for (int64_t j = lanes.lane(); j < count; j += lanes.width()) squares += delta_at(j) * delta_at(j);
    const A total = lanes.sum(squares);
    const A spare = positive_part(args.eps * args.eps - total) / A(image.channels);

    const Window gains(args.corner + 4 * n, side, image), loses(args.corner + 4 * n + 2, side, image);
    const int64_t down = args.transpose[n] ? 1 : side, along = args.transpose[n] ? side : 1;
    SquareChannel<A>* channels = args.channel + n * image.channels;
    A left = total, gained = 0;
    const auto bump_of = [=](int64_t c) {
      const A sign = static_cast<A>(args.sign[n * image.channels + c]);
      const S* pattern = args.pattern;
      return [=](int64_t row, int64_t column) { return static_cast<A>(pattern[row * down + column * along]) * sign; };
    };
    for (int64_t c = 0; c < image.channels; ++c) {
      const auto delta = [=](int64_t row, int64_t column) { return delta_at(offset_in(image, c, row, column)); };
      const SquareMove<A> move = square_move(lanes, delta, bump_of(c), gains, loses, spare);
      if (threadIdx.x == 0) channels[c] = move.channel;
      left -= move.lost;
      gained += move.gained;
    }
    __syncthreads();  // channels are read by all

    const A stretch = stretch_to(args.eps, left, gained);
    for (int64_t c = 0; c < image.channels; ++c) {
      const SquareChannel<A> channel = channels[c];
      const auto bump = bump_of(c);
      for (Walk at(lanes, image.columns); at.row < image.rows; at.next()) {
        const int64_t j = offset_in(image, c, at.row, at.column);
        A delta = delta_at(j);
        if (gains.holds(at.row, at.column))
          delta = square_eta(channel, bump(at.row - gains.row, at.column - gains.column), delta);
        else if (loses.holds(at.row, at.column))
          delta = A(0);
        args.out[n * count + j] =
            static_cast<S>(clamp(static_cast<A>(x0[j]) + delta * stretch, args.box.lower, args.box.upper));
      }
    }
  }
}

Tensor square_linf_cuda(const Tensor& best_, const Tensor& x0_, const Tensor& corner_, const Tensor& sign_, int64_t side,
                        double eps, double lower, double upper) {
  check_square({"best", best_}, {"x0", x0_}, {"corner", corner_}, 2, {"sign", sign_}, side);
  const DeviceGuard guard(best_.get_device_index());
  const auto format = memory_format(best_);
  const Tensor best = in_format(best_, format), x0 = in_format(x0_, format);
  const Tensor corner = as_contiguous(corner_), sign = as_contiguous(sign_);
  Tensor out = torch::stable::empty_like(best);
  if (best.numel() == 0) return out;
  const cudaStream_t stream = current_stream(best);
  dispatch(best.scalar_type(), "square_linf", CudaTypes{}, [&](auto type) {
    using S = decltype(type);
    using A = accumulator_of<S>;
    launch(square_linf_kernel<S, A>, blocks_for(best.size(0) * best.size(1), 1), stream, best.const_data_ptr<S>(),
           x0.const_data_ptr<S>(), corner.const_data_ptr<int64_t>(), sign.const_data_ptr<S>(), out.mutable_data_ptr<S>(),
           best.size(0), image_of(best), side, A(eps), Box<A>{A(lower), A(upper)});
  });
  return out;
}

Tensor square_l2_cuda(const Tensor& best_, const Tensor& x0_, const Tensor& corner_, const Tensor& sign_, const Tensor& pattern_,
                      const Tensor& transpose_, double eps, double lower, double upper) {
  const int64_t side = rows_of(pattern_);
  check_square({"best", best_}, {"x0", x0_}, {"corner", corner_}, 4, {"sign", sign_}, side);
  check_square_pattern({"best", best_}, {"pattern", pattern_}, {"transpose", transpose_});
  const DeviceGuard guard(best_.get_device_index());
  const auto format = memory_format(best_);
  const Tensor best = in_format(best_, format), x0 = in_format(x0_, format);
  const Tensor corner = as_contiguous(corner_), sign = as_contiguous(sign_), pattern = as_contiguous(pattern_),
               transpose = as_contiguous(transpose_);
  Tensor out = torch::stable::empty_like(best);
  if (best.numel() == 0) return out;
  const cudaStream_t stream = current_stream(best);
  dispatch(best.scalar_type(), "square_l2", CudaTypes{}, [&](auto type) {
    using S = decltype(type);
    using A = accumulator_of<S>;
    const Tensor channel = square_scratch<A>(best);
    const SquareL2Arguments<S, A> args{best.const_data_ptr<S>(),
                                       x0.const_data_ptr<S>(),
                                       corner.const_data_ptr<int64_t>(),
                                       sign.const_data_ptr<S>(),
                                       pattern.const_data_ptr<S>(),
                                       transpose.const_data_ptr<bool>(),
                                       out.mutable_data_ptr<S>(),
                                       static_cast<SquareChannel<A>*>(channel.mutable_data_ptr()),
                                       best.size(0),
                                       image_of(best),
                                       side,
                                       A(eps),
                                       {A(lower), A(upper)}};
    launch(square_l2_kernel<S, A>, blocks_for(args.samples, 1), stream, args);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scorematch, CUDA, m) {
  m.impl("square_linf", TORCH_BOX(&square_linf_cuda));
  m.impl("square_l2", TORCH_BOX(&square_l2_cuda));
}

}  // namespace scorematch
