// out = epilogue(a @ b.T), tile after tile.
//
// A block takes the tiles blockIdx.x, blockIdx.x + gridDim.x, ...; the copies of the next tile's first stages are in
// flight while the sums of this one are stored. Tiles are numbered so that those at work at a time form a patch whose
// rows of a and of b stay in L2.
#pragma once
#include "gemm/tile.cuh"

namespace fastshard {

template <typename T, typename Epilogue>
struct GemmParams {
  GemmOperand<T> a;  // [num_rows, in_features]
  GemmOperand<T> b;  // [out_features, in_features], out_features a multiple of kRun
  int in_features;   // a multiple of 8
  Epilogue epilogue;  // visit(finish): calls finish with what GemmTile::finish takes
};

// Tiles in bands of kBandTiles rows of tiles, down each column of a band.
template <typename Config>
struct TileOrder {
  static constexpr int kBandTiles = 16;
  int row_tiles, column_tiles;

  static __host__ __device__ int64_t num_tiles(int64_t rows, int64_t columns) {
    return (rows + Config::kTileRows - 1) / Config::kTileRows *
           ((columns + Config::kTileColumns - 1) / Config::kTileColumns);
  }

  __device__ TileOrder(int rows, int columns)
      : row_tiles((rows + Config::kTileRows - 1) / Config::kTileRows),
        column_tiles((columns + Config::kTileColumns - 1) / Config::kTileColumns) {}

  __device__ int size() const { return row_tiles * column_tiles; }

  // First row and column of a tile.
  __device__ int2 position(int tile) const {
    const int band = tile / (kBandTiles * column_tiles), in_band = tile % (kBandTiles * column_tiles);
    const int height = min(kBandTiles, row_tiles - band * kBandTiles);
    return make_int2((band * kBandTiles + in_band % height) * Config::kTileRows,
                     in_band / height * Config::kTileColumns);
  }
};

// This thread's copies, stage after stage, through all tiles of the block; zeros after the last one.
template <typename T, typename Config>
struct StageLoader {
  using LoaderA = OperandLoader<T, Config, Config::kTileRows, false>;
  using LoaderB = OperandLoader<T, Config, Config::kTileColumns, true>;
  static constexpr int kLoads = LoaderA::kLoads + LoaderB::kLoads;
  static constexpr int kParts = 4;

  LoaderA a;
  LoaderB b;
  int tile, left;  // values of k of the tile that are not loaded yet

  static __device__ int column() { return threadIdx.x % (Config::kDepth / 8) * 8; }

  template <typename Params>
  __device__ __forceinline__ void begin(const Params& p, const TileOrder<Config>& order, int first_tile) {
    tile = first_tile;
    const int2 at = order.position(tile);
    a.begin(p.a, at.x);
    b.begin(p.b, at.y);
    left = p.in_features;
    skip_missing();
  }

  // Columns past the last one are zeros, and not read; their address is one that exists.
  __device__ __forceinline__ void skip_missing() {
    if (column() < left) return;
    a.next -= column();
    b.next -= column();
  }

  // Part of the copies of one stage: they stand between the products, not in one run.
  __device__ __forceinline__ void load(typename GemmSharedStorage<T, Config>::Stage& stage, int part) const {
    const bool valid = column() < left;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (i * kParts / kLoads != part) continue;
      if (i < LoaderA::kLoads) a.load(stage.a, i, valid);
      else b.load(stage.b, i - LoaderA::kLoads, valid);
    }
  }

  template <typename Params>
  __device__ __forceinline__ void advance(const Params& p, const TileOrder<Config>& order) {
    ptx::cp_async_commit();
    if (left > Config::kDepth) {
      a.next += Config::kDepth;
      b.next += Config::kDepth;
      left -= Config::kDepth;
      if (left < Config::kDepth) skip_missing();
    } else if (tile + int(gridDim.x) < order.size()) {
      begin(p, order, tile + gridDim.x);
    } else {
      left = 0;
    }
  }
};

template <typename T, typename Config, typename Epilogue>
__global__ __launch_bounds__(Config::kThreads, Config::kMinBlocks) void gemm_kernel(const GemmParams<T, Epilogue> p) {
  using Tile = GemmTile<T, Config>;
  using Storage = GemmSharedStorage<T, Config>;
  using Loader = StageLoader<T, Config>;
  constexpr int kStages = Config::kStages;
  FS_SHARED_STORAGE(Storage, smem);
  const TileOrder<Config> order(p.a.num_rows, p.b.num_rows);
  Loader loader;
  loader.begin(p, order, blockIdx.x);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
#pragma unroll
    for (int part = 0; part < Loader::kParts; ++part) loader.load(smem.stages[stage], part);
    loader.advance(p, order);
  }

  Tile tile;
  typename Tile::Fragments fragments[2];
  ptx::cp_async_wait<kStages - 2>();
  __syncthreads();
  Tile::load(fragments[0], smem.stages[0], 0);
  int stage = 0, refill = kStages - 1;
  for (int at = blockIdx.x; at < order.size(); at += gridDim.x) {
    tile.clear();
    for (int k = 0; k < p.in_features; k += Config::kDepth) {
      const int next_stage = stage + 1 == kStages ? 0 : stage + 1;
#pragma unroll
      for (int step = 0; step < Tile::kSteps; ++step) {
        const bool last = step == Tile::kSteps - 1;
        if (last) {
          ptx::cp_async_wait<kStages - 2>();
          __syncthreads();  // the next stage has arrived for all; and all are done with this one
        }
        const auto& from = smem.stages[last ? next_stage : stage];
        typename Tile::Fragments& next = fragments[(step + 1) % 2];
#pragma unroll
        for (int m = 0; m < Tile::kRowTiles; ++m) {
          Tile::load_a(next, from, (step + 1) % Tile::kSteps, m);
#pragma unroll
          for (int n = 0; n < Tile::kColumnTiles / 2; ++n) {
            if (n * Tile::kRowTiles / (Tile::kColumnTiles / 2) == m) {
              Tile::load_b(next, from, (step + 1) % Tile::kSteps, n);
            }
          }
          if (step == 0) {
#pragma unroll
            for (int part = 0; part < Loader::kParts; ++part) {
              if (part * Tile::kRowTiles / Loader::kParts == m) loader.load(smem.stages[refill], part);
            }
          }
          if constexpr (Config::kFp16Sums) tile.multiply_row_fp16(fragments[step % 2], m);
          else tile.multiply_row(fragments[step % 2], m);
        }
        if (step == 0) loader.advance(p, order);
      }
      refill = stage;
      stage = next_stage;
    }
    p.epilogue.visit([&](const auto& epilogue) {
      tile.finish(epilogue, order.position(at), p.a.num_rows, p.b.num_rows);
    });
  }
}

}  // namespace fastshard
