// The options of the ops, under the numbers that scorematch/ops passes. Torch-free, no functions.
#pragma once
#include <cstdint>

namespace scorematch {

enum class Norm : int64_t { linf = 0, l2 = 1, l1 = 2 };

template <typename T>
struct Box {
  T lower, upper;  // either may be infinite
};

template <typename T>
struct ApgdOptions {
  T eps;
  T momentum, inertia;  // inertia = 1 - momentum, rounded once
  Box<T> box;
};

template <typename T>
struct FabOptions {
  T alpha_max, overshoot;
  Box<T> box;  // finite
};

// A sample [C, H, W]: its sizes, and the distance between neighbours in each dimension.
struct Image {
  int64_t channels, rows, columns;
  int64_t channel_stride, row_stride, column_stride;
};

// One channel of Square's l2 move: η = (bump + δ inverse) factor in the window that gains, where δ is the perturbation.
template <typename A>
struct SquareChannel {
  A inverse, factor;
};

enum class Kind : int64_t { kl = 0, se, l2, l1, linf, js, js_distance, l1_squared };
constexpr int64_t kKinds = 8;

enum class TargetForm { classes, probabilities, logits };

}  // namespace scorematch
