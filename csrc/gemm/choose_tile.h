// What matrix products by tiles take, the menu of tiles, and which of them is taken.
#pragma once
#include <cstdint>
#include <iterator>
#include <string_view>

namespace fastshard {

constexpr int64_t kGemmMaxStride = int64_t(1) << 26;  // of rows: 256 of them are counted in 32 bits, in chunks of 8

// A tile that is compiled; the numbers are those of GemmConfig (gemm/tile.cuh).
struct GemmMenuEntry {
  const char* name;
  int row_warps, column_warps, warp_rows, warp_columns, depth, stages, min_blocks;
  int speed;  // of a multiprocessor full of them, in percent of the largest: an estimate; 0: taken only where asked for

  constexpr int rows() const { return row_warps * warp_rows; }
  constexpr int columns() const { return column_warps * warp_columns; }
};

// `fastshard tune --patch` adds lines to the end.
constexpr GemmMenuEntry kGemmMenu[] = {
    {"128x256", 2, 4, 64, 64, 32, 4, 1, 100},
    {"128x128", 2, 2, 64, 64, 32, 3, 2, 85},
    {"64x128", 2, 2, 32, 64, 32, 4, 2, 70},
};

// An index of kGemmMenu, or one of these. kFp16Sums: tiles of the first entry, float16 only, never chosen by kAuto.
enum class GemmTileSize : int { kAuto = -2, kFp16Sums = -1 };

// kAuto for a name that is not in the menu.
constexpr GemmTileSize gemm_tile_named(std::string_view name) {
  for (int i = 0; i < int(std::size(kGemmMenu)); ++i) {
    if (name == kGemmMenu[i].name) return GemmTileSize(i);
  }
  return GemmTileSize::kAuto;
}

// Of [num_rows, out_features]: the size with which the busiest multiprocessor ends first, on paper.
constexpr GemmTileSize choose_gemm_tile(int64_t num_rows, int64_t out_features, int num_sms) {
  GemmTileSize best = GemmTileSize::kAuto;
  double best_time = 0;
  for (int i = 0; i < int(std::size(kGemmMenu)); ++i) {
    const GemmMenuEntry& entry = kGemmMenu[i];
    if (entry.speed == 0) continue;
    const int64_t rows = entry.rows(), columns = entry.columns();
    const int64_t tiles = (num_rows + rows - 1) / rows * ((out_features + columns - 1) / columns);
    const int64_t tiles_per_sm = (tiles + num_sms - 1) / num_sms;
    const double time = double(tiles_per_sm) * double(rows * columns) / entry.speed;
    if (best_time == 0 || time < best_time) {
      best_time = time;
      best = GemmTileSize(i);
    }
  }
  return best;
}

// Llama-3-8B's gate and up on the 72 multiprocessors of an A10: 1792 tiles of 128 x 256 are up to 25 each; 64 rows fill
// only half of such a tile.
static_assert(choose_gemm_tile(2048, 28672, 72) == gemm_tile_named("128x256"));
static_assert(choose_gemm_tile(64, 28672, 72) == gemm_tile_named("64x128"));

}  // namespace fastshard
