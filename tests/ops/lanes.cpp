// The shared row bodies on an emulated warp: 32 threads in lockstep through a barrier, as WarpLanes does it on a GPU,
// against one serial lane. Prints each disagreement; the exit status is their number.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/apgd_step.h"
#include "../../csrc/divergence.h"
#include "../../csrc/fab_step.h"
#include "../../csrc/score_step.h"
#include "../../csrc/square.h"
#include "../../csrc/threat_model.h"

using namespace scorematch;

constexpr int kLanes = 32;

struct EmulatedWarp {
  static constexpr bool keeps_exponentials = false;
  int id;
  std::barrier<>* barrier;
  double* slots;
  int64_t lane() const { return id; }
  int64_t width() const { return kLanes; }
  template <typename A>
  A sum(A v) const {
    return butterfly(v, [](A a, A b) { return a + b; });
  }
  template <typename A>
  A max(A v) const {
    return butterfly(v, [](A a, A b) { return b > a ? b : a; });
  }

 private:
  template <typename A, typename Combine>
  A butterfly(A v, Combine combine) const {  // __shfl_xor_sync
    for (int offset = kLanes / 2; offset != 0; offset /= 2) {
      slots[id] = v;
      barrier->arrive_and_wait();
      const A other = static_cast<A>(slots[id ^ offset]);
      barrier->arrive_and_wait();
      v = combine(v, other);
    }
    return v;
  }
};

template <typename Body>
void on_warp(Body body) {
  std::barrier<> barrier(kLanes);
  double slots[kLanes];
  std::vector<std::thread> threads;
  for (int id = 0; id < kLanes; ++id) threads.emplace_back([&, id] { body(EmulatedWarp{id, &barrier, slots}, id); });
  for (auto& thread : threads) thread.join();
}

template <typename T>
struct Row {
  T* data;
  T operator()(int64_t j) const { return data[j]; }
  T get(int64_t j) const { return data[j]; }
  void put(int64_t j, T v) const { data[j] = v; }
  void operator()(int64_t j, T v) const { data[j] = v; }
};

template <typename T>
struct Number {
  T operator()(int64_t j) const { return static_cast<T>(j); }
};

int disagreements = 0;

template <typename T>
void compare(const char* what, int64_t count, const std::vector<T>& serial, const std::vector<T>& warp) {
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-12;
  for (size_t j = 0; j < serial.size(); ++j) {
    const bool same = std::isnan(serial[j]) ? std::isnan(warp[j]) : std::abs(serial[j] - warp[j]) <= tolerance * (1 + std::abs(serial[j]));
    if (!same) {
      ++disagreements;
      std::printf("%s, %lld elements of %zu bytes: element %zu is %g serially, %g on the warp\n", what, (long long)count,
                  sizeof(T), j, double(serial[j]), double(warp[j]));
      return;
    }
  }
}

std::mt19937 generator(0);

template <typename T>
std::vector<T> normal(int64_t count) {
  std::normal_distribution<double> distribution(0, 2);
  std::vector<T> values(count);
  for (auto& v : values) v = static_cast<T>(distribution(generator));
  return values;
}

template <typename T, typename MakeTarget>
void check_divergence(const char* what, int64_t classes, std::vector<T>& logits, MakeTarget make_target) {
  for (int64_t kind = 0; kind < kKinds; ++kind) {
    std::vector<T> serial(2 * classes + 1), warp(2 * classes + 1), loss_of_lane(kLanes);
    const auto run = [&](auto lanes, std::vector<T>& out) {
      return divergence_row<T>(lanes, static_cast<Kind>(kind), Row<T>{logits.data()}, make_target(), Number<T>{}, classes, T(0.01),
                               T(1e-3), true, Row<T>{out.data()}, true, Row<T>{out.data() + classes})
          .loss;
    };
    serial.back() = run(SerialLanes{}, serial);
    on_warp([&](auto lanes, int id) { loss_of_lane[id] = run(lanes, warp); });
    warp.back() = loss_of_lane[0];
    compare(what, classes, serial, warp);
    compare("every lane has the loss", classes, std::vector<T>(kLanes, loss_of_lane[0]), loss_of_lane);
  }
}

