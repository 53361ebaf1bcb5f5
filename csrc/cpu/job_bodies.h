// How each job of jobs.h is done: the shared row bodies on SIMD packs. Included once for each instruction set.
#pragma once
#include "standard_library.h"

#include "../apgd_step.h"
#include "../divergence.h"
#include "../fab_step.h"
#include "../l1_step.h"
#include "../philox.h"
#include "../score_step.h"
#include "../square.h"
#include "../threat_model.h"
#include "jobs.h"
#include "pack.h"

namespace scorematch {

template <typename P>
SCOREMATCH_INLINE PackedRow<P> row_of(const scalar_of<P>* data, int64_t count, scalar_of<P> rest = 0) {
  return {data, count, rest};
}

template <typename P, typename T>
SCOREMATCH_INLINE void work(const LinfStep<T>& job, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + P::size <= end; i += P::size)
    linf_step(P::load(job.x + i), P::load(job.grad + i), P::load(job.x0 + i), job.step_size, job.eps, job.box).store(job.out + i);
  for (; i < end; ++i) job.out[i] = linf_step(job.x[i], job.grad[i], job.x0[i], job.step_size, job.eps, job.box);
}

template <typename P, typename T>
SCOREMATCH_INLINE void work(const L2Step<T>& job, int64_t begin, int64_t end) {
  const int64_t count = job.features;
  for (int64_t n = begin; n < end; ++n)
    l2_step_row<P>(PackLanes<P>{}, row_of<P>(job.x + n * count, count), row_of<P>(job.grad + n * count, count),
                   row_of<P>(job.x0 + n * count, count), PackedOutput<P>{job.out + n * count, count}, count, job.step_size,
                   job.eps, job.box);
}

template <typename P, typename T>
SCOREMATCH_INLINE void work(const LinfRandomStart<T>& job, int64_t begin, int64_t end) {
  int64_t i = begin;
  for (; i + P::size <= end; i += P::size)
    linf_random_start(P::load(job.x + i), P::load(job.noise + i), job.eps, job.box).store(job.out + i);
  for (; i < end; ++i) job.out[i] = linf_random_start(job.x[i], job.noise[i], job.eps, job.box);
}

template <typename P, typename T>
SCOREMATCH_INLINE void work(const L2RandomStart<T>& job, int64_t begin, int64_t end) {
  const int64_t count = job.features;
  for (int64_t n = begin; n < end; ++n)
    l2_random_start_row<P>(PackLanes<P>{}, row_of<P>(job.x + n * count, count), row_of<P>(job.noise + n * count, count),
                           PackedOutput<P>{job.out + n * count, count}, count,
                           job.radius == nullptr ? job.eps : job.eps * clamp(job.radius[n], T(0), T(1)), job.box);
}

template <typename P, typename T>
SCOREMATCH_INLINE void work(const ApgdStep<T>& job, int64_t begin, int64_t end) {
  const int64_t count = job.features;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t at = n * count;
    T *x = job.x + at, *x_prev = job.x_prev + at;
    if (job.improved[n]) {
      std::memcpy(job.best_x + at, x, count * sizeof(T));
      std::memcpy(job.best_grad + at, job.grad + at, count * sizeof(T));
    }
    const T* start = job.restart[n] ? job.best_x + at : x;
    const T* grad = (job.restart[n] ? job.best_grad : job.grad) + at;
    const T* x0 = job.x0 + at;
    if (job.norm == Norm::l2) {
      // Beyond the end of a row all points are one and the same of the box, so that nothing there moves or counts.
      const T rest = clamp(T(0), job.options.box.lower, job.options.box.upper);
      apgd_l2_row<P>(PackLanes<P>{}, row_of<P>(start, count, rest), row_of<P>(grad, count), row_of<P>(x0, count, rest),
                     row_of<P>(x_prev, count, rest), PackedOutput<P>{x, count}, PackedOutput<P>{x_prev, count}, count,
                     job.step_size[n], job.options);
      continue;
    }
    int64_t j = 0;
    for (; j + P::size <= count; j += P::size) {
      const P from = P::load(start + j);
      const P next = apgd_linf(from, P::load(grad + j), P::load(x_prev + j), P::load(x0 + j), job.step_size[n], job.options);
      from.store(x_prev + j);
      next.store(x + j);
    }
    for (; j < count; ++j) {
      const T from = start[j];
      const T next = apgd_linf(from, grad[j], x_prev[j], x0[j], job.step_size[n], job.options);
      x_prev[j] = from;
      x[j] = next;
    }
  }
}

