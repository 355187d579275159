// One tile of a matrix product, out[row, n] = sum_k a[row, k] * b[n, k], by mma.sync from stages in shared memory.
//
// A block owns kTileRows x kTileColumns sums, a warp kWarpRows x kWarpColumns of them, in registers. Stages of kDepth
// values of k of both operands arrive by cp.async; the fragments of the next 16 values of k are read while the tensor
// cores work on these. The rows of b lie permuted, so that a thread's sums of a row are runs of kRun neighbours.
// Floor: a warp reads (kWarpRows + kWarpColumns) * 32 bytes of shared memory for kWarpRows * kWarpColumns * 32 FLOPs.
#pragma once
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace fastshard {

template <int kRowWarps_, int kColumnWarps_, int kWarpRows_, int kWarpColumns_, int kDepth_, int kStages_,
          int kMinBlocks_>
struct GemmConfig {
  static constexpr int kRowWarps = kRowWarps_;
  static constexpr int kColumnWarps = kColumnWarps_;
  static constexpr int kWarpRows = kWarpRows_;
  static constexpr int kWarpColumns = kWarpColumns_;
  static constexpr int kDepth = kDepth_;          // values of k in a stage
  static constexpr int kStages = kStages_;
  static constexpr int kMinBlocks = kMinBlocks_;  // that a multiprocessor holds
  static constexpr int kThreads = 32 * kRowWarps * kColumnWarps;
  static constexpr int kTileRows = kRowWarps * kWarpRows;
  static constexpr int kTileColumns = kColumnWarps * kWarpColumns;
  static constexpr bool kFp16Sums = false;        // 16 products are added in float16, such sums in float32
  static_assert(kWarpRows % 16 == 0 && kWarpColumns % 32 == 0 && kDepth % 32 == 0 && kStages >= 2);
};

template <typename T, typename Config>
struct GemmSharedStorage {
  struct Stage {
    T a[Config::kTileRows * Config::kDepth];
    T b[Config::kTileColumns * Config::kDepth];
  };
  Stage stages[Config::kStages];
};

constexpr int kRun = 8;  // neighbouring columns of one thread

// Offset in elements of a chunk of 16 bytes of a row of a stage: any eight rows from a multiple of eight on have the
// same chunk in different banks.
template <int kDepth>
__device__ __forceinline__ int stage_offset(int row, int chunk) {
  return row * kDepth + (chunk ^ (kDepth == 32 ? row / 2 % 4 : row % 8)) * 8;
}

// Where row n of a tile of b lies: in each 32 rows, thread t of four finds rows 8 * t, ..., 8 * t + 7 as its columns
// (2 * t, 2 * t + 1) of four mma in turn.
__device__ __forceinline__ int stage_row(int n) { return n / 32 * 32 + n / 2 % 4 * 8 + n / 8 % 4 * 2 + n % 2; }

// What a tile reads.
template <typename T>
struct GemmOperand {
  const T* rows;   // [num_rows, in_features], 16-byte aligned rows
  int64_t stride;  // between rows, in elements, a multiple of 8
  int num_rows;
};

// One thread's share of the copies of an operand's tile into stages, k after k.
template <typename T, typename Config, int kRows, bool kPermuted>
struct OperandLoader {
  static constexpr int kChunks = Config::kDepth / 8;
  static constexpr int kStep = Config::kThreads / kChunks;
  static constexpr int kLoads = kRows / kStep;
  static_assert(kRows % kStep == 0 && kStep % (kPermuted ? 32 : 8) == 0);

  const T* next;             // of this thread's chunk, in the tile's first row
  unsigned offsets[kLoads];  // of its rows, in chunks
  int to;                    // of its first row in a stage

  __device__ OperandLoader() {
    const int row = threadIdx.x / kChunks;
    // opaque: to be kept, not computed again for each stage
    to = ptx::mov_opaque(stage_offset<Config::kDepth>(kPermuted ? stage_row(row) : row, threadIdx.x % kChunks));
  }

  // Rows past the last one repeat it: what comes of them is not stored.
  __device__ __forceinline__ void begin(const GemmOperand<T>& from, int first_row) {
    next = from.rows + first_row * from.stride + threadIdx.x % kChunks * 8;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = threadIdx.x / kChunks + i * kStep;
      offsets[i] = unsigned(min(row, from.num_rows - 1 - first_row)) * unsigned(from.stride / 8);
    }
  }

  __device__ __forceinline__ void load(T* stage, int i, bool valid) const {
    const T* from = next + offsets[i] * size_t(8);
    ptx::cp_async_16_or_zero(ptx::shared_address(stage + to + i * kStep * Config::kDepth), from, valid);
  }
};

