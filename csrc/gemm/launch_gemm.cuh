// Launches a product with the tile that its sizes ask for.
#pragma once
#include <algorithm>
#include <type_traits>

#include "gemm/choose_tile.h"
#include "gemm/gemm.cuh"

namespace fastshard {

using GemmConfig128x256 = GemmConfig<2, 4, 64, 64, 32, 4, 1>;
using GemmConfig128x128 = GemmConfig<2, 2, 64, 64, 32, 3, 2>;
using GemmConfig64x128 = GemmConfig<2, 2, 32, 64, 32, 4, 2>;
struct GemmConfigFp16Sums : GemmConfig128x256 {
  static constexpr bool kFp16Sums = true;
};

// As many blocks as are resident together: each takes tiles in turn.
template <typename Config, typename T, typename Epilogue>
void launch_gemm_config(const GemmParams<T, Epilogue>& p, cudaStream_t stream) {
  using Storage = GemmSharedStorage<T, Config>;
  const auto kernel = gemm_kernel<T, Config, Epilogue>;
  const int64_t tiles = TileOrder<Config>::num_tiles(p.a.num_rows, p.b.num_rows);
  const int resident = max_resident_blocks<Storage>(kernel, Config::kThreads);
  launch_kernel<Storage>(kernel, dim3(unsigned(std::min<int64_t>(tiles, resident))), Config::kThreads, stream, p);
}

template <typename T, typename Epilogue>
void launch_gemm(const GemmParams<T, Epilogue>& p, GemmTileSize size, cudaStream_t stream) {
  if (p.a.num_rows == 0 || p.b.num_rows == 0) return;  // an empty grid is a launch error
  if (size == GemmTileSize::kAuto) {
    int device = 0, num_sms = 0;
    FS_CUDA_CHECK(cudaGetDevice(&device));
    FS_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
    size = choose_gemm_tile(p.a.num_rows, p.b.num_rows, num_sms);
  }
  switch (size) {
    case GemmTileSize::kAuto:    break;
    case GemmTileSize::k128x256: return launch_gemm_config<GemmConfig128x256>(p, stream);
    case GemmTileSize::k128x128: return launch_gemm_config<GemmConfig128x128>(p, stream);
    case GemmTileSize::k64x128:  return launch_gemm_config<GemmConfig64x128>(p, stream);
    case GemmTileSize::kFp16Sums128x256:
      if constexpr (std::is_same_v<T, __half>) return launch_gemm_config<GemmConfigFp16Sums>(p, stream);
  }
}

}  // namespace fastshard