template <typename P, typename T>
SCOREMATCH_INLINE void work(const L1Step<T>& job, int64_t begin, int64_t end) {
  const int64_t count = job.features;
  for (int64_t n = begin; n < end; ++n)  // beyond the end of a row x is x0 and grad 0, so that nothing there moves or counts
    l1_step_row<P>(PackLanes<P>{}, row_of<P>(job.x + n * count, count), row_of<P>(job.grad + n * count, count),
                   row_of<P>(job.x0 + n * count, count), PackedOutput<P>{job.out + n * count, count}, count, job.step_size[n],
                   T(job.moving[n]), job.eps, job.box);
}

template <Norm norm, typename P, typename T>
SCOREMATCH_INLINE void fab_step_of_sample(const FabStep<T>& job, int64_t n) {
  const int64_t count = job.features, at = n * count;
  // Beyond the end of a row the normal is 0, so that nothing there moves or counts.
  fab_step_row<norm, P>(PackLanes<P>{}, row_of<P>(job.x + at, count), row_of<P>(job.x0 + at, count),
                        row_of<P>(job.normal + at, count), PackedOutput<P>{job.out + at, count}, count, job.difference[n],
                        job.options);
}

template <typename P, typename T>
SCOREMATCH_INLINE void work(const FabStep<T>& job, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    if (job.norm == Norm::linf)
      fab_step_of_sample<Norm::linf, P>(job, n);
    else if (job.norm == Norm::l2)
      fab_step_of_sample<Norm::l2, P>(job, n);
    else
      fab_step_of_sample<Norm::l1, P>(job, n);
  }
}

// out[j] = element(j) for j in [begin, end); element takes and returns packs as well as scalars.
template <typename P, typename T, typename Element>
SCOREMATCH_INLINE void for_each_element(T* out, int64_t begin, int64_t end, Element element) {
  int64_t j = begin;
  for (; j + P::size <= end; j += P::size) element([j](const T* p) { return P::load(p + j); }).store(out + j);
  for (; j < end; ++j) out[j] = element([j](const T* p) { return p[j]; });
}

template <typename P, typename T>
SCOREMATCH_INLINE void work(const SquareLinf<T>& job, int64_t begin, int64_t end) {
  const Image image = job.image;
  const int64_t count = image.channels * image.rows * image.columns;
  for (int64_t n = begin; n < end; ++n) {
    const T *best = job.best + n * count, *x0 = job.x0 + n * count;
    T* out = job.out + n * count;
    for_each_element<P>(out, 0, count, [=](auto at) { return linf_projection(at(best), at(x0), job.eps, job.box); });
    const Window window(job.corner + 2 * n, job.side, image);
    for (int64_t c = 0; c < image.channels; ++c) {
      const T move = sign(job.sign[n * image.channels + c]) * (2 * job.eps);
      const auto moved = [=](auto at) {
        const auto b = at(best);
        return linf_projection(b + decltype(b + b)(move), at(x0), job.eps, job.box);
      };
      for (int64_t row = window.row; row < window.row + job.side; ++row) {
        const int64_t first = offset_in(image, c, row, window.column);
        if (image.column_stride == 1)
          for_each_element<P>(out, first, first + job.side, moved);
        else
          for (int64_t k = 0, j = first; k < job.side; ++k, j += image.column_stride)
            out[j] = moved([j](const T* p) { return p[j]; });
      }
    }
  }
}

