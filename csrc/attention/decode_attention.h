// Host interface of the decode attention kernel: no torch, no device code.
#pragma once
#include <algorithm>

#include "attention/attention.h"

namespace fastshard {

// Whether decode_attention takes the problem, else attention() does. It is for few query rows a key/value head, and
// compiled for the head dims of nearly all models.
inline bool decode_attention_serves(const AttentionParams& p) {
  const bool has_head_dim = p.head_dim == 64 || p.head_dim == 96 || p.head_dim == 128;
  const bool fits_grid = p.batch <= 65535 && p.num_kv_heads <= 65535;
  // The kernel counts in 16 bytes, 8 elements, and steps from key to key in bytes.
  const auto fits = [](const AttentionStrides& s) {
    return std::max({s.batch, s.token, s.head}) / 8 <= UINT32_MAX && s.token * 2 <= INT32_MAX;
  };
  const bool has_strides = fits(p.q_strides) && fits(p.k_strides) && fits(p.v_strides);
  const bool is_plain = !p.layer_norm && p.rope.table == nullptr;
  return has_head_dim && fits_grid && has_strides && p.rows_per_head() <= 16 && is_plain;
}

// T: __half, __nv_bfloat16. One launch; tile, num_splits and the partials of `params` are not read.
template <typename T>
void decode_attention(const AttentionParams& params, cudaStream_t stream);

}  // namespace fastshard
