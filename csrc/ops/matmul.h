// What the ops around a weight matrix share: which weights the streaming kernels take, and torch's matmul for the rest.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "gemv/weight_stream.h"
#include "ops/call_op.h"
#include "ops/check.h"

namespace fastshard {

// Whether rows of a 2-D tensor have unit stride and start on 16 bytes.
inline bool has_vector_rows(const Tensor& t) {
  return t.stride(1) == 1 && is_aligned16(t) && t.stride(0) * int64_t(t.element_size()) % 16 == 0;
}

// Whether the kernels of csrc/gemv can read this [out_features, in_features] in place.
inline bool can_stream(const Tensor& weight) {
  constexpr int64_t kMaxSize = int64_t(1) << 30;  // indices and tile numbers are ints
  const bool is_16bit = weight.scalar_type() == ScalarType::Half || weight.scalar_type() == ScalarType::BFloat16;
  return is_16bit && weight.size(1) % 8 == 0 && has_vector_rows(weight) && weight.size(0) <= kMaxSize &&
         weight.size(1) <= kMaxSize && weight.stride(0) <= kStreamMaxStride;
}

// The rows of a tensor [..., columns], in place where its strides allow, else in a copy.
struct RowMatrix {
  Tensor tensor;
  int64_t stride;  // between rows, in elements
  const void* data() const { return tensor.const_data_ptr(); }
};

// Unit-stride rows; 16-byte aligned ones, `columns` being whole 16-byte vectors, where `aligned`.
inline RowMatrix row_matrix(const Tensor& t, int64_t columns, bool aligned) {
  // no call to the dispatcher for what is the rule
  if (t.is_contiguous() && (!aligned || is_aligned16(t))) return {t, columns};
  Tensor rows = torch::stable::reshape(t, {-1, columns});
  const bool usable = aligned ? has_vector_rows(rows) : rows.stride(1) == 1;
  if (!usable) rows = torch::stable::clone(torch::stable::contiguous(rows));
  return {rows, rows.stride(0)};
}

// x @ weight.T + bias by torch's own kernels; x: [num_tokens, in_features].
inline Tensor library_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return call_op("aten::linear", x, weight, bias);
}

// a + b: the stable ABI has no add.
inline Tensor library_add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

}  // namespace fastshard