template <typename P, typename T>
SCOREMATCH_INLINE void work(const SquareL2<T>& job, int64_t begin, int64_t end) {
  const Image image = job.image;
  const Box<T> box = job.box;
  const int64_t count = image.channels * image.rows * image.columns, side = job.side;
  for (int64_t n = begin; n < end; ++n) {
    const T *best = job.best + n * count, *x0 = job.x0 + n * count;
    T* out = job.out + n * count;
    const auto best_row = row_of<P>(best, count), x0_row = row_of<P>(x0, count);
    P squares(T(0));
    for (int64_t j = 0; j < count; j += P::size) {
      const P d = best_row(j) - x0_row(j);
      squares += d * d;
    }
    const T total = uniform(PackLanes<P>{}.sum(squares));
    const T spare = positive_part(job.eps * job.eps - total) / T(image.channels);

    const Window gains(job.corner + 4 * n, side, image), loses(job.corner + 4 * n + 2, side, image);
    const T* signs = job.sign + n * image.channels;
    const int64_t down = job.transpose[n] ? 1 : side, along = job.transpose[n] ? side : 1;
    const T* pattern = job.pattern;
    SquareChannel<T>* channels = job.channel + n * image.channels;
    T left = total, gained = 0;
    for (int64_t c = 0; c < image.channels; ++c) {
      const auto delta = [=](int64_t row, int64_t column) {
        const int64_t j = offset_in(image, c, row, column);
        return best[j] - x0[j];
      };
      const auto bump = [=](int64_t row, int64_t column) { return pattern[row * down + column * along] * signs[c]; };
      const SquareMove<T> move = square_move(SerialLanes{}, delta, bump, gains, loses, spare);
      channels[c] = move.channel;
      left = left - move.lost;
      gained = gained + move.gained;
    }

    const T stretch = stretch_to(job.eps, left, gained);
    for_each_element<P>(out, 0, count, [=](auto at) {
      const auto centre = at(x0);
      using A = decltype(centre + centre);
      return clamp(centre + (at(best) - centre) * A(stretch), A(box.lower), A(box.upper));
    });
    for (int64_t c = 0; c < image.channels; ++c) {
      for (int64_t row = 0; row < side; ++row)
        for (int64_t column = 0; column < side; ++column) {
          const int64_t j = offset_in(image, c, loses.row + row, loses.column + column);
          out[j] = clamp(x0[j] + T(0) * stretch, box.lower, box.upper);
        }
      for (int64_t row = 0; row < side; ++row)
        for (int64_t column = 0; column < side; ++column) {
          const int64_t j = offset_in(image, c, gains.row + row, gains.column + column);
          const T eta = square_eta(channels[c], pattern[row * down + column * along] * signs[c], best[j] - x0[j]);
          out[j] = clamp(x0[j] + eta * stretch, box.lower, box.upper);
        }
    }
  }
}

template <int ways, typename T>
SCOREMATCH_INLINE void set_counter(uint32_t (&words)[4][ways], const KeyedUniform<T>& job, int i, int64_t n, int64_t block) {
  words[0][i] = static_cast<uint32_t>(block);
  words[1][i] = static_cast<uint32_t>(job.samples[n]);
  words[2][i] = static_cast<uint32_t>(job.stream);
  words[3][i] = static_cast<uint32_t>(job.stream >> 32);
}

// A pack of counters at a time. They run on from one sample to the next, because an attack draws few numbers a sample.
template <typename P, typename T>
SCOREMATCH_INLINE void work(const KeyedUniform<T>& job, int64_t begin, int64_t end) {
  constexpr int ways = sizeof(P) / sizeof(uint32_t);
  uint32_t words[4][ways] = {};
  int64_t n = begin / job.blocks, block = begin % job.blocks;
  for (int64_t first = begin; first < end;) {
    T* row = job.out + n * job.count;
    if (first + ways <= end && 4 * (block + ways) <= job.count) {
      for (int i = 0; i < ways; ++i) set_counter(words, job, i, n, block + i);
      philox(words, job.seed);
      for (int i = 0; i < ways; ++i)
        for (int k = 0; k < 4; ++k) row[4 * (block + i) + k] = unit_interval<T>(words[k][i]);
      first += ways;
      block += ways;
      if (block == job.blocks) {
        block = 0;
        ++n;
      }
      continue;
    }
    T* to[ways];
    int64_t wanted[ways];  // numbers of each counter
    int used = 0;
    for (; used < ways && first < end; ++used, ++first) {
      set_counter(words, job, used, n, block);
      to[used] = job.out + n * job.count + 4 * block;
      wanted[used] = job.count - 4 * block < 4 ? job.count - 4 * block : 4;
      if (++block == job.blocks) {
        block = 0;
        ++n;
      }
    }
    philox(words, job.seed);
    for (int i = 0; i < used; ++i)
      for (int k = 0; k < wanted[i]; ++k) to[i][k] = unit_interval<T>(words[k][i]);
  }
}

