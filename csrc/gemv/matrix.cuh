// What a block multiplies of whole matrices: its tiles, or those of its share of a part, and the runs of them.
#pragma once
#include "gemv/product.cuh"

namespace fastshard {

// A block's share of a product that is cut into parts along its input, so that a block needs few of the activations:
// each part has blocks in proportion to its chunks.
struct Part {
  int index;
  int first_chunk, chunks;
  int first_block, blocks;

  // parts: at most num_chunks, and half of grid.
  __device__ __forceinline__ Part(int block, int grid, int parts, int num_chunks) {
    const auto chunk_of = [&](int part) { return num_chunks * part / parts; };
    const auto block_of = [&](int part) { return grid * chunk_of(part) / num_chunks; };
    index = 0;
    while (index < parts - 1 && block_of(index + 1) <= block) ++index;
    first_chunk = chunk_of(index), chunks = chunk_of(index + 1) - first_chunk;
    first_block = block_of(index), blocks = block_of(index + 1) - first_block;
  }
};

// A matrix, and what the block has of it.
template <typename T>
struct Matrix {
  const T* weight;  // [out_features, in_features]
  int stride, out_features, in_features;
  Segment segment;
  int num_runs;
};

// The runs of matrices begin, begin + 1, ... < end: the source of their stream.
template <typename T>
class MatrixSchedule {
 public:
  // matrices: in shared memory, as they take many registers.
  __device__ __forceinline__ MatrixSchedule(const Matrix<T>* matrices, int begin, int end)
      : matrix_(matrices + begin), end_(matrices + end) {}

  __device__ __forceinline__ const T* next(Run& run) {
    while (matrix_ < end_ && index_ == matrix_->num_runs) ++matrix_, index_ = 0;
    if (matrix_ >= end_) return nullptr;
    const Matrix<T>& m = *matrix_;
    run = run_of(m.segment, m.out_features, m.in_features, m.stride, index_++);
    return m.weight;
  }

 private:
  const Matrix<T>* matrix_;
  const Matrix<T>* end_;
  int index_ = 0;  // of the matrix' next run
};

template <typename T>
__device__ __forceinline__ Matrix<T> streamed_matrix(const void* weight, int64_t stride, int out_features,
                                                     int in_features, const Segment& segment) {
  return {static_cast<const T*>(weight), int(stride), out_features, in_features, segment,
          num_runs(segment)};
}

}  // namespace fastshard
