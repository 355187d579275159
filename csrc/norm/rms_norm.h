// Host interface of the RMSNorm kernel: no torch, no device code.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastshard {

constexpr int kRmsNormMaxRowBytes = 64 * 1024;  // the row of one token is held in registers

struct RmsNormParams {
  const void* x;       // [num_tokens, hidden_size], rows of unit stride, 16-byte aligned
  const void* weight;  // [hidden_size], dtype of x, contiguous, 16-byte aligned
  void* out;           // [num_tokens, hidden_size], contiguous, 16-byte aligned
  int64_t x_stride;    // between tokens, in elements
  int64_t num_tokens;
  int hidden_size;     // a multiple of 16 bytes
  float eps;
  bool weight_in_fp32;  // multiply by weight before rounding to T, not after
};

// T: float, __half, __nv_bfloat16. Throws std::runtime_error for rows above kRmsNormMaxRowBytes.
template <typename T>
void rms_norm(const RmsNormParams& params, cudaStream_t stream);

}  // namespace fastshard
