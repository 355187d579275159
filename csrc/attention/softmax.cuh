// Online softmax of the rows that a thread holds in mma accumulators; a row is spread over four lanes.
#pragma once
#include "common/ptx.cuh"
#include "common/reduce.cuh"

namespace fastshard {

constexpr int kRowLanes = 4;  // that hold a row of an mma accumulator

// Over the row; all its lanes get it.
__device__ __forceinline__ float row_max(float v) {
  return warp_reduce<kRowLanes>(v, [](float a, float b) { return fmaxf(a, b); });
}

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
      new_max = row_max(new_max);
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
  __device__ __forceinline__ float row_sum(int row) const { return warp_reduce_sum<kRowLanes>(sum[row]); }
};

// The same for kRowTiles accumulators of 16 rows, made for long rows: the origin of the exponent follows the maximum
// only where that has grown far enough past it to matter, which is seldom after the first keys.
template <int kRowTiles>
struct LazySoftmax {
  static constexpr int kRows = 2 * kRowTiles;
  static constexpr float kMargin = 8.f;         // weights are at most 2^8, which float16 holds
  static constexpr float kNothingSeen = -2e38f;  // below all scores but -inf

  float origin[kRows];  // base 2
  float sum[kRows];     // of the weights so far, of this thread's columns only

  __device__ __forceinline__ LazySoftmax() {
#pragma unroll
    for (int i = 0; i < kRows; ++i) origin[i] = kNothingSeen, sum[i] = 0.f;
  }

  // Move origins to where weigh() cannot overflow, and rescale what was accumulated.
  template <int kTiles, int kOutTiles>
  __device__ __forceinline__ void move_origins(const float (&scores)[kRowTiles][kTiles][4],
                                               float (&out)[kRowTiles][kOutTiles][4], float scale) {
    float max[kRows];
    bool grows = false;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const auto& tiles = scores[i / 2];
      const int e = i % 2 * 2;
      max[i] = fmaxf(tiles[0][e], tiles[0][e + 1]);
#pragma unroll
      for (int n = 1; n < kTiles; ++n) max[i] = fmaxf(max[i], fmaxf(tiles[n][e], tiles[n][e + 1]));
      grows |= fmaf(max[i], scale, -origin[i]) > kMargin;
    }
    if (!__any_sync(0xffffffffu, grows)) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float next = fmaxf(origin[i], row_max(max[i]) * scale);
      const float rescale = ptx::ex2(origin[i] - next);
      origin[i] = next;
      sum[i] *= rescale;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        out[i / 2][n][i % 2 * 2] *= rescale;
        out[i / 2][n][i % 2 * 2 + 1] *= rescale;
      }
    }
  }

  // The weight of a score of row i.
  __device__ __forceinline__ float weigh(float score, int i, float scale) {
    const float weight = ptx::ex2(fmaf(score, scale, -origin[i]));
    sum[i] += weight;
    return weight;
  }

  // The sum over the whole row, on all its lanes.
  __device__ __forceinline__ float row_sum(int i) const { return warp_reduce_sum<kRowLanes>(sum[i]); }
};

}  // namespace fastshard