template <typename T>
void check_all() {
  for (int64_t count : {2, 3, 10, 31, 32, 33, 100, 1000}) {
    auto logits = normal<T>(count), target_logits = normal<T>(count), probabilities = normal<T>(count);
    T mass = 0;
    for (auto& p : probabilities) mass += p = std::abs(p);
    for (auto& p : probabilities) p /= mass;
    const T label = T(count / 2);
    check_divergence<T>("divergence from labels", count, logits, [&] { return ClassTarget<T, Number<T>>{label, {}, T(count)}; });
    check_divergence<T>("divergence from probabilities", count, logits, [&] { return ProbabilityTarget<T, Row<T>>{{probabilities.data()}}; });
    check_divergence<T>("divergence from logits", count, logits, [&] { return LogitTarget<T, Row<T>>{{target_logits.data()}}; });
    std::vector<T> entropy(count + 1), warp_entropy(count + 1), entropy_of_lane(kLanes);
    const auto cross_entropy = [&](auto lanes, std::vector<T>& out) {
      return cross_entropy_row<T>(lanes, Row<T>{logits.data()}, ClassTarget<T, Number<T>>{label, {}, T(count)},
                                  logits[count / 2], count, T(0), true, Row<T>{out.data()}).loss;
    };
    entropy.back() = cross_entropy(SerialLanes{}, entropy);
    on_warp([&](auto lanes, int id) { entropy_of_lane[id] = cross_entropy(lanes, warp_entropy); });
    warp_entropy.back() = entropy_of_lane[0];
    compare("cross-entropy", count, entropy, warp_entropy);
    logits[count - 1] = T(NAN);
    check_divergence<T>("divergence of NaN", count, logits, [&] { return LogitTarget<T, Row<T>>{{target_logits.data()}}; });

    auto x = normal<T>(count), grad = normal<T>(count), x0 = normal<T>(count);
    std::vector<T> serial(count), warp(count);
    const Box<T> box{T(-1), T(1)};
    const auto step = [&](auto lanes, std::vector<T>& out) {
      l2_step_row<T>(lanes, Row<T>{x.data()}, Row<T>{grad.data()}, Row<T>{x0.data()}, Row<T>{out.data()}, count, T(0.5), T(0.7), box);
    };
    step(SerialLanes{}, serial);
    on_warp([&](auto lanes, int) { step(lanes, warp); });
    compare("l2 step", count, serial, warp);
    const auto start = [&](auto lanes, std::vector<T>& out) {
      l2_random_start_row<T>(lanes, Row<T>{x.data()}, Row<T>{grad.data()}, Row<T>{out.data()}, count, T(0.5), box);
    };
    start(SerialLanes{}, serial);
    on_warp([&](auto lanes, int) { start(lanes, warp); });
    compare("l2 random start", count, serial, warp);

    const auto iterate = [&](auto lanes, std::vector<T>& x_and_x_prev, const T* start) {
      const Row<T> next{x_and_x_prev.data()}, previous{x_and_x_prev.data() + count};
      const Row<T> from{start == nullptr ? next.data : const_cast<T*>(start)};
      apgd_l2_row<T>(lanes, from, Row<T>{grad.data()}, Row<T>{x0.data()}, previous, next, previous, count, T(0.5),
                     ApgdOptions<T>{T(0.7), T(0.75), T(0.25), box});
    };
    for (const T* start : {static_cast<const T*>(nullptr), static_cast<const T*>(x0.data())}) {
      std::vector<T> points(x);
      points.insert(points.end(), logits.begin(), logits.end());
      points.back() = T(0.5);  // logits ends with NaN here
      std::vector<T> warp_points(points);
      iterate(SerialLanes{}, points, start);
      on_warp([&](auto lanes, int) { iterate(lanes, warp_points, start); });
      compare("apgd step l2", count, points, warp_points);
    }

    auto inside = x, inside0 = x0;
    for (auto* point : {&inside, &inside0})
      for (auto& v : *point) v = clamp(v, box.lower, box.upper);
    for (const T difference : {T(0.3), T(-2), T(1e6), T(0)}) {
      const auto fab = [&](auto lanes, auto norm, std::vector<T>& out) {
        fab_step_row<decltype(norm)::value, T>(lanes, Row<T>{inside.data()}, Row<T>{inside0.data()}, Row<T>{grad.data()},
                                               Row<T>{out.data()}, count, difference, FabOptions<T>{T(0.1), T(1.05), box});
      };
      const std::integral_constant<Norm, Norm::linf> linf;
      const std::integral_constant<Norm, Norm::l2> l2;
      fab(SerialLanes{}, linf, serial);
      on_warp([&](auto lanes, int) { fab(lanes, linf, warp); });
      compare("fab step linf", count, serial, warp);
      fab(SerialLanes{}, l2, serial);
      on_warp([&](auto lanes, int) { fab(lanes, l2, warp); });
      compare("fab step l2", count, serial, warp);
    }

    std::vector<T> integral(1), integrals(kLanes);
    const auto integrate = [&](auto lanes) {
      return trapezoid<T>(lanes, Row<T>{x.data()}, Row<T>{grad.data()}, Row<T>{x0.data()}, count);
    };
    integral[0] = integrate(SerialLanes{});
    on_warp([&](auto lanes, int id) { integrals[id] = integrate(lanes); });
    compare("line integral", count, std::vector<T>(kLanes, integral[0]), integrals);
  }
}

template <typename T>
void check_square() {
  for (int64_t side : {1, 3, 5, 7, 33}) {
    const int64_t height = side + 4, width = side + 2;
    const Image image{1, height, width, height * width, width, 1};
    const auto delta_values = normal<T>(height * width), bump_values = normal<T>(side * side);
    const int64_t corners[] = {1, 2, 3, 0};
    const Window gains(corners, side, image), loses(corners + 2, side, image);
    const auto delta = [&](int64_t row, int64_t column) { return delta_values[offset_in(image, 0, row, column)]; };
    const auto bump = [&](int64_t row, int64_t column) { return bump_values[row * side + column]; };
    const auto move_of = [&](auto lanes) {
      const SquareMove<T> move = square_move(lanes, delta, bump, gains, loses, T(0.5));
      return std::vector<T>{move.channel.inverse, move.channel.factor, move.lost, move.gained};
    };
    std::vector<std::vector<T>> of_lane(kLanes);
    on_warp([&](auto lanes, int id) { of_lane[id] = move_of(lanes); });
    for (const auto& move : of_lane) compare("square move", side, move_of(SerialLanes{}), move);

    std::vector<T> visits(height * width, T(0)), once(height * width, T(1));
    on_warp([&](auto lanes, int) {
      for (Walk at(lanes, width); at.row < height; at.next()) visits[at.row * width + at.column] += T(1);
    });
    compare("a walk meets every element once", side, once, visits);
  }
}

int main() {
  check_square<float>();
  check_square<double>();
  check_all<float>();
  check_all<double>();
  std::printf("%d disagreements\n", disagreements);
  return std::min(disagreements, 100);
}
