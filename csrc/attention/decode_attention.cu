// Launcher and instances of the decode attention kernel.
#include "attention/decode_attention.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/workspace.h"

namespace fastshard {
namespace decode_attention_detail {

// Blocks of a head, of `num_heads` over all batch rows, where `capacity` blocks run at a time: as many as fill the
// device once; with less than eight of them what a rounded-down number leaves idle counts, and several waves may be
// better. 132 blocks: 8 heads get 16, 64 get 2; 72 get 5 (360 blocks, nearly three waves of 396).
inline int num_splits(int64_t num_heads, int64_t capacity, int max_splits) {
  constexpr int kFew = 8;
  int64_t splits = capacity / num_heads;
  if (splits < kFew) {
    const auto waves = [&](int64_t n) { return (num_heads * n + capacity - 1) / capacity; };
    splits = 1;
    for (int64_t n = 2; n <= kFew; ++n) {
      if (waves(n) * splits * 100 < waves(splits) * n * 95) splits = n;
    }
  }
  return static_cast<int>(std::clamp<int64_t>(splits, 1, std::max(max_splits, 1)));
}

// threads: of a block. As many of them as can be share the splits of four columns: up to eight.
inline DecodeAttentionParams decode_attention_params(const AttentionParams& p, int threads) {
  int log_slices = 0;
  while (log_slices < 3 && p.rows_per_head() * (p.head_dim / 4) << (log_slices + 1) <= threads) ++log_slices;
  const auto strides = [](const AttentionStrides& s) {
    return DecodeStrides{uint32_t(s.batch / 8), uint32_t(s.token / 8), uint32_t(s.head / 8)};
  };
  return {nullptr, strides(p.q_strides), strides(p.k_strides), strides(p.v_strides),
          1.f / static_cast<float>(p.group), log_slices, p};
}

template <typename T, typename Config>
void launch(const AttentionParams& p, cudaStream_t stream) {
  using Storage = DecodeAttentionSharedStorage<Config>;
  const auto kernel = decode_attention_kernel<T, Config>;
  // A heuristic: the figure of the first device serves for all.
  static const int capacity = max_resident_blocks<Storage>(kernel, Config::kThreads);
  const int num_heads = p.batch * p.num_kv_heads;
  const int max_splits = p.max_keys / (kDecodeKeys * Config::kWarps) + 1;
  const int splits = p.asked_splits > 0 ? p.asked_splits : num_splits(num_heads, capacity, max_splits);
  DecodeAttentionParams params = decode_attention_params(p, Config::kThreads);
  if (splits > 1) {
    const int64_t words = SplitResults(nullptr, num_heads, p.rows_per_head(), p.head_dim).num_words(num_heads, splits);
    const int64_t bytes = words * int64_t(sizeof(uint32_t));
    params.workspace = static_cast<uint32_t*>(workspace(WorkspaceUser::kDecodeAttention, bytes, stream).data);
  }
  const dim3 grid(unsigned(splits), unsigned(p.num_kv_heads), unsigned(p.batch));
  launch_kernel<Storage>(kernel, grid, Config::kThreads, stream, params);
}

template <typename T, int kHeadDim>
void launch(const AttentionParams& p, cudaStream_t stream) {
  const bool plain = p.mask.type == AttentionMaskType::kNone && p.softcap == 0.f;
  if (!plain) return launch<T, DecodeAttentionConfig<kHeadDim, 16, false>>(p, stream);
  if (p.rows_per_head() > 8) return launch<T, DecodeAttentionConfig<kHeadDim, 16, true>>(p, stream);
  launch<T, DecodeAttentionConfig<kHeadDim, 8, true>>(p, stream);
}

}  // namespace decode_attention_detail

template <typename T>
void decode_attention(const AttentionParams& p, cudaStream_t stream) {
  using namespace decode_attention_detail;
  switch (p.head_dim) {
    case 64:  return launch<T, 64>(p, stream);
    case 96:  return launch<T, 96>(p, stream);
    case 128: return launch<T, 128>(p, stream);
  }
  throw std::runtime_error("decode_attention: head_dim must be 64, 96 or 128, got " + std::to_string(p.head_dim));
}

template void decode_attention<__half>(const AttentionParams&, cudaStream_t);
template void decode_attention<__nv_bfloat16>(const AttentionParams&, cudaStream_t);

}  // namespace fastshard
