// Host interface of the decode step kernel: no torch, no device code.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "activation/activation.h"

namespace fastshard {

constexpr int kDecodeMaxTokens = 8;
constexpr int kDecodeMaxLayers = 128;
constexpr int kDecodeMaxRanks = 8;
constexpr int kDecodeMaxSplits = 16;  // parts of a key-value head's keys

// Of one layer: contiguous matrices [out_features, in_features] and vectors of T, 16-byte aligned.
struct DecodeLayer {
  const void* sa_norm;      // [hidden_size]
  const void* weights[4];   // qkv [qkv_size, hidden_size], output [hidden_size, num_heads * head_dim], gate and up
                            // [2 * intermediate_size, hidden_size], rows interleaved, down [hidden_size,
                            // intermediate_size]
  const void* qkv_bias;     // [qkv_size] or null
  const void* q_norm;       // [head_dim] or null, as k_norm
  const void* k_norm;
  const void* output_bias;  // [hidden_size] or null
  const void* mlp_norm;     // [hidden_size]
  void* k_cache;            // [>= num_tokens, num_kv_heads, cache_size, head_dim]
  void* v_cache;
  int window;               // keys that a query sees, 0: all
};

// Where the launcher puts the buffers of a step in the workspace: csrc/decode/step.cuh says what they are for.
struct DecodeBuffers {
  uint64_t *entered, *qkv, *attended, *middle, *hidden, *down, *partials;
};

struct DecodeStepParams {
  // Either the tokens of a first shard, or the hidden state that another one gave.
  const int64_t* tokens;  // [num_tokens] or null
  const void* embedding;  // [num_embeddings, hidden_size] or null
  const void* hidden;     // [num_tokens, hidden_size] or null
  // What comes out: the logits of a last shard, or the hidden state.
  const void* norm;  // [hidden_size] or null
  const void* head;  // [vocab_size, hidden_size] or null
  void* out;         // [num_tokens, vocab_size] float with a head, else [num_tokens, hidden_size] T

  const float* rope_table;   // [num_positions, rotary_dim / 2, 2]
  const int64_t* positions;  // [num_tokens]
  const int64_t* slots;      // [num_tokens]: where k and v go; keys up to there are seen
  const int64_t* first_key;  // [num_tokens] or null: keys before it are not seen
  int* overflow;             // [1], set where a slot or position is out of range
  // Ranks that share each layer: heads, units of the MLP and rows of the head are this rank's, and what enters and
  // leaves a layer is whole. One rank: no memory.
  int num_ranks, rank;
  uint64_t* rank_sums[kDecodeMaxRanks];  // each rank's memory, decode_rank_sum_words(), zeros before the first step
  uint64_t* workspace;       // decode_workspace_words(), zeros before the first step

  int num_tokens, num_layers, hidden_size, intermediate_size;
  int num_embeddings, vocab_size;  // rows of the embedding and of the head
  int num_heads, num_kv_heads, head_dim, rotary_dim, num_positions, cache_size;
  float norm_eps;
  float softmax_scale;
  bool rope_interleaved;
  bool weight_in_fp32;  // multiply norms by their weight before rounding to T, not after
  Activation activation;
  DecodeBuffers buffers;  // filled in by the launcher
  DecodeLayer layers[kDecodeMaxLayers];

  __host__ __device__ int group() const { return num_heads / num_kv_heads; }
  __host__ __device__ int q_size() const { return num_heads * head_dim; }
  __host__ __device__ int qkv_size() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
};

// Words of 64 bits.
int64_t decode_workspace_words(const DecodeStepParams& params);
int64_t decode_rank_sum_words(int num_ranks, int hidden_size);

// One cooperative launch. T: __half, __nv_bfloat16. False, and nothing launched, where the current device cannot hold
// the kernel's blocks together.
template <typename T>
bool decode_step(const DecodeStepParams& params, cudaStream_t stream);
template <typename T>
bool decode_step_of_ranks(const DecodeStepParams& params, cudaStream_t stream);  // num_ranks > 1

}  // namespace fastshard
