#include "instruction_set.h"

#ifdef SCOREMATCH_X86

// The standard library is included before the instruction set is chosen, and every function of ours after it is forced
// inline or named after its register width: no inline function that other files share is compiled for instructions that
// the processor may lack.
#include "standard_library.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

#include "job_bodies.h"

SCOREMATCH_INSTANTIATE(64)

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // SCOREMATCH_X86
