#include "instruction_set.h"

#include <cstdlib>
#include <string_view>

namespace scorematch {

static InstructionSet detect() {
#ifdef SCOREMATCH_X86
  // SCOREMATCH_SIMD=baseline|avx2 caps the choice, so that the tests reach every variant on one machine.
  const char* wish = std::getenv("SCOREMATCH_SIMD");
  const std::string_view cap = wish == nullptr ? "" : wish;
  if (cap == "baseline") return InstructionSet::baseline;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && cap != "avx2") return InstructionSet::avx512;
  if (avx2) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

InstructionSet instruction_set() {
  static const InstructionSet detected = detect();
  return detected;
}

const char* name_of(InstructionSet set) {
  switch (set) {
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace scorematch
