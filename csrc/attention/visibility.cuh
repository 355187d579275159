// Which keys a query sees, and what happens to its scores before the softmax.
//
// A query token sees one range of keys (lengths, first key, causal rule, window); a mask may hide keys within it.
// Both ends of the range grow with the token, so a block of tokens needs the range of its first and its last only.
#pragma once
#include <type_traits>

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

// What an additive mask adds, in base 2. The lowest float32 stays finite, so that a row of nothing else is a plain mean.
__device__ __forceinline__ float mask_to_base2(float value) {
  return fmaxf(value * kLog2e, value == -INFINITY ? value : -1e38f);
}

// An element of any mask, in base 2.
__device__ __forceinline__ float additive_mask(const AttentionMask& mask, int batch, int token, int key) {
  const int64_t offset = batch * mask.batch_stride + token * mask.query_stride + key * mask.key_stride;
  float value = 0.f;
  switch (mask.type) {
    case AttentionMaskType::kFloat32: value = static_cast<const float*>(mask.data)[offset]; break;
    case AttentionMaskType::kFloat16: value = to_float(static_cast<const __half*>(mask.data)[offset]); break;
    case AttentionMaskType::kBfloat16: value = to_float(static_cast<const __nv_bfloat16*>(mask.data)[offset]); break;
    default: return static_cast<const bool*>(mask.data)[offset] ? 0.f : -INFINITY;
  }
  return mask_to_base2(value);
}

// How a thread turns q.k into base-2 scores; `exp_scale` is what then remains to be multiplied with, inside exp2.
struct ScoreRule {
  float scale;         // to base 2
  float cap, inverse;  // softcap in base 2, and what turns q.k into the argument of tanh
  bool is_base2;  // scores leave transform() in base 2

  __device__ explicit ScoreRule(const AttentionParams& p)
      : scale(p.softmax_scale * kLog2e),
        cap(p.softcap * kLog2e),
        inverse(p.softmax_scale / p.softcap),
        is_base2(p.softcap > 0.f || p.mask.type > AttentionMaskType::kBool) {}

  __device__ float exp_scale() const { return is_base2 ? 1.f : scale; }

  __device__ float transform(float score) const {
    return cap > 0.f ? cap * tanhf(score * inverse) : score * scale;
  }
};

// The two rows whose scores a thread holds in an mma accumulator.
struct ThreadRows {
  KeyRange keys[2];
  int token[2];

  __device__ ThreadRows(const AttentionParams& p, RowBounds bounds, int token0, int token1)
      : keys{visible_keys(p, bounds, token0), visible_keys(p, bounds, token1)}, token{token0, token1} {}

  // From a table of rows, see RowTable.
  template <typename Table>
  __device__ ThreadRows(const Table& table, int row)
      : keys{table.keys[row], table.keys[row + 8]}, token{table.token_of(row), table.token_of(row + 8)} {}
};

template <int kRows>
struct RowTokens {
  int token[kRows];
};
struct NoRowTokens {};

// What all rows of a block see, in shared memory. kTokens: whether a mask asks for their tokens; others save the room.
template <int kRows, bool kTokens>
struct RowTable : std::conditional_t<kTokens, RowTokens<kRows>, NoRowTokens> {
  KeyRange keys[kRows];

  __device__ __forceinline__ int token_of(int row) const {
    if constexpr (kTokens) return this->token[row];
    return 0;
  }

  // By all threads. first_row: of the rows of a head; past their end any token will do.
  template <int kThreads>
  __device__ __forceinline__ void fill(const AttentionParams& p, RowBounds bounds, int first_row) {
    for (int row = threadIdx.x; row < kRows; row += kThreads) {
      const int token = min((first_row + row) / p.group, p.s_q - 1);
      if constexpr (kTokens) this->token[row] = token;
      keys[row] = visible_keys(p, bounds, token);
    }
  }
};

// Whether MaskBytes can load the mask: a vector of kSpan keys is where its size divides.
template <int kSpan>
inline bool has_mask_bytes(const AttentionMask& mask) {
  const int64_t bits = reinterpret_cast<int64_t>(mask.data) | mask.batch_stride | mask.query_stride;
  return mask.type == AttentionMaskType::kBool && mask.key_stride == 1 && bits % kSpan == 0;
}

// A bool mask over the kSpan neighbouring keys from `key` on of the rows of kRowTiles accumulators, a byte a key.
template <int kRowTiles, int kSpan>
struct MaskBytes {
  static_assert(kSpan % 4 == 0 && kSpan <= 16);
  uint32_t words[2 * kRowTiles][kSpan / 4];

