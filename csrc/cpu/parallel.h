// Runs a job on torch's threads with the widest instruction set that the processor has.
#pragma once
#include "../tensor.h"
#include "instruction_set.h"
#include "jobs.h"

namespace scorematch {

template <typename Job>
void run_parallel(const Job& job, int64_t items, int64_t items_a_thread) {
  auto run_items = &run<16, Job>;
#ifdef SCOREMATCH_X86
  if (instruction_set() == InstructionSet::avx2) run_items = &run<32, Job>;
  if (instruction_set() == InstructionSet::avx512) run_items = &run<64, Job>;
#endif
  if (items <= items_a_thread) return run_items(job, 0, items);
  torch::stable::parallel_for(0, items, items_a_thread, [&](int64_t begin, int64_t end) { run_items(job, begin, end); });
}

// How many items of `cost` elementary operations are worth a thread of their own.
inline int64_t worth_a_thread(int64_t operations, int64_t cost) {
  return std::max<int64_t>(1, operations / std::max<int64_t>(cost, 1));
}

}  // namespace scorematch
