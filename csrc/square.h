// Proposals of the Square Attack (Andriushchenko et al., ECCV 2020). Torch-free; shared by CPU and CUDA.
#pragma once
#include "threat_model.h"

namespace scorematch {

SCOREMATCH_INLINE int64_t offset_in(Image image, int64_t channel, int64_t row, int64_t column) {
  return channel * image.channel_stride + row * image.row_stride + column * image.column_stride;
}

// A square of `side` rows and columns, moved into the image if it protrudes.
struct Window {
  int64_t row, column, side;
  SCOREMATCH_INLINE Window(const int64_t* corner, int64_t side_, Image image)
      : row(within(corner[0], image.rows - side_)), column(within(corner[1], image.columns - side_)), side(side_) {}
  SCOREMATCH_INLINE bool holds(int64_t r, int64_t c) const {
    return row <= r && r < row + side && column <= c && c < column + side;
  }

 private:
  static SCOREMATCH_INLINE int64_t within(int64_t v, int64_t last) { return v < 0 ? 0 : v > last ? last : v; }
};

// Goes through the elements of a rectangle `columns` wide that a lane owns, row by row, without a division for each.
struct Walk {
  int64_t row, column;
  template <typename Lanes>
  SCOREMATCH_INLINE Walk(Lanes lanes, int64_t columns)
      : row(lanes.lane() / columns),
        column(lanes.lane() % columns),
        rows_a_step_(lanes.width() / columns),
        columns_a_step_(lanes.width() % columns),
        columns_(columns) {}
  SCOREMATCH_INLINE void next() {
    row += rows_a_step_;
    column += columns_a_step_;
    if (column >= columns_) {
      column -= columns_;
      ++row;
    }
  }

 private:
  int64_t rows_a_step_, columns_a_step_, columns_;
};

// max(v, 0); NaN stays.
template <typename A>
SCOREMATCH_INLINE A positive_part(A v) {
  return select(v < A(0), A(0), v);
}

constexpr double kSquareFloor = 1e-12;  // added to norms before division

template <typename A>
struct SquareMove {
  SquareChannel<A> channel;
  A lost, gained;  // ‖δ‖² in both windows, before and after
};

// delta(row, column) in the image, bump(row, column) in the window; spare is what each channel may gain in ‖δ‖².
template <typename A, typename Lanes, typename Delta, typename Bump>
SCOREMATCH_INLINE SquareMove<A> square_move(Lanes lanes, Delta delta, Bump bump, Window gains, Window loses, A spare) {
  const int64_t side = gains.side;
  A own(0), other(0);
  for (Walk at(lanes, side); at.row < side; at.next()) {
    const A d = delta(gains.row + at.row, gains.column + at.column);
    own += d * d;
    const int64_t row = loses.row + at.row, column = loses.column + at.column;
    if (!gains.holds(row, column)) {
      const A e = delta(row, column);
      other += e * e;
    }
  }
  own = lanes.sum(own);
  const A lost = own + lanes.sum(other);
  const A inverse = A(1) / (A(kSquareFloor) + square_root(own));
  A squares(0);
  for (Walk at(lanes, side); at.row < side; at.next()) {
    const A eta = bump(at.row, at.column) + delta(gains.row + at.row, gains.column + at.column) * inverse;
    squares += eta * eta;
  }
  squares = lanes.sum(squares);
  const A factor = square_root(spare + lost) / (A(kSquareFloor) + square_root(squares));
  return {{inverse, factor}, lost, squares * factor * factor};
}

// η of an element where the perturbation was δ
template <typename A>
SCOREMATCH_INLINE A square_eta(SquareChannel<A> channel, A bump, A delta) {
  return (bump + delta * channel.inverse) * channel.factor;
}

// The factor that brings the new perturbation to length eps, from its ‖·‖² outside and inside the windows; NaN stays.
template <typename A>
SCOREMATCH_INLINE A stretch_to(A eps, A outside, A inside) {
  return eps / (A(kSquareFloor) + square_root(positive_part(outside) + inside));
}

}  // namespace scorematch
