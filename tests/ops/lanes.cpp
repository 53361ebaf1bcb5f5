// The shared row bodies on an emulated warp: 32 threads in lockstep through a barrier, as WarpLanes does it on a GPU,
// against one serial lane. Prints each disagreement; the exit status is their number.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/divergence.h"
#include "../../csrc/score_step.h"
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

    std::vector<T> integral(1), integrals(kLanes);
    const auto integrate = [&](auto lanes) {
      return trapezoid<T>(lanes, Row<T>{x.data()}, Row<T>{grad.data()}, Row<T>{x0.data()}, count);
    };
    integral[0] = integrate(SerialLanes{});
    on_warp([&](auto lanes, int id) { integrals[id] = integrate(lanes); });
    compare("line integral", count, std::vector<T>(kLanes, integral[0]), integrals);
  }
}

int main() {
  check_all<float>();
  check_all<double>();
  std::printf("%d disagreements\n", disagreements);
  return std::min(disagreements, 100);
}
