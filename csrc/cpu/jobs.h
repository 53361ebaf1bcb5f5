// The work of each CPU kernel as plain pointers and sizes: launchers (threat_model.cpp, ...) fill it in, job_bodies.h
// does it, once for each instruction set. Torch-free.
#pragma once
#include <atomic>
#include <cstdint>

#include "../options.h"

namespace scorematch {

// Does items [begin, end) of the job with SIMD registers of `bytes` bytes; defined in simd_*.cpp.
template <int bytes, typename Job>
void run(const Job& job, int64_t begin, int64_t end);

template <typename T>
struct LinfStep {  // an item is an element
  const T *x, *grad, *x0;
  T* out;
  T step_size, eps;
  Box<T> box;
};

template <typename T>
struct L2Step {  // an item is a sample
  const T *x, *grad, *x0;
  T* out;
  int64_t features;
  T step_size, eps;
  Box<T> box;
};

template <typename T>
struct LinfRandomStart {  // an item is an element
  const T *x, *noise;
  T* out;
  T eps;
  Box<T> box;
};

template <typename T>
struct L2RandomStart {  // an item is a sample
  const T *x, *noise;
  const T* radius;  // [N], or null: 1
  T* out;
  int64_t features;
  T eps;
  Box<T> box;
};

template <typename T>
struct L1Step {  // an item is a sample
  const T *x, *grad, *x0;
  const T* step_size;     // [N]
  const int64_t* moving;  // [N]
  T* out;
  int64_t features;
  T eps;
  Box<T> box;
};

template <typename T>
struct ApgdStep {  // an item is a sample
  T *x, *x_prev, *best_x, *best_grad;
  const T *x0, *grad;
  const T* step_size;              // [N]
  const bool *improved, *restart;  // [N]
  int64_t features;
  Norm norm;
  ApgdOptions<T> options;
};

template <typename T>
struct FabStep {        // an item is a sample
  const T *x, *x0, *normal;
  const T* difference;  // [N]
  T* out;
  int64_t features;
  Norm norm;
  FabOptions<T> options;
};

template <typename T>
struct SquareLinf {       // an item is a sample
  const T *best, *x0;
  const int64_t* corner;  // [N, 2]
  const T* sign;          // [N, C]
  T* out;
  Image image;
  int64_t side;
  T eps;
  Box<T> box;
};

template <typename T>
struct SquareL2 {             // an item is a sample
  const T *best, *x0;
  const int64_t* corner;      // [N, 4]
  const T* sign;              // [N, C]
  const T* pattern;           // [side, side]
  const bool* transpose;      // [N]
  T* out;
  SquareChannel<T>* channel;  // [N, C], scratch
  Image image;
  int64_t side;
  T eps;
  Box<T> box;
};

template <typename T>
struct KeyedUniform {      // an item is four numbers of one sample
  const int64_t* samples;  // [N]
  T* out;                  // [N, count]
  int64_t count, blocks;   // blocks = count / 4, rounded up
  uint64_t seed, stream;
};

template <typename T, TargetForm form>
struct Divergence {               // an item is a row
  const T* logits;                // [N, L]
  const T* target;                // [N, L], or null for TargetForm::classes
  const int64_t* labels;          // [N], or null for the others
  T* loss;                        // [N]
  T* logit_gradient;              // [N, L], or null where not wanted
  T* target_gradient;             // [N, L], or null where not wanted
  std::atomic<int64_t>* refused;  // receives a row that is not a distribution, or whose label is not a class
  int64_t classes;
  Kind kind;
  T clip, mass_tolerance;
};

// Features of one sample that are summed together: each class is read in runs of whole cache lines.
constexpr int64_t kScoreBlock = 128;

template <typename T>
struct ScoreStep {     // an item is a block of kScoreBlock features of one sample
  const T* weights;    // [N, L]
  const T* scores;     // [N, L, D]
  const T* grad;       // [N, D]
  T* out;              // [N, D]
  int64_t classes, features, blocks;
};

template <typename T>
struct Trapezoid {     // an item is a class of one sample
  const T* scores0;    // [N, L, D]
  const T* scores1;    // [N, L, D]
  const T* move;       // [N, D]
  T* integrals;        // [N, L]
  int64_t classes, features;
};

template <typename T>
struct Normalize {     // an item is a sample
  const T* log_p;      // [N, L]
  T* integrals;        // [N, L], becomes log softmax(log_p + integrals)
  int64_t classes;
};

}  // namespace scorematch
