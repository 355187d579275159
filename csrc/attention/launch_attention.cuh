// Launcher of the attention kernels of one head_dim: picks the configuration by the number of rows.
#pragma once
#include <algorithm>

#include "attention/attention.cuh"

namespace fastshard {

// Decode: up to 16 rows (query tokens x query heads of a group), the warps share the keys. Prefill: any number of rows.
template <int kHeadDim> struct AttentionConfigs;
template <> struct AttentionConfigs<64> {
  using Decode = AttentionConfig<64, 1, 4, 16, 2, 4>;
  using Prefill = AttentionConfig<64, 4, 1, 64, 2, 3>;
};
template <> struct AttentionConfigs<96> {
  using Decode = AttentionConfig<96, 1, 4, 16, 2, 3>;
  using Prefill = AttentionConfig<96, 4, 1, 32, 2, 3>;
};
template <> struct AttentionConfigs<128> {
  using Decode = AttentionConfig<128, 1, 4, 16, 2, 3>;
  using Prefill = AttentionConfig<128, 4, 1, 32, 2, 2>;
};
template <> struct AttentionConfigs<256> {
  using Decode = AttentionConfig<256, 1, 2, 16, 2, 4>;
  using Prefill = AttentionConfig<256, 4, 1, 32, 2, 1>;
};

constexpr int kMinKeysPerSplit = 256;  // less is not worth the second kernel

// For T and one head_dim that the kernels are compiled for.
template <typename T, int kHeadDim>
struct AttentionLauncher {
  static int num_splits(const AttentionParams& p) {
    return is_decode(p) ? splits_of<typename AttentionConfigs<kHeadDim>::Decode>(p)
                        : splits_of<typename AttentionConfigs<kHeadDim>::Prefill>(p);
  }

  static void run(const AttentionParams& p, cudaStream_t stream) {
    if (is_decode(p)) {
      launch<typename AttentionConfigs<kHeadDim>::Decode>(p, stream);
    } else {
      launch<typename AttentionConfigs<kHeadDim>::Prefill>(p, stream);
    }
    if (p.num_splits == 1) return;
    launch_kernel<AttentionCombineSharedStorage<kHeadDim>>(attention_combine_kernel<T, kHeadDim>,
                                                           dim3(unsigned(p.num_rows())), 32 * kCombineWarps, stream, p);
  }

 private:
  static bool is_decode(const AttentionParams& p) {
    return p.rows_per_head() <= AttentionConfigs<kHeadDim>::Decode::kRows;
  }

  template <typename Config>
  static int64_t num_row_blocks(const AttentionParams& p) {
    return int64_t(p.batch) * p.num_kv_heads * ((p.rows_per_head() + Config::kRows - 1) / Config::kRows);
  }

  // As many blocks as the device holds at once, where the rows alone fill less than half of it. The lengths are on the
  // device: the kernel divides what is there of a row over the splits. Llama-3.1-8B decode, batch 1, on 132 SMs with 3
  // blocks each: 8 row blocks, 396 / 8 = 49 splits.
  template <typename Config>
  static int splits_of(const AttentionParams& p) {
    using Storage = AttentionSharedStorage<T, Config>;
    // A heuristic: the figure of the first device serves for all.
    static const int capacity = max_resident_blocks<Storage>(attention_kernel<T, Config>, Config::kThreads);
    const int64_t splits = std::min<int64_t>(
        {capacity / num_row_blocks<Config>(p), p.max_keys / kMinKeysPerSplit, kAttentionMaxSplits});
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

}  // namespace fastshard
