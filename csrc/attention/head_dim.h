// Attention of one head_dim that the kernels are compiled for, in attention_64.cu and its siblings. No device code: who
// includes launch_attention.cuh instead compiles the kernels once more.
#pragma once
#include "attention/attention.h"

namespace fastshard {

template <typename T, int kHeadDim>
struct AttentionOfHeadDim {
  static int num_splits(const AttentionParams& params);
  static void run(const AttentionParams& params, cudaStream_t stream);
};

}  // namespace fastshard
