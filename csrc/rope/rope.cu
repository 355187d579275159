// Launcher of the RoPE kernel.
#include "rope/rope.cuh"

#include <stdexcept>
#include <string>

namespace fastshard {
namespace rope_detail {

template <typename T, typename Config>
void launch(const RopeParams& p, cudaStream_t stream) {
  const int64_t num_heads = p.num_qo_heads + (p.slots.data != nullptr ? 2 * int64_t(p.num_kv_heads) : 0);
  if (p.num_tokens == 0 || num_heads == 0 || p.head_dim == 0) return;  // an empty grid is a launch error
  const RopeCover<Config> cover(p.head_dim);
  constexpr int64_t kMaxGrid = 65535;  // y and z
  const int64_t heads = int64_t(cover.heads) * Config::kHeads, elements = int64_t(cover.lanes) * Config::kVecSize;
  const int64_t head_groups = (num_heads + heads - 1) / heads, head_parts = (p.head_dim + elements - 1) / elements;
  if (head_groups > kMaxGrid || head_parts > kMaxGrid) {
    throw std::runtime_error("rope: a token must have at most " + std::to_string(kMaxGrid * heads) +
                             " heads of at most " + std::to_string(kMaxGrid * elements) + " elements, got " +
                             std::to_string(num_heads) + " of " + std::to_string(p.head_dim));
  }
  const dim3 grid(unsigned(p.num_tokens), unsigned(head_groups), unsigned(head_parts));
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
