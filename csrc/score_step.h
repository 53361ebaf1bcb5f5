// The data gradient of direct SCORE and the change of the class posterior along a move. Torch-free.
#pragma once
#include "arithmetic.h"

namespace scorematch {

// grad + Σ_y w_y s_y at `count` neighbouring features (paper Eq. 33 in covariance form: with w = c - p Σ c the
// unconditional score of Eq. 34 cancels). `score(y, k)` is s_y at the k-th of them. Classes are outermost so that the
// scores of a class are read in one run.
template <int count, typename A, typename Weights, typename Scores>
SCOREMATCH_INLINE void add_weighted_scores(A (&totals)[count], Weights weight, Scores score, int64_t classes) {
  for (int64_t y = 0; y < classes; ++y) {
    const A w = weight(y);
    SCOREMATCH_UNROLL
    for (int k = 0; k < count; ++k) totals[k] += w * score(y, k);
  }
}

// ½ Σ_f move_f (s0_f + s1_f): the trapezoid rule for ∫ moveᵀ s(x + t move) dt. Four partial sums keep both the
// rounding error and the latency of the additions small.
template <typename A, typename Lanes, typename Move, typename Score0, typename Score1>
SCOREMATCH_INLINE A trapezoid(Lanes lanes, Move move, Score0 score0, Score1 score1, int64_t count) {
  constexpr int ways = 4;
  A partial[ways] = {A(0), A(0), A(0), A(0)};
  const int64_t width = lanes.width();
  int64_t j = lanes.lane();
  for (; j + (ways - 1) * width < count; j += ways * width) {
    SCOREMATCH_UNROLL
    for (int k = 0; k < ways; ++k) {
      const int64_t at = j + k * width;
      partial[k] += move(at) * (score0(at) + score1(at));
    }
  }
  for (; j < count; j += width) partial[0] += move(j) * (score0(j) + score1(j));
  const A total = (partial[0] + partial[1]) + (partial[2] + partial[3]);
  return A(scalar_of<A>(0.5)) * lanes.sum(total);
}

}  // namespace scorematch
