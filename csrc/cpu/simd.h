// Chooses, when a kernel runs, the widest instruction set that the processor has.
//
// A job is an object with `template <int bytes> void run(int64_t begin, int64_t end) const`, forced inline, where
// `bytes` is the register width to use. It is compiled once for each instruction set below. No -march flag is needed,
// so that one binary serves every processor, and no inline function of the standard library is compiled for an
// instruction set that another processor lacks.
#pragma once
#include "../tensor.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define SCOREMATCH_X86 1
#endif

namespace scorematch {

template <typename Job>
void run_baseline(const Job& job, int64_t begin, int64_t end) {
  job.template run<16>(begin, end);
}

#ifdef SCOREMATCH_X86
template <typename Job>
__attribute__((target("avx2,fma"))) void run_avx2(const Job& job, int64_t begin, int64_t end) {
  job.template run<32>(begin, end);
}

template <typename Job>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512"))) void run_avx512(
    const Job& job, int64_t begin, int64_t end) {
  job.template run<64>(begin, end);
}
#endif

enum class InstructionSet { baseline, avx2, avx512 };

InstructionSet instruction_set();  // simd.cpp

// Runs the job over [0, count), at least `grain` at a time, on torch's threads.
template <typename Job>
void parallel_simd(int64_t count, int64_t grain, const Job& job) {
  auto run = &run_baseline<Job>;
#ifdef SCOREMATCH_X86
  if (instruction_set() == InstructionSet::avx2) run = &run_avx2<Job>;
  if (instruction_set() == InstructionSet::avx512) run = &run_avx512<Job>;
#endif
  if (count <= grain) return run(job, 0, count);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { run(job, begin, end); });
}

}  // namespace scorematch