// Up to this many classes the elements of a pack are rows, and a tile of rows is transposed on the way in and out;
// beyond, the elements are classes of one row.
constexpr int64_t kMostClassesAcrossRows = 32;

template <typename P>
struct Tile {
  using T = scalar_of<P>;
  T values[kMostClassesAcrossRows * P::size] __attribute__((aligned(64)));

  SCOREMATCH_INLINE void load(const T* p, int64_t rows, int64_t classes) {
    for (int64_t i = 0; i < P::size; ++i) {
      const T* row = p + (i < rows ? i : rows - 1) * classes;  // beyond the last row, repeat it
      for (int64_t j = 0; j < classes; ++j) values[j * P::size + i] = row[j];
    }
  }
  SCOREMATCH_INLINE void store(T* p, int64_t rows, int64_t classes) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < classes; ++j) p[i * classes + j] = values[j * P::size + i];
  }
};

template <typename P>
struct TileRow {
  scalar_of<P>* values;
  SCOREMATCH_INLINE P operator()(int64_t j) const { return P::load(values + j * P::size); }
  SCOREMATCH_INLINE P get(int64_t j) const { return P::load(values + j * P::size); }
  SCOREMATCH_INLINE void put(int64_t j, P value) const { value.store(values + j * P::size); }
};

template <typename P>
struct ClassAcrossRows {
  SCOREMATCH_INLINE P operator()(int64_t j) const { return P(static_cast<scalar_of<P>>(j)); }
};
template <typename P>
struct ClassesOfRow {
  SCOREMATCH_INLINE P operator()(int64_t j) const { return P::counting_from(static_cast<scalar_of<P>>(j)); }
};

template <TargetForm form, typename P, typename Row, typename Number>
SCOREMATCH_INLINE auto target_of(Row row, P label, Number number, int64_t classes) {
  if constexpr (form == TargetForm::classes)
    return ClassTarget<P, Number>{label, number, scalar_of<P>(classes)};
  else if constexpr (form == TargetForm::probabilities)
    return ProbabilityTarget<P, Row>{row};
  else
    return LogitTarget<P, Row>{row};
}

template <TargetForm form, typename P, typename T, typename Lanes, typename Row, typename Target, typename Number, typename Gradient>
SCOREMATCH_INLINE DivergenceOfRow<P> divergence_of(const Divergence<T, form>& job, Lanes lanes, Row logits, Target target,
                                                   P label_logit, Number number, Gradient logit_gradient,
                                                   Gradient target_gradient) {
  const bool want_logit_gradient = job.logit_gradient != nullptr;
  if constexpr (form == TargetForm::classes)
    if (job.kind == Kind::kl)
      return cross_entropy_row<P>(lanes, logits, target, label_logit, job.classes, job.clip, want_logit_gradient, logit_gradient);
  return divergence_row<P>(lanes, job.kind, logits, target, number, job.classes, job.clip, job.mass_tolerance,
                           want_logit_gradient, logit_gradient, job.target_gradient != nullptr, target_gradient);
}

