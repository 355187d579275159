// Sums over the ranks that share each layer, within a launch: every rank writes its part into the memory of all, and
// adds up what it finds in its own, in the order of the ranks, so that all have the same bits.
//
// Parts are flagged words (gemv/flagged.cuh), across GPUs: no rank waits but for the values that it needs. The memory of
// a rank has two places, for the sums after attention and after the MLP. A rank writes to one of them again after a sum
// of the other, which every rank gives its part to after it has read all of the first: so nothing is written that has
// not been read. A step's first write is to the place that its last one was not to, so that holds from step to step.
// Floor: the latency of a store into another GPU's memory, twice a layer.
#pragma once
#include "decode/step.h"
#include "gemv/flagged.cuh"

namespace fastshard {

enum class RankSum { kAttention, kMlp };

// Of a rank's memory: word 0 counts the flags that are used up; the others begin at word 16, [2, num_ranks,
// kDecodeMaxTokens, hidden_size] of one float each.
constexpr int kRankSumHeader = 16;

__device__ __forceinline__ uint64_t* rank_words(const DecodeStepParams& p, int of, RankSum sum, int from, int token,
                                                int n) {
  const int64_t row = (static_cast<int>(sum) * p.num_ranks + from) * kDecodeMaxTokens + token;
  return p.rank_sums[of] + kRankSumHeader + row * p.hidden_size + n;
}

// The flag before those of this launch, which has one for each layer.
__device__ __forceinline__ uint32_t last_rank_flag(const DecodeStepParams& p) {
  return uint32_t(ptx::ld_relaxed_64(p.rank_sums[p.rank]));
}

// Give this rank's part of elements n and n + 1 to all ranks.
__device__ __forceinline__ void give_part(const DecodeStepParams& p, RankSum sum, int token, int n, float first,
                                          float second, uint32_t flag) {
  const ulonglong2 words = make_ulonglong2(flagged_word(__float_as_uint(first), flag),
                                           flagged_word(__float_as_uint(second), flag));
#pragma unroll 1
  for (int i = 1; i <= p.num_ranks; ++i) {  // the others first
    const int to = (p.rank + i) % p.num_ranks;
    ptx::st_system_2x64(rank_words(p, to, sum, p.rank, token, n), words);
  }
}

// Elements n and n + 1 of the sum: waits for the parts, as long as it takes.
__device__ __forceinline__ float2 take_sum(const DecodeStepParams& p, RankSum sum, int token, int n, uint32_t flag) {
  constexpr int kAtATime = 2;
  float2 total = make_float2(0.f, 0.f);
#pragma unroll 1
  for (int first = 0; first < p.num_ranks; first += kAtATime) {
    ulonglong2 words[kAtATime];
    load_all_flagged(words, flag, [&](int i) {
      return ptx::ld_system_2x64(rank_words(p, p.rank, sum, min(first + i, p.num_ranks - 1), token, n));
    });
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      if (first + i < p.num_ranks) total.x += flagged_float(words[i].x), total.y += flagged_float(words[i].y);
    }
  }
  return total;
}

}  // namespace fastshard
