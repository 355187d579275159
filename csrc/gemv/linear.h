// Host interface of the small-row linear kernels: no torch, no device code.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastshard {

constexpr int kLinearMaxTokens = 16;

struct LinearParams {
  const void* x;            // [num_tokens, in_features], unit-stride 16-byte aligned rows
  const void* weight;       // [out_features, in_features], dtype of x, unit-stride 16-byte aligned rows
  const void* bias;         // [out_features] or null
  const void* norm_weight;  // [in_features] or null, 16-byte aligned
  const void* residual;     // [num_tokens, out_features] or null, unit-stride rows
  void* out;                // [num_tokens, out_features], contiguous
  int64_t x_stride;         // between rows, in elements, a multiple of 8
  int64_t weight_stride;    // a multiple of 8, at most kStreamMaxStride
  int64_t residual_stride;
  int num_tokens;           // at most kLinearMaxTokens
  int out_features;
  int in_features;          // a multiple of 8
  float norm_eps;
  bool norm_weight_in_fp32;  // multiply by norm_weight before rounding to T, not after
};

// T: __half, __nv_bfloat16. Throws std::runtime_error for more rows than kLinearMaxTokens.
template <typename T>
void linear(const LinearParams& params, cudaStream_t stream);

}  // namespace fastshard
