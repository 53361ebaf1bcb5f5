// Philox4x32-10, a random function of a counter and a key (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3,
// SC 2011). Torch-free; shared by CPU, CUDA and the tests.
#pragma once
#include "lanes.h"

namespace scorematch {

// Turns `ways` counters of four words into random words. Loops of constant length, for SIMD.
template <int ways>
SCOREMATCH_INLINE void philox(uint32_t (&words)[4][ways], uint64_t key) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < ways; ++i) {
      const uint64_t product0 = uint64_t(0xD2511F53u) * words[0][i], product1 = uint64_t(0xCD9E8D57u) * words[2][i];
      words[0][i] = static_cast<uint32_t>(product1 >> 32) ^ words[1][i] ^ key0;
      words[1][i] = static_cast<uint32_t>(product1);
      words[2][i] = static_cast<uint32_t>(product0 >> 32) ^ words[3][i] ^ key1;
      words[3][i] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// [0, 1) from the upper 24 bits, exact in float32
template <typename T>
SCOREMATCH_INLINE T unit_interval(uint32_t word) {
  return static_cast<T>(static_cast<int32_t>(word >> 8)) * T(0x1p-24);
}

constexpr int64_t kCounters = int64_t(1) << 32;  // values of a word: samples and blocks of four numbers are below

}  // namespace scorematch
