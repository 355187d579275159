// Launcher of decode_step: as many blocks as are resident together, one an SM.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "decode/step.cuh"

namespace fastshard {
namespace decode_detail {

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

}  // namespace decode_detail

int64_t decode_workspace_words(const DecodeStepParams& p) {
  int64_t num_words;
  decode_buffers(p, &num_words);
  return num_words;
}

template <typename T>
bool decode_step(const DecodeStepParams& p, cudaStream_t stream) {
  using namespace decode_detail;
  if (p.num_tokens == 0) return true;
  const int group = p.group();
  if (p.head_dim == 64 && group <= 7) return launch<T, DecodeConfig<64, 7>>(p, stream);
  if (p.head_dim == 64 && group <= 8) return launch<T, DecodeConfig<64, 8>>(p, stream);
  if (p.head_dim == 96 && group <= 8) return launch<T, DecodeConfig<96, 8>>(p, stream);
  if (p.head_dim == 128 && group <= 4) return launch<T, DecodeConfig<128, 4>>(p, stream);
  if (p.head_dim == 128 && group <= 8) return launch<T, DecodeConfig<128, 8>>(p, stream);
  throw std::runtime_error("decode_step: head_dim must be 64, 96 or 128 and a key-value head have at most 8 query "
                           "heads, got " + std::to_string(p.head_dim) + " and " + std::to_string(group));
}

template bool decode_step<__half>(const DecodeStepParams&, cudaStream_t);
template bool decode_step<__nv_bfloat16>(const DecodeStepParams&, cudaStream_t);

}  // namespace fastshard
