// The options of the ops, under the numbers that scorematch/ops passes. Torch-free, no functions.
#pragma once
#include <cstdint>

namespace scorematch {

enum class Norm : int64_t { linf = 0, l2 = 1 };

template <typename T>
struct Box {
  T lower, upper;  // either may be infinite
};

enum class Kind : int64_t { kl = 0, se, l2, l1, linf, js, js_distance, l1_squared };
constexpr int64_t kKinds = 8;

enum class TargetForm { classes, probabilities, logits };

}  // namespace scorematch
