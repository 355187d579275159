// Host interface of the decode attention kernel: no torch, no device code.
#pragma once
#include <algorithm>

#include "attention/attention.h"

namespace fastshard {

// Whether decode_attention takes the problem; attention() takes the rest. It is for few query rows a key/value head, and
// is compiled for the head dims of nearly all models.
inline bool decode_attention_serves(const AttentionParams& p) {
  const bool has_head_dim = p.head_dim == 64 || p.head_dim == 96 || p.head_dim == 128;
  const bool fits_grid = p.batch <= 65535 && p.num_kv_heads <= 65535;
  const bool has_strides = std::max(p.k_strides.token, p.v_strides.token) <= INT32_MAX / 2;  // 2 bytes an element
  return has_head_dim && fits_grid && has_strides && p.rows_per_head() <= 16 && !p.layer_norm;
}

// T: __half, __nv_bfloat16. One launch; num_splits and the partials of `params` are not read.
template <typename T>
void decode_attention(const AttentionParams& params, cudaStream_t stream);

}  // namespace fastshard
