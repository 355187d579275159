// decode_step of a rank that shares its layers with others.
#include "decode/launch_step.cuh"

namespace fastshard {

int64_t decode_rank_sum_words(int num_ranks, int hidden_size) {
  return kRankSumHeader + int64_t(2) * num_ranks * kDecodeMaxTokens * hidden_size;
}

template <typename T>
bool decode_step_of_ranks(const DecodeStepParams& p, cudaStream_t stream) {
  return decode_detail::launch_by_head<T, true>(p, stream);
}

template bool decode_step_of_ranks<__half>(const DecodeStepParams&, cudaStream_t);
template bool decode_step_of_ranks<__nv_bfloat16>(const DecodeStepParams&, cudaStream_t);

}  // namespace fastshard
