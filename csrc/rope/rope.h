// Host interface of the RoPE kernel, which may append k and v to the cache: no torch, no device code.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastshard {

// [batch, seq_len, num_heads, head_dim] with unit last stride.
struct RopeHeads {
  const void* data;
  int64_t batch_stride, token_stride, head_stride;  // in elements
};

// [batch, num_kv_heads, max_seq_len, head_dim] with unit last stride.
struct RopeCache {
  void* data;
  int64_t batch_stride, head_stride, slot_stride;  // in elements
};

// [batch, seq_len]
struct RopeIndex {
  const int64_t* data;
  int64_t batch_stride, token_stride;  // in elements
};

struct RopeParams {
  RopeHeads q;
  RopeHeads k, v;         // null data: q only
  void* q_out;            // [batch, seq_len, num_qo_heads, head_dim], contiguous
  RopeCache k_cache, v_cache;
  const float* table;     // [max_positions, rotary_dim / 2, 2] cosine and sine, contiguous
  RopeIndex positions;    // null data: no rotation
  RopeIndex slots;        // null data: q only
  int* overflow;          // [1], set to 1 where a token is out of range; null: q only, and such a q is NaN, not 0
  int64_t max_positions;
  int64_t max_seq_len;
  int64_t num_tokens;     // batch * seq_len, at most 2^31 - 1
  int seq_len;
  int num_qo_heads, num_kv_heads;
  int head_dim;
  int rotary_dim;         // even, at most head_dim; 0 for no rotation
  bool interleaved;       // pairs (2i, 2i + 1), else (i, i + rotary_dim / 2)
  bool whole_vectors;     // all pointers (of table too), strides and head_dim, rotary_dim (its half, where not
                          // interleaved) are of whole 16-byte vectors
};

// T: float, __half, __nv_bfloat16.
template <typename T>
void rope(const RopeParams& params, cudaStream_t stream);

}  // namespace fastshard
