// What a block multiplies in a decode step: the matrices in order, and its tiles of each.
//
// A step has four matrices a layer, then the head. A block has every gridDim.x-th tile of each; of down, whose rows are
// long, every tile of its share of a part. The kernel (step.cuh) asks for the segments, the stream of weights for the
// runs, of the same plan.
#pragma once
#include "decode/step.h"
#include "gemv/weight_stream.cuh"

namespace fastshard {

enum class DecodeProduct { kQkv, kOutput, kGateUp, kDown, kHead };  // of a layer in order, then the head
constexpr int kDecodeProducts = 5;

// The down product is cut into parts along its input, of one slice at most, so that a block needs few of the
// activations.
__host__ __device__ inline int num_down_parts(const DecodeStepParams& p) {
  return (num_chunks(p.intermediate_size) + kSliceChunks - 1) / kSliceChunks;
}

__device__ __forceinline__ int out_features_of(const DecodeStepParams& p, DecodeProduct product) {
  switch (product) {
    case DecodeProduct::kQkv: return p.qkv_size();
    case DecodeProduct::kGateUp: return 2 * p.intermediate_size;
    case DecodeProduct::kHead: return p.vocab_size;
    default: return p.hidden_size;
  }
}

__device__ __forceinline__ int in_features_of(const DecodeStepParams& p, DecodeProduct product) {
  switch (product) {
    case DecodeProduct::kOutput: return p.q_size();
    case DecodeProduct::kDown: return p.intermediate_size;
    default: return p.hidden_size;
  }
}

__host__ __device__ inline int num_decode_matrices(const DecodeStepParams& p) {
  return 4 * p.num_layers + (p.head != nullptr ? 1 : 0);
}

__device__ __forceinline__ DecodeProduct product_of(const DecodeStepParams& p, int matrix) {
  return matrix == 4 * p.num_layers ? DecodeProduct::kHead : static_cast<DecodeProduct>(matrix % 4);
}

// Matrix i of a step: four a layer, then the head.
template <typename T>
__device__ __forceinline__ const T* weight_of(const DecodeStepParams& p, int matrix) {
  return static_cast<const T*>(matrix == 4 * p.num_layers ? p.head : p.layers[matrix / 4].weights[matrix % 4]);
}

// What a block does of each product. Of down it has its share of one part, and of all where the grid is small.
struct DecodePlan {
  Run runs[kDecodeProducts];          // the first, of which there often is no other
  Segment segments[kDecodeProducts];  // of down: of its first part
  int num_runs[kDecodeProducts];      // of down: of all parts
  int parts, chunks;                  // of down
  int first_part, end_part;           // that the block has

  __device__ int first_chunk(int part) const { return chunks * part / parts; }
  __device__ int first_block(int part) const { return gridDim.x * first_chunk(part) / chunks; }

  __device__ __forceinline__ void init(const DecodeStepParams& p) {
    parts = num_down_parts(p), chunks = num_chunks(p.intermediate_size);
    first_part = 0, end_part = parts;
    int index = blockIdx.x, count = gridDim.x;
    if (gridDim.x >= 2 * parts) {  // then each part has a block
      while (first_part < parts - 1 && first_block(first_part + 1) <= blockIdx.x) ++first_part;
      end_part = first_part + 1;
      index -= first_block(first_part), count = first_block(end_part) - first_block(first_part);
    }
#pragma unroll 1
    for (int i = 0; i < kDecodeProducts; ++i) {
      const DecodeProduct product = static_cast<DecodeProduct>(i);
      const int out_features = out_features_of(p, product), in_features = in_features_of(p, product);
      segments[i] = whole_rows(out_features, in_features, p.num_tokens);
      if (product == DecodeProduct::kDown) {
        const int chunk = first_chunk(first_part);
        segments[i] = every_tile(index, count, out_features, chunk, first_chunk(first_part + 1) - chunk,
                                 group_tiles(p.num_tokens));
      }
      num_runs[i] = fastshard::num_runs(segments[i]);
      if (product == DecodeProduct::kDown) num_runs[i] *= end_part - first_part;
      runs[i] = run_of(segments[i], out_features, in_features, in_features, 0);
    }
  }

  __device__ __forceinline__ Segment segment(DecodeProduct product, int part) const {
    Segment segment = segments[static_cast<int>(product)];
    if (part != first_part) {
      segment.first_chunk = first_chunk(part), segment.chunks = first_chunk(part + 1) - segment.first_chunk;
    }
    return segment;
  }

  __device__ __forceinline__ Run run(const DecodeStepParams& p, DecodeProduct product, int index) const {
    const int out_features = out_features_of(p, product), in_features = in_features_of(p, product);
    const bool in_parts = product == DecodeProduct::kDown;  // of one run each
    return run_of(segment(product, first_part + (in_parts ? index : 0)), out_features, in_features, in_features,
                  in_parts ? 0 : index);
  }
};

// The runs of all matrices: the source of the weights' stream.
template <typename T>
class DecodeSchedule {
 public:
  __device__ __forceinline__ DecodeSchedule(const DecodeStepParams& p, const DecodePlan& plan)
      : p_(p), plan_(plan), weight_(weight_of<T>(p, 0)) {}

  // Not inlined: it is needed in many places, and not often.
  __device__ __noinline__ const T* next(Run& run) {
    while (matrix_ < num_decode_matrices(p_)) {
      const DecodeProduct product = product_of(p_, matrix_);
      const int index = index_++, count = plan_.num_runs[static_cast<int>(product)];
      const T* const weight = weight_;
      if (index_ >= count) {
        ++matrix_, index_ = 0;
        if (matrix_ < num_decode_matrices(p_)) weight_ = weight_of<T>(p_, matrix_);  // early: constants are far
      }
      if (index >= count) continue;
      run = plan_.runs[static_cast<int>(product)];
      if (index > 0) run = plan_.run(p_, product, index);
      return weight;
    }
    return nullptr;
  }

 private:
  const DecodeStepParams& p_;
  const DecodePlan& plan_;
  const T* weight_;  // of the matrix
  int matrix_ = 0, index_ = 0;
};

}  // namespace fastshard
