// Launcher of the attention kernels of one head_dim: picks the configuration by the number of rows.
#pragma once
#include <algorithm>

#include "attention/attention.cuh"
#include "attention/head_dim.h"

namespace fastshard {

// The tiles of one head_dim: row warps, row tiles, key warps, keys of a warp, blocks, queries in registers.
// Few: up to 16 rows (query tokens x query heads of a group), the warps share the keys.
// Small: too few rows for the tiles of Prefill to fill half of the device, or rules that take many registers.
// Prefill: the rest.
template <int kHeadDim> struct AttentionConfigs;
template <> struct AttentionConfigs<64> {
  using Few = AttentionConfig<64, 1, 1, 4, 16, 4, true, AttentionRules::kAll>;
  template <AttentionRules kRules> using Small = AttentionConfig<64, 4, 1, 1, 64, 2, true, kRules>;
  // Beside the values of a mask, registers have no room for the queries.
  template <AttentionRules kRules>
  using Prefill = AttentionConfig<64, 4, 2, 1, 64, 2, kRules != AttentionRules::kMaskValues, kRules>;
};
template <> struct AttentionConfigs<96> {
  using Few = AttentionConfig<96, 1, 1, 4, 16, 3, true, AttentionRules::kAll>;
  template <AttentionRules kRules> using Small = AttentionConfig<96, 4, 1, 1, 64, 2, true, kRules>;
  template <AttentionRules kRules> using Prefill = AttentionConfig<96, 4, 2, 1, 32, 2, true, kRules>;
};
template <> struct AttentionConfigs<128> {
  using Few = AttentionConfig<128, 1, 1, 4, 16, 3, true, AttentionRules::kAll>;
  template <AttentionRules kRules> using Small = AttentionConfig<128, 4, 1, 1, 64, 2, true, kRules>;
  template <AttentionRules kRules> using Prefill = AttentionConfig<128, 4, 2, 1, 32, 2, false, kRules>;
};
template <> struct AttentionConfigs<256> {
  using Few = AttentionConfig<256, 1, 1, 2, 16, 4, false, AttentionRules::kAll>;
  template <AttentionRules kRules> using Small = AttentionConfig<256, 4, 1, 1, 32, 1, false, kRules>;
  template <AttentionRules kRules> using Prefill = Small<kRules>;
};

// Two blocks of these share the 100 KB of a multiprocessor of 8.6, of which each takes 1 KB for the system.
template <int kHeadDim>
constexpr bool fits_twice =
    2 * (sizeof(AttentionSharedStorage<__half, typename AttentionConfigs<kHeadDim>::template Prefill<
                                                   AttentionRules::kRanges>>) + 1024) <= 100 * 1024;
static_assert(fits_twice<64> && fits_twice<96>);

// For T and one head_dim that the kernels are compiled for.
template <typename T, int kHeadDim>
struct AttentionLauncher {
  using Configs = AttentionConfigs<kHeadDim>;

  static int num_splits(const AttentionParams& p) {
    return with_config(p, [&]<typename Config>() { return splits_of<Config>(p); });
  }

  static void run(AttentionParams p, cudaStream_t stream) {
    p.heads_at_once = heads_at_once(p);
    with_config(p, [&]<typename Config>() { launch<Config>(p, stream); });
    if (p.num_splits == 1) return;
    launch_kernel<AttentionCombineSharedStorage<kHeadDim>>(attention_combine_kernel<T, kHeadDim>,
                                                           dim3(unsigned(p.num_rows())), 32 * kCombineWarps, stream, p);
  }

 private:
  // Calls function.operator()<Config>().
  template <typename Function>
  static auto with_config(const AttentionParams& p, Function function) {
    using enum AttentionRules;
    using Prefill = typename Configs::template Prefill<kRanges>;
    const bool is_plain = p.softcap == 0.f && p.mask.type == AttentionMaskType::kNone;
    const AttentionTile tile = p.tile == AttentionTile::kAuto ? choose_tile(p, is_plain) : p.tile;
    if (tile == AttentionTile::kFew) return function.template operator()<typename Configs::Few>();
    if (is_plain && tile == AttentionTile::kPrefill) return function.template operator()<Prefill>();
    if (is_plain) return function.template operator()<typename Configs::template Small<kRanges>>();
    if (p.softcap == 0.f && tile == AttentionTile::kPrefill) {
      if (has_mask_bytes<Prefill::kWarpKeys / 4>(p.mask)) {
        return function.template operator()<typename Configs::template Prefill<kMaskBytes>>();
      }
      if (has_mask_values<T>(p.mask)) {
        return function.template operator()<typename Configs::template Prefill<kMaskValues>>();
      }
    }
    return function.template operator()<typename Configs::template Small<kAll>>();
  }

