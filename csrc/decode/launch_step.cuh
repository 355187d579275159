// Launcher of the decode step kernel: as many blocks as are resident together, one an SM.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "decode/step.cuh"

namespace fastshard::decode_detail {

template <typename T, typename Config>
bool launch(const DecodeStepParams& p, cudaStream_t stream) {
  using Storage = DecodeStorage<T, Config>;
  constexpr int kStages = decode_stages<Storage>(), kQueueBytes = kStages * kChunkBytes;
  static_assert(kStages >= 3);
  const auto kernel = decode_step_kernel<T, Config>;
  if (!supports_cooperative_launch()) return false;
  DecodeStepParams params = p;
  const int resident = max_resident_blocks<Storage>(kernel, kStreamThreads, kQueueBytes);
  if (resident < 1) return false;
  int64_t num_words;
  params.buffers = decode_buffers(p, &num_words);
  return launch_cooperative_kernel<Storage>(kernel, dim3(resident), kStreamThreads, kQueueBytes, stream, params);
}

template <typename T, bool kIsShared>
bool launch_by_head(const DecodeStepParams& p, cudaStream_t stream) {
  const int group = p.group();
  if (p.head_dim == 64 && group <= 7) return launch<T, DecodeConfig<64, 7, kIsShared>>(p, stream);
  if (p.head_dim == 64 && group <= 8) return launch<T, DecodeConfig<64, 8, kIsShared>>(p, stream);
  if (p.head_dim == 96 && group <= 8) return launch<T, DecodeConfig<96, 8, kIsShared>>(p, stream);
  if (p.head_dim == 128 && group <= 4) return launch<T, DecodeConfig<128, 4, kIsShared>>(p, stream);
  if (p.head_dim == 128 && group <= 8) return launch<T, DecodeConfig<128, 8, kIsShared>>(p, stream);
  throw std::runtime_error("decode_step: head_dim must be 64, 96 or 128 and a key-value head have at most 8 query "
                           "heads, got " + std::to_string(p.head_dim) + " and " + std::to_string(group));
}

}  // namespace fastshard::decode_detail