  // key: a multiple of kSpan; token_of(i): of row i of the accumulators. No byte from max_keys on is read.
  template <typename TokenOf>
  __device__ __forceinline__ void load(const AttentionParams& p, int batch, int key, TokenOf token_of) {
    const uint8_t* const base = static_cast<const uint8_t*>(p.mask.data) + batch * p.mask.batch_stride + key;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const uint8_t* const row = base + token_of(i) * p.mask.query_stride;
#pragma unroll
      for (int j = 0; j < kSpan / 4; ++j) words[i][j] = 0;
      if (key + kSpan <= p.max_keys) {
        struct alignas(kSpan) Vector {
          uint32_t words[kSpan / 4];
        };
        const Vector vector = *reinterpret_cast<const Vector*>(row);
#pragma unroll
        for (int j = 0; j < kSpan / 4; ++j) words[i][j] = vector.words[j];
      } else {
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
          if (key + j < p.max_keys) words[i][j / 4] |= uint32_t(row[j]) << j % 4 * 8;
        }
      }
    }
  }

  // -inf for hidden keys of the two rows of accumulator r.
  template <int kTiles>
  __device__ __forceinline__ void hide(float (&scores)[kTiles][4], int r) const {
    static_assert(kTiles * 2 == kSpan);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = n * 2 + e % 2;
        if ((words[2 * r + e / 2][at / 4] & 0xffu << at % 4 * 8) == 0) scores[n][e] = -INFINITY;
      }
    }
  }
};

// Whether MaskValues can load the mask: of T, 16-byte aligned rows.
template <typename T>
inline bool has_mask_values(const AttentionMask& mask) {
  constexpr auto kType = std::is_same_v<T, __half> ? AttentionMaskType::kFloat16 : AttentionMaskType::kBfloat16;
  const int64_t bits = reinterpret_cast<int64_t>(mask.data) | mask.batch_stride * 2 | mask.query_stride * 2;
  return mask.type == kType && mask.key_stride == 1 && bits % 16 == 0;
}

// An additive mask over the kSpan neighbouring keys from `key` on of one row.
template <typename T, int kSpan>
struct MaskValues {
  static_assert(kSpan % Vec<T>::kSize == 0);
  Vec<T> values[kSpan / Vec<T>::kSize];

  // key: a multiple of kSpan. No element from max_keys on is read.
  __device__ __forceinline__ void load(const AttentionParams& p, int batch, int token, int key) {
    const T* const from = static_cast<const T*>(p.mask.data) + batch * p.mask.batch_stride +
                          token * p.mask.query_stride + key;
    const bool is_whole = key + kSpan <= p.max_keys;
#pragma unroll
    for (int i = 0; i < kSpan; i += Vec<T>::kSize) {
      if (is_whole) {
        values[i / Vec<T>::kSize] = load_vec(from + i);
      } else {
#pragma unroll
        for (int j = 0; j < Vec<T>::kSize; ++j) {
          values[i / Vec<T>::kSize][j] = key + i + j < p.max_keys ? from[i + j] : from_float<T>(0.f);
        }
      }
    }
  }

  // Scores in base 2 with the mask, of q.k, scale being to base 2. half: which of the accumulator's two rows it is.
  template <int kTiles>
  __device__ __forceinline__ void add(float (&scores)[kTiles][4], int half, float scale) const {
    static_assert(kTiles * 2 == kSpan);
#pragma unroll
    for (int at = 0; at < kSpan; ++at) {
      float& score = scores[at / 2][half * 2 + at % 2];
      score = fmaf(score, scale, mask_to_base2(to_float(values[at / Vec<T>::kSize][at % Vec<T>::kSize])));
    }
  }
};

// -inf for keys outside the ranges of the rows. key: of scores[0][0]; scores[n] is kStep keys on.
template <int kStep = 8, int kTiles>
__device__ __forceinline__ void hide_keys(float (&scores)[kTiles][4], const ThreadRows& rows, int key) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int at = key + n * kStep + e % 2;
      if (at < rows.keys[e / 2].begin || at >= rows.keys[e / 2].end) scores[n][e] = -INFINITY;
    }
  }
}

// Softcap and mask, and -inf for hidden keys. key, kStep: as for hide_keys; all_visible: all ranges hold the whole tile.
template <int kStep = 8, int kTiles>
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
      const int at = key + n * kStep + e % 2;
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
