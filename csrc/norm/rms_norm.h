// Host interface of the RMSNorm kernel: no torch, no device code.
#pragma once
#include "norm/row.h"

namespace fastshard {

struct RmsNormParams {
  NormRows rows;
  const void* weight;   // [hidden_size], dtype of x, contiguous, 16-byte aligned
  float eps;
  bool weight_in_fp32;  // multiply by weight before rounding to T, not after
};

// T: float, __half, __nv_bfloat16. Throws std::runtime_error for rows above kMaxRowBytes, or that the variant does
// not hold.
template <typename T>
void rms_norm(const RmsNormParams& params, RowVariant variant, cudaStream_t stream);

}  // namespace fastshard
