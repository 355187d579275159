// Weights on their way: a ring of chunks in shared memory that producer warps fill from global memory, ahead of the
// consumer warps and of whatever those wait for.
//
// A chunk is 8 weight rows by up to kChunkColumns columns. Producers and consumers of a block walk the same chunks in
// the same order, given by Schedule; a pair of mbarriers a stage tells when it is full and when it is free again.
// Floor: the weights' bytes at the bandwidth of the memory.
#pragma once
#include "common/launch.cuh"
#include "common/ptx.cuh"

namespace fastshard {

constexpr int kConsumerWarps = 8;
constexpr int kProducerWarps = 4;
constexpr int kConsumerThreads = 32 * kConsumerWarps;
constexpr int kStreamThreads = kConsumerThreads + 32 * kProducerWarps;  // of a block: consumers first

constexpr int kTileRows = 8;          // weight rows of a tile: the n of mma.m16n8k16
constexpr int kChunkColumns = 1024;   // 16-bit columns of a chunk
constexpr int kChunkUnits = kChunkColumns / 8;                       // 16-byte units in a chunk's row
constexpr int kStepsPerChunk = kChunkColumns / 32 / kConsumerWarps;  // steps of 32 columns that a warp has in a chunk
constexpr int kSliceChunks = 2;       // chunks whose activations a consumer holds in registers at a time
constexpr int kGroupTiles = 8;        // tiles whose sums meet in shared memory together

// What one block does of one matrix: `tiles` tiles of 8 rows, the same chunks of each. Groups of kGroupTiles tiles; in
// a group, slices of kSliceChunks chunks; in a slice, tile by tile; in a tile, chunk by chunk.
struct Segment {
  int first_tile, tile_step, tiles;
  int first_chunk, chunks;

  __device__ int tile(int index) const { return first_tile + index * tile_step; }
};

__host__ __device__ inline int num_tiles(int out_features) { return (out_features + kTileRows - 1) / kTileRows; }
__host__ __device__ inline int num_chunks(int in_features) { return (in_features + kChunkColumns - 1) / kChunkColumns; }

// Whole rows: tiles blockIdx.x, blockIdx.x + gridDim.x, ...
__device__ __forceinline__ Segment whole_rows(int out_features, int in_features) {
  const int all = num_tiles(out_features), first = blockIdx.x, step = gridDim.x;
  return {first, step, first < all ? (all - first + step - 1) / step : 0, 0, num_chunks(in_features)};
}

// Rows cut into parts of one slice, so that a block needs few of the activations: the tiles of part 0, then those of
// part 1, and so on, dealt out to the blocks in ranges. The part's segment may be empty.
struct RowParts {
  int tiles, chunks, parts, begin, end;

  __device__ RowParts(int out_features, int in_features)
      : tiles(num_tiles(out_features)),
        chunks(num_chunks(in_features)),
        parts((chunks + kSliceChunks - 1) / kSliceChunks),
        begin(unsigned(tiles * parts) * blockIdx.x / gridDim.x),
        end(unsigned(tiles * parts) * (blockIdx.x + 1) / gridDim.x) {}

  __device__ int first_part() const { return begin / tiles; }
  __device__ int end_part() const { return (end + tiles - 1) / tiles; }
  __device__ Segment segment(int part) const {
    const int first = max(begin - part * tiles, 0), last = min(end - part * tiles, tiles);
    const int chunk = part * kSliceChunks;
    return {first, 1, last - first, chunk, min(kSliceChunks, chunks - chunk)};
  }
};

constexpr int kMinRingStages = 3, kMaxRingStages = 6;
constexpr int kChunkBytes = kTileRows * kChunkUnits * 16;

// Of a block's SharedStorage, its last member: the chunks lie behind the storage, as many as there is room for.
struct alignas(16) RingBarriers {
  uint64_t full[kMaxRingStages], free[kMaxRingStages];
};

struct WeightRing {
  RingBarriers& barriers;
  uint32_t chunks;  // shared address of [stages][kTileRows][kChunkUnits] units, swizzled by chunk_unit
  int stages;