  // A heuristic: the large tiles, where they fill half of the device; and for masks, which only they have kernels for.
  static AttentionTile choose_tile(const AttentionParams& p, bool is_plain) {
    using Prefill = typename Configs::template Prefill<AttentionRules::kRanges>;
    if (p.rows_per_head() <= Configs::Few::kRows) return AttentionTile::kFew;
    const bool fills_half = num_row_blocks<Prefill>(p) * 2 > capacity<Prefill>();
    return fills_half || !is_plain ? AttentionTile::kPrefill : AttentionTile::kSmall;
  }

  // Heads whose keys and values fill half of the L2 cache: blocks of one head that run at the same time share them.
  static int heads_at_once(const AttentionParams& p) {
    // A heuristic: the figure of the first device serves for all.
    static const int64_t l2_bytes = [] {
      int device = 0, bytes = 0;
      FS_CUDA_CHECK(cudaGetDevice(&device));
      FS_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
      return bytes;
    }();
    const int64_t head_bytes = int64_t(p.max_keys) * p.head_dim * 2 * int64_t(sizeof(T));
    const int64_t num_heads = int64_t(p.batch) * p.num_kv_heads;
    return static_cast<int>(std::clamp<int64_t>(l2_bytes / 2 / std::max<int64_t>(head_bytes, 1), 1, num_heads));
  }

  template <typename Config>
  static int64_t num_row_blocks(const AttentionParams& p) {
    return int64_t(p.batch) * p.num_kv_heads * ((p.rows_per_head() + Config::kRows - 1) / Config::kRows);
  }

  // Blocks that the device holds at once. A heuristic: the figure of the first device serves for all.
  template <typename Config>
  static int capacity() {
    using Storage = AttentionSharedStorage<T, Config>;
    static const int blocks = max_resident_blocks<Storage>(attention_kernel<T, Config>, Config::kThreads);
    return blocks;
  }

  // As many blocks as the device holds at once, where the rows alone fill less than half of it. The lengths are on the
  // device: the kernel divides what is there of a row over the splits. 4 tokens of 4 x 8 heads on 132 SMs with 3 blocks
  // each: 8 row blocks, 396 / 8 = 49 splits.
  template <typename Config>
  static int splits_of(const AttentionParams& p) {
    if (p.asked_splits > 0) return p.asked_splits;
    // Fewer keys are not worth the second kernel and what it reads, which grows with the rows.
    constexpr int kMinKeys = Config::kRows > 16 ? 1024 : 256;
    const int64_t splits = std::min<int64_t>(
        {capacity<Config>() / num_row_blocks<Config>(p), p.max_keys / kMinKeys, kAttentionMaxSplits});
    return static_cast<int>(std::max<int64_t>(splits, 1));
  }

  template <typename Config>
  static void launch(const AttentionParams& p, cudaStream_t stream) {
    const int64_t num_blocks = num_row_blocks<Config>(p) * p.num_splits;
    if (num_blocks > INT32_MAX) {
      throw std::runtime_error("attention: needs " + std::to_string(num_blocks) + " blocks, the most is 2147483647");
    }
    launch_kernel<AttentionSharedStorage<T, Config>>(attention_kernel<T, Config>, dim3(unsigned(num_blocks)),
                                                     Config::kThreads, stream, p);
  }
};

template <typename T, int kHeadDim>
int AttentionOfHeadDim<T, kHeadDim>::num_splits(const AttentionParams& params) {
  return AttentionLauncher<T, kHeadDim>::num_splits(params);
}

template <typename T, int kHeadDim>
void AttentionOfHeadDim<T, kHeadDim>::run(const AttentionParams& params, cudaStream_t stream) {
  AttentionLauncher<T, kHeadDim>::run(params, stream);
}

}  // namespace fastshard