template <typename P, typename T, TargetForm form>
SCOREMATCH_INLINE void divergence_of_tile(const Divergence<T, form>& job, int64_t first, int64_t rows) {
  const int64_t classes = job.classes, at = first * classes;
  Tile<P> logits, target, logit_gradient, target_gradient;
  logits.load(job.logits + at, rows, classes);
  if constexpr (form != TargetForm::classes) target.load(job.target + at, rows, classes);
  const SerialLanes lanes{};
  const ClassAcrossRows<P> number{};
  P label(T(0)), label_logit(T(0));
  if constexpr (form == TargetForm::classes)
    for (int64_t i = 0; i < P::size; ++i) {
      const int64_t y = job.labels[first + (i < rows ? i : rows - 1)];
      label.v[i] = static_cast<T>(y);
      if (0 <= y && y < classes) label_logit.v[i] = logits.values[y * P::size + i];
    }
  const auto distribution = target_of<form>(TileRow<P>{target.values}, label, number, classes);
  const TileRow<P> z{logits.values}, by_z{logit_gradient.values}, by_p{target_gradient.values};
  const auto result =
      divergence_of<form, P>(job, lanes, z, distribution, label_logit, number, by_z, by_p);
  result.loss.store_first(job.loss + first, rows);
  for (int64_t i = 0; i < rows; ++i)
    if (!result.valid[i]) *job.refused = first + i;
  if (job.logit_gradient != nullptr) logit_gradient.store(job.logit_gradient + at, rows, classes);
  if (job.target_gradient != nullptr) target_gradient.store(job.target_gradient + at, rows, classes);
}

template <typename P, typename T, TargetForm form>
SCOREMATCH_INLINE void divergence_of_row(const Divergence<T, form>& job, int64_t n) {
  const int64_t classes = job.classes, at = n * classes;
  const PackLanes<P> lanes{};
  const ClassesOfRow<P> number{};
  P label(T(0)), label_logit(T(0));
  if constexpr (form == TargetForm::classes) {
    const int64_t y = job.labels[n];
    label = P(static_cast<T>(y));
    if (0 <= y && y < classes) label_logit = P(job.logits[at + y]);
  }
  const auto target = row_of<P>(form == TargetForm::classes ? nullptr : job.target + at, classes,
                                form == TargetForm::logits ? T(-INFINITY) : T(0));
  const auto gradient = [=](T* data) { return PackedOutput<P>{data == nullptr ? nullptr : data + at, classes}; };
  const auto result = divergence_of<form, P>(
      job, lanes, row_of<P>(job.logits + at, classes, T(-INFINITY)), target_of<form>(target, label, number, classes), label_logit,
      number, gradient(job.logit_gradient), gradient(job.target_gradient));
  job.loss[n] = result.loss.v[0];
  if (!result.valid[0]) *job.refused = n;
}

template <typename P, typename T, TargetForm form>
SCOREMATCH_INLINE void work(const Divergence<T, form>& job, int64_t begin, int64_t end) {
  if (job.classes <= kMostClassesAcrossRows)
    for (int64_t n = begin; n < end; n += P::size) divergence_of_tile<P>(job, n, end - n < P::size ? end - n : P::size);
  else
    for (int64_t n = begin; n < end; ++n) divergence_of_row<P>(job, n);
}

template <typename P, int packs, typename T>
SCOREMATCH_INLINE void sum_scores(const ScoreStep<T>& job, int64_t n, int64_t f) {
  const T* weights = job.weights + n * job.classes;
  const T* scores = job.scores + n * job.classes * job.features + f;
  const int64_t at = n * job.features + f, features = job.features;
  P totals[packs];
  SCOREMATCH_UNROLL
  for (int k = 0; k < packs; ++k) totals[k] = P::load(job.grad + at + k * P::size);
  add_weighted_scores(totals, [=](int64_t y) { return P(weights[y]); },
                      [=](int64_t y, int k) { return P::load(scores + y * features + k * P::size); }, job.classes);
  SCOREMATCH_UNROLL
  for (int k = 0; k < packs; ++k) totals[k].store(job.out + at + k * P::size);
}

template <typename P, typename T>
SCOREMATCH_INLINE void work(const ScoreStep<T>& job, int64_t begin, int64_t end) {
  constexpr int packs = 8;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / job.blocks, first = (i % job.blocks) * kScoreBlock;
    const int64_t last = first + kScoreBlock < job.features ? first + kScoreBlock : job.features;
    int64_t f = first;
    for (; f + packs * P::size <= last; f += packs * P::size) sum_scores<P, packs>(job, n, f);
    for (; f + P::size <= last; f += P::size) sum_scores<P, 1>(job, n, f);
    for (; f < last; ++f) {
      T total[] = {job.grad[n * job.features + f]};
      add_weighted_scores(total, [&](int64_t y) { return job.weights[n * job.classes + y]; },
                          [&](int64_t y, int) { return job.scores[(n * job.classes + y) * job.features + f]; }, job.classes);
      job.out[n * job.features + f] = total[0];
    }
  }
}

