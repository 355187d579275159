// What the norm kernels share on the host: their rows, and the limit of a row.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/row_layout.h"

namespace fastshard {

constexpr int kMaxRowBytes = 64 * 1024;  // a row is held in registers; MAX_ROW_BYTES in fastshard/ops/norm.py

struct NormRows {
  const void* x;         // [num_tokens, hidden_size], unit-stride 16-byte aligned rows
  const void* residual;  // as x, added to it; may be null
  void* out;             // [num_tokens, hidden_size], contiguous, 16-byte aligned
  void* new_residual;    // as out: x + residual, rounded; null where residual is
  RowLayout x_layout;
  RowLayout residual_layout;
  int64_t num_tokens;
  int hidden_size;       // a multiple of 16 bytes
  float inv_hidden_size;
};

// How many threads hold a row, and how many 16-byte vectors of it each; zeros: chosen by the row's length.
struct RowVariant {
  int threads_per_row = 0, vecs_per_thread = 0;
  bool is_auto() const { return threads_per_row == 0; }
};

}  // namespace fastshard
