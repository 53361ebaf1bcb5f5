// The instruction sets that CPU kernels are compiled for. Torch-free.
#pragma once

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define SCOREMATCH_X86 1
#endif

namespace scorematch {

// A job is compiled once for each SIMD register width in bytes; simd_<name>.cpp says with which instructions.
enum class InstructionSet { baseline = 16, avx2 = 32, avx512 = 64 };

InstructionSet instruction_set();  // the widest that this processor has
const char* name_of(InstructionSet set);

}  // namespace scorematch
