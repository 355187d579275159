// Which keys a query sees, and what happens to its scores before the softmax.
//
// A query token sees one range of keys (lengths, first key, causal rule, window); a mask may hide keys within it.
// Both ends of the range grow with the token, so a block of tokens needs the range of its first and its last only.
#pragma once
#include "attention/attention.h"
#include "common/vec.cuh"

namespace fastshard {

constexpr float kLog2e = 1.4426950408889634f;

struct KeyRange {
  int begin, end;
};

// indices[i], kept within 0..limit: the kernels read no key outside the tensors whatever the device memory holds.
__device__ __forceinline__ int read_index(const AttentionIndices& indices, int i, int otherwise, int limit) {
  if (indices.data == nullptr) return otherwise;
  const int64_t index = indices.is_int64 ? static_cast<const int64_t*>(indices.data)[i * indices.stride]
                                         : static_cast<const int32_t*>(indices.data)[i * indices.stride];
  return static_cast<int>(index < 0 ? 0 : index > limit ? limit : index);
}

// What one batch row allows.
struct RowBounds {
  int length;  // valid keys
  int first;   // first valid key
};

__device__ __forceinline__ RowBounds row_bounds(const AttentionParams& p, int batch) {
  return {read_index(p.kv_lengths, batch, p.s_kv, p.s_kv), read_index(p.first_key, batch, 0, p.s_kv)};
}

__device__ __forceinline__ KeyRange visible_keys(const AttentionParams& p, RowBounds row, int token) {
  const int index = row.length - p.s_q + token;  // the token's own key
  KeyRange keys{row.first, min(row.length, p.max_keys)};
  if (p.causal) keys.end = min(keys.end, index + 1);
  if (p.window > 0) keys.begin = max(keys.begin, index - p.window + 1);
  return keys;
}

// An additive mask in base 2. The lowest float32 stays finite, so that a row of nothing else is a plain mean.
__device__ __forceinline__ float additive_mask(const AttentionMask& mask, int batch, int token, int key) {
  const int64_t offset = batch * mask.batch_stride + token * mask.query_stride + key * mask.key_stride;
  float value = 0.f;
  switch (mask.type) {
    case AttentionMaskType::kFloat32: value = static_cast<const float*>(mask.data)[offset]; break;
    case AttentionMaskType::kFloat16: value = to_float(static_cast<const __half*>(mask.data)[offset]); break;
    case AttentionMaskType::kBfloat16: value = to_float(static_cast<const __nv_bfloat16*>(mask.data)[offset]); break;
    default: return static_cast<const bool*>(mask.data)[offset] ? 0.f : -INFINITY;
  }
  return value == -INFINITY ? value : fmaxf(value * kLog2e, -1e38f);
}

// How a thread turns q.k into base-2 scores; `exp_scale` is what then remains to be multiplied with, inside exp2.
struct ScoreRule {
  float scale, softcap;
  bool is_base2;  // scores leave transform() in base 2

  __device__ explicit ScoreRule(const AttentionParams& p)
      : scale(p.softmax_scale * kLog2e),
        softcap(p.softcap),
        is_base2(p.softcap > 0.f || p.mask.type > AttentionMaskType::kBool) {}

  __device__ float exp_scale() const { return is_base2 ? 1.f : scale; }

  __device__ float transform(float score) const {
    return softcap > 0.f ? softcap * kLog2e * tanhf(score * scale / (softcap * kLog2e)) : score * scale;
  }
};

// The two rows whose scores a thread holds in an mma accumulator.
struct ThreadRows {
  KeyRange keys[2];
  int token[2];

  __device__ ThreadRows(const AttentionParams& p, RowBounds bounds, int row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      token[i] = min((row + 8 * i) / p.group, p.s_q - 1);  // rows past the end: any token will do
      keys[i] = visible_keys(p, bounds, token[i]);
    }
  }
};

// Softcap and mask, and -inf for hidden keys. key: of scores[0][0]; all_visible: all ranges hold the whole tile.
template <int kTiles>
__device__ __forceinline__ void apply_rules(float (&scores)[kTiles][4], const AttentionParams& p,
                                            const ScoreRule& rule, int batch, const ThreadRows& rows, int key,
                                            bool all_visible) {
  if (rule.is_base2) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[n][e] = rule.transform(scores[n][e]);
    }
  }
  const bool has_mask = p.mask.type != AttentionMaskType::kNone;
  if (all_visible && !has_mask) return;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int at = key + n * 8 + e % 2;
      const KeyRange keys = rows.keys[e / 2];
      if (at < keys.begin || at >= keys.end) {
        scores[n][e] = -INFINITY;
      } else if (has_mask) {
        scores[n][e] += additive_mask(p.mask, batch, rows.token[e / 2], at);
      }
    }
  }
}

}  // namespace fastshard
