// decode_step of a rank that has its layers to itself, and the choice.
#include "decode/launch_step.cuh"

namespace fastshard {

int64_t decode_workspace_words(const DecodeStepParams& p) {
  int64_t num_words;
  decode_buffers(p, &num_words);
  return num_words;
}

template <typename T>
bool decode_step(const DecodeStepParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return true;
  if (p.num_ranks > 1) return decode_step_of_ranks<T>(p, stream);
  return decode_detail::launch_by_head<T, false>(p, stream);
}

template bool decode_step<__half>(const DecodeStepParams&, cudaStream_t);
template bool decode_step<__nv_bfloat16>(const DecodeStepParams&, cudaStream_t);

}  // namespace fastshard