template <typename T, typename Config>
struct GemmTile {
  using Stage = typename GemmSharedStorage<T, Config>::Stage;
  static constexpr int kSteps = Config::kDepth / 16;
  static constexpr int kRowTiles = Config::kWarpRows / 16;
  static constexpr int kColumnTiles = Config::kWarpColumns / 8;

  struct Fragments {
    uint32_t a[kRowTiles][4];
    uint32_t b[kColumnTiles / 2][4];
  };

  float sums[kRowTiles][kColumnTiles][4];

  static __device__ int warp_row() { return threadIdx.x / 32 / Config::kColumnWarps * Config::kWarpRows; }
  static __device__ int warp_column() { return threadIdx.x / 32 % Config::kColumnWarps * Config::kWarpColumns; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] = 0.f;
      }
    }
  }

  static __device__ __forceinline__ void load_a(Fragments& to, const Stage& stage, int step, int m) {
    const int lane = threadIdx.x % 32;
    const int offset = stage_offset<Config::kDepth>(warp_row() + lane % 16, step * 2 + lane / 16);
    ptx::ldmatrix_x4(to.a[m], ptx::shared_address(stage.a + offset + m * 16 * Config::kDepth));
  }

  // Columns 0-7 low and high half of the step, then columns 8-15.
  static __device__ __forceinline__ void load_b(Fragments& to, const Stage& stage, int step, int n) {
    const int lane = threadIdx.x % 32;
    const int offset = stage_offset<Config::kDepth>(warp_column() + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2);
    ptx::ldmatrix_x4(to.b[n], ptx::shared_address(stage.b + offset + n * 16 * Config::kDepth));
  }

  static __device__ __forceinline__ void load(Fragments& to, const Stage& stage, int step) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) load_a(to, stage, step, m);
#pragma unroll
    for (int n = 0; n < kColumnTiles / 2; ++n) load_b(to, stage, step, n);
  }

  __device__ __forceinline__ void multiply_row(const Fragments& f, int m) {
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) {
      const int n = m % 2 ? kColumnTiles - 1 - i : i;
      ptx::mma_m16n8k16<T>(sums[m][n], f.a[m], f.b[n / 2][n % 2 * 2], f.b[n / 2][n % 2 * 2 + 1]);
    }
  }

  // The same by tensor cores that add in float16, for cards on which that is twice as fast.
  __device__ __forceinline__ void multiply_row_fp16(const Fragments& f, int m) {
    uint32_t parts[kColumnTiles][2];
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) {
      const int n = m % 2 ? kColumnTiles - 1 - i : i;
      ptx::mma_m16n8k16_fp16(parts[n], f.a[m], f.b[n / 2][n % 2 * 2], f.b[n / 2][n % 2 * 2 + 1], 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) {
      const int n = m % 2 ? kColumnTiles - 1 - i : i;
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float2 pair = unpack_pair<T>(parts[n][e / 2]);
        sums[m][n][e] += pair.x;
        sums[m][n][e + 1] += pair.y;
      }
    }
  }

  // Hands each run of kRun columns of the tile that this thread holds to the epilogue: what epilogue.load(row, column)
  // returned of it goes to epilogue.store(row, column, sums, loaded). The runs of a row are loaded before the first is
  // stored.
  template <typename Epilogue>
  __device__ __forceinline__ void finish(const Epilogue& epilogue, int2 origin, int num_rows, int num_columns) const {
    constexpr int kRuns = kColumnTiles / 4;
    const int lane = threadIdx.x % 32;
    const int first_column = origin.y + warp_column() + lane % 4 * kRun;
#pragma unroll
    for (int i = 0; i < kRowTiles * 2; ++i) {
      const int row = origin.x + warp_row() + i * 8 + lane / 4;
      if (row >= num_rows) continue;
      decltype(epilogue.load(0, 0)) loaded[kRuns];
#pragma unroll
      for (int j = 0; j < kRuns; ++j) {
        if (first_column + j * 32 < num_columns) loaded[j] = epilogue.load(row, first_column + j * 32);
      }
#pragma unroll
      for (int j = 0; j < kRuns; ++j) {
        float run[kRun];
#pragma unroll
        for (int e = 0; e < kRun; ++e) run[e] = sums[i / 2][j * 4 + e / 2][i % 2 * 2 + e % 2];
        if (first_column + j * 32 < num_columns) epilogue.store(row, first_column + j * 32, run, loaded[j]);
      }
    }
  }
};

}  // namespace fastshard
