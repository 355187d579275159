// What ops that rotate read of their arguments: checks for csrc/rope and csrc/attention.
#pragma once
#include "ops/check.h"
#include "rope/rope.h"

namespace fastshard {

struct RopeTable {
  const float* data;  // [max_positions, rotary_dim / 2, 2] cosine and sine, contiguous
  int64_t max_positions;
  int rotary_dim;
};

// Throws unless it is a table for heads of x, [.., .., .., head_dim].
RopeTable rope_table_of(const Tensor& table, const Tensor& x);

// A [batch, seq_len] index of the tokens of x.
RopeIndex rope_index_of(const Tensor& index, const Tensor& x);

}  // namespace fastshard
