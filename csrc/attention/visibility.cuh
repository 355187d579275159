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

// An index on its way from memory: a kernel may start other loads before it asks for the value.
struct LoadedIndex {
  int32_t low, high;  // words

  __device__ __forceinline__ LoadedIndex(const AttentionIndices& indices, int i, int otherwise)
      : low(otherwise), high(0) {
    if (indices.data == nullptr) return;
    const int words_each = indices.is_int64 ? 2 : 1;
    const auto* words = static_cast<const volatile int32_t*>(indices.data) + i * indices.stride * words_each;
    low = words[0];
    high = words[words_each - 1];
  }

  // Kept within 0..limit: the kernels read no key outside the tensors whatever the device memory holds.
  __device__ __forceinline__ int within(int limit, const AttentionIndices& indices) const {
    const int64_t value = indices.is_int64 ? int64_t(uint64_t(high) << 32 | uint32_t(low)) : low;
    return static_cast<int>(value < 0 ? 0 : value > limit ? limit : value);
  }
};

// What one batch row allows.
struct RowBounds {
  int length;  // valid keys
  int first;   // first valid key
};

struct LoadedRowBounds {
  LoadedIndex length, first;

  __device__ __forceinline__ LoadedRowBounds(const AttentionParams& p, int batch)
      : length(p.kv_lengths, batch, p.s_kv), first(p.first_key, batch, 0) {}
  __device__ __forceinline__ RowBounds values(const AttentionParams& p) const {
    return {length.within(p.s_kv, p.kv_lengths), first.within(p.s_kv, p.first_key)};
  }
};

__device__ __forceinline__ RowBounds row_bounds(const AttentionParams& p, int batch) {
  return LoadedRowBounds(p, batch).values(p);
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

  __device__ ThreadRows(const AttentionParams& p, RowBounds bounds, int token0, int token1)
      : keys{visible_keys(p, bounds, token0), visible_keys(p, bounds, token1)}, token{token0, token1} {}

  // Of rows `row` and `row` + 8; past the end any token will do.
  __device__ ThreadRows(const AttentionParams& p, RowBounds bounds, int row)
      : ThreadRows(p, bounds, min(row / p.group, p.s_q - 1), min((row + 8) / p.group, p.s_q - 1)) {}
};

// -inf for keys outside the ranges of the rows. key: of scores[0][0].
template <int kTiles>
__device__ __forceinline__ void hide_keys(float (&scores)[kTiles][4], const ThreadRows& rows, int key) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int at = key + n * 8 + e % 2;
      if (at < rows.keys[e / 2].begin || at >= rows.keys[e / 2].end) scores[n][e] = -INFINITY;
    }
  }
}

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