  template <typename SharedStorage>
  __device__ WeightRing(SharedStorage& storage, int stages)
      : barriers(storage.barriers), chunks(ptx::shared_address(&storage + 1)), stages(stages) {}
  __device__ uint32_t chunk(int stage) const { return chunks + stage * kChunkBytes; }
};

// A stage, and the parity of its current round.
struct RingPosition {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance(const WeightRing& ring) {
    if (++stage == ring.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Odd rows swap the 64-byte halves of a line, so that the eight lanes of a phase, two rows by 64 bytes, touch every
// bank once.
__device__ __forceinline__ int chunk_unit(int row, int unit) { return unit ^ (row % 2 * 4); }

__device__ __forceinline__ void wait_for_phase(const uint64_t& barrier, int parity) {
  const uint32_t address = ptx::shared_address(&barrier);
  while (!ptx::mbarrier_test_wait(address, parity)) {
  }
}

// By all threads of the block, before producers and consumers part.
__device__ __forceinline__ void init_ring(const WeightRing& ring) {
  if (threadIdx.x < ring.stages) {
    ptx::mbarrier_init(ptx::shared_address(&ring.barriers.full[threadIdx.x]), 32 * kProducerWarps);
    ptx::mbarrier_init(ptx::shared_address(&ring.barriers.free[threadIdx.x]), kConsumerWarps);
  }
  __syncthreads();
}

// One chunk into the next stage, by the producer warps: each has kTileRows / kProducerWarps of its rows. `weight` is
// the chunk's first element; `columns`, a multiple of 8, and `rows` are what is left of the matrix. A step of 32 columns that the
// matrix ends within is filled up with zeros; what lies further is left alone, and never read.
template <typename T>
__device__ __forceinline__ void fill_stage(const WeightRing& ring, RingPosition& position, const T* weight,
                                           int64_t stride, int columns, int rows) {
  constexpr int kRows = kTileRows / kProducerWarps;
  columns = min(columns, kChunkColumns);
  const int lane = threadIdx.x % 32, first = (threadIdx.x / 32 - kConsumerWarps) * kRows;
  const T* source = weight + first * stride + 8 * lane;
  wait_for_phase(ring.barriers.free[position.stage], position.parity ^ 1);
  const auto target = [&](int i, int j) {
    return ring.chunk(position.stage) + 16 * ((first + i) * kChunkUnits + chunk_unit(first + i, 32 * j + lane));
  };
  if (columns >= kChunkColumns && rows >= kTileRows) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kChunkUnits / 32; ++j) ptx::cp_async_16(target(i, j), source + i * stride + 256 * j);
    }
  } else {
    for (int i = 0; i < min(kRows, rows - first); ++i) {
      for (int j = 0; 256 * j < columns; ++j) {
        const int column = 256 * j + 8 * lane;
        if (column < (columns + 31) / 32 * 32) {
          ptx::cp_async_16_or_zero(target(i, j), column < columns ? source + i * stride + 256 * j : weight,
                                   column < columns);
        }
      }
    }
  }
  ptx::cp_async_mbarrier_arrive_noinc(ptx::shared_address(&ring.barriers.full[position.stage]));
  position.advance(ring);
}

// Keep no more than two chunks of this thread in flight: what consumers load from L2 waits behind what is in flight,
// and two chunks a block are enough for the memory.
__device__ __forceinline__ void pace() {
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
}

// A segment of a matrix [out_features, in_features], rows `stride` elements apart, by the producer warps.
template <typename T>
__device__ __forceinline__ void fill_ring(const WeightRing& ring, RingPosition& position,
                                          const Segment& segment, const T* weight, int64_t stride, int out_features,
                                          int in_features) {
  const int last_chunk = segment.first_chunk + segment.chunks;
  for (int group = 0; group < segment.tiles; group += kGroupTiles) {
    const int end = min(segment.tiles, group + kGroupTiles);
    for (int slice = segment.first_chunk; slice < last_chunk; slice += kSliceChunks) {
      for (int tile = group; tile < end; ++tile) {
        const int row = kTileRows * segment.tile(tile);
        for (int chunk = slice; chunk < min(last_chunk, slice + kSliceChunks); ++chunk) {
          const int column = chunk * kChunkColumns;
          fill_stage(ring, position, weight + row * stride + column, stride, in_features - column, out_features - row);
          pace();
        }
      }
    }
  }
}

}  // namespace fastshard
