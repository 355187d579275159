// Host interface of the attention kernels: no torch, no device code.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "rope/rope.h"

namespace fastshard {

constexpr int kAttentionMaxHeadDim = 256;

// Strides in elements; the stride of head_dim is 1. All are multiples of 8: every row of a head is 16-byte aligned.
struct AttentionStrides {
  int64_t batch, token, head;
};

// One index per batch row, int32 or int64.
struct AttentionIndices {
  const void* data;  // [batch]; null: the default
  int64_t stride;
  bool is_int64;
};

enum class AttentionMaskType { kNone, kBool, kFloat32, kFloat16, kBfloat16 };

struct AttentionMask {
  const void* data;  // [batch, s_q, at least max_keys], null for kNone
  int64_t batch_stride, query_stride, key_stride;
  AttentionMaskType type;
};

// RoPE of the queries; keys are rotated already.
struct AttentionRope {
  const float* table;    // [max_positions, rotary_dim / 2, 2] cosine and sine, 16-byte aligned; null: no rotation
  RopeIndex positions;   // [batch, s_q]
  int64_t max_positions;
  int rotary_dim;        // above 0, at most head_dim; a multiple of 8, or of 16 where not interleaved
  bool interleaved;      // as in RopeParams
};

// Which tiles of AttentionConfigs (launch_attention.cuh) a call gets.
enum class AttentionTile { kAuto, kFew, kSmall, kPrefill };

constexpr int kAttentionMaxSplits = 128;

struct AttentionParams {
  const void* q;  // [batch, s_q, num_kv_heads * group, head_dim]
  const void* k;  // [batch, s_kv, num_kv_heads, head_dim]
  const void* v;  // [batch, s_kv, num_kv_heads, head_dim]
  void* out;      // [batch, s_q, num_kv_heads * group, head_dim], contiguous
  AttentionStrides q_strides, k_strides, v_strides;
  int batch, s_q, s_kv, num_kv_heads, group;
  int head_dim;  // a multiple of 8, at most kAttentionMaxHeadDim

  AttentionRope rope;

  // Which keys a query sees, and how scores are made: see visibility.cuh.
  AttentionIndices kv_lengths;  // default s_kv
  AttentionIndices first_key;   // default 0
  int max_keys;                 // no key from here on is seen: s_kv, or what the mask covers if that is less
  bool causal;
  int window;           // 0: none
  float softcap;        // 0: none
  float softmax_scale;  // above 0
  AttentionMask mask;

  // LayerNorm over head_dim of each row of out.
  bool layer_norm;
  const void* weight;  // [head_dim], may be null
  const void* bias;    // [head_dim], may be null
  float eps;

  AttentionTile tile;
  int asked_splits;  // of the keys of a row, at most kAttentionMaxSplits; 0: a heuristic chooses

  // The keys of a row may be split over blocks, whose partial results a second kernel combines.
  int num_splits;      // from attention_num_splits
  float* partial_out;  // [num_splits, num_rows, head_dim], null where num_splits is 1, as the next two
  float* partial_max;  // [num_splits, num_rows], of base-2 scores
  float* partial_sum;  // [num_splits, num_rows]; 0: nothing seen, the other two may hold anything

  int heads_at_once;  // set by attention(): key/value heads that blocks work on side by side

  // A row of the kernels: one query token of one query head, numbered [batch, num_kv_heads, s_q, group].
  __host__ __device__ int rows_per_head() const { return s_q * group; }
  __host__ __device__ int64_t num_rows() const { return int64_t(batch) * num_kv_heads * rows_per_head(); }
};

// T: __half, __nv_bfloat16. Into how many splits the keys should go on the current device.
template <typename T>
int attention_num_splits(const AttentionParams& params);

template <typename T>
void attention(const AttentionParams& params, cudaStream_t stream);

}  // namespace fastshard
