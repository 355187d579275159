// The end of a row: merge what several workers found over different keys, normalise, optional LayerNorm, store.
//
// A warp owns a row; lane i holds the column pairs i, i + 32, ...
#pragma once
#include "attention/attention.h"
#include "attention/tile.cuh"
#include "common/reduce.cuh"

namespace fastshard {

// A query row as the loaders walk over them: rows of a head are numbered [s_q, group].
struct RowStep {
  int tokens, heads;
  __device__ __forceinline__ RowStep(int rows, int group) : tokens(rows / group), heads(rows % group) {}
};

struct RowCursor {
  int token, head;  // head: within the group
  __device__ __forceinline__ RowCursor(int row, int group) : token(row / group), head(row % group) {}
  __device__ __forceinline__ void advance(const RowStep& step, int group) {
    token += step.tokens;
    head += step.heads;
    if (head < group) return;
    head -= group;
    ++token;
  }
};

// What kParts workers found of kRows rows each; the softmax is relative to each one's own maximum.
template <int kParts, int kRows, int kHeadDim>
struct PartialRows {
  float out[kParts][kRows][kHeadDim + 4];  // sum of weight * v; + 4: rows begin in different banks
  float max[kParts][kRows];                // of base-2 scores
  float sum[kParts][kRows];                // of weights; 0: nothing seen, the other two are not read
};

// One row of PartialRows, for RowResult::merge.
template <typename Partial>
struct SharedParts {
  const Partial& partial;
  int row;
  __device__ float max(int i) const { return partial.max[i][row]; }
  __device__ float sum(int i) const { return partial.sum[i][row]; }
  __device__ float2 pair(int i, int index) const {
    return reinterpret_cast<const float2*>(partial.out[i][row])[index];
  }
};

// Two columns of a standardized row, times weight, plus bias.
template <typename T>
__device__ __forceinline__ float2 scale_and_shift(float2 y, const AttentionParams& p, int column) {
  if (p.weight != nullptr) {
    const T* weight = static_cast<const T*>(p.weight) + column;
    y = make_float2(y.x * to_float(weight[0]), y.y * to_float(weight[1]));
  }
  if (p.bias != nullptr) {
    const T* bias = static_cast<const T*>(p.bias) + column;
    y = make_float2(y.x + to_float(bias[0]), y.y + to_float(bias[1]));
  }
  return y;
}

template <int kHeadDim>
struct RowResult {
  static constexpr int kPairs = (kHeadDim + 63) / 64;
  float2 out[kPairs];  // as in PartialRows
  float max, sum;

  static __device__ int pair(int i) { return i * 32 + threadIdx.x % 32; }

  // Merge up to 32 parts. A part that has seen NaN makes the row NaN.
  template <typename Parts>
  __device__ __forceinline__ void merge(const Parts& parts, int num_parts, int head_dim) {
    const int lane = threadIdx.x % 32;
    const float part_sum = lane < num_parts ? parts.sum(lane) : 0.f;
    const float part_max = part_sum == 0.f ? -INFINITY : parts.max(lane);
    max = warp_reduce(part_max, [](float a, float b) { return fmaxf(a, b); });
    const float part_weight = part_sum == 0.f ? 0.f : ptx::ex2(part_max - max);
    sum = warp_reduce_sum(part_weight * part_sum);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) out[j] = make_float2(0.f, 0.f);
#pragma unroll 4
    for (int i = 0; i < num_parts; ++i) {
      const float weight = __shfl_sync(0xffffffffu, part_weight, i);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        if (weight == 0.f || 2 * pair(j) >= head_dim) continue;  // what was not written may be NaN
        const float2 value = parts.pair(i, pair(j));
        out[j].x += weight * value.x;
        out[j].y += weight * value.y;
      }
    }
  }

  // Write the row as part `part`.
  template <typename Partial>
  __device__ __forceinline__ void write(Partial& partial, int part, int row) const {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (2 * pair(j) < kHeadDim) reinterpret_cast<float2*>(partial.out[part][row])[pair(j)] = out[j];
    }
    partial.max[part][row] = max;
    partial.sum[part][row] = sum;
  }

  __device__ __forceinline__ void standardize(int head_dim, float eps) {
    float total = 0.f;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) total += out[j].x + out[j].y;  // columns past head_dim are zero
    const float mean = warp_reduce_sum(total) / head_dim;
    float squares = 0.f;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (2 * pair(j) >= head_dim) break;
      out[j].x -= mean;
      out[j].y -= mean;
      squares += out[j].x * out[j].x + out[j].y * out[j].y;
    }
    const float rstd = rsqrtf(warp_reduce_sum(squares) / head_dim + eps);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      out[j].x *= rstd;
      out[j].y *= rstd;
    }
  }

  // row: [batch, num_kv_heads, s_q, group] flattened. Rounds to T.
  template <typename T>
  __device__ __forceinline__ void store(const AttentionParams& p, int64_t row) {
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;  // nothing to attend to: zeros
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      out[j].x *= inverse;
      out[j].y *= inverse;
    }
    if (p.layer_norm) standardize(p.head_dim, p.eps);

    const int rows_per_head = p.rows_per_head();
    const int in_head = static_cast<int>(row % rows_per_head);
    const int64_t kv_head = row / rows_per_head % p.num_kv_heads, batch = row / rows_per_head / p.num_kv_heads;
    const int64_t token = batch * p.s_q + in_head / p.group;
    const int64_t head = kv_head * p.group + in_head % p.group;
    T* to = static_cast<T*>(p.out) + (token * p.num_kv_heads * p.group + head) * p.head_dim;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int column = 2 * pair(j);
      if (column >= p.head_dim) break;
      float2 y = out[j];
      if (p.layer_norm) y = scale_and_shift<T>(y, p, column);
      *reinterpret_cast<uint32_t*>(to + column) = pack_pair<T>(y.x, y.y);
    }
  }
};

}  // namespace fastshard
