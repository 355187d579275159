// The flagged activations of a decode step as input of a product.
#pragma once
#include "gemv/product.cuh"

namespace fastshard {

// Load `slice` as multiply() asks for it, waiting for it as long as it takes. rows: [num_tokens, in_features / 2] words
// of two values each.
__device__ __forceinline__ void load_flagged_rows(Activations& x, const uint64_t* rows, uint32_t flag,
                                                  int in_features, int num_tokens, int slice) {
  const int token = threadIdx.x % 32 / 4;
  const int first = step_column(slice, 0);
  const uint64_t* source = rows + (token * in_features + first) / 2;
  ulonglong2 words[kSliceSteps][2] = {};
  bool waits = token < num_tokens;
  do {
    if (waits) {
      uint32_t wrong = 0;
#pragma unroll
      for (int step = 0; step < kSliceSteps; ++step) {
        const int column = step_column(slice, step);
        if (column < in_features) {
          words[step][0] = ptx::ld_relaxed_2x64(source + (column - first) / 2);
          words[step][1] = ptx::ld_relaxed_2x64(source + (column - first) / 2 + 2);
        }
      }
#pragma unroll
      for (int step = 0; step < kSliceSteps; ++step) {
        if (step_column(slice, step) < in_features) {
#pragma unroll
          for (int i = 0; i < 2; ++i) wrong |= flag_error(words[step][i], flag);
        }
      }
      waits = wrong != 0;
    }
  } while (__any_sync(0xffffffffu, waits));
#pragma unroll
  for (int step = 0; step < kSliceSteps; ++step) {
    x.set(step, make_uint4(uint32_t(words[step][0].x), uint32_t(words[step][0].y), uint32_t(words[step][1].x),
                           uint32_t(words[step][1].y)));
  }
}

// 1 / sqrt(mean(x^2) + eps) of a token, by one warp. squares: [num_tiles] words of one float, the sums of x^2 of tiles.
__device__ __forceinline__ float load_rstd(const uint64_t* squares, uint32_t flag, int num_tiles, int hidden_size,
                                           float eps) {
  constexpr int kAtATime = 8;
  float sum = 0.f;
#pragma unroll 1
  for (int first = threadIdx.x % 32; first < num_tiles; first += 32 * kAtATime) {
    uint64_t words[kAtATime];
    load_all_flagged(words, flag, [&](int i) {
      return ptx::ld_relaxed_64(squares + min(first + 32 * i, num_tiles - 1));
    });
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      if (first + 32 * i < num_tiles) sum += flagged_float(words[i]);
    }
  }
  return rsqrtf(warp_reduce_sum(sum) / hidden_size + eps);
}

}  // namespace fastshard
