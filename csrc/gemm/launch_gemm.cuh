// Launches a product with the tile that its sizes ask for.
#pragma once
#include <algorithm>
#include <iterator>
#include <type_traits>
#include <utility>

#include "gemm/choose_tile.h"
#include "gemm/gemm.cuh"

namespace fastshard {

template <size_t kIndex>
using GemmConfigOfMenu =
    GemmConfig<kGemmMenu[kIndex].row_warps, kGemmMenu[kIndex].column_warps, kGemmMenu[kIndex].warp_rows,
               kGemmMenu[kIndex].warp_columns, kGemmMenu[kIndex].depth, kGemmMenu[kIndex].stages,
               kGemmMenu[kIndex].min_blocks>;

struct GemmConfigFp16Sums : GemmConfigOfMenu<0> {
  static constexpr bool kFp16Sums = true;
};

// As many blocks as are resident together: each takes tiles in turn.
template <typename Config, typename T, typename Epilogue>
void launch_gemm_config(const GemmParams<T, Epilogue>& p, cudaStream_t stream) {
  if (p.a.num_rows == 0 || p.b.num_rows == 0) return;  // an empty grid is a launch error
  using Storage = GemmSharedStorage<T, Config>;
  const auto kernel = gemm_kernel<T, Config, Epilogue>;
  const int64_t tiles = TileOrder<Config>::num_tiles(p.a.num_rows, p.b.num_rows);
  const int resident = max_resident_blocks<Storage>(kernel, Config::kThreads);
  launch_kernel<Storage>(kernel, dim3(unsigned(std::min<int64_t>(tiles, resident))), Config::kThreads, stream, p);
}

template <typename T, typename Epilogue>
void launch_gemm(const GemmParams<T, Epilogue>& p, GemmTileSize size, cudaStream_t stream) {
  if (size == GemmTileSize::kAuto) {
    int device = 0, num_sms = 0;
    FS_CUDA_CHECK(cudaGetDevice(&device));
    FS_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
    size = choose_gemm_tile(p.a.num_rows, p.b.num_rows, num_sms);
  }
  if (size == GemmTileSize::kFp16Sums) {
    if constexpr (std::is_same_v<T, __half>) launch_gemm_config<GemmConfigFp16Sums>(p, stream);
    return;
  }
  [&]<size_t... kIndices>(std::index_sequence<kIndices...>) {
    const auto is_launched = [&]<size_t kIndex>(std::integral_constant<size_t, kIndex>) {
      if (size != GemmTileSize(kIndex)) return false;
      launch_gemm_config<GemmConfigOfMenu<kIndex>>(p, stream);
      return true;
    };
    (is_launched(std::integral_constant<size_t, kIndices>{}) || ...);
  }(std::make_index_sequence<std::size(kGemmMenu)>{});
}

}  // namespace fastshard
