// The rows of a tensor [..., row_size] as kernels take them: in place where their strides allow, else in a copy.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/row_layout.h"
#include "ops/check.h"

namespace fastshard {

struct Rows {
  Tensor tensor;  // owns what data points to
  const void* data;
  RowLayout layout;
};

// Fill layout with x's leading dimensions, merged where they are one; false where more than three remain.
inline bool make_row_layout(const Tensor& x, RowLayout& layout) {
  std::vector<int64_t> sizes, strides;  // outermost first
  for (int64_t dim = 0; dim < x.dim() - 1; ++dim) {
    const int64_t size = x.size(dim), stride = x.stride(dim);
    if (size == 1) continue;
    if (!sizes.empty() && strides.back() == size * stride) {
      sizes.back() *= size;
      strides.back() = stride;
    } else {
      sizes.push_back(size);
      strides.push_back(stride);
    }
  }
  if (sizes.size() > 3) return false;
  // Missing dimensions are inner ones of size 1, so that a plain matrix needs no division.
  sizes.resize(3, 1);
  strides.resize(3, 0);
  layout = {{strides[0], strides[1], strides[2]}, unsigned(sizes[1]), unsigned(sizes[2])};
  return true;
}

// x has at least one dimension. aligned: every row starts at a multiple of 16 bytes (rows are whole 16-byte vectors).
inline Rows rows_of(const Tensor& x, bool aligned) {
  const int64_t vec_size = 16 / int64_t(x.element_size());
  Tensor rows = x;
  RowLayout layout{};
  const auto usable = [&] {
    if (rows.size(rows.dim() - 1) > 1 && rows.stride(rows.dim() - 1) != 1) return false;
    if (!make_row_layout(rows, layout)) return false;
    if (!aligned) return true;
    for (const int64_t stride : layout.strides) {
      if (stride % vec_size != 0) return false;
    }
    return is_aligned16(rows);
  };
  if (!usable()) {
    rows = x.is_contiguous() ? torch::stable::clone(x) : torch::stable::contiguous(x);
    STD_TORCH_CHECK(usable(), "a fresh copy must have aligned rows");
  }
  return {rows, rows.const_data_ptr(), layout};
}

// Rows are counted by the x dimension of a grid.
inline int64_t num_rows_of(const Tensor& x, int64_t row_size) {
  const int64_t num_rows = x.numel() / row_size;
  STD_TORCH_CHECK(num_rows <= INT32_MAX, "at most ", INT32_MAX, " rows, got ", num_rows);
  return num_rows;
}

}  // namespace fastshard
