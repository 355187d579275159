// Launcher of the gated activation kernel.
#include "activation/act_and_mul.cuh"

#include <stdexcept>
#include <string>

namespace fastshard {
namespace act_and_mul_detail {

template <typename T, typename Config>
void launch(const ActAndMulParams& p, cudaStream_t stream) {
  const int num_parts = (p.intermediate_size + Config::kOutputsPerBlock - 1) / Config::kOutputsPerBlock;
  if (num_parts > 65535) {  // grid y
    throw std::runtime_error("act_and_mul: intermediate_size must be at most " +
                             std::to_string(65535 * Config::kOutputsPerBlock) + ", got " +
                             std::to_string(p.intermediate_size));
  }
  const dim3 grid(unsigned(p.num_tokens), unsigned(num_parts));
  launch_kernel<void>(act_and_mul_kernel<T, Config>, grid, Config::kThreads, stream, p);
}

}  // namespace act_and_mul_detail

template <typename T>
void act_and_mul(const ActAndMulParams& p, cudaStream_t stream) {
  using namespace act_and_mul_detail;
  if (p.num_tokens == 0 || p.intermediate_size == 0) return;  // an empty grid is a launch error
  if (p.whole_vectors) return launch<T, ActAndMulConfig<T, Vec<T>::kSize>>(p, stream);
  launch<T, ActAndMulConfig<T, 1>>(p, stream);
}

template void act_and_mul<float>(const ActAndMulParams&, cudaStream_t);
template void act_and_mul<__half>(const ActAndMulParams&, cudaStream_t);
template void act_and_mul<__nv_bfloat16>(const ActAndMulParams&, cudaStream_t);

}  // namespace fastshard
