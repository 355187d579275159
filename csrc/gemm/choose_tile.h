// What matrix products by tiles take, and which tile.
#pragma once
#include <cstdint>

namespace fastshard {

constexpr int64_t kGemmMaxStride = int64_t(1) << 26;  // of rows: 256 of them are counted in 32 bits, in chunks of 8

// kFp16Sums128x256: float16 only, and never chosen by kAuto.
enum class GemmTileSize { kAuto, k128x256, k128x128, k64x128, kFp16Sums128x256 };

struct GemmTileCost {
  GemmTileSize size;
  int rows, columns;
  int speed;  // of a multiprocessor full of them, in percent of the largest: an estimate, not measured
};
constexpr GemmTileCost kGemmTileCosts[] = {
    {GemmTileSize::k128x256, 128, 256, 100},
    {GemmTileSize::k128x128, 128, 128, 85},
    {GemmTileSize::k64x128, 64, 128, 70},
};

// Of [num_rows, out_features]: the size with which the busiest multiprocessor ends first, on paper.
constexpr GemmTileSize choose_gemm_tile(int64_t num_rows, int64_t out_features, int num_sms) {
  GemmTileSize best{};
  double best_time = 0;
  for (const GemmTileCost& cost : kGemmTileCosts) {
    const int64_t tiles = (num_rows + cost.rows - 1) / cost.rows * ((out_features + cost.columns - 1) / cost.columns);
    const int64_t tiles_per_sm = (tiles + num_sms - 1) / num_sms;
    const double time = double(tiles_per_sm) * cost.rows * cost.columns / cost.speed;
    if (best_time == 0 || time < best_time) {
      best_time = time;
      best = cost.size;
    }
  }
  return best;
}

// Llama-3-8B's gate and up on the 72 multiprocessors of an A10: 1792 tiles of 128 x 256 are up to 25 each; 64 rows fill
// only half of such a tile.
static_assert(choose_gemm_tile(2048, 28672, 72) == GemmTileSize::k128x256);
static_assert(choose_gemm_tile(64, 28672, 72) == GemmTileSize::k64x128);

}  // namespace fastshard
