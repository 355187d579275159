// Launcher of the RoPE kernel.
#include "rope/rope.cuh"

#include <stdexcept>
#include <string>

namespace fastshard {
namespace rope_detail {

template <typename T, typename Config>
void launch(const RopeParams& p, cudaStream_t stream) {
  const int64_t num_heads = p.num_qo_heads + (p.slots.data != nullptr ? 2 * int64_t(p.num_kv_heads) : 0);
  const int64_t num_parts = (num_heads * (p.head_dim / Config::kVecSize) + Config::kThreads - 1) / Config::kThreads;
  if (p.num_tokens == 0 || num_parts == 0) return;  // an empty grid is a launch error
  if (num_parts > 65535) {                          // grid y
    constexpr int64_t kMaxElements = int64_t(65535) * Config::kThreads * Config::kVecSize;
    throw std::runtime_error("rope: the heads of a token must have at most " + std::to_string(kMaxElements) +
                             " elements, got " + std::to_string(num_heads * p.head_dim));
  }
  const dim3 grid(unsigned(p.num_tokens), unsigned(num_parts));
  launch_kernel<void>(rope_kernel<T, Config>, grid, Config::kThreads, stream, p);
}

}  // namespace rope_detail

template <typename T>
void rope(const RopeParams& p, cudaStream_t stream) {
  using namespace rope_detail;
  if (p.whole_vectors) return launch<T, RopeConfig<T, Vec<T>::kSize>>(p, stream);
  launch<T, RopeConfig<T, 1>>(p, stream);
}

template void rope<float>(const RopeParams&, cudaStream_t);
template void rope<__half>(const RopeParams&, cudaStream_t);
template void rope<__nv_bfloat16>(const RopeParams&, cudaStream_t);

}  // namespace fastshard
