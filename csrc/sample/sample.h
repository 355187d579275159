// Host interface of the sampling kernel: no torch, no device code.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastshard {

constexpr int kMaxVocabSize = 1 << 24;  // so that the masses of a row, 40 bits each, add up in 64

struct SampleParams {
  const void* logits;   // [num_rows, vocab_size], unit-stride rows
  const int64_t* step;  // []
  int64_t* out;         // [num_rows]
  int64_t row_stride;   // of logits, in elements
  uint64_t seed;
  int num_rows;
  int vocab_size;       // 1 to kMaxVocabSize
  float inverse_temperature;  // 0: the largest logit, whatever the filters
  int top_k;            // 1 to vocab_size - 1; 0: all
  float min_x;          // logarithm of min_p; -inf: all
  double top_p;         // 1: all
};

// T: float, __half, __nv_bfloat16.
template <typename T>
void sample(const SampleParams& params, cudaStream_t stream);

}  // namespace fastshard
