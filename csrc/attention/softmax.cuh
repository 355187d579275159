// Online softmax of the two rows that a thread holds in an mma accumulator; a row is spread over four lanes.
#pragma once
#include "common/ptx.cuh"

namespace fastshard {

struct OnlineSoftmax {
  float max[2] = {-INFINITY, -INFINITY};  // of the scores so far, over the whole row
  float sum[2] = {0.f, 0.f};              // of the weights so far, of this thread's columns only

  // Turn scores into weights 2^((score - max) * scale) and rescale what was accumulated under the old maximum.
  // A row that has seen nothing but -inf keeps weights of zero. kRows: 1 leaves the second row alone.
  template <int kRows = 2, int kTiles, int kOutTiles>
  __device__ __forceinline__ void update(float (&scores)[kTiles][4], float (&out)[kOutTiles][4], float scale) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float new_max = max[row];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) new_max = fmaxf(new_max, fmaxf(scores[n][2 * row], scores[n][2 * row + 1]));
      new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 1));
      new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 2));
      const float origin = new_max == -INFINITY ? 0.f : new_max * scale;
      const float rescale = ptx::ex2(max[row] * scale - origin);
      max[row] = new_max;
      sum[row] *= rescale;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 2 * row; e < 2 * row + 2; ++e) {
          scores[n][e] = ptx::ex2(fmaf(scores[n][e], scale, -origin));
          sum[row] += scores[n][e];
        }
      }
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        out[n][2 * row] *= rescale;
        out[n][2 * row + 1] *= rescale;
      }
    }
  }

  // The sum over the whole row, on all its lanes.
  __device__ __forceinline__ float row_sum(int row) const {
    float total = sum[row] + __shfl_xor_sync(0xffffffffu, sum[row], 1);
    return total + __shfl_xor_sync(0xffffffffu, total, 2);
  }
};

}  // namespace fastshard
