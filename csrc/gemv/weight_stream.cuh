// Weights on their way: every warp of a block has a queue of its own in shared memory, filled from global memory ahead
// of the products that take from it, and of whatever those wait for.
//
// A chunk is 8 weight rows by up to kChunkColumns columns. Each warp copies (cp.async) just the columns that it will
// multiply, so that no warp hands anything to another: no barrier, no producer. What a warp takes next, and what it
// fetches in its place, kStages chunks later, follows from the same sequence of segments.
// Floor: the weights' bytes at the bandwidth of the memory.
#pragma once
#include <climits>

#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "gemv/weight_stream.h"

namespace fastshard {

constexpr int kStreamWarps = 8;
constexpr int kStreamThreads = 32 * kStreamWarps;  // of a block

constexpr int kTileRows = 8;         // weight rows of a tile: the n of mma.m16n8k16
constexpr int kChunkColumns = 1024;  // 16-bit columns of a chunk
constexpr int kChunkBytes = kTileRows * kChunkColumns * 2;
constexpr int kWarpColumns = kChunkColumns / kStreamWarps;  // of a chunk
constexpr int kChunkSteps = kWarpColumns / 32;              // steps of 32 columns that a warp has of a chunk
constexpr int kSliceChunks = 4;                             // whose activations a warp holds in registers at a time
constexpr int kGroupSums = 64;                              // tiles times tokens whose sums meet in shared memory

// Tiles of a group: as many as there is room for the sums of; tokens, at most 16, are rounded up to a power of two.
__host__ __device__ constexpr int token_shift(int num_tokens) {
  return num_tokens <= 1 ? 0 : num_tokens <= 2 ? 1 : num_tokens <= 4 ? 2 : num_tokens <= 8 ? 3 : 4;
}
__host__ __device__ constexpr int group_tiles(int num_tokens) { return kGroupSums >> token_shift(num_tokens); }

// What one block does of one matrix: `tiles` tiles of 8 rows, the same chunks of each. Groups of group_tiles tiles; in
// a group, slices of kSliceChunks chunks; in a slice, tile by tile; in a tile, chunk by chunk.
struct Segment {
  int first_tile, tile_step, tiles;
  int first_chunk, chunks;
  int group_tiles;

