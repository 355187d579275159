// Philox4x32-10 (Salmon et al. 2011): 128 random bits as a function of a counter and a key.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastshard {

__device__ __forceinline__ uint4 philox4x32(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * counter.x, product1 = uint64_t(0xCD9E8D57u) * counter.z;
    counter = {uint32_t(product1 >> 32) ^ counter.y ^ key.x, uint32_t(product1),
               uint32_t(product0 >> 32) ^ counter.w ^ key.y, uint32_t(product0)};
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

}  // namespace fastshard
