// Tiles of 16-bit rows in shared memory, and the two matrix products on them.
//
// A tile is [rows][kHeadDim] in chunks of 16 bytes, whose order within a row is permuted so that the eight rows which
// one ldmatrix phase reads lie in different banks.
#pragma once
#include <bit>

#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace fastshard {

// Offset in elements of a chunk of a row.
template <int kHeadDim>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  static_assert(kHeadDim % 32 == 0);
  // Rows of whole 128-byte lines start in the same bank: eight permutations. Others start in two banks in turn: four.
  const int swizzle = kHeadDim % 64 == 0 ? row % 8 : row / 2 % 4;
  return row * kHeadDim + (chunk ^ swizzle) * 8;
}

// Starts copying rows into a tile, kStep rows at a time.
template <typename Config, int kRows>
struct TileLoader {
  static constexpr int kChunks = Config::kHeadDim / 8;
  static constexpr int kLanesPerRow = std::bit_ceil(unsigned(kChunks));
  static constexpr int kStep = Config::kThreads / kLanesPerRow;  // rows that the block copies at a time
  static_assert(kRows % kStep == 0);

  static __device__ int first_row() { return threadIdx.x / kLanesPerRow; }

  // row_source: called for the rows first_row(), first_row() + kStep, ... in this order; returns where the row lies in
  // global memory, or null for a row of zeros. Columns from head_dim on are zeros too. anywhere: any mapped address.
  template <typename T, typename RowSource>
  static __device__ __forceinline__ void load(T* tile, int head_dim, const T* anywhere, RowSource row_source) {
    const int chunk = threadIdx.x % kLanesPerRow;
    if (kLanesPerRow != kChunks && chunk >= kChunks) return;
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      const int row = first_row() + i * kStep;
      const T* from = row_source(row);
      const bool valid = from != nullptr && chunk * 8 < head_dim;
      ptx::cp_async_16_or_zero(ptx::shared_address(tile + chunk_offset<Config::kHeadDim>(row, chunk)),
                               valid ? from + chunk * 8 : anywhere, valid);
    }
  }
};

// The 16 x 16 block of a query tile at row 0 and column step * 16, as operand A.
template <int kHeadDim, typename T>
__device__ __forceinline__ void load_query_fragment(uint32_t (&a)[4], const T* tile, int row, int step) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(a, ptx::shared_address(tile + chunk_offset<kHeadDim>(row + lane % 16, step * 2 + lane / 16)));
}

// scores[16, 8 * kTiles] = q[16, kHeadDim] * k[8 * kTiles, kHeadDim]^T. row: of q in its tile; key: of k in its tile.
// With kInRegisters the fragments of q come from `q`, else from its tile.
template <int kHeadDim, bool kInRegisters, int kTiles, int kSteps, typename T>
__device__ __forceinline__ void multiply_queries_keys(float (&scores)[kTiles][4], const uint32_t (&q)[kSteps][4],
                                                      const T* q_tile, int row, const T* k_tile, int key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[n][e] = 0.f;
  }
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[4];
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = q[step][i];
    } else {
      load_query_fragment<kHeadDim>(a, q_tile, row, step);
    }
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      // Matrices: keys 0-7 low and high half of the step, then keys 8-15.
      const int from = key + n * 8 + lane % 8 + lane / 16 * 8;
      uint32_t b[4];
      ptx::ldmatrix_x4(b, ptx::shared_address(k_tile + chunk_offset<kHeadDim>(from, step * 2 + lane / 8 % 2)));
      ptx::mma_m16n8k16<T>(scores[n], a, b[0], b[1]);
      ptx::mma_m16n8k16<T>(scores[n + 1], a, b[2], b[3]);
    }
  }
}

// out[16, kHeadDim] += weights[16, 8 * kTiles] * v[8 * kTiles, kHeadDim], the weights rounded to T.
template <typename T, int kTiles, int kOutTiles>
__device__ __forceinline__ void accumulate_values(float (&out)[kOutTiles][4], const float (&weights)[kTiles][4],
                                                  const T* v_tile, int key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kTiles; k += 2) {
    // An accumulator pair of 16 x 8 is an operand A of 16 x 16.
    const uint32_t a[4] = {
        pack_pair<T>(weights[k][0], weights[k][1]), pack_pair<T>(weights[k][2], weights[k][3]),
        pack_pair<T>(weights[k + 1][0], weights[k + 1][1]), pack_pair<T>(weights[k + 1][2], weights[k + 1][3])};
#pragma unroll
    for (int n = 0; n < kOutTiles; n += 2) {
      // Matrices: keys 0-7 and 8-15 of eight columns, then of the next eight.
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(
          b, ptx::shared_address(v_tile + chunk_offset<kOutTiles * 8>(key + k * 8 + lane % 16, n + lane / 16)));
      ptx::mma_m16n8k16<T>(out[n], a, b[0], b[1]);
      ptx::mma_m16n8k16<T>(out[n + 1], a, b[2], b[3]);
    }
  }
}

}  // namespace fastshard
