// Dispatch on head_dim: the smallest head_dim that the kernels are compiled for and that holds it.
#include <stdexcept>
#include <string>

#include "attention/head_dim.h"

namespace fastshard {

namespace attention_detail {

// Calls function.operator()<kHeadDim>().
template <typename Function>
auto with_head_dim(int head_dim, Function function) {
  if (head_dim <= 64) return function.template operator()<64>();
  if (head_dim <= 96) return function.template operator()<96>();
  if (head_dim <= 128) return function.template operator()<128>();
  if (head_dim <= kAttentionMaxHeadDim) return function.template operator()<256>();
  throw std::runtime_error("attention: head_dim must be at most " + std::to_string(kAttentionMaxHeadDim) + ", got " +
                           std::to_string(head_dim));
}

}  // namespace attention_detail

template <typename T>
int attention_num_splits(const AttentionParams& p) {
  if (p.num_rows() == 0) return 1;
  return attention_detail::with_head_dim(
      p.head_dim, [&]<int kHeadDim>() { return AttentionOfHeadDim<T, kHeadDim>::num_splits(p); });
}

template <typename T>
void attention(const AttentionParams& p, cudaStream_t stream) {
  if (p.num_rows() == 0) return;  // an empty grid is a launch error
  attention_detail::with_head_dim(p.head_dim,
                                  [&]<int kHeadDim>() { AttentionOfHeadDim<T, kHeadDim>::run(p, stream); });
}

template int attention_num_splits<__half>(const AttentionParams&);
template int attention_num_splits<__nv_bfloat16>(const AttentionParams&);
template void attention<__half>(const AttentionParams&, cudaStream_t);
template void attention<__nv_bfloat16>(const AttentionParams&, cudaStream_t);

}  // namespace fastshard