  __device__ int tile(int index) const { return first_tile + index * tile_step; }
};

__host__ __device__ inline int num_tiles(int out_features) { return (out_features + kTileRows - 1) / kTileRows; }
__host__ __device__ inline int num_chunks(int in_features) { return (in_features + kChunkColumns - 1) / kChunkColumns; }

// Tiles index, index + count, ... of a matrix.
__device__ __forceinline__ Segment every_tile(int index, int count, int out_features, int first_chunk, int chunks,
                                               int group_tiles) {
  const int tiles = num_tiles(out_features);
  return {index, count, index < tiles ? (tiles - index + count - 1) / count : 0, first_chunk, chunks, group_tiles};
}

__device__ __forceinline__ Segment whole_rows(int out_features, int in_features, int num_tokens) {
  return every_tile(blockIdx.x, gridDim.x, out_features, 0, num_chunks(in_features), group_tiles(num_tokens));
}

// Tiles of a segment, one after another, with one slice of each: what a stream fetches without looking up.
struct alignas(16) Run {
  int64_t offset;             // of its first element in the matrix
  int stride;                 // from row to row of the matrix
  int columns, chunks;        // of a row from there on, and of the slice
  int rows, row_step, tiles;  // of the matrix from there on; from tile to tile
};

// A segment is one run, unless its rows are longer than a slice.
__device__ __forceinline__ int num_runs(const Segment& s) {
  if (s.tiles == 0 || s.chunks <= kSliceChunks) return s.tiles > 0;
  return (s.tiles + s.group_tiles - 1) / s.group_tiles * ((s.chunks + kSliceChunks - 1) / kSliceChunks);
}

// In the order of multiply(). stride: from row to row, at most kStreamMaxStride.
__device__ __forceinline__ Run run_of(const Segment& s, int out_features, int in_features, int stride, int index) {
  const int slices = (s.chunks + kSliceChunks - 1) / kSliceChunks;
  const int group = index / slices * s.group_tiles, chunk = index % slices * kSliceChunks;
  const int row = kTileRows * s.tile(group), column = (s.first_chunk + chunk) * kChunkColumns;
  Run run;
  run.offset = int64_t(row) * stride + column, run.stride = stride;
  run.columns = in_features - column, run.chunks = min(kSliceChunks, s.chunks - chunk);
  run.rows = out_features - row, run.row_step = kTileRows * s.tile_step;
  run.tiles = slices == 1 ? s.tiles : min(s.group_tiles, s.tiles - group);
  return run;
}

// Source: const T* next(Run&), the matrix of this block's next run; null where there is none.
template <typename T, int kStages, typename Source>
class WeightStream {
 public:
  // queue: kStages * kChunkBytes of shared memory.
  __device__ __forceinline__ WeightStream(void* queue, Source& source) : source_(source) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t warp_queue = ptx::shared_address(queue) + warp * kWarpBytes;
    // Odd rows swap the 64-byte halves of a line, so that the eight lanes of a phase, which take 64 bytes of two rows,
    // touch every bank once.
    to_ = warp_queue + lane / kRowLanes * kRowBytes + (lane % kRowLanes ^ lane / kRowLanes % 2 * 4) * 16;
    take_[0] = warp_queue + lane / 4 * kRowBytes + lane / 4 % 2 * 64 + lane % 4 * 16;
    take_[1] = take_[0] + (lane / 4 % 2 == 0 ? 64 : -64);
    begin_run();
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) fetch();
  }

  // Of the next chunk, for each step 16 bytes of weight row lane / 4, columns 8 (lane % 4).. of the step; zeros past
  // the columns. A call of fetch() follows.
  __device__ __forceinline__ void take(uint4 (&weights)[kChunkSteps]) const {
    ptx::cp_async_wait<kStages - 1>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kChunkSteps; ++i) weights[i] = ptx::ld_shared_16(take_[i % 2] + stage_ + i / 2 * 128);
  }

  // Start to fetch the chunk that takes the place of the one taken. What was taken must have been used.
  __device__ __forceinline__ void fetch() {
    __syncwarp();
    if (left_ >= whole_) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        ptx::cp_async_16(to_ + stage_ + i * kCopyRows * kRowBytes, from_ + i * copy_stride_);
      }
    } else if (left_ > 0) {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const bool inside = lane_column() < left_ && i * kCopyRows + lane / kRowLanes < rows_left_;
        ptx::cp_async_16_or_zero(to_ + stage_ + i * kCopyRows * kRowBytes,
                                 inside ? from_ + i * copy_stride_ : from_ - lane_column(), inside);
      }
    }
    ptx::cp_async_commit();
    stage_ = stage_ == (kStages - 1) * kChunkBytes ? 0 : stage_ + kChunkBytes;
    left_ -= kChunkColumns, from_ += kChunkColumns;
    if (--chunks_left_ == 0) {
      if (--tiles_left_ > 0) {
        from_ += skip_, rows_left_ -= row_step_;
        begin_row();
      } else {
        begin_run();
      }
    }
  }

 private:
  static constexpr int kWarpBytes = kChunkBytes / kStreamWarps, kRowBytes = kWarpBytes / kTileRows;
  static constexpr int kRowLanes = kRowBytes / 16, kCopyRows = 32 / kRowLanes;  // of one copy by all lanes
  static constexpr int kCopies = kTileRows / kCopyRows;
  static_assert(kRowLanes == 16 && kChunkSteps == 4);

  // Of a chunk, where this lane's copies begin.
  static __device__ __forceinline__ int lane_column() {
    return threadIdx.x / 32 * kWarpColumns + threadIdx.x % kRowLanes * 8;
  }

  __device__ __forceinline__ void begin_run() {
    Run run;
    left_ = 0, chunks_left_ = 0;
    const T* const weight = source_.next(run);
    if (weight == nullptr) return;
    from_ = weight + run.offset + int(threadIdx.x % 32 / kRowLanes) * run.stride + lane_column();
    rows_left_ = run.rows, row_step_ = run.row_step;
    skip_ = int64_t(run.row_step) * run.stride - run.chunks * kChunkColumns;
    copy_stride_ = kCopyRows * run.stride;
    columns_ = run.columns, chunks_ = run.chunks, tiles_left_ = run.tiles;
    begin_row();
  }

  __device__ __forceinline__ void begin_row() {
    left_ = columns_, chunks_left_ = chunks_;
    whole_ = rows_left_ >= kTileRows ? kChunkColumns : INT_MAX;
  }

  Source& source_;
  uint32_t to_, take_[2];  // where this lane copies to, and takes even and odd steps from, in stage 0
  int stage_ = 0;          // offset of the next to take, and to fetch into
  const T* from_;          // this lane's first copy of the next chunk
  int copy_stride_;
  int left_, whole_ = 1;   // columns of the row from that chunk on; how many must be left to copy without looking
  int chunks_left_, tiles_left_, rows_left_;
  int64_t skip_;           // elements from the end of a row's chunks to the row of the next tile
  int row_step_, columns_, chunks_;  // of the run
};

}  // namespace fastshard
