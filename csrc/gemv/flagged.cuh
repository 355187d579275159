// Values that carry their own "written" flag: how one block hands activations to all others within a launch.
//
// A word of 64 bits holds two 16-bit values, or one float, and a 32-bit flag, and is written whole: who reads the flag
// that it waits for has the values, without a fence and without a barrier. A buffer's flags differ from use to use, so
// that nothing is ever cleared. Source: the "LL" protocol of NCCL.
#pragma once
#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace fastshard {

__device__ __forceinline__ uint64_t flagged_word(uint32_t value, uint32_t flag) { return uint64_t(flag) << 32 | value; }

__device__ __forceinline__ void store_flagged(uint64_t* word, uint32_t value, uint32_t flag) {
  ptx::st_relaxed_64(word, flagged_word(value, flag));
}

__device__ __forceinline__ uint32_t flag_error(uint64_t word, uint32_t flag) { return uint32_t(word >> 32) ^ flag; }
__device__ __forceinline__ uint32_t flag_error(const ulonglong2& words, uint32_t flag) {
  return flag_error(words.x, flag) | flag_error(words.y, flag);
}

// words[i] = load(i), all at once, and again until each of them carries the flag.
template <int kCount, typename Words, typename Load>
__device__ __forceinline__ void load_all_flagged(Words (&words)[kCount], uint32_t flag, Load load) {
  uint32_t error;
  do {
#pragma unroll
    for (int i = 0; i < kCount; ++i) words[i] = load(i);
    error = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) error |= flag_error(words[i], flag);
  } while (error != 0);
}

__device__ __forceinline__ float flagged_float(uint64_t word) { return __uint_as_float(uint32_t(word)); }

// Wait for the flag, for as long as it takes.
__device__ __forceinline__ uint32_t load_flagged(const uint64_t* word, uint32_t flag) {
  for (;;) {
    const uint64_t v = ptx::ld_relaxed_64(word);
    if (uint32_t(v >> 32) == flag) return uint32_t(v);
  }
}

}  // namespace fastshard
