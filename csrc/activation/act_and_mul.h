// Host interface of the gated activation kernel: no torch, no device code.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "activation/activation.h"
#include "common/row_layout.h"

namespace fastshard {

struct ActAndMulParams {
  const void* gate_up;     // [num_tokens, 2 * intermediate_size], unit-stride rows
  void* out;               // [num_tokens, intermediate_size], contiguous, 16-byte aligned
  RowLayout gate_up_layout;
  int64_t num_tokens;      // at most 2^31 - 1
  int intermediate_size;
  Activation activation;
  bool interleaved;        // columns g0, u0, g1, u1, ...; else all gates, then all ups
  bool whole_vectors;      // rows of gate_up and halves of rows start at, rows of out are, multiples of 16 bytes
};

// T: float, __half, __nv_bfloat16.
template <typename T>
void act_and_mul(const ActAndMulParams& params, cudaStream_t stream);

}  // namespace fastshard
