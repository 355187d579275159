// Instances for head_dim up to 64.
#include "attention/launch_attention.cuh"

namespace fastshard {

template struct AttentionOfHeadDim<__half, 64>;
template struct AttentionOfHeadDim<__nv_bfloat16, 64>;

}  // namespace fastshard
