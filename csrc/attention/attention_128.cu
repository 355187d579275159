// Instances for head_dim up to 128.
#include "attention/launch_attention.cuh"

namespace fastshard {

template struct AttentionOfHeadDim<__half, 128>;
template struct AttentionOfHeadDim<__nv_bfloat16, 128>;

}  // namespace fastshard