template <typename P, typename T>
SCOREMATCH_INLINE void work(const Trapezoid<T>& job, int64_t begin, int64_t end) {
  const int64_t count = job.features;
  for (int64_t row = begin; row < end; ++row)
    job.integrals[row] = trapezoid<P>(PackLanes<P>{}, row_of<P>(job.move + row / job.classes * count, count),
                                      row_of<P>(job.scores0 + row * count, count), row_of<P>(job.scores1 + row * count, count),
                                      count)
                             .v[0];
}

template <typename P, typename T>
SCOREMATCH_INLINE void work(const Normalize<T>& job, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const auto start = row_of<P>(job.log_p + n * job.classes, job.classes, T(-INFINITY));
    const PackedOutput<P> row{job.integrals + n * job.classes, job.classes};
    const auto moved = [&](int64_t j) { return start(j) + row.get(j); };
    const auto log_softmax = log_softmax_of<P>(PackLanes<P>{}, moved, job.classes);
    for (int64_t j = 0; j < job.classes; j += P::size) row.put(j, log_softmax(moved(j)));
  }
}

template <typename Job>
struct ScalarOfJob;
template <template <typename> typename Job, typename T>
struct ScalarOfJob<Job<T>> {
  using type = T;
};
template <typename T, TargetForm form>
struct ScalarOfJob<Divergence<T, form>> {
  using type = T;
};

template <int bytes, typename Job>
void run(const Job& job, int64_t begin, int64_t end) {
  work<Pack<typename ScalarOfJob<Job>::type, bytes>>(job, begin, end);
}

#define SCOREMATCH_INSTANTIATE_JOB(bytes, ...) template void run<bytes, __VA_ARGS__>(const __VA_ARGS__&, int64_t, int64_t);
#define SCOREMATCH_INSTANTIATE_DTYPE(bytes, T)                                         \
  SCOREMATCH_INSTANTIATE_JOB(bytes, LinfStep<T>)                                       \
  SCOREMATCH_INSTANTIATE_JOB(bytes, L2Step<T>)                                         \
  SCOREMATCH_INSTANTIATE_JOB(bytes, LinfRandomStart<T>)                                \
  SCOREMATCH_INSTANTIATE_JOB(bytes, L2RandomStart<T>)                                  \
  SCOREMATCH_INSTANTIATE_JOB(bytes, ApgdStep<T>)                                       \
  SCOREMATCH_INSTANTIATE_JOB(bytes, FabStep<T>)                                        \
  SCOREMATCH_INSTANTIATE_JOB(bytes, L1Step<T>)                                         \
  SCOREMATCH_INSTANTIATE_JOB(bytes, SquareLinf<T>)                                     \
  SCOREMATCH_INSTANTIATE_JOB(bytes, SquareL2<T>)                                       \
  SCOREMATCH_INSTANTIATE_JOB(bytes, KeyedUniform<T>)                                   \
  SCOREMATCH_INSTANTIATE_JOB(bytes, Divergence<T, TargetForm::classes>)                \
  SCOREMATCH_INSTANTIATE_JOB(bytes, Divergence<T, TargetForm::probabilities>)          \
  SCOREMATCH_INSTANTIATE_JOB(bytes, Divergence<T, TargetForm::logits>)                 \
  SCOREMATCH_INSTANTIATE_JOB(bytes, ScoreStep<T>)                                      \
  SCOREMATCH_INSTANTIATE_JOB(bytes, Trapezoid<T>)                                      \
  SCOREMATCH_INSTANTIATE_JOB(bytes, Normalize<T>)
#define SCOREMATCH_INSTANTIATE(bytes)         \
  namespace scorematch {                      \
  SCOREMATCH_INSTANTIATE_DTYPE(bytes, float)  \
  SCOREMATCH_INSTANTIATE_DTYPE(bytes, double) \
  }

}  // namespace scorematch
